import pytest
import torch
from prdc import compute_prdc

from distilled_decoding.metrics import precision_recall as module
from distilled_decoding.metrics.precision_recall import precision_recall


def features(seed, num, scale=1.0):
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize(("k", "chunk"), [(3, 250), (5, 17)])
def test_it_agrees_with_prdc(k, chunk, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    real_ND, fake_MD = features(0, 80), features(1, 120, scale=0.8) + 0.5
    expected = compute_prdc(real_ND.double().numpy(), fake_MD.double().numpy(), k)
    assert precision_recall(real_ND, fake_MD, k) == (expected["precision"], expected["recall"])
    assert 0 < expected["recall"] < 1 and 0 < expected["precision"] < 1


def test_it_is_one_for_a_set_against_itself_and_zero_far_away():
    feature_ND = features(2, 50)
    assert precision_recall(feature_ND, feature_ND) == (1, 1)
    assert precision_recall(feature_ND, feature_ND + 100) == (0, 0)


def test_few_modes_cost_recall_and_scattered_samples_cost_precision():
    real_ND = features(3, 200)
    precision, recall = precision_recall(real_ND, features(4, 200, scale=0.3))
    assert precision > 0.95 and recall < 0.5
    precision, recall = precision_recall(real_ND, features(5, 200, scale=3.0))
    assert precision < 0.5 and recall > 0.8


def test_it_is_a_function_of_the_sets():
    real_ND, fake_MD = features(6, 60), features(7, 60)
    assert precision_recall(real_ND.flip(0), fake_MD.roll(5, 0)) == precision_recall(real_ND, fake_MD)


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"more than 3 images .* got \(3, 4\) and \(9, 4\)"):
        precision_recall(features(0, 3), features(0, 9))
    with pytest.raises(ValueError, match=r"got \(9, 4\) and \(9, 2\)"):
        precision_recall(features(0, 9), features(0, 9)[:, :2])
