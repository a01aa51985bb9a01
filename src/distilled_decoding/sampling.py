"""Samplers: student steps, teacher blocks in between, or the teacher alone, all behind one function (Eq. 9).

Axis letters: B batch, L tokens in a sequence, C code channels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Condition
from distilled_decoding.flow import FlowSettings, flow_map
from distilled_decoding.noise import gaussian_noise, uniform
from distilled_decoding.student import STUDENT_STREAM, Student, final_sequence, flow_sequence
from distilled_decoding.teacher import (
    Prefix,
    Teacher,
    TeacherSampling,
    by_chance,
    by_flow,
    log_probabilities,
    rollout,
)


@dataclass(frozen=True)
class Step:
    """What a callback hears after each forward pass of the student and each span of the teacher.

    Attributes:
        name: `student` or `teacher`.
        block: the first block that was predicted.
        code_BLC: the sequence so far, noise behind what is predicted.
    """

    name: str
    block: int
    code_BLC: Tensor


Callback = Callable[[Step], None]


@dataclass(frozen=True)
class Plan:
    """Which model predicts which blocks.

    Attributes:
        schedule: the blocks from which the student starts, one for each step; () leaves all to the teacher.
        teacher_span: blocks a..b-1 that the teacher predicts, before the student starts from b.
        ancestral: the teacher draws its tokens instead of mapping the image's own noise.
        prefix: how the teacher reads what stands before its span.
        refine: passes of the teacher over all blocks at once, behind all else; each maps the image's noise anew.
    """

    schedule: tuple[int, ...]
    teacher_span: tuple[int, int] | None = None
    ancestral: bool = False
    prefix: Prefix = "causal"
    refine: int = 0


def spread_schedule(steps: int, start_blocks: Sequence[int]) -> tuple[int, ...]:
    """The schedule of `steps` student steps: every (S / steps)-th of its S starting blocks, rounded down.

    Raises:
        ValueError: fewer than one step, or more than there are starting blocks.
    """
    if not 1 <= steps <= len(start_blocks):
        raise ValueError(
            f"steps must lie in 1..{len(start_blocks)} for this student (it starts at blocks "
            f"{tuple(start_blocks)}), got {steps}"
        )
    return tuple(start_blocks[i * len(start_blocks) // steps] for i in range(steps))


def check_plan(plan: Plan, order: BlockOrder, start_blocks: Sequence[int]) -> Plan:
    """The plan itself when it can be carried out.

    Raises:
        ValueError: a schedule that the student does not know, a span that does not end where a step starts, or refining
            passes that are fewer than none, or not behind student steps.
    """
    if plan.refine < 0 or (plan.refine and not plan.schedule):
        raise ValueError(f"refine must be 0 or more passes of the teacher behind student steps, got {plan.refine}")
    if plan.schedule:
        order.check_schedule(plan.schedule, start_blocks)
    if plan.teacher_span is not None:
        first, end = plan.teacher_span
        if not plan.schedule:
            raise ValueError(f"teacher span {first} {end} needs student steps beside it, got an empty schedule")
        if not 0 <= first < end <= order.num_blocks:
            raise ValueError(f"teacher span {first} {end} must ascend within 0..{order.num_blocks}")
        if end != order.num_blocks and end not in plan.schedule:
            raise ValueError(
                f"teacher span {first} {end} must end at a block of the schedule {plan.schedule} "
                f"or at the last, {order.num_blocks}"
            )
        if wasted := [start for start in plan.schedule if start > 0 and first <= start < end]:
            raise ValueError(f"the teacher span {first} {end} would overwrite the student's step at block {wasted[0]}")
    return plan


def jump(
    student: Student,
    x_BLC: Tensor,
    condition: Condition,
    known_blocks: int,
    codebook_VC: Tensor,
    split_block: int,
    temperature: float = 0.0,
    uniform_BL: Tensor | None = None,
    flow: FlowSettings = FlowSettings(),  # noqa: B008 - frozen
) -> Tensor:
    """One pass of the student: codes of a sequence whose later blocks are noise (Eq. 8, 20).

    Args:
        student: the model.
        x_BLC: codes in the known blocks, noise in the others; all blocks of a sequence or the leading ones.
        condition: one entry per sequence.
        known_blocks: how many leading blocks are known.
        codebook_VC: the codes.
        split_block: blocks before it come from the logits, known ones as the nearest code; the others from the code
            head, known ones as they are.
        temperature: of the draw from the logits; 0 takes the most likely codes.
        uniform_BL: numbers in (0, 1), one a token of a whole sequence, for the draw; None without one.
        flow: the solver of a flow head, which knows neither split nor temperature.

    Returns:
        code_BLC, the shape of `x_BLC`.
    """
    length = x_BLC.shape[1]
    known, split = (min(student.order.tokens_before(block), length) for block in (known_blocks, split_block))
    known_blocks_B = torch.full((len(x_BLC),), known_blocks, device=x_BLC.device)
    output = student(x_BLC, condition, known_blocks_B, split)
    if output.code_BLC is None:
        mapped_BLC = flow_sequence(output.logits_BLV[:, known:], x_BLC[:, known:], codebook_VC, flow)
        return torch.cat([x_BLC[:, :known], mapped_BLC], 1)
    code_BLC = final_sequence(output, codebook_VC, split, temperature, uniform_BL)
    if known == 0:
        return code_BLC
    quantised_BLC, kept_BLC = x_BLC[:, :known].tensor_split((min(known, split),), dim=1)
    chosen_BLC = lookup(nearest(quantised_BLC, codebook_VC), codebook_VC)
    # What is no code stays none.
    chosen_BLC = chosen_BLC.masked_fill(~quantised_BLC.isfinite().all(-1, keepdim=True), math.nan)
    return torch.cat([chosen_BLC, kept_BLC, code_BLC[:, known:]], dim=1)


@dataclass(frozen=True)
class Passes:
    """The computations of a sampler outside the teacher, each a function of tensors, so that it can be compiled.

    Attributes:
        noise: see `gaussian_noise`.
        uniform: see `uniform`.
        jump: see `jump`.
    """

    noise: Callable[..., Tensor] = gaussian_noise
    uniform: Callable[..., Tensor] = uniform
    jump: Callable[..., Tensor] = jump


@torch.no_grad()
def sample(
    plan: Plan,
    teacher: Teacher,
    student: Student | None,
    condition: Condition,
    key_B: Tensor,
    sampling: TeacherSampling,
    flow: FlowSettings,
    split_block: int,
    callback: Callback | None = None,
    passes: Passes = Passes(),  # noqa: B008
    student_temperature: float = 0.0,
) -> Tensor:
    """Codes of whole images, each from its key and condition alone.

    A step predicts only what no later step predicts again: of two steps 0 and b, the first runs on the blocks before b.

    Args:
        plan: a plan that `check_plan` accepted.
        teacher: gives the order and the codebook, and predicts its blocks of the plan.
        student: predicts the others; None when the plan has no schedule.
        condition: one entry per image.
        key_B: one key per image, on the device of the models.
        sampling: the teacher's distribution.
        flow: the solver of the flow map, the teacher's and that of a student's flow head.
        split_block: see `jump`.
        callback: called after every step.
        passes: the computations, eager by default.
        student_temperature: of the student's draws, one for each token from the image's key; 0 takes the most likely.

    Returns:
        code_BLC for the tokenizer's decoder; not finite where the student's logits are not numbers.

    Raises:
        ValueError: the teacher's logits are not finite, or the student's codes that it is to go on from.
    """
    order, codebook_VC = teacher.order, teacher.codebook
    code_BLC = noise_BLC = passes.noise(key_B, order.length, codebook_VC.shape[1])
    if plan.ancestral:
        choose = by_chance(order, passes.uniform(key_B, order.length, 1), sampling)
    else:
        choose = by_flow(order, code_BLC, codebook_VC, sampling, flow)

    uniform_BL = passes.uniform(key_B, order.length, STUDENT_STREAM) if student_temperature > 0 else None

    def teach(first: int, end: int) -> Tensor:
        known_BLC, prefix_BL = code_BLC[:, : order.tokens_before(first)], None
        if first:
            prefix_BL = nearest(_finite(known_BLC), codebook_VC)
        token_BL = rollout(teacher, condition, sampling.guidance, choose, prefix_BL, end, plan.prefix)
        return lookup(token_BL, codebook_VC)

    def predict(first: int, end: int) -> Tensor:
        x_BLC = code_BLC[:, : order.tokens_before(end)]
        drawing = (student_temperature, uniform_BL)
        return passes.jump(student, x_BLC, condition, first, codebook_VC, split_block, *drawing, flow)

    def refine(token_BL: Tensor) -> Tensor:
        logits_BLV = teacher.forced_logits(token_BL, condition, sampling.guidance).float()
        return flow_map(noise_BLC, log_probabilities(logits_BLV, sampling), codebook_VC, flow)

    for (name, first), (_, end) in pairwise([*_steps(plan), ("", order.num_blocks)]):
        predicted_BLC = teach(first, end) if name == "teacher" else predict(first, end)
        code_BLC = torch.cat([predicted_BLC, code_BLC[:, predicted_BLC.shape[1] :]], 1)
        if callback is not None:
            callback(Step(name, first, code_BLC))
    for _ in range(plan.refine):
        code_BLC = lookup(refine(nearest(_finite(code_BLC), codebook_VC)), codebook_VC)
        if callback is not None:
            callback(Step("teacher", 0, code_BLC))
    return code_BLC


def _finite(code_BLC: Tensor) -> Tensor:
    """The codes themselves, unless some are none."""
    if not code_BLC.isfinite().all():
        raise ValueError("the student's output is not finite: its weights are damaged, or the dtype is too narrow")
    return code_BLC


def _steps(plan: Plan) -> list[tuple[str, int]]:
    """Who predicts, from which block on; each step ends where the next one begins."""
    steps = dict.fromkeys(plan.schedule, "student")
    if plan.teacher_span is not None or not plan.schedule:
        steps[plan.teacher_span[0] if plan.teacher_span else 0] = "teacher"
    return [(name, first) for first, name in sorted(steps.items())]
