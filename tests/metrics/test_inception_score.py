import pytest
import torch
from torchmetrics.image.inception import InceptionScore

from distilled_decoding.metrics.inception_score import inception_score


def test_certain_and_balanced_answers_give_the_number_of_classes():
    assert inception_score(torch.eye(7).repeat(3, 1) * 1000) == pytest.approx(7, rel=1e-12)


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [3.0, -1.0, 0.5]])
def test_equal_answers_give_one(row):
    assert inception_score(torch.tensor([row] * 10)) == pytest.approx(1, rel=1e-12)


def test_it_agrees_with_torchmetrics_on_one_split():
    logits_NV = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * 3
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(logits_NV)
    assert inception_score(logits_NV) == pytest.approx(metric.compute()[0].item(), rel=1e-4)


def test_the_order_of_images_changes_no_digit():
    logits_NV = torch.randn(300, 10, generator=torch.Generator().manual_seed(1))
    assert inception_score(logits_NV.flip(0)) == inception_score(logits_NV)
