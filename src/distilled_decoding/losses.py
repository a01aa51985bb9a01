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
"""A scalar distance of two image batches; gradients flow to the first."""


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


def _mean(value_BL: Tensor, weight_BL: Tensor) -> Tensor:
    return (value_BL * weight_BL).sum() / weight_BL.sum()


def distillation_loss(
    output: StudentOutput,
    token_BL: Tensor,
    code_BLC: Tensor,
    known_BL: Tensor,
    weights: LossWeights,
    weight_L: Tensor | None = None,
    perceptual: Tensor | None = None,
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
    """
    weight_BL = (~known_BL).float() * (1.0 if weight_L is None else weight_L)
    flat = F.cross_entropy(output.logits_BLV.flatten(0, 1), token_BL.flatten(), reduction="none")
    cross_entropy_BL = flat.view(token_BL.shape)
    logits = _mean(cross_entropy_BL, weight_BL)
    code = _mean((output.code_BLC - code_BLC).square().sum(-1), weight_BL)
    perceptual = logits.new_zeros(()) if perceptual is None else perceptual
    total = weights.logits_weight * logits + weights.code_weight * code + weights.perceptual_weight * perceptual
    hits_BL = (output.logits_BLV.argmax(-1) == token_BL).float()
    return Losses(total, logits, code, perceptual, _mean(hits_BL, (~known_BL).float()))


def perceptual_loss(predicted_BLC: Tensor, code_BLC: Tensor, decode: Decode, image_distance: ImageDistance) -> Tensor:
    """Distance of the images of predicted codes from those of the trajectories' codes, a scalar.

    Gradients flow through the decoder to `predicted_BLC`.
    """
    with torch.no_grad():
        target_BCHW = decode(code_BLC)
    return image_distance(decode(predicted_BLC), target_BCHW)
