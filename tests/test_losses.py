import pytest
import torch

from distilled_decoding.losses import LossWeights, Totals, distillation_loss
from distilled_decoding.student import StudentOutput


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_the_losses_of_parts_add_up_to_those_of_the_whole(cut: int) -> None:
    """Also when they know of very different numbers of unknown tokens, with weights or without."""
    torch.manual_seed(0)
    token_BL, code_BLC = torch.randint(6, (5, 4)), torch.randn(5, 4, 2)
    output = StudentOutput(torch.randn(5, 4, 6), torch.randn(5, 4, 2))
    known_BL = torch.arange(4) < torch.tensor([0, 3, 1, 0, 3])[:, None]
    weights = LossWeights(1.0, 0.5)
    for weight_L in (None, torch.tensor([4.0, 1.0, 0.0, 2.0])):
        whole = distillation_loss(output, token_BL, code_BLC, known_BL, weights, weight_L)
        totals = Totals.of(known_BL, weight_L)
        parts = [
            distillation_loss(
                StudentOutput(output.logits_BLV[rows], output.code_BLC[rows]),
                token_BL[rows],
                code_BLC[rows],
                known_BL[rows],
                weights,
                weight_L,
                totals=totals,
            )
            for rows in (slice(0, cut), slice(cut, 5))
        ]
        for name, value in vars(whole).items():
            torch.testing.assert_close(sum(getattr(part, name) for part in parts), value)
