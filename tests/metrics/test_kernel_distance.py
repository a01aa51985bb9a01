import pytest
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from distilled_decoding.metrics import kernel_distance as module
from distilled_decoding.metrics.kernel_distance import kernel_distance


def features(seed, num, shift=0.0):
    return torch.randn(num, 5, generator=torch.Generator().manual_seed(seed)) + shift


def brute_force(a_ND, b_MD):
    a_ND, b_MD = a_ND.double().tolist(), b_MD.double().tolist()

    def mean(xs, ys, own):
        kernel = [
            (sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3
            for i, x in enumerate(xs)
            for j, y in enumerate(ys)
            if own or i != j
        ]
        return sum(kernel) / len(kernel)

    return mean(a_ND, a_ND, False) + mean(b_MD, b_MD, False) - 2 * mean(a_ND, b_MD, True)


def test_it_is_the_mean_over_all_pairs_whatever_the_chunks(monkeypatch):
    a_ND, b_MD = features(0, 23), features(1, 31, shift=0.5)
    expected = brute_force(a_ND, b_MD)
    for chunk in (7, 250):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert kernel_distance(a_ND, b_MD) == pytest.approx(expected, rel=1e-12)


def test_it_agrees_with_torchmetrics_on_one_full_subset():
    a_ND, b_ND = features(2, 100), features(3, 100, shift=0.2)
    assert kernel_distance(a_ND, b_ND) == pytest.approx(poly_mmd(a_ND.double(), b_ND.double()).item(), rel=1e-9)
    metric = KernelInceptionDistance(feature=nn.Identity(), subsets=1, subset_size=100).set_dtype(torch.float64)
    metric.update(a_ND.double(), real=True)
    metric.update(b_ND.double(), real=False)
    assert kernel_distance(a_ND, b_ND) == pytest.approx(metric.compute()[0].item(), rel=1e-5)


def test_it_is_a_function_of_the_sets():
    a_ND, b_MD = features(4, 600), features(5, 500, shift=0.1)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    assert kernel_distance(a_ND[order], b_MD.flip(0)) == kernel_distance(a_ND, b_MD)
    assert kernel_distance(b_MD, a_ND) == pytest.approx(kernel_distance(a_ND, b_MD), rel=1e-9)


def test_it_is_unbiased_for_few_images():
    values = torch.tensor([kernel_distance(features(2 * i, 10), features(2 * i + 1, 10)) for i in range(300)])
    assert abs(values.mean()) < 3 * values.std() / 300**0.5


def test_sets_that_cannot_be_compared_are_refused():
    with pytest.raises(ValueError, match=r"got \(1, 5\) and \(4, 5\)"):
        kernel_distance(features(0, 1), features(0, 4))
    with pytest.raises(ValueError, match=r"got \(4, 5\) and \(4, 3\)"):
        kernel_distance(features(0, 4), features(0, 4)[:, :3])
