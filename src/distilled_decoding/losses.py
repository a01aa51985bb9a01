"""What the student learns from: partly known sequences (Eq. 5), the losses on trajectories (Eq. 7), tokens and scores.

Axis letters: B batch, L tokens in a sequence, S blocks, R noised vectors of a position, V codebook entries, C code
channels, H W image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.student import StudentOutput

Decode = Callable[[Tensor], Tensor]
"""Codes [B, L, C] to images [B, 1 or 3, H, W]."""

ImageDistance = Callable[[Tensor, Tensor], Tensor]
"""A scalar distance of two image batches, a mean over images; gradients flow to the first."""


_LEAST_SIZE = 0.1
"""In Eq. 19: where a vector has settled on a code, dividing by its distance would blow up the tracker's last errors."""


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
    """What a network is trained on, a scalar, and in a derived class the parts of it that are told, scalars too."""

    total: Tensor

    def __str__(self) -> str:
        return f"loss {float(self.total):.3f}"


@dataclass(frozen=True)
class TrajectoryLosses(Losses):
    """The parts of the loss on trajectories; `accuracy`: share of unknown tokens that argmax gets right."""

    logits: Tensor
    code: Tensor
    perceptual: Tensor
    accuracy: Tensor

    def __str__(self) -> str:
        return f"{super().__str__()}, argmax right {float(self.accuracy):.1%}"


@dataclass(frozen=True)
class OnPolicySettings:
    """How a student and its trackers take turns, whatever the teacher judges of what the student makes.

    Attributes:
        tracker_first: the first updates, in which the trackers alone learn.
        tracker_updates: of the tracker in each update.
        tracker_rate: the tracker's learning rate, in units of the student's.
        trajectory_weight: of the loss on trajectories; 0 needs none.

    Raises:
        ValueError: a setting outside its range.
    """

    tracker_first: int = 120
    tracker_updates: int = 1
    tracker_rate: float = 4.0
    trajectory_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.tracker_first < 0:
            raise ValueError(f"tracker_first must be at least 0, got {self.tracker_first}")
        for name in ("tracker_updates", "tracker_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.trajectory_weight < math.inf:
            raise ValueError(f"trajectory_weight must not be negative, got {self.trajectory_weight}")


@dataclass(frozen=True)
class TokenSettings:
    """How a student learns from the teacher's judgement of its own tokens (Eq. 10, 11, 12, 14).

    Attributes:
        draw_temperature: divides the student's logits where tokens are drawn, in training and, after it, in sampling.
        ratio_clamp: largest log-ratio of tracker and teacher, either way; codes that the teacher never samples have it.
        forward_share: how much the student is told by the divergence of the teacher from it, which punishes what it
            leaves out, instead of its divergence from the teacher, which punishes what it adds.
        entropy_weight: of the entropy of the student's tokens; what is positive makes it surer, what is negative less.
        downstream: how much a token is also judged by the blocks behind it: a block counts this number of times as much
            as the one before; 0 judges each token by itself alone, 1 weighs all blocks alike.

    Raises:
        ValueError: a setting outside its range.
    """

    draw_temperature: float = 1.0
    ratio_clamp: float = 3.0
    forward_share: float = 1.0
    entropy_weight: float = 0.0
    downstream: float = 0.0

    def __post_init__(self) -> None:
        for name in ("draw_temperature", "ratio_clamp"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not math.isfinite(self.entropy_weight):
            raise ValueError(f"entropy_weight must be finite, got {self.entropy_weight}")
        for name in ("forward_share", "downstream"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in 0..1, got {getattr(self, name)}; 0 is without")


@dataclass(frozen=True)
class ScoreSettings:
    """How a student learns from the teacher's scores of what it makes (Eq. 15 to 19, 22).

    Attributes:
        noised: points that each vector, or each token's code, is noised to, for one pass of the tracker's network.
        head_width: of the head of a tracker of vectors; 0 is the width of the features that the teacher offers.
        head_layers: in it.

    Raises:
        ValueError: a setting outside its range.
    """

    noised: int = 4
    head_width: int = 0
    head_layers: int = 3

    def __post_init__(self) -> None:
        for name, least in (("noised", 1), ("head_width", 0), ("head_layers", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class MixedLosses(Losses):
    """The losses on what a student made itself; `trajectories`: the loss on trajectories beside it, 0 without."""

    trajectories: Tensor


@dataclass(frozen=True)
class TokenLosses(MixedLosses):
    """The parts of the loss on a student's own tokens, means over unknown tokens.

    Attributes:
        divergence: of the student's conditionals from the teacher's, as the tracker sees them and clamped (Eq. 11).
        entropy: of the distributions that the tokens are drawn from.
        tracker: the tracker's cross-entropy on them, before it learns from them (Eq. 12).
    """

    divergence: Tensor
    entropy: Tensor
    tracker: Tensor

    def __str__(self) -> str:
        return f"divergence {float(self.divergence):.3f}, entropy {float(self.entropy):.3f}"


@dataclass(frozen=True)
class ScoreLosses(MixedLosses):
    """The parts of the loss on a student's own vectors, means over unknown tokens.

    Attributes:
        difference: of the two expected vectors, as the student follows it, root mean square over channels (Eq. 19).
        gap: squared distance of its vectors from the nearest codes, summed over channels.
        tracker: the tracker's squared error on them, before it learns from them (Eq. 18).
    """

    difference: Tensor
    gap: Tensor
    tracker: Tensor

    def __str__(self) -> str:
        return f"difference {float(self.difference):.3f}, gap {float(self.gap):.3f}"


@dataclass(frozen=True)
class TokenScoreLosses(MixedLosses):
    """The parts of the loss on the scores of a student's own tokens, means over unknown tokens.

    Attributes:
        difference: of the two expected codes, as the student follows it, root mean square over channels (Eq. 22).
        entropy: of the distributions whose likeliest tokens it takes.
        tracker: the tracker's cross-entropy on them, before it learns from them (Eq. 12).
    """

    difference: Tensor
    entropy: Tensor
    tracker: Tensor

    def __str__(self) -> str:
        return f"difference {float(self.difference):.3f}, tracker {float(self.tracker):.3f}"


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
) -> TrajectoryLosses:
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
    code = nothing = logits.new_zeros(())
    if output.code_BLC is not None:
        code = ((output.code_BLC - code_BLC).square().sum(-1) * weight_BL).sum() / totals.weight
    perceptual = nothing if perceptual is None else perceptual
    total = weights.logits_weight * logits + weights.code_weight * code + weights.perceptual_weight * perceptual
    hits_BL = (output.logits_BLV.argmax(-1) == token_BL).float()
    return TrajectoryLosses(total, logits, code, perceptual, (hits_BL * unknown_BL).sum() / totals.unknown)


def perceptual_loss(predicted_BLC: Tensor, code_BLC: Tensor, decode: Decode, image_distance: ImageDistance) -> Tensor:
    """Distance of the images of predicted codes from those of the trajectories' codes, a scalar.

    Gradients flow through the decoder to `predicted_BLC`.
    """
    with torch.no_grad():
        target_BCHW = decode(code_BLC)
    return image_distance(decode(predicted_BLC), target_BCHW)


def log_ratio(log_psi_BLV: Tensor, log_p_BLV: Tensor, clamp: float) -> Tensor:
    """How much likelier a token is with the student than with the teacher, given those before it (Eq. 10), [B, L, V].

    Args:
        log_psi_BLV: the tracker's log probabilities, finite.
        log_p_BLV: the teacher's, -inf for codes that it never samples.
        clamp: largest value, either way.
    """
    return (log_psi_BLV - log_p_BLV).clamp(-clamp, clamp)


def token_loss(
    log_pi_BLV: Tensor,
    log_psi_BLV: Tensor,
    log_p_BLV: Tensor,
    token_BL: Tensor,
    weight_BL: Tensor,
    order: BlockOrder,
    settings: TokenSettings,
) -> TokenLosses:
    """The loss whose gradient moves a student's tokens towards the teacher's conditionals (Eq. 11, 14).

    Args:
        log_pi_BLV: the student's log probabilities; gradients flow to them alone.
        log_psi_BLV: the tracker's on the student's tokens.
        log_p_BLV: the teacher's on them.
        token_BL: the student's tokens.
        weight_BL: of each token in the mean, 0 for known ones; over the whole update they add up to 1.
        order: the blocks.
        settings: clamp, weights and discount.
    """
    pi_BLV, ratio_BLV = log_pi_BLV.exp(), log_ratio(log_psi_BLV, log_p_BLV, settings.ratio_clamp).detach()
    divergence_BL = (pi_BLV * ratio_BLV).sum(-1) * weight_BL
    divergence = divergence_BL.sum()
    share = settings.forward_share
    told_BLV = (1 - share) * ratio_BLV + share * (1 - (-ratio_BLV).exp())
    entropy = -((pi_BLV * log_pi_BLV).sum(-1) * weight_BL).sum()
    total = ((pi_BLV * told_BLV).sum(-1) * weight_BL).sum() + settings.entropy_weight * entropy
    if settings.downstream > 0:
        total = total + downstream_loss(log_pi_BLV, divergence_BL, token_BL, weight_BL, order, settings.downstream)
    tracker = tracker_loss(log_psi_BLV, token_BL, weight_BL).detach()
    return TokenLosses(total, total.new_zeros(()), divergence, entropy, tracker)


def downstream_loss(
    log_pi_BLV: Tensor, divergence_BL: Tensor, token_BL: Tensor, weight_BL: Tensor, order: BlockOrder, discount: float
) -> Tensor:
    """The part of the loss that judges each token by what came behind it, compared with other rows (Eq. 14), a scalar.

    Args:
        log_pi_BLV: see `token_loss`, like token_BL, weight_BL and order.
        divergence_BL: what each token adds to the divergence, by its weight; no gradients flow to it.
        token_BL: tokens.
        weight_BL: weights.
        order: blocks.
        discount: see `TokenSettings.downstream`, positive.
    """
    chosen_BL1, (rows, _), block_L = token_BL.unsqueeze(-1), token_BL.shape, order.block_L(token_BL.device)
    own_BS = divergence_BL.new_zeros(rows, order.num_blocks).index_add(1, block_L, divergence_BL.detach())
    block_S = torch.arange(order.num_blocks, device=block_L.device)
    discount_SS = (discount ** (block_S - block_S[:, None]).abs()).triu(1)
    behind_BS = own_BS @ discount_SS.mT.to(own_BS)
    # What the other rows found there has nothing to do with this row's choice: it steadies, and shifts no mean.
    usual_BS = (behind_BS.sum(0) - behind_BS) / max(1, rows - 1)
    advantage_BL = (behind_BS - usual_BS)[:, block_L] * (weight_BL > 0)
    return (log_pi_BLV.gather(-1, chosen_BL1).squeeze(-1) * advantage_BL).sum()


def tracker_loss(log_psi_BLV: Tensor, token_BL: Tensor, weight_BL: Tensor) -> Tensor:
    """The tracker's cross-entropy on a student's tokens (Eq. 12), a scalar; for the arguments see `token_loss`."""
    return -(log_psi_BLV.gather(-1, token_BL.unsqueeze(-1)).squeeze(-1) * weight_BL).sum()


@dataclass(frozen=True, eq=False)
class Noised:
    """Vectors on their way to noise (Eq. 15).

    Attributes:
        x_BLRC: the points, float32.
        time_BLR1: how far they are: 0 is the vector, 1 noise alone.
    """

    x_BLRC: Tensor
    time_BLR1: Tensor

    @classmethod
    def of(cls, code_BLC: Tensor, noise_BLRC: Tensor, time_BLR1: Tensor) -> "Noised":
        """Each vector on its way to each of its R noises."""
        return cls(code_BLC.float().unsqueeze(2).lerp(noise_BLRC, time_BLR1), time_BLR1)


def unit_error(time_BLR1: Tensor, spread: Tensor) -> Tensor:
    """How wrong the best guess of a vector of no known kind is, at a time: b_t of Eq. 17.

    Args:
        time_BLR1: the times.
        spread: root mean square of the codes' channels, a scalar.
    """
    return time_BLR1 * spread / ((1 - time_BLR1).square() * spread.square() + time_BLR1.square()).sqrt()


def score_tracker_loss(mean_BLRC: Tensor, target_BLRC: Tensor, unit_BLR1: Tensor, weight_BL: Tensor) -> Tensor:
    """A tracker's squared error, a scalar (Eq. 18).

    Args:
        mean_BLRC: the vectors that it expects at noised points.
        target_BLRC: those that there were, or those that the teacher expects.
        unit_BLR1: the error to measure in, see `unit_error`.
        weight_BL: of each token in the mean, 0 for known ones; over the whole update they add up to 1.
    """
    return (((mean_BLRC - target_BLRC) / unit_BLR1).square().mean((-2, -1)) * weight_BL).sum()


def score_step(
    code_BLC: Tensor,
    student_BLRC: Tensor,
    teacher_BLRC: Tensor,
    unit_BLR1: Tensor,
    weight_BLR1: Tensor | float = 1.0,
) -> Tensor:
    """The gradient that codes go down, for their scores to agree: both's weighed difference (Eq. 19, 22), [B, L, C].

    Args:
        code_BLC: the codes.
        student_BLRC: what the tracker expects at their noised points.
        teacher_BLRC: what the teacher expects there.
        unit_BLR1: see `score_tracker_loss`.
        weight_BLR1: of each of the points.
    """
    size_BLR1 = (code_BLC.unsqueeze(2) - teacher_BLRC).abs().mean(-1, keepdim=True).maximum(_LEAST_SIZE * unit_BLR1)
    return ((student_BLRC - teacher_BLRC) / size_BLR1 * weight_BLR1).mean(2)


def score_loss(
    code_BLC: Tensor,
    student_BLRC: Tensor,
    teacher_BLRC: Tensor,
    nearest_BLC: Tensor,
    unit_BLR1: Tensor,
    weight_BL: Tensor,
) -> ScoreLosses:
    """The loss whose gradient moves a student's vectors towards the teacher's scores (Eq. 19).

    Args:
        code_BLC: the student's vectors; gradients flow to them alone.
        student_BLRC: what the tracker expects at their noised points.
        teacher_BLRC: what the teacher expects there.
        nearest_BLC: their nearest codes.
        unit_BLR1: see `score_tracker_loss`, like the next.
        weight_BL: weights.
    """
    held_BLC = code_BLC.detach()
    step_BLC = score_step(held_BLC, student_BLRC, teacher_BLRC, unit_BLR1)
    # Its gradient to the vectors is the step itself, over C.
    total = 0.5 * ((code_BLC - (held_BLC - step_BLC)).square().mean(-1) * weight_BL).sum()
    difference = (step_BLC.square().mean(-1).sqrt() * weight_BL).sum()
    gap = ((held_BLC - nearest_BLC).square().sum(-1) * weight_BL).sum()
    tracker = score_tracker_loss(student_BLRC, held_BLC.unsqueeze(2), unit_BLR1, weight_BL)
    return ScoreLosses(total, total.new_zeros(()), difference, gap, tracker)


def token_score_loss(
    log_pi_BLV: Tensor,
    log_psi_BLV: Tensor,
    step_BLC: Tensor,
    token_BL: Tensor,
    codebook_VC: Tensor,
    weight_BL: Tensor,
) -> TokenScoreLosses:
    """The loss whose gradient moves a student's tokens towards the teacher's scores (Eq. 22).

    Args:
        log_pi_BLV: the student's log probabilities; gradients flow to them alone.
        log_psi_BLV: the tracker's on the student's tokens.
        step_BLC: at their codes, see `score_step`.
        token_BL: the student's tokens.
        codebook_VC: the codes.
        weight_BL: of each token in the mean, 0 for known ones; over the whole update they add up to 1.
    """
    pi_BLV = log_pi_BLV.exp()
    # The gradient of the expected code stands for that of the likeliest token's, which has none.
    total = (((pi_BLV @ codebook_VC) * step_BLC).mean(-1) * weight_BL).sum()
    difference = (step_BLC.square().mean(-1).sqrt() * weight_BL).sum()
    entropy = -((pi_BLV.detach() * log_pi_BLV.detach()).sum(-1) * weight_BL).sum()
    tracker = tracker_loss(log_psi_BLV, token_BL, weight_BL).detach()
    return TokenScoreLosses(total, total.new_zeros(()), difference, entropy, tracker)
