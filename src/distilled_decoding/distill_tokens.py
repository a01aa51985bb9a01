"""Token matching: the student draws tokens of its own, and the teacher's conditionals on them say what to change.

For each of the student's starting blocks a tracker, the teacher's network to begin with, learns how likely the student
makes a token after those before it; where that is more than the teacher would have it, the student is turned down. One
start is drawn for all rows of an update, since what a tracker learns from several would be their mixture.

Axis letters: B batch, L tokens in a sequence, K tokens of the known blocks, V codebook entries, C code channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition, ConditionTable
from distilled_decoding.distill import (
    STUDENT,
    DistillSettings,
    Forward,
    LossesOf,
    batch_indices,
    start_blocks_of,
    token_weights,
)
from distilled_decoding.distill_trajectories import output_loss
from distilled_decoding.losses import ImageDistance, Losses, TokenLosses, Totals, token_loss, tracker_loss
from distilled_decoding.noise import gaussian_noise, image_keys, uniform
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.student import STUDENT_STREAM, StudentOutput, draw_tokens
from distilled_decoding.teacher import Guidance, Teacher, TeacherSampling, log_probabilities

ALL = slice(None)
"""All rows of an update."""


class Tracker(nn.Module):
    """A teacher's network as a function: log probabilities of all tokens of a sequence, without guidance.

    Args:
        teacher: a `Teacher` that is a module; those of its parameters are trained that require a gradient.
    """

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """Log probabilities of each token given the blocks before its own, float32 [B, L, V]."""
        return self.teacher.forced_logits(token_BL, condition, Guidance()).float().log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a student made of some noise.

    Attributes:
        output: its predictions.
        log_pi_BLV: the distributions that its tokens are drawn from, float32.
        token_BL: known tokens, and behind them those that were drawn.
        condition: what was asked for.
    """

    output: StudentOutput
    log_pi_BLV: Tensor
    token_BL: Tensor
    condition: Condition


@dataclass(frozen=True, eq=False)
class Tokens:
    """The method `tokens`, a `distill.Method`.

    Attributes:
        teacher: judges the tokens.
        new_tracker: makes a copy of the teacher; those of its parameters are trained that require a gradient.
        table: what images are asked for.
        sampling: the teacher's distribution, which the student is to match.
        settings: see there.
        trajectories: the teacher's, of the same table. With them, noise, conditions and known blocks are theirs;
            without, noise is ever new, conditions are those of the table in turn, and known blocks are the student's
            own, of one step.
        image_distance: the perceptual distance, needed when it has a part in the loss on trajectories.

    Raises:
        ValueError: settings that do not fit the teacher, or a loss on trajectories without any.
    """

    teacher: Teacher
    new_tracker: Callable[[], nn.Module]
    table: ConditionTable
    sampling: TeacherSampling
    settings: DistillSettings
    trajectories: Shard | TrajectoryStore | None = None
    image_distance: ImageDistance | None = None

    def __post_init__(self) -> None:
        settings = self.settings
        settings.check(self.teacher.order, self.teacher.order.num_blocks)
        if settings.tokens.trajectory_weight > 0 and self.trajectories is None:
            raise ValueError(f"a trajectory weight of {settings.tokens.trajectory_weight} needs trajectories")
        if self.image_distance is None and settings.tokens.trajectory_weight * settings.loss.perceptual_weight > 0:
            raise ValueError(f"a perceptual weight of {settings.loss.perceptual_weight} needs an image distance")

    @cached_property
    def networks(self) -> Mapping[str, tuple[nn.Module, float]]:
        """A tracker for each starting block."""
        rate = self.settings.tokens.tracker_rate * self.settings.learning_rate
        return {_name(start): (Tracker(self.new_tracker()), rate) for start in self.settings.start_blocks}

    def steps(self, update: int) -> Iterator[tuple[str, LossesOf]]:
        """See `distill.Method`: the tracker's steps and then the student's, each on a batch of its own."""
        known_blocks = int(start_blocks_of(update, self.settings)[0])
        batches = self.settings.tokens.tracker_updates + 1
        *tracked, last = range(update * batches, (update + 1) * batches)
        for number in tracked:
            yield _name(known_blocks), partial(self._losses_of, self.tracker_losses, number, known_blocks)
        yield STUDENT, partial(self._losses_of, self.student_losses, last, known_blocks)

    def _losses_of(
        self,
        losses: Callable[..., Losses],
        number: int,
        known_blocks: int,
        forwards: Mapping[str, Forward],
        part: slice,
    ) -> Losses:
        return losses(self.batch(number, part), known_blocks, forwards, part)

    def tracker_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> Losses:
        """What the tracker of a start learns from: the student's tokens (Eq. 12).

        Args:
            begun: rows of a batch, see `batch`.
            known_blocks: how many leading blocks are known.
            forwards: student and trackers by name.
            part: which rows of the update these are.
        """
        with torch.no_grad():
            drawn = self.drawn(begun, known_blocks, forwards[STUDENT])
        log_psi_BLV = self._track(forwards[_name(known_blocks)], drawn)
        return Losses(tracker_loss(log_psi_BLV, drawn.token_BL, self._weights(known_blocks, part)))

    def student_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> TokenLosses:
        """What the student learns from: the teacher's conditionals on its tokens (Eq. 11, 14); see `tracker_losses`."""
        settings = self.settings.tokens
        drawn = self.drawn(begun, known_blocks, forwards[STUDENT])
        with torch.no_grad():
            logits_BLV = self.teacher.forced_logits(drawn.token_BL, drawn.condition, self.sampling.guidance)
            log_p_BLV = log_probabilities(logits_BLV, self.sampling)
            log_psi_BLV = self._track(forwards[_name(known_blocks)], drawn)
        weight_BL = self._weights(known_blocks, part)
        order = self.teacher.order
        losses = token_loss(drawn.log_pi_BLV, log_psi_BLV, log_p_BLV, drawn.token_BL, weight_BL, order, settings)
        # The code head has no say, but processes wait for a gradient of every parameter.
        total = losses.total + 0 * drawn.output.code_BLC.sum()
        if settings.trajectory_weight == 0:
            return replace(losses, total=total)
        known_blocks_B, num_blocks = self._known_blocks_B(known_blocks), self.teacher.order.num_blocks
        trajectories = output_loss(
            self.teacher,
            drawn.output,
            begun,
            known_blocks_B,
            self.settings,
            num_blocks,
            self.image_distance,
            part,
        ).total
        return replace(losses, total=total + settings.trajectory_weight * trajectories, trajectories=trajectories)

    def batch(self, number: int, part: slice = ALL) -> Shard:
        """Where sequences begin: trajectories, or numbers of conditions with keys of noise and no tokens.

        Args:
            number: of the batch, counted over the whole training.
            part: the rows of it.
        """
        settings = self.settings
        if self.trajectories is not None:
            return self.trajectories[batch_indices(number, settings, len(self.trajectories))[part]]
        row_B = range(number * settings.batch_size, (number + 1) * settings.batch_size)[part]
        # Of few conditions a pass takes each several times: a batch shall not need an order for every few rows.
        copies = math.ceil(settings.batch_size / len(self.table))
        number_B = batch_indices(number, settings, copies * len(self.table))[part] % len(self.table)
        token_BK = torch.empty(len(row_B), 0, dtype=torch.int64)
        return Shard(token_BK, number_B, image_keys("training", settings.seed, row_B))

    def drawn(self, begun: Shard, known_blocks: int, student: Forward) -> Drawn:
        """Let a student finish sequences, each token drawn by its image's own key, as in sampling.

        Args:
            begun: some rows of a batch.
            known_blocks: how many leading blocks are known.
            student: the model; gradients flow through its last pass.
        """
        order, codebook_VC = self.teacher.order, self.teacher.codebook
        temperature, device = self.settings.tokens.draw_temperature, codebook_VC.device
        condition, key_B = self.table[begun.label_N].to(device), begun.key_N.to(device)
        noise_BLC = gaussian_noise(key_B, order.length, codebook_VC.shape[1])
        uniform_BL = uniform(key_B, order.length, STUDENT_STREAM)

        def predict(x_BLC: Tensor, blocks: int) -> StudentOutput:
            known_blocks_B = torch.full((len(x_BLC),), blocks, device=device)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.bf16):
                return student(x_BLC, condition, known_blocks_B)

        num_known = order.tokens_before(known_blocks)
        known_BK = begun.token_NL[:, :num_known].to(device)
        if num_known and self.trajectories is None:
            with torch.no_grad():
                logits_BKV = predict(noise_BLC[:, :num_known], 0).logits_BLV
            known_BK = draw_tokens(logits_BKV, temperature, uniform_BL)
        x_BLC = torch.cat([lookup(known_BK, codebook_VC), noise_BLC[:, num_known:]], 1)
        output = predict(x_BLC, known_blocks)
        log_pi_BLV = (output.logits_BLV / temperature).log_softmax(-1)
        drawn_BL = draw_tokens(output.logits_BLV.detach(), temperature, uniform_BL)
        return Drawn(output, log_pi_BLV, torch.cat([known_BK, drawn_BL[:, num_known:]], 1), condition)

    def _track(self, tracker: Forward, drawn: Drawn) -> Tensor:
        with torch.autocast(drawn.token_BL.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return tracker(drawn.token_BL, drawn.condition)

    def _known_blocks_B(self, known_blocks: int) -> Tensor:
        return torch.full((self.settings.batch_size,), known_blocks)

    def _weights(self, known_blocks: int, part: slice) -> Tensor:
        """What each token of a part counts for in the mean over all unknown tokens of an update, [B, L]."""
        order, device = self.teacher.order, self.teacher.codebook.device
        known_BL = order.known_BL(self._known_blocks_B(known_blocks).to(device))
        weight_L = token_weights(order, self.settings, device)
        weight_BL = (~known_BL).float() * (1.0 if weight_L is None else weight_L)
        return weight_BL[part] / Totals.of(known_BL, weight_L).weight


def _name(known_blocks: int) -> str:
    return f"tracker-{known_blocks}"
