import math

import pytest
import torch

from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.flow import flow_map
from distilled_decoding.noise import gaussian_noise, image_keys, uniform
from distilled_decoding.sampling import Passes, Plan, check_plan, jump, sample, spread_schedule
from distilled_decoding.student import STUDENT_STREAM, StudentOutput, final_sequence
from distilled_decoding.teacher import by_flow, log_probabilities, rollout
from tests import tiny

PIPE = tiny.pipeline()
CONDITION = tiny.labels(6)
KEY_B = image_keys("sampling", 0, range(6))


def codes(plan: Plan, callback=None) -> torch.Tensor:
    return PIPE.codes(plan, CONDITION, KEY_B, callback)


def teacher_codes() -> torch.Tensor:
    noise_BLC = gaussian_noise(KEY_B, 16, 4)
    choose = by_flow(PIPE.teacher.order, noise_BLC, PIPE.teacher.codebook, tiny.SAMPLING, tiny.FLOW)
    return lookup(rollout(PIPE.teacher, CONDITION, tiny.SAMPLING.guidance, choose), PIPE.teacher.codebook)


def test_teacher_in_every_block_gives_the_teachers_own_tokens() -> None:
    expected = teacher_codes()
    assert torch.equal(codes(Plan((0,), teacher_span=(0, 16))), expected)
    assert torch.equal(codes(Plan(())), expected)


def test_teacher_span_is_the_teacher_on_the_students_prefix() -> None:
    first = codes(Plan((0,)))
    both = codes(Plan((0, 8), teacher_span=(4, 8)))
    assert torch.equal(both[:, :4], first[:, :4])
    teachers_own = teacher_codes()
    assert torch.equal(codes(Plan((0, 8), teacher_span=(0, 8)))[:, :8], teachers_own[:, :8])


def test_span_at_the_end_comes_last() -> None:
    names = []
    codes(Plan((0, 8), teacher_span=(12, 16)), lambda step: names.append((step.name, step.block)))
    assert names == [("student", 0), ("student", 8), ("teacher", 12)]


def test_known_blocks_pass_through_unchanged() -> None:
    states = []
    codes(Plan((0, 4, 12)), lambda step: states.append(step.code_BLC))
    assert torch.equal(states[1][:, :4], states[0][:, :4])
    assert torch.equal(states[2][:, :12], states[1][:, :12])


def test_a_step_predicts_only_what_no_later_step_predicts_again() -> None:
    """Of two steps the first runs on the blocks before the second, which sees the same as after a whole first step."""
    lengths = []

    def watched(student, x_BLC, *others):
        lengths.append(x_BLC.shape[1])
        return jump(student, x_BLC, *others)

    models = (PIPE.teacher, PIPE.student, CONDITION, KEY_B, tiny.SAMPLING, tiny.FLOW, PIPE.config.split_block)
    both_BLC = sample(Plan((0, 4, 12)), *models, passes=Passes(jump=watched))
    assert lengths == [4, 12, 16]
    lengths.clear()
    sample(Plan((0, 8), teacher_span=(4, 8)), *models, passes=Passes(jump=watched))
    assert lengths == [4, 16]

    codebook_VC, x_BLC = PIPE.teacher.codebook, gaussian_noise(KEY_B, 16, 4)
    with torch.no_grad():
        for known in (0, 4, 12):
            whole_BLC = jump(PIPE.student, x_BLC, CONDITION, known, codebook_VC, PIPE.config.split_block)
            end = {0: 4, 4: 12, 12: 16}[known]
            x_BLC = torch.cat([whole_BLC[:, :end], x_BLC[:, end:]], 1)
    torch.testing.assert_close(both_BLC, x_BLC)


def test_ancestral_draws_depend_on_the_key_alone() -> None:
    plan = Plan((), ancestral=True)
    together = codes(plan)
    assert not torch.equal(together, teacher_codes())
    alone = PIPE.codes(plan, CONDITION[4:5], KEY_B[4:5])
    assert torch.equal(together[4:5], alone)


def test_one_signature_serves_student_and_teacher() -> None:
    code_BLC = sample(Plan((0,)), PIPE.teacher, PIPE.student, CONDITION, KEY_B, tiny.SAMPLING, tiny.FLOW, split_block=0)
    assert code_BLC.shape == (6, 16, 4)


def test_a_students_draws_depend_on_the_key_alone() -> None:
    """In one step, in several, and where the teacher has a part."""
    pipe = PIPE.with_settings(student_temperature=1.0)
    for plan in (Plan((0,)), Plan((0, 4, 12)), Plan((0, 8), teacher_span=(4, 8))):
        together = pipe.codes(plan, CONDITION, KEY_B)
        assert not torch.equal(together, codes(plan))
        assert torch.equal(together[4:5], pipe.codes(plan, CONDITION[4:5], KEY_B[4:5]))


def test_a_cold_student_takes_the_most_likely_tokens() -> None:
    plan = Plan((0, 8))
    assert torch.equal(PIPE.with_settings(student_temperature=1e-4).codes(plan, CONDITION, KEY_B), codes(plan))


def test_a_student_draws_with_the_probabilities_of_its_logits() -> None:
    logits_V = torch.tensor([0.0, 1.0, 2.0])
    output = StudentOutput(logits_V.expand(1, 30_000, 3), torch.zeros(1, 30_000, 1))
    uniform_BL = uniform(KEY_B[:1], 30_000, STUDENT_STREAM)
    code_BLC = final_sequence(output, torch.tensor([[0.0], [1.0], [2.0]]), 30_000, 2.0, uniform_BL)
    found_V = code_BLC.long().flatten().bincount() / 30_000
    torch.testing.assert_close(found_V, (logits_V / 2).softmax(-1), atol=0.01, rtol=0)


def test_spread_schedule() -> None:
    starts = (0, 4, 8, 12)
    assert [spread_schedule(k, starts) for k in (1, 2, 4)] == [(0,), (0, 8), (0, 4, 8, 12)]
    for steps in (0, -1, 5):
        with pytest.raises(ValueError, match=f"got {steps}"):
            spread_schedule(steps, starts)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan((0, 8, 4)), "ascend"),
        (Plan((4, 8)), "begin with block 0"),
        (Plan((0, 16)), "past the last"),
        (Plan((0, 5)), "cannot start at"),
        (Plan((0, 8), teacher_span=(9, 8)), "ascend"),
        (Plan((0, 8), teacher_span=(2, 6)), "must end at"),
        (Plan((0, 8), teacher_span=(2, 17)), "within 0..16"),
        (Plan((), teacher_span=(4, 16)), "needs student steps"),
    ],
)
def test_impossible_plans_are_refused(plan: Plan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_plan(plan, PIPE.teacher.order, (0, 4, 8, 12))


class Blind:
    """A student with a flow head that expects the same of every token."""

    order = PIPE.teacher.order

    def __init__(self, logits_V: torch.Tensor) -> None:
        self.logits_V = logits_V

    def __call__(self, code_BLC, condition, known_blocks_B, num_logits=None) -> StudentOutput:
        return StudentOutput(self.logits_V.expand(*code_BLC.shape[:2], -1), None)


def test_a_flow_head_maps_the_noise_of_what_is_unknown() -> None:
    codebook_VC, noise_BLC = PIPE.teacher.codebook, gaussian_noise(KEY_B, 16, 4)
    logits_V = torch.randn(len(codebook_VC), generator=torch.Generator().manual_seed(0))
    known_BLC = lookup(torch.arange(16) % len(codebook_VC), codebook_VC).expand(6, -1, -1)
    x_BLC = torch.cat([known_BLC[:, :4], noise_BLC[:, 4:]], 1)
    code_BLC = jump(Blind(logits_V), x_BLC, CONDITION, 4, codebook_VC, 16, flow=tiny.FLOW)
    token_BL = flow_map(noise_BLC, logits_V.log_softmax(-1).expand(6, 16, -1), codebook_VC, tiny.FLOW)
    assert torch.equal(code_BLC[:, :4], known_BLC[:, :4])
    assert torch.equal(code_BLC[:, 4:], lookup(token_BL, codebook_VC)[:, 4:])
    assert jump(Blind(logits_V * math.nan), x_BLC, CONDITION, 4, codebook_VC, 16)[:, 4:].isnan().all()


def test_a_flow_head_that_knows_the_teacher_makes_its_images() -> None:
    """One that reads the teacher's own tokens, whatever it is given, is at the fixed point."""
    token_BL = nearest(teacher_codes(), PIPE.teacher.codebook)

    def knowing(code_BLC, condition, known_blocks_B, num_logits=None) -> StudentOutput:
        logits_BLV = PIPE.teacher.forced_logits(token_BL, condition, tiny.SAMPLING.guidance)
        return StudentOutput(log_probabilities(logits_BLV, tiny.SAMPLING).clamp(min=-50), None)

    knowing.order = PIPE.teacher.order
    models = (PIPE.teacher, knowing, CONDITION, KEY_B, tiny.SAMPLING, tiny.FLOW, 16)
    assert torch.equal(sample(Plan((0,)), *models), teacher_codes())


def test_each_refining_pass_makes_one_more_block_the_teachers_own() -> None:
    expected, student = teacher_codes(), codes(Plan((0,)))
    assert not torch.equal(student[:, :1], expected[:, :1])
    for passes in (1, 2, 5):
        assert torch.equal(codes(Plan((0,), refine=passes))[:, :passes], expected[:, :passes])
    assert torch.equal(codes(Plan((0,), refine=16)), expected)


def test_a_flow_head_refuses_what_it_would_not_heed() -> None:
    pipe = PIPE.with_student(PIPE.new_student(0, "flow").eval(), (0,), 16)
    assert pipe.plan(1) == Plan((0,))
    for change in ({"student_temperature": 0.5}, {"split_block": 8}):
        with pytest.raises(ValueError, match="leave out student_temperature .* and split_block"):
            pipe.with_settings(**change).plan(1)


def test_refining_follows_student_steps() -> None:
    for plan in (Plan((), refine=1), Plan((0,), refine=-1)):
        with pytest.raises(ValueError, match=f"behind student steps, got {plan.refine}"):
            check_plan(plan, PIPE.teacher.order, (0,))
