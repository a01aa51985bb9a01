import pytest
import torch

from distilled_decoding.condition import Labels
from distilled_decoding.noise import image_keys
from distilled_decoding.sampling import Plan
from tests import tiny

CONDITION, KEY_B = Labels.balanced(2, 3), image_keys("sampling", 0, range(2))
PLANS = [Plan((0,)), Plan((0, 8)), Plan((), ancestral=True), Plan(())]


@pytest.mark.parametrize("family", ["llamagen", pytest.param("var", marks=pytest.mark.slow)])
def test_compiled_images_are_those_of_the_plain_code(family: str) -> None:
    plain = tiny.pipeline(family=family)
    plans = PLANS if family == "llamagen" else [Plan((0,)), Plan((0, 2)), *PLANS[2:]]
    fast = plain.compiled()
    assert fast.is_compiled and not plain.is_compiled
    for plan in plans:
        expected_BLC = plain.codes(plan, CONDITION, KEY_B)
        torch.testing.assert_close(fast.codes(plan, CONDITION, KEY_B), expected_BLC)
        # Again from the same cache, which still holds the last generation.
        torch.testing.assert_close(fast.codes(plan, CONDITION, KEY_B), expected_BLC)
    torch.testing.assert_close(fast.teacher.decode(expected_BLC), plain.teacher.decode(expected_BLC))


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
    with pytest.raises(ValueError, match="float32, bfloat16, float16, got torch.int8"):
        tiny.pipeline().cast(torch.int8)
