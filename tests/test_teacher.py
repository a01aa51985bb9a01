import pytest
import torch

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.teacher import Guidance, combine_guidance


def test_scale_one_is_conditional_to_the_last_bit_and_zero_is_unconditional():
    cond, uncond = torch.randn(2, 5, 7).unbind(0)
    assert torch.equal(combine_guidance(cond, uncond, 1.0), cond)
    torch.testing.assert_close(combine_guidance(cond, uncond, 0.0), uncond)
    torch.testing.assert_close(combine_guidance(cond, uncond, 2.5), uncond + 2.5 * (cond - uncond))


def test_linear_ramp_is_the_published_one_of_var():
    cond, uncond = torch.randn(2, 5, 7).unbind(0)
    cfg, blocks = 1.5, 10
    guidance = Guidance(scale=1 + cfg, ramp="linear")
    for block in range(blocks):
        ratio = cfg * block / (blocks - 1)
        expected = (1 + ratio) * cond - ratio * uncond
        torch.testing.assert_close(combine_guidance(cond, uncond, guidance.at(block, blocks)), expected)


def test_a_ramp_over_a_single_block_does_not_guide_it():
    assert Guidance(scale=3.0, ramp="linear").at(0, 1) == 1.0


def test_only_the_first_blocks_are_guided():
    guidance = Guidance(scale=2.0, num_blocks=2)
    assert [guidance.at(block, 4) for block in range(4)] == [2.0, 2.0, 1.0, 1.0]
    assert guidance.at_tokens(BlockOrder((1, 2, 2))).tolist() == [2.0, 2.0, 2.0, 1.0, 1.0]


def test_guidance_is_inactive_exactly_when_no_block_is_guided():
    assert Guidance(2.0).is_active
    assert not Guidance().is_active
    assert not Guidance(2.0, num_blocks=0).is_active


def test_inactive_guidance_leaves_logits_alone_and_active_halves_the_batch():
    logits = torch.randn(4, 3, 7)
    assert Guidance().apply(logits, 1.0) is logits
    assert torch.equal(Guidance(2.0).apply(logits, 1.0), logits[:2])


@pytest.mark.parametrize("wrong", [{"scale": -1.0}, {"scale": float("inf")}, {"ramp": "cosine"}, {"num_blocks": -1}])
def test_wrong_settings_are_refused_with_their_value(wrong: dict):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        Guidance(**wrong)
