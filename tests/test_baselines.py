import pytest
import torch
import torch.nn.functional as F

from distilled_decoding.baselines import OneStep, Skip
from distilled_decoding.codebook import nearest
from distilled_decoding.condition import Labels
from distilled_decoding.noise import image_keys
from distilled_decoding.teacher import log_probabilities
from tests import tiny

PIPE = tiny.pipeline()
CLASSES, LENGTH, VOCAB = 3, 16, 16


def samples(num=600):
    """Sequences whose second token always equals the first, so that positions depend on each other."""
    label_N = torch.arange(num) % CLASSES
    p_NV = F.one_hot(label_N, VOCAB) * 0.5 + F.one_hot(label_N + 3, VOCAB) * 0.3 + F.one_hot(label_N * 0, VOCAB) * 0.2
    token_NL = torch.multinomial(p_NV, LENGTH, True, generator=torch.Generator().manual_seed(0))
    token_NL[:, 1] = token_NL[:, 0]
    return token_NL, Labels(label_N, CLASSES)


def tokens(baseline, num, label=None, seed=0):
    condition = tiny.labels(num, CLASSES) if label is None else Labels(torch.full((num,), label), CLASSES)
    code_BLC = baseline(condition, image_keys("evaluation", seed, range(num)))
    return nearest(code_BLC, PIPE.teacher.codebook)


@pytest.mark.parametrize("label", range(CLASSES))
def test_onestep_recovers_the_frequencies_of_its_class(label):
    token_NL, asked = samples()
    own_NL = token_NL[asked.label_B == label]
    frequency_LV = F.one_hot(own_NL, VOCAB).double().mean(0)
    found_LV = F.one_hot(tokens(OneStep(PIPE, token_NL, asked), 10_000, label), VOCAB).double().mean(0)
    assert (found_LV - frequency_LV).abs().max() < 0.02
    assert found_LV[frequency_LV == 0].sum() == 0


def test_positions_of_onestep_are_independent_though_the_samples_are_not():
    token_NL, asked = samples()
    frequency_V = F.one_hot(token_NL[asked.label_B == 0, 0], VOCAB).double().mean(0)
    token_BL = tokens(OneStep(PIPE, token_NL, asked), 10_000, 0)
    joint = torch.bincount(token_BL[:, 0] * VOCAB + token_BL[:, 1], minlength=VOCAB**2).view(VOCAB, VOCAB)
    assert (joint / len(token_BL) - torch.outer(frequency_V, frequency_V)).abs().max() < 0.02


def test_a_class_without_samples_is_refused():
    token_NL, asked = samples()
    others_N = asked.label_B != 2
    with pytest.raises(ValueError, match="no sample of the teacher has number 2"):
        OneStep(PIPE, token_NL[others_N], asked[others_N])


@pytest.mark.parametrize("baseline", [OneStep(PIPE, *samples()), Skip(PIPE, 5)], ids=["onestep", "skip"])
def test_an_image_depends_on_its_own_key_and_label_alone(baseline):
    condition, key_B = tiny.labels(12, CLASSES), image_keys("evaluation", 0, range(12))
    together = baseline(condition, key_B)
    order = torch.tensor([7, 2, 11])
    assert torch.equal(baseline(condition[order], key_B[order]), together[order])
    assert not torch.equal(baseline(condition, image_keys("evaluation", 1, range(12))), together)


def test_skip_draws_each_block_from_the_teacher_given_the_prefix_and_nothing_in_between():
    """The joint of the last two tokens against the exact product of their marginals given each image's prefix."""
    num, sampling = 1000, PIPE.config.sampling
    token_BL = tokens(Skip(PIPE, 1), num, label=1)
    condition = Labels(torch.full((num,), 1), CLASSES)

    def p_BLV(sequence_BL):
        logits_BLV = PIPE.teacher.forced_logits(sequence_BL, condition, sampling.guidance)
        return log_probabilities(logits_BLV, sampling).exp().double()

    first_BV = p_BLV(token_BL)[:, -2]
    second_BV = torch.zeros_like(first_BV)
    for between in range(VOCAB):
        sequence_BL = torch.cat([token_BL[:, :-2], torch.full((num, 1), between), token_BL[:, -1:]], 1)
        second_BV += first_BV[:, between, None] * p_BLV(sequence_BL)[:, -1]
    expected = torch.einsum("bi,bj->ij", first_BV, second_BV)
    found = torch.bincount(token_BL[:, -2] * VOCAB + token_BL[:, -1], minlength=VOCAB**2).view(VOCAB, VOCAB)
    enough = expected >= 5
    statistic = ((found - expected).square() / expected)[enough].sum()
    degrees = int(enough.sum())
    assert degrees > 30
    assert abs(statistic - degrees) < 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_skip_keeps_the_teachers_own_sample_in_front_of_the_gap(family):
    pipe = tiny.pipeline(family=family)
    order, condition = pipe.teacher.order, tiny.labels(6, CLASSES)
    key_B = image_keys("evaluation", 0, range(6))
    whole = pipe.codes(pipe.plan("teacher-ancestral"), condition, key_B)
    skipped = Skip(pipe, 2)(condition, key_B)
    known = order.tokens_before(order.num_blocks - 3)
    assert torch.equal(skipped[:, :known], whole[:, :known])
    assert skipped.shape == whole.shape and not torch.equal(skipped, whole)


@pytest.mark.parametrize("num_skipped", [0, 16])
def test_skips_beyond_the_sequence_are_refused(num_skipped):
    with pytest.raises(ValueError, match=rf"skip:{num_skipped} must lie in 1\.\.15"):
        Skip(PIPE, num_skipped)
