"""What the methods share in which a student learns from the teacher's judgement of what it makes itself.

The teacher judges each position by what stands before it, and a tracker, which begins as the teacher's network,
learns how the student makes it. At first the tracker learns alone, and then student and tracker take turns. Each of
the student's starting blocks has a tracker, and all rows of an update have one start, since what a tracker learns
from several would be their mixture.

Axis letters: B batch, L tokens in a sequence, V codebook entries, C code channels.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

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
from distilled_decoding.flow import FlowSettings
from distilled_decoding.losses import ImageDistance, Losses, MixedLosses, Totals
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Teacher, TeacherSampling, log_probabilities

ALL = slice(None)
"""All rows of an update."""

Lesson = Callable[[Shard, int, Mapping[str, Forward], slice], Losses]
"""The losses of a network on some rows of a batch, given the known blocks, all networks, and which rows they are."""

Mixed = TypeVar("Mixed", bound=MixedLosses)


@dataclass(frozen=True, eq=False)
class OnPolicy:
    """A `distill.Method`, but for the trackers and what is learnt.

    Attributes:
        teacher: judges what the student makes.
        new_tracker: makes a copy of the teacher; those of its parameters are trained that require a gradient.
        table: what images are asked for.
        sampling: the teacher's distribution, which the student is to match.
        settings: see there.
        trajectories: the teacher's, of the same table. With them, noise, conditions and known blocks are theirs;
            without, noise is ever new, conditions are those of the table in turn, and known blocks are the student's
            own, of one step.
        image_distance: the perceptual distance, needed when it has a part in the loss on trajectories.
        flow: the solver of a student's flow head.

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
    flow: FlowSettings = FlowSettings()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        settings, trajectory_weight = self.settings, self.settings.on_policy.trajectory_weight
        settings.check(self.teacher.order, self.split_block)
        if trajectory_weight > 0 and self.trajectories is None:
            raise ValueError(f"a trajectory weight of {trajectory_weight} needs trajectories")
        if self.image_distance is None and trajectory_weight * settings.loss.perceptual_weight > 0:
            raise ValueError(f"a perceptual weight of {settings.loss.perceptual_weight} needs an image distance")

    @property
    def split_block(self) -> int:
        """Where sampling will go over from the logits to the code head."""
        raise NotImplementedError

    def tracker(self) -> nn.Module:
        """What learns how the student makes its positions, before it has learnt anything."""
        raise NotImplementedError

    def lessons(self, update: int) -> tuple[Lesson, Lesson | None]:
        """What the tracker of an update learns, and then the student, unless it does not learn yet."""
        raise NotImplementedError

    @cached_property
    def networks(self) -> Mapping[str, tuple[nn.Module, float]]:
        """A tracker for each starting block."""
        rate = self.settings.on_policy.tracker_rate * self.settings.learning_rate
        return {tracker_name(start): (self.tracker(), rate) for start in self.settings.start_blocks}

    def steps(self, update: int) -> Iterator[tuple[str, LossesOf]]:
        """See `distill.Method`: the tracker's steps and then the student's, each on a batch of its own."""
        known_blocks = int(start_blocks_of(update, self.settings)[0])
        batches = self.settings.on_policy.tracker_updates + 1
        *tracked, last = range(update * batches, (update + 1) * batches)
        trackers, students = self.lessons(update)
        for number in tracked:
            yield tracker_name(known_blocks), partial(self._losses_of, trackers, number, known_blocks)
        if students is not None:
            yield STUDENT, partial(self._losses_of, students, last, known_blocks)

    def _losses_of(
        self, lesson: Lesson, number: int, known_blocks: int, forwards: Mapping[str, Forward], part: slice
    ) -> Losses:
        return lesson(self.batch(number, part), known_blocks, forwards, part)

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

    def asked(self, begun: Shard) -> tuple[Condition, Tensor, Tensor]:
        """Condition, keys and noise of some rows of a batch, on the teacher's device."""
        codebook_VC = self.teacher.codebook
        key_B = begun.key_N.to(codebook_VC.device)
        noise_BLC = gaussian_noise(key_B, self.teacher.order.length, codebook_VC.shape[1])
        return self.table[begun.label_N].to(codebook_VC.device), key_B, noise_BLC

    def predict(
        self, student: Forward, x_BLC: Tensor, condition: Condition, known_blocks: int, num_logits: int | None = None
    ) -> StudentOutput:
        """A pass of a student, for the arguments see there; all rows have as many known blocks."""
        known_blocks_B = torch.full((len(x_BLC),), known_blocks, device=x_BLC.device)
        with torch.autocast(x_BLC.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return student(x_BLC, condition, known_blocks_B, num_logits)

    @cached_property
    def _teacher_pass(self) -> Forward:
        """Its logits, compiled like the networks that are trained."""
        return torch.compile(self.teacher.forced_logits) if self.settings.compile else self.teacher.forced_logits

    def track(self, judge: Forward, *inputs: Any) -> Tensor:
        """A pass of a tracker or the teacher."""
        with torch.autocast(self.teacher.codebook.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return judge(*inputs)

    @torch.no_grad()
    def judged(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """The teacher's log p of every token given the blocks before its own, float32 [B, L, V]."""
        logits_BLV = self.track(self._teacher_pass, token_BL, condition, self.sampling.guidance)
        return log_probabilities(logits_BLV.float(), self.sampling)

    def weights(self, known_blocks: int, part: slice) -> Tensor:
        """What each token of a part counts for in the mean over all unknown tokens of an update, [B, L]."""
        order, device = self.teacher.order, self.teacher.codebook.device
        known_BL = order.known_BL(self._known_blocks_B(known_blocks).to(device))
        weight_L = token_weights(order, self.settings, device)
        weight_BL = (~known_BL).float() * (1.0 if weight_L is None else weight_L)
        return weight_BL[part] / Totals.of(known_BL, weight_L).weight

    def mixed(self, losses: Mixed, output: StudentOutput, begun: Shard, known_blocks: int, part: slice) -> Mixed:
        """A student's losses with its loss on trajectories, as far as that counts.

        Args:
            losses: without.
            output: what it predicts from the trajectories' states.
            begun: the trajectories.
            known_blocks: of all rows.
            part: which rows of the update they are.
        """
        weight = self.settings.on_policy.trajectory_weight
        if weight == 0:
            return losses
        known_blocks_B = self._known_blocks_B(known_blocks)
        more = output_loss(
            self.teacher,
            output,
            begun,
            known_blocks_B,
            self.settings,
            self.split_block,
            self.image_distance,
            part,
        ).total
        return replace(losses, total=losses.total + weight * more, trajectories=more)

    def _known_blocks_B(self, known_blocks: int) -> Tensor:
        return torch.full((self.settings.batch_size,), known_blocks)


def tracker_name(known_blocks: int) -> str:
    """What the tracker of a start is called among the networks of a run."""
    return f"tracker-{known_blocks}"
