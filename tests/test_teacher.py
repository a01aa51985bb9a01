import pytest
import torch
from scipy import stats

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Labels
from distilled_decoding.flow import FlowSettings
from distilled_decoding.noise import gaussian_noise, image_keys, uniform
from distilled_decoding.teacher import (
    Guidance,
    TeacherSampling,
    by_chance,
    by_flow,
    combine_guidance,
    draw,
    log_probabilities,
    rollout,
)
from tests import tiny
from tests.golden import load_case


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


FILTERS = load_case("llamagen_filter")


@pytest.mark.parametrize("name", FILTERS.config["filters"])
def test_temperature_top_k_and_top_p_match_the_reference(name: str) -> None:
    entry = FILTERS.config["filters"][name]
    sampling = TeacherSampling(temperature=entry["temperature"], top_k=entry["top_k"], top_p=entry["top_p"])
    p_BV = log_probabilities(FILTERS.inputs[f"logits_{entry['logits']}"][:, 0], sampling).exp()
    expected_BV = FILTERS.outputs[f"probs_{name}"]
    if entry.get("tie_order_dependent"):
        # The reference's sort is unstable: which of equal codes survive is arbitrary.
        p_BV, expected_BV = p_BV.sort().values, expected_BV.sort().values
    torch.testing.assert_close(p_BV, expected_BV, rtol=FILTERS.rtol, atol=FILTERS.atol)


@pytest.mark.parametrize("top_k", [0, 1, 3, 5, 12, 20])
@pytest.mark.parametrize("top_p", [0.0, 0.301, 0.557, 0.803, 1.0])
def test_top_p_keeps_what_walking_down_the_sorted_codes_keeps_ties_included(top_k: int, top_p: float) -> None:
    weight_NV = torch.randint(1, 6, (50, 12), generator=torch.Generator().manual_seed(0))
    found_NV = log_probabilities(weight_NV.log(), TeacherSampling(top_k=top_k, top_p=top_p)).isfinite()
    for weights, found in zip(weight_NV.tolist(), found_NV.tolist(), strict=True):
        least = sorted(weights, reverse=True)[min(top_k or 12, 12) - 1]
        candidates = sorted((v for v in range(12) if weights[v] >= least), key=lambda v: (-weights[v], v))
        total, before, expected = sum(weights[v] for v in candidates), 0, set()
        for v in candidates:
            if before <= top_p * total:
                expected.add(v)
            before += weights[v]
        assert {v for v in range(12) if found[v]} == expected


def test_draws_are_as_frequent_as_p_and_never_where_p_is_zero() -> None:
    log_p_V = torch.tensor([0.0, 0.3, 0.0, 0.1, 0.6, 0.0]).log()
    uniform = (torch.arange(30_000) + 0.5) / 30_000
    token = draw(log_p_V.expand(1, 30_000, 6), uniform[None].double())
    assert torch.bincount(token[0], minlength=6).tolist() == [0, 9000, 0, 3000, 18_000, 0]
    edges = draw(log_p_V.expand(1, 2, 6), torch.tensor([[1e-12, 1 - 1e-12]], dtype=torch.float64))
    assert edges.tolist() == [[1, 4]]


@pytest.mark.parametrize("how", ["flow", "chance"])
def test_two_tokens_are_distributed_as_the_teacher_says(how: str) -> None:
    """The joint of two tokens, guidance and top-k included: the map is exact along the sequence too."""
    teacher, num = tiny.teacher(), 20_000
    condition = Labels(torch.full((num,), 1), 3)
    key_B = image_keys("sampling", 0, range(num))
    noise_BLC = gaussian_noise(key_B, 16, 4)
    flow = by_flow(teacher.order, noise_BLC, teacher.codebook, tiny.SAMPLING, FlowSettings(num_steps=40))
    choose = flow if how == "flow" else by_chance(teacher.order, uniform(key_B, 16, 1), tiny.SAMPLING)
    token_BL = rollout(teacher, condition, tiny.SAMPLING.guidance, choose, end_block=2)

    both = torch.cartesian_prod(torch.arange(16), torch.zeros(1, dtype=torch.long))
    logits_BLV = teacher.forced_logits(torch.nn.functional.pad(both, (0, 14)), condition[:16], tiny.SAMPLING.guidance)
    log_p_BLV = log_probabilities(logits_BLV, tiny.SAMPLING)
    joint = (log_p_BLV[0, 0].exp()[:, None] * log_p_BLV[:, 1].exp()).double().flatten()
    counts = torch.bincount(token_BL[:, 0] * 16 + token_BL[:, 1], minlength=256).double()
    assert counts[joint == 0].sum() == 0
    enough = joint * num >= 5
    rest = [counts[~enough].sum(), joint[~enough].sum() * num]
    observed = torch.cat([counts[enough], rest[0][None]])
    expected = torch.cat([joint[enough] * num, rest[1][None]])
    assert stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("how", ["flow", "chance"])
def test_logits_that_are_not_numbers_are_an_error(how: str) -> None:
    teacher, key_B = tiny.teacher(), image_keys("sampling", 0, range(2))
    torch.nn.init.constant_(teacher.transformer.output.weight, torch.nan)
    flow = by_flow(teacher.order, gaussian_noise(key_B, 16, 4), teacher.codebook, tiny.SAMPLING, tiny.FLOW)
    choose = flow if how == "flow" else by_chance(teacher.order, uniform(key_B, 16, 1), tiny.SAMPLING)
    with pytest.raises(ValueError, match="holds nan|not finite"):
        rollout(teacher, tiny.labels(2), tiny.SAMPLING.guidance, choose)


def test_a_prefix_is_kept_and_continued() -> None:
    teacher, condition = tiny.teacher(), tiny.labels(4)
    noise_BLC = gaussian_noise(image_keys("sampling", 0, range(4)), 16, 4)
    choose = by_flow(teacher.order, noise_BLC, teacher.codebook, tiny.SAMPLING, tiny.FLOW)
    whole_BL = rollout(teacher, condition, tiny.SAMPLING.guidance, choose)
    part_BL = rollout(teacher, condition, tiny.SAMPLING.guidance, choose, end_block=6)
    assert torch.equal(part_BL, whole_BL[:, :6])
    assert torch.equal(rollout(teacher, condition, tiny.SAMPLING.guidance, choose, prefix_BL=part_BL), whole_BL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1"),
        ({"top_k": -1}, "top-k must be 0"),
        ({"top_p": 1.5}, "top-p must lie in 0..1, got 1.5"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"guidance_ramp": "quadratic"}, "unknown guidance ramp 'quadratic'"),
    ],
)
def test_bad_sampling_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSampling(**change)
