"""The reference's samplers, with the student alone and with its teacher in between, as plans of ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distilled_decoding import sampling
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.flow import FlowSettings
from distilled_decoding.noise import image_keys
from distilled_decoding.sampling import Passes, Plan, Step, check_plan, sample
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Prefix, TeacherSampling, log_probabilities
from tests.families.var import reference
from tests.golden import Case, load_case, pass_known

Calls = list[tuple[tuple[Any, ...], Any]]
"""Arguments and result of each call."""

FILTERS = load_case("var_filter")


@pytest.mark.parametrize("name", FILTERS.config["filters"])
def test_top_k_and_top_p_match_the_reference(name: str) -> None:
    entry = FILTERS.config["filters"][name]
    # Top-p is off at 0 in the reference and at 1 here.
    top_p = entry["top_p"] or 1.0
    if name == "flat_p30":
        # Twelve of forty equal codes make up 0.3: VAR stops when top-p is reached, LlamaGen and we when it is passed.
        top_p -= 1e-6
    filtering = TeacherSampling(top_k=entry["top_k"], top_p=top_p)
    p_BLV = log_probabilities(FILTERS.inputs[f"logits_{entry['logits']}"], filtering).exp()
    expected_BLV = FILTERS.outputs[f"probs_{name}"]
    if entry.get("tie_order_dependent"):
        # The reference's sort is unstable: which of equal codes survive is arbitrary.
        p_BLV, expected_BLV = p_BLV.sort().values, expected_BLV.sort().values
    torch.testing.assert_close(p_BLV, expected_BLV, rtol=FILTERS.rtol, atol=FILTERS.atol)
    if entry["top_p"] != 1:
        # At 1 the reference also drops codes whose probabilities add up to 0 in float32; here 1 keeps every code.
        assert torch.equal(p_BLV > 0, expected_BLV > 0)


def record(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Calls:
    """Listen to a function, which goes on doing what it does."""
    calls: Calls = []
    function: Callable[..., Any] = getattr(owner, name)

    def listening(*args: Any) -> Any:
        calls.append((args, function(*args)))
        return calls[-1][1]

    monkeypatch.setattr(owner, name, listening)
    return calls


def plan_of(case: Case, prefix: Prefix) -> Plan:
    schedule = tuple(case.config["t_list"])
    if "t_teacher_start" not in case.config:
        return Plan(schedule)
    return Plan(schedule, teacher_span=(case.config["t_teacher_start"], schedule[1]), prefix=prefix)


def greedy_sampling(case: Case) -> TeacherSampling:
    """One surviving code leaves the flow map no choice, so that the default plan is the reference's greedy one."""
    if "cfg" not in case.config:
        return TeacherSampling(top_k=1)
    guidance = reference.guidance(case)
    return TeacherSampling(guidance_scale=guidance.scale, guidance_ramp=guidance.ramp, top_k=1)


def after_student(name: str, code_BLC: Tensor, output: StudentOutput, step: Step, teacher: VARTeacher) -> dict:
    """What one student step read, predicted with known positions passed through, and left behind."""
    logits_BLV = output.logits_BLV
    seen = {
        "x_in": code_BLC,
        "conti": output.code_BLC,
        "logits": logits_BLV,
        "seq": step.code_BLC[:, : code_BLC.shape[1]],
    }
    seen |= {"argmax": logits_BLV.argmax(-1), "top1_logit": logits_BLV.amax(-1)}
    seen["quant_idx"] = nearest(seen["seq"], teacher.codebook)
    seen["quant_seq"] = lookup(seen["quant_idx"], teacher.codebook)
    return {f"{name}_{key}": value for key, value in seen.items()}


def after_teacher(token_BL: Tensor, first: int, logits: Calls, teacher: VARTeacher) -> dict[str, Tensor]:
    """What the teacher chose, from which logits, and the image of that alone."""
    seen = {}
    for block, (_, logits_BKV) in enumerate(logits, start=first):
        seen[f"teacher_logits_cfg_s{block}"] = logits_BKV
        seen[f"teacher_idx_s{block}"] = token_BL[:, teacher.order.span(block)]
    seen["teacher_seq"] = lookup(token_BL, teacher.codebook)
    sum_BChw = teacher.tokenizer.partial_sums(seen["teacher_seq"])[-1]
    return seen | {"teacher_partial_image": reference.shown(teacher.tokenizer.decode_features(sum_BChw))}


def observe(
    case: Case, monkeypatch: pytest.MonkeyPatch, prefix: Prefix = "unmasked"
) -> tuple[list[tuple[str, int]], dict[str, Tensor]]:
    """Run `sample` from the case's noise: its steps in turn, and all it computed by the reference's names."""
    teacher, student = reference.teacher(case), reference.student(case)
    noise_BLC = reference.noise(case)
    record_free = student.forward
    reads, logits = record(monkeypatch, student, "forward"), record(monkeypatch, teacher, "next_logits")
    rollouts = record(monkeypatch, sampling, "rollout")
    plan = check_plan(plan_of(case, prefix), teacher.order, case.config["t_list"])
    condition = reference.labels(case, teacher.num_classes)
    steps: list[Step] = []
    passes = Passes(noise=lambda *_: noise_BLC)
    settings = greedy_sampling(case), FlowSettings(), case.config["loss_split_t"]
    key_B = image_keys("sampling", 0, range(len(condition)))
    final_BLC = sample(plan, teacher, student, condition, key_B, *settings, steps.append, passes)
    image = reference.shown(teacher.decode(final_BLC))
    seen = {"final_seq": final_BLC, "image": image}
    seen |= {f"image_{part}": excerpt for part, excerpt in reference.excerpts(image).items()}
    student_steps = [step for step in steps if step.name == "student"]
    for step, (read, _) in zip(student_steps, reads, strict=True):
        name = f"{'dd' if plan.teacher_span else 'step'}{plan.schedule.index(step.block)}"
        whole = record_free(*read[:3])
        known_BL = student.order.known_BL(read[2])[:, : read[0].shape[1]]
        used = pass_known(whole, read[0], nearest(read[0], teacher.codebook), known_BL)
        seen |= after_student(name, read[0], used, step, teacher)
    if plan.teacher_span:
        seen |= after_teacher(rollouts[0][1], plan.teacher_span[0], logits, teacher)
    return [(step.name, step.block) for step in steps], seen


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "expected_steps"),
    [
        ("dd_var_sample_1step", [("student", 0)]),
        ("dd_var_sample_2step", [("student", 0), ("student", 3)]),
        ("dd_var_sample_2step_splitK", [("student", 0), ("student", 2)]),
        ("dd_var_combine_prefix", [("student", 0), ("teacher", 2), ("student", 4)]),
        ("dd_var_combine_fromscratch", [("teacher", 0), ("student", 3)]),
        ("struct_dd_var_2step", [("student", 0), ("student", 5)]),
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


@torch.no_grad()
def test_a_masked_prefix_is_not_what_the_reference_samples_from(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_case("dd_var_combine_prefix")
    _, seen = observe(case, monkeypatch, prefix="causal")
    case.check("dd0_seq", seen["dd0_seq"], leading=True)
    moved = (seen["teacher_logits_cfg_s2"] - case.outputs["teacher_logits_cfg_s2"]).abs().amax()
    assert moved > 1
