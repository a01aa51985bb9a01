"""Samplers: student steps, teacher blocks in between, or the teacher alone, all behind one function (Eq. 9).

Axis letters: B batch, L tokens in a sequence, C code channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Condition
from distilled_decoding.flow import FlowSettings
from distilled_decoding.losses import corrupt
from distilled_decoding.noise import gaussian_noise
from distilled_decoding.student import Student, final_sequence, pass_known
from distilled_decoding.teacher import Prefix, Teacher, TeacherSampling, by_chance, by_flow, rollout


@dataclass(frozen=True)
class Step:
    """What a callback hears after each forward pass of the student and each span of the teacher.

    Attributes:
        name: `student` or `teacher`.
        block: the first block that was predicted.
        code_BLC: the sequence so far.
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
    """

    schedule: tuple[int, ...]
    teacher_span: tuple[int, int] | None = None
    ancestral: bool = False
    prefix: Prefix = "causal"


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
        ValueError: a schedule that the student does not know, or a span that does not end where a step starts.
    """
    if plan.schedule:
        order.check_schedule(plan.schedule, start_blocks)
    if plan.teacher_span is not None:
        first, end = plan.teacher_span
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
) -> Tensor:
    """Codes of whole images, each from its key and condition alone.

    Args:
        plan: a plan that `check_plan` accepted.
        teacher: gives the order and the codebook, and predicts its blocks of the plan.
        student: predicts the others; None when the plan has no schedule.
        condition: one entry per image.
        key_B: one key per image, on the device of the models.
        sampling: the teacher's distribution.
        flow: the solver of the teacher's flow map.
        split_block: see `final_sequence`.
        callback: called after every step.

    Returns:
        code_BLC for the tokenizer's decoder.
    """
    order, codebook_VC = teacher.order, teacher.codebook
    noise_BLC = gaussian_noise(key_B, order.length, codebook_VC.shape[1])
    choose = by_chance(order, key_B) if plan.ancestral else by_flow(order, noise_BLC, codebook_VC, flow)
    tell = callback or (lambda step: None)
    code_BLC = noise_BLC

    def teach(first: int, end: int) -> Tensor:
        prefix_BL = nearest(code_BLC[:, : order.tokens_before(first)], codebook_VC) if first else None
        token_BL = rollout(teacher, condition, sampling, choose, prefix_BL, end, plan.prefix)
        predicted_BLC = torch.cat([lookup(token_BL, codebook_VC), noise_BLC[:, token_BL.shape[1] :]], 1)
        tell(Step("teacher", first, predicted_BLC))
        return predicted_BLC

    def jump(start: int) -> Tensor:
        assert student is not None
        known_blocks_B = torch.full((len(condition),), start, device=noise_BLC.device)
        known_BL = order.known_BL(known_blocks_B)
        x_BLC = corrupt(noise_BLC, code_BLC, known_BL)
        output = student(x_BLC, condition, known_blocks_B)
        if start > 0:
            output = pass_known(output, x_BLC, nearest(x_BLC, codebook_VC), known_BL)
        predicted_BLC = final_sequence(output, codebook_VC, order, split_block)
        tell(Step("student", start, predicted_BLC))
        return predicted_BLC

    if not plan.schedule:
        return teach(0, order.num_blocks)
    span_first, span_end = plan.teacher_span or (-1, -1)
    for start in plan.schedule:
        if start == span_end:
            code_BLC = teach(span_first, span_end)
        # What the first step predicts would all be predicted again.
        if not (start == 0 and span_first == 0):
            code_BLC = jump(start)
    return teach(span_first, span_end) if span_end == order.num_blocks else code_BLC
