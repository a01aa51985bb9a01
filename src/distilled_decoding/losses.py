"""What the student learns from: partly known sequences (Eq. 5) and the distillation losses (Eq. 7).

Axis letters: B batch, L tokens in a sequence, V codebook entries, C code channels, H W image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distilled_decoding.student import StudentOutput

Decode = Callable[[Tensor], Tensor]
"""Codes [B, L, C] to images [B, 1 or 3, H, W]."""

ImageDistance = Callable[[Tensor, Tensor], Tensor]
"""A scalar distance of two image batches, a mean over images; gradients flow to the first."""


def corrupt(noise_BLC: Tensor, code_BLC: Tensor, known_BL: Tensor) -> Tensor:
    """The state X_n: known tokens hold their codes, the rest their noise (Eq. 5), [B, L, C]."""
    return torch.where(known_BL.unsqueeze(-1), code_BLC, noise_BLC)


@dataclass(frozen=True)
class LossWeights:
    """How much each part of the loss counts.

    Attributes:
        logits_weight: cross-entropy of the logits head.
        code_weight: squared distance of the code head, summed over channels.
        perceptual_weight: distance of decoded images; 0 decodes nothing.

    Raises:
        ValueError: a negative weight, or none that is positive.
    """

    logits_weight: float = 1.0
    code_weight: float = 1.0
    perceptual_weight: float = 0.0

    def __post_init__(self) -> None:
        values = (self.logits_weight, self.code_weight, self.perceptual_weight)
        if min(values) < 0 or max(values) == 0:
            raise ValueError(f"loss weights {values} must not be negative, and one must be positive")


@dataclass(frozen=True)
class Losses:
    """The parts of a batch's loss, each a scalar; `accuracy`: share of unknown tokens that argmax gets right."""

    total: Tensor
    logits: Tensor
    code: Tensor
    perceptual: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Totals:
    """What the sums over tokens are divided by; the losses of the parts of an update then add up to those of the whole.

    Attributes:
        weight: of all unknown tokens of the update.
        unknown: how many they are.
    """

    weight: Tensor
    unknown: Tensor

    @classmethod
    def of(cls, known_BL: Tensor, weight_L: Tensor | None = None) -> "Totals":
        """Totals of an update; for the arguments see `distillation_loss`."""
        unknown_BL = (~known_BL).float()
        return cls((unknown_BL * (1.0 if weight_L is None else weight_L)).sum(), unknown_BL.sum())


def distillation_loss(
    output: StudentOutput,
    token_BL: Tensor,
    code_BLC: Tensor,
    known_BL: Tensor,
    weights: LossWeights,
    weight_L: Tensor | None = None,
    perceptual: Tensor | None = None,
    totals: Totals | None = None,
) -> Losses:
    """The loss of a student against the ends of its trajectories, over unknown tokens only (Eq. 7).

    Args:
        output: what the student predicts from X_n.
        token_BL: the trajectories' tokens, int64.
        code_BLC: their codes.
        known_BL: bool, tokens that were given.
        weights: of the parts.
        weight_L: weight of each token; None weighs all alike.
        perceptual: distance of the decoded images, a scalar (`perceptual_loss`); None counts as 0.
        totals: of the update that these sequences are a part of; None means that they are all of it.
    """
    totals = Totals.of(known_BL, weight_L) if totals is None else totals
    unknown_BL = (~known_BL).float()
    weight_BL = unknown_BL * (1.0 if weight_L is None else weight_L)
    flat = F.cross_entropy(output.logits_BLV.flatten(0, 1), token_BL.flatten(), reduction="none")
    cross_entropy_BL = flat.view(token_BL.shape)
    logits = (cross_entropy_BL * weight_BL).sum() / totals.weight
    code = ((output.code_BLC - code_BLC).square().sum(-1) * weight_BL).sum() / totals.weight
    perceptual = logits.new_zeros(()) if perceptual is None else perceptual
    total = weights.logits_weight * logits + weights.code_weight * code + weights.perceptual_weight * perceptual
    hits_BL = (output.logits_BLV.argmax(-1) == token_BL).float()
    return Losses(total, logits, code, perceptual, (hits_BL * unknown_BL).sum() / totals.unknown)


def perceptual_loss(predicted_BLC: Tensor, code_BLC: Tensor, decode: Decode, image_distance: ImageDistance) -> Tensor:
    """Distance of the images of predicted codes from those of the trajectories' codes, a scalar.

    Gradients flow through the decoder to `predicted_BLC`.
    """
    with torch.no_grad():
        target_BCHW = decode(code_BLC)
    return image_distance(decode(predicted_BLC), target_BCHW)
