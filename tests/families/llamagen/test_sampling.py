"""The reference's samplers, with the student alone and with its teacher in between, as plans of ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distilled_decoding import sampling
from distilled_decoding.codebook import nearest
from distilled_decoding.flow import FlowSettings
from distilled_decoding.noise import image_keys
from distilled_decoding.sampling import Passes, Plan, Step, check_plan, sample
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import TeacherSampling
from tests.families.llamagen import reference
from tests.golden import Case, load_case, pass_known

Calls = list[tuple[tuple[Any, ...], Any]]
"""Arguments and result of each call."""


def record(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Calls:
    """Listen to a function, which goes on doing what it does."""
    calls: Calls = []
    function: Callable[..., Any] = getattr(owner, name)

    def listening(*args: Any) -> Any:
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, listening)
    return calls


def plan_of(case: Case) -> Plan:
    schedule = tuple(case.config["t_list"])
    if "teacher_start_t" not in case.config:
        return Plan(schedule)
    return Plan(schedule, teacher_span=(case.config["teacher_start_t"], schedule[1]))


def greedy_sampling(case: Case) -> TeacherSampling:
    """One surviving code leaves the flow map no choice, so that the default plan is the reference's greedy one."""
    assert case.config.get("cfg_interval", -1) == -1
    return TeacherSampling(guidance_scale=case.config.get("cfg_scale", 1.0), top_k=1)


def after_student(name: str, code_BLC: Tensor, output: StudentOutput, step: Step) -> dict[str, Tensor]:
    """What one student step read, predicted with known positions passed through, and left behind."""
    logits_BLV = output.logits_BLV
    seen = {
        "x_in": code_BLC,
        "tokens": output.code_BLC,
        "logits": logits_BLV,
        "x_out": step.code_BLC[:, : code_BLC.shape[1]],
    }
    seen |= {"argmax": logits_BLV.argmax(-1), "top1_logit": logits_BLV.amax(-1)}
    return {f"{name}_{key}": value for key, value in seen.items()}


def after_teacher(token_BL: Tensor, first: int, logits: Calls) -> dict[str, Tensor]:
    """What the teacher was given, what it chose and from which logits."""
    step_logits_BLV = torch.cat([result for _, result in logits], 1)
    return {"dd0_prefix_ids": token_BL[:, :first], "teacher_ids": token_BL, "teacher_step_logits": step_logits_BLV}


def observe(case: Case, monkeypatch: pytest.MonkeyPatch) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    """Run `sample` from the case's noise: its steps in turn, and all it computed by the reference's names."""
    teacher, student, noise_BLC = reference.teacher(case), reference.student(case), reference.noise(case)
    record_free = student.forward
    reads, logits = record(monkeypatch, student, "forward"), record(monkeypatch, teacher, "next_logits")
    rollouts = record(monkeypatch, sampling, "rollout")
    plan = check_plan(plan_of(case), teacher.order, case.config["t_list"])
    condition = reference.labels(case, teacher.num_classes)
    steps: list[Step] = []
    passes = Passes(noise=lambda *_: noise_BLC)
    settings = greedy_sampling(case), FlowSettings(), case.config["split_t"]
    key_B = image_keys("sampling", 0, range(len(condition)))
    final_BLC = sample(plan, teacher, student, condition, key_B, *settings, steps.append, passes)
    image = (teacher.decode(final_BLC) + 1) / 2
    seen = {"final_x": final_BLC, "image": image}
    seen |= {f"image_{part}": excerpt for part, excerpt in reference.excerpts(image).items()}
    student_steps = [step for step in steps if step.name == "student"]
    for step, (read, _) in zip(student_steps, reads, strict=True):
        name = f"{'dd' if plan.teacher_span else 'step'}{plan.schedule.index(step.block)}"
        whole = record_free(*read[:3])
        known_BL = student.order.known_BL(read[2])[:, : read[0].shape[1]]
        used = pass_known(whole, read[0], nearest(read[0], teacher.codebook), known_BL)
        seen |= after_student(name, read[0], used, step)
    if plan.teacher_span:
        seen |= after_teacher(rollouts[0][1], plan.teacher_span[0], logits)
    return [(step.name, step.block) for step in steps], seen


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "expected_steps"),
    [
        ("dd_llamagen_sample_1step", [("student", 0)]),
        ("dd_llamagen_sample_2step", [("student", 0), ("student", 12)]),
        ("dd_llamagen_combine_prefix", [("student", 0), ("teacher", 5), ("student", 12)]),
        ("dd_llamagen_combine_fromscratch", [("teacher", 0), ("student", 12)]),
        ("struct_dd_llamagen_2step", [("student", 0), ("student", 80)]),
    ],
)
def test_every_intermediate_matches_the_reference(
    name: str, expected_steps: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load_case(name)
    steps, seen = observe(case, monkeypatch)
    assert steps == expected_steps
    for output in case.outputs:
        case.check(output, seen[output], leading=output.startswith(("step", "dd")))
