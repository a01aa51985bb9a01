"""Score distillation: the student makes vectors of its own, and at noised vectors its score is moved to the teacher's.

The teacher's score is exact: its conditionals are distributions over codes, and a noised code is a mixture. The
student's is a tracker's, which learns to expect the vector at a noised point, given what stands before it.

Axis letters: B batch, L tokens in a sequence, R noised vectors of a position, C code channels, D feature width, W
width of the tracker's head.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Condition, stand_ins
from distilled_decoding.distill import STUDENT, Forward
from distilled_decoding.flow import posterior_means
from distilled_decoding.losses import (
    Losses,
    Noised,
    ScoreLosses,
    ScoreSettings,
    score_loss,
    score_tracker_loss,
    unit_error,
)
from distilled_decoding.noise import gaussian_noise, uniform
from distilled_decoding.on_policy import ALL, Lesson, OnPolicy, tracker_name
from distilled_decoding.store import Shard
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import draw

_TIME_STREAM, _NOISE_STREAM, _TEACHER_STREAM = 11, 12, 13
"""Streams of an image's key: times, noise on its way to which a vector is looked at, the teacher's draws."""

_TIMES = (0.02, 0.98)
"""Where vectors are looked at: at 0 there is no score, and at 1 nothing is left to tell."""

_WAVES = 8
"""Frequencies by which the head reads a time."""


class HeadLayer(nn.Module):
    """An MLP beside a straight way, scaled, shifted and let in by the context; it begins closed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x_BLRW: Tensor, context_BLRW: Tensor) -> Tensor:
        """Vector by vector."""
        shift, scale, gate = self.modulation(F.silu(context_BLRW)).chunk(3, -1)
        return x_BLRW + gate * self.mlp(F.layer_norm(x_BLRW, x_BLRW.shape[-1:]) * (1 + scale) + shift)


class Head(nn.Module):
    """What a vector is to be, out of a noised one, its time and the feature of its position; it begins with zeros."""

    def __init__(self, channels: int, feature_width: int, settings: ScoreSettings, seed: int) -> None:
        super().__init__()
        width = settings.head_width or feature_width
        self.code_in, self.feature_in = nn.Linear(channels, width), nn.Linear(feature_width, width)
        self.time_in = nn.Sequential(nn.Linear(2 * _WAVES, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(HeadLayer(width) for _ in range(settings.head_layers))
        self.code_out = nn.Linear(width, channels)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    # Drawn on the CPU, so that it is the same everywhere.
                    drawn = torch.randn(layer.weight.shape, generator=generator, device="cpu")
                    layer.weight.copy_(drawn * layer.in_features**-0.5)
                    layer.bias.zero_()
        for layer in self.modules():
            if isinstance(layer, HeadLayer):
                nn.init.zeros_(layer.modulation.weight)
        nn.init.zeros_(self.code_out.weight)

    def forward(self, x_BLRC: Tensor, time_BLR1: Tensor, feature_BLD: Tensor) -> Tensor:
        """[B, L, R, C], for inputs of unit size."""
        angle = time_BLR1 * math.pi * 2.0 ** torch.arange(_WAVES, device=time_BLR1.device)
        time_BLRW = self.time_in(torch.cat([angle.sin(), angle.cos()], -1))
        context_BLRW = self.feature_in(feature_BLD).unsqueeze(2) + time_BLRW
        x_BLRW = self.code_in(x_BLRC)
        for layer in self.layers:
            x_BLRW = layer(x_BLRW, context_BLRW)
        return self.code_out(F.layer_norm(x_BLRW, x_BLRW.shape[-1:]))


class ScoreTracker(nn.Module):
    """A teacher's network with a head that expects vectors where they are noised, without guidance.

    Args:
        teacher: a `Teacher` that is a module and has `forced_features`; those of its parameters are trained that
            require a gradient and that the features depend on.
        settings: of the head.
        seed: of its first values.

    Raises:
        ValueError: the teacher offers no features.
    """

    def __init__(self, teacher: Any, settings: ScoreSettings, seed: int) -> None:
        super().__init__()
        if not hasattr(teacher, "forced_features"):
            raise ValueError(
                f"score distillation needs features, which {type(teacher).__name__} does not offer: give it "
                "forced_features (see Teacher), or use another method"
            )
        self.teacher, codebook_VC = teacher, teacher.codebook
        token_1L = torch.zeros(1, teacher.order.length, dtype=torch.int64, device=codebook_VC.device)
        learnt = [parameter for parameter in teacher.parameters() if parameter.requires_grad]
        with torch.enable_grad():
            feature_1LD = teacher.forced_features(token_1L, stand_ins(teacher, 1).to(codebook_VC.device))
            gradients = torch.autograd.grad(feature_1LD.sum(), learnt, allow_unused=True)
        # Processes wait for a gradient of every parameter, and the logits' own would have none.
        for parameter, gradient in zip(learnt, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        with codebook_VC.device:
            self.head = Head(codebook_VC.shape[1], feature_1LD.shape[-1], settings, seed)

    def forward(self, token_BL: Tensor, condition: Condition, x_BLRC: Tensor, time_BLR1: Tensor) -> Tensor:
        """The vector to expect at each noised one, given the tokens in the blocks before, float32 (Eq. 17)."""
        spread = code_spread(self.teacher.codebook)
        power_BLR1 = (1 - time_BLR1).square() * spread.square() + time_BLR1.square()
        feature_BLD = self.teacher.forced_features(token_BL, condition)
        out_BLRC = self.head(x_BLRC / power_BLR1.sqrt(), time_BLR1, feature_BLD).float()
        guess_BLRC = (1 - time_BLR1) * spread.square() / power_BLR1 * x_BLRC
        return guess_BLRC + unit_error(time_BLR1, spread) * out_BLRC


@dataclass(frozen=True, eq=False)
class Made:
    """What a student made of some noise.

    Attributes:
        output: its predictions; its logits are left out where nothing needs them.
        code_BLC: known codes, and behind them its vectors.
        token_BL: their nearest codes, which teacher and tracker read.
        condition: what was asked for.
        key_B: keys of the images.
    """

    output: StudentOutput
    code_BLC: Tensor
    token_BL: Tensor
    condition: Condition
    key_B: Tensor


@dataclass(frozen=True, eq=False)
class Scores(OnPolicy):
    """The method `scores`, a `distill.Method`; for attributes and errors see `OnPolicy`."""

    @property
    def split_block(self) -> int:
        """In front of the first block: all come from the code head."""
        return 0

    def tracker(self) -> nn.Module:
        """See `OnPolicy`."""
        return ScoreTracker(self.new_tracker(), self.settings.scores, self.settings.seed % 2**63)

    def lessons(self, update: int) -> tuple[Lesson, Lesson | None]:
        """See `OnPolicy`: first the trackers alone learn, from the teacher."""
        if update < self.settings.first_update:
            return self.teacher_losses, None
        return self.tracker_losses, self.student_losses

    def teacher_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> Losses:
        """What the tracker of a start learns first: what the teacher expects, behind the student's tokens (Eq. 18).

        Args:
            begun: rows of a batch, see `batch`.
            known_blocks: how many leading blocks are known.
            forwards: student and trackers by name.
            part: which rows of the update these are.
        """
        with torch.no_grad():
            made = self.made(begun, known_blocks, forwards[STUDENT])
            log_p_BLV = self.judged(made.token_BL, made.condition)
            token_BL = draw(log_p_BLV, uniform(made.key_B, self.teacher.order.length, _TEACHER_STREAM))
            noised = self._noised(lookup(token_BL, self.teacher.codebook), made.key_B)
            target_BLRC = expected_codes(noised, log_p_BLV, self.teacher.codebook)
        mean_BLRC = self._followed(made, noised, known_blocks, forwards)
        return Losses(score_tracker_loss(mean_BLRC, target_BLRC, self._unit(noised), self.weights(known_blocks, part)))

    def tracker_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> Losses:
        """What the tracker of a start learns from: the student's vectors (Eq. 18); see `teacher_losses`."""
        with torch.no_grad():
            made = self.made(begun, known_blocks, forwards[STUDENT])
        noised = self._noised(made.code_BLC, made.key_B)
        mean_BLRC, target_BLRC = self._followed(made, noised, known_blocks, forwards), made.code_BLC.unsqueeze(2)
        return Losses(score_tracker_loss(mean_BLRC, target_BLRC, self._unit(noised), self.weights(known_blocks, part)))

    def student_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> ScoreLosses:
        """What the student learns from: the difference of two scores (Eq. 19); see `teacher_losses`."""
        made = self.made(begun, known_blocks, forwards[STUDENT])
        with torch.no_grad():
            noised = self._noised(made.code_BLC, made.key_B)
            log_p_BLV = self.judged(made.token_BL, made.condition)
            teacher_BLRC = expected_codes(noised, log_p_BLV, self.teacher.codebook)
            student_BLRC = self._followed(made, noised, known_blocks, forwards)
        nearest_BLC = lookup(made.token_BL, self.teacher.codebook)
        unit_BLR1, weight_BL = self._unit(noised), self.weights(known_blocks, part)
        losses = score_loss(made.code_BLC, student_BLRC, teacher_BLRC, nearest_BLC, unit_BLR1, weight_BL)
        # The logits have no say, but processes wait for a gradient of every parameter.
        losses = replace(losses, total=losses.total + 0 * made.output.logits_BLV.sum())
        return self.mixed(losses, made.output, begun, known_blocks, part)

    def made(self, begun: Shard, known_blocks: int, student: Forward) -> Made:
        """Let a student finish sequences, as in sampling.

        Args:
            begun: some rows of a batch.
            known_blocks: how many leading blocks are known.
            student: the model; gradients flow through its last pass.
        """
        condition, key_B, noise_BLC = self.asked(begun)
        codebook_VC, num_known = self.teacher.codebook, self.teacher.order.tokens_before(known_blocks)
        known_BKC = lookup(begun.token_NL[:, :num_known].to(codebook_VC.device), codebook_VC)
        if num_known and self.trajectories is None:
            with torch.no_grad():
                known_BKC = _codes(self.predict(student, noise_BLC[:, :num_known], condition, 0, 0))
        x_BLC = torch.cat([known_BKC, noise_BLC[:, num_known:]], 1)
        num_logits = None if self.settings.on_policy.trajectory_weight > 0 else 0
        output = self.predict(student, x_BLC, condition, known_blocks, num_logits)
        code_BLC = torch.cat([known_BKC, _codes(output)[:, num_known:]], 1)
        return Made(output, code_BLC, nearest(code_BLC.detach(), codebook_VC), condition, key_B)

    def _noised(self, code_BLC: Tensor, key_B: Tensor) -> Noised:
        return noised_codes(code_BLC, key_B, self.settings.scores.noised)

    def _followed(self, made: Made, noised: Noised, known_blocks: int, forwards: Mapping[str, Forward]) -> Tensor:
        """What the tracker of a start expects at noised vectors."""
        tracker = forwards[tracker_name(known_blocks)]
        return self.track(tracker, made.token_BL, made.condition, noised.x_BLRC, noised.time_BLR1)

    def _unit(self, noised: Noised) -> Tensor:
        return unit_error(noised.time_BLR1, code_spread(self.teacher.codebook))


def noised_codes(code_BLC: Tensor, key_B: Tensor, num: int) -> Noised:
    """Codes on their way to noise of the images' keys, each at `num` times (Eq. 15)."""
    _, length, channels = code_BLC.shape
    noise_BLRC = gaussian_noise(key_B, length * num, channels, _NOISE_STREAM).unflatten(1, (length, num))
    first, last = _TIMES
    time_BLR = first + (last - first) * uniform(key_B, length * num, _TIME_STREAM).unflatten(1, (length, num))
    return Noised.of(code_BLC, noise_BLRC, time_BLR.float().unsqueeze(-1))


def expected_codes(noised: Noised, log_p_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """The code to expect at each noised one, given how its token is distributed, exactly (Eq. 16), [B, L, R, C]."""
    time_NR = 1 - noised.time_BLR1.flatten(0, 1).squeeze(-1)
    mean_NRC = posterior_means(noised.x_BLRC.flatten(0, 1), time_NR, log_p_BLV.flatten(0, 1), codebook_VC)
    return mean_NRC.view(noised.x_BLRC.shape)


def code_spread(codebook_VC: Tensor) -> Tensor:
    """Root mean square of the codes' channels, a scalar."""
    return codebook_VC.float().square().mean().sqrt()


def _codes(output: StudentOutput) -> Tensor:
    """The vectors of a student, whose head is a code head: settings refuse any other."""
    assert output.code_BLC is not None
    return output.code_BLC
