import pytest
import torch

from distilled_decoding.condition import stand_ins
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.sampling import Plan, jump
from tests import tiny

CONDITION, KEY_B = tiny.labels(2), image_keys("sampling", 0, range(2))
PLANS = [Plan((0,)), Plan((0, 8)), Plan((), ancestral=True), Plan(())]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llamagen", "var", "text"])
def test_compiled_images_are_those_of_the_plain_code(family: str) -> None:
    plain = tiny.pipeline(family=family)
    plans = [Plan((0,)), Plan((0, 2)), *PLANS[2:]] if family == "var" else PLANS
    fast, condition = plain.compiled(), stand_ins(plain.teacher, 2)
    assert fast.is_compiled and not plain.is_compiled
    for plan in plans:
        expected_BLC = plain.codes(plan, condition, KEY_B)
        torch.testing.assert_close(fast.codes(plan, condition, KEY_B), expected_BLC)
        # Again from the same cache, which still holds the last generation.
        torch.testing.assert_close(fast.codes(plan, condition, KEY_B), expected_BLC)
    torch.testing.assert_close(fast.teacher.decode(expected_BLC), plain.teacher.decode(expected_BLC))


@pytest.mark.parametrize("family", ["llamagen", "var"])
@torch.no_grad()
def test_a_step_with_a_flow_head_is_one_graph(family: str) -> None:
    pipe = tiny.pipeline(family=family)
    student, codebook_VC = pipe.new_student(0, "flow").eval(), pipe.teacher.codebook
    noise_BLC = gaussian_noise(KEY_B, pipe.teacher.order.length, codebook_VC.shape[1])
    step = torch.compile(jump, backend="eager", fullgraph=True)
    for known_blocks in (0, 2):
        arguments = (student, noise_BLC, CONDITION, known_blocks, codebook_VC, pipe.teacher.order.num_blocks)
        expected_BLC = jump(*arguments, flow=tiny.FLOW)
        assert torch.equal(step(*arguments, flow=tiny.FLOW), expected_BLC)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_recorded_graphs_make_the_same_images(family: str) -> None:
    """Every plan, batch sizes in turn: what a graph wrote before must not change when it writes again."""
    plain = tiny.pipeline(family=family)
    plain.teacher.cuda()
    plain.student.cuda()
    fast, second = plain.compiled(), 8 if family == "llamagen" else 2
    for plan in (Plan((0,)), Plan((0, second)), Plan((0, second), (1, second)), Plan((), ancestral=True), Plan(())):
        for batch in (2, 1, 2):
            inputs = CONDITION[:batch].to("cuda"), KEY_B[:batch].cuda()
            torch.testing.assert_close(fast.codes(plan, *inputs), plain.codes(plan, *inputs))


def test_a_failed_generation_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also alternating batch sizes and a cache that is read in several spans; the seams are what matters here."""
    monkeypatch.setattr("distilled_decoding.pipeline.compiled", lambda function, **_: function)
    monkeypatch.setattr("distilled_decoding.families.llamagen.teacher._SPAN", 5)
    plain = tiny.pipeline()
    fast, plan = plain.compiled(), Plan((), ancestral=True)
    fast.teacher.transformer.layers[0].attention.wo.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        fast.codes(plan, CONDITION, KEY_B)
    fast.teacher.transformer.layers[0].attention.wo.weight.zero_()
    for batch in (2, 1, 2):
        expected_BLC = plain.codes(plan, CONDITION[:batch], KEY_B[:batch])
        assert torch.equal(fast.codes(plan, CONDITION[:batch], KEY_B[:batch]), expected_BLC)


@pytest.mark.parametrize("family", ["llamagen", "var"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_plan_runs_in_16_bits(family: str, dtype: torch.dtype) -> None:
    model = tiny.pipeline(family=family)
    model.cast(dtype)
    assert model.dtype == dtype and model.teacher.codebook.dtype == torch.float32
    second = 8 if family == "llamagen" else 2
    for plan in (Plan((0,)), Plan((0, second)), Plan((0, second), (1, second)), Plan((), ancestral=True), Plan(())):
        code_BLC = model.codes(plan, CONDITION, KEY_B)
        assert code_BLC.dtype == torch.float32 and code_BLC.isfinite().all()


@pytest.mark.slow
def test_another_student_is_not_run_in_the_graph_of_the_first() -> None:
    plain = tiny.pipeline()
    other = plain.new_student(1)
    torch.nn.init.normal_(other.output.weight, generator=torch.Generator().manual_seed(7))
    fast = plain.compiled()
    first_BLC = fast.codes(Plan((0,)), CONDITION, KEY_B)
    second = plain.with_student(other, (0,), 16).compiled()
    expected_BLC = plain.with_student(other, (0,), 16).codes(Plan((0,)), CONDITION, KEY_B)
    assert not torch.equal(expected_BLC, first_BLC)
    torch.testing.assert_close(second.codes(Plan((0,)), CONDITION, KEY_B), expected_BLC)
    torch.testing.assert_close(fast.codes(Plan((0,)), CONDITION, KEY_B), first_BLC)


def test_weights_are_cast_before_not_after() -> None:
    with pytest.raises(ValueError, match="cast first, then compile"):
        tiny.pipeline().compiled().cast(torch.bfloat16)
    with pytest.raises(ValueError, match="keeps its student"):
        tiny.pipeline().compiled().with_student(tiny.pipeline().student, (0,), 16)
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got torch.int8"):
        tiny.pipeline().cast(torch.int8)
