import pytest
import torch

from distilled_decoding.baselines import OneStep
from distilled_decoding.condition import Labels
from distilled_decoding.noise import image_keys
from distilled_decoding.store import Shard

CLASSES, LENGTH, VOCAB = 2, 3, 4


def shard(num=400):
    """Trajectories whose second token always equals the first, so that positions depend on each other."""
    label_N = torch.arange(num) % CLASSES
    p_NV = torch.tensor([[0.5, 0.0, 0.3, 0.2], [0.0, 0.1, 0.0, 0.9]])[label_N]
    token_NL = torch.multinomial(p_NV, LENGTH, True, generator=torch.Generator().manual_seed(0))
    token_NL[:, 1] = token_NL[:, 0]
    return Shard(token_NL, label_N, torch.arange(num))


def drawn(num, label, seed=0):
    onestep = OneStep.fit(shard(), CLASSES, VOCAB)
    return onestep.draw(Labels.checked([label] * num, CLASSES), image_keys("evaluation", seed, range(num)))


def test_frequency_counts_every_class_and_position_apart():
    trajectories = shard()
    frequency = OneStep.fit(trajectories, CLASSES, VOCAB).frequency
    for label in range(CLASSES):
        own_NL = trajectories.token_NL[trajectories.label_N == label]
        for position in range(LENGTH):
            counts_V = torch.bincount(own_NL[:, position], minlength=VOCAB)
            torch.testing.assert_close(frequency[label, position], counts_V / len(own_NL))


@pytest.mark.parametrize("label", range(CLASSES))
def test_draws_recover_the_frequency(label):
    frequency = OneStep.fit(shard(), CLASSES, VOCAB).frequency[label]
    found = torch.nn.functional.one_hot(drawn(10_000, label), VOCAB).double().mean(0)
    assert (found - frequency).abs().max() < 0.02
    assert found[frequency == 0].sum() == 0


def test_positions_are_independent_though_the_trajectories_are_not():
    frequency = OneStep.fit(shard(), CLASSES, VOCAB).frequency[0].double()
    token_BL = drawn(10_000, 0)
    joint = torch.bincount(token_BL[:, 0] * VOCAB + token_BL[:, 1], minlength=VOCAB**2).view(VOCAB, VOCAB)
    assert (joint / len(token_BL) - torch.outer(frequency[0], frequency[1])).abs().max() < 0.02


def test_a_draw_depends_on_its_own_key_and_label_alone():
    onestep = OneStep.fit(shard(), CLASSES, VOCAB)
    condition, key_B = Labels.balanced(12, CLASSES), image_keys("evaluation", 0, range(12))
    together = onestep.draw(condition, key_B)
    order = torch.tensor([7, 2, 11])
    assert torch.equal(onestep.draw(condition[order], key_B[order]), together[order])
    assert not torch.equal(onestep.draw(condition, image_keys("evaluation", 1, range(12))), together)


def test_trajectories_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"tokens of the trajectories run over 0\.\.3, .* knows 0\.\.2"):
        OneStep.fit(shard(), CLASSES, 3)
    with pytest.raises(ValueError, match=r"labels of the trajectories run over 0\.\.1, .* knows 0\.\.0"):
        OneStep.fit(shard(), 1, VOCAB)
    with pytest.raises(ValueError, match="no trajectory has label 2"):
        OneStep.fit(shard(), 3, VOCAB)
