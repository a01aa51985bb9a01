"""Distillation from trajectories: the student learns to jump from noise to where the teacher's flow map ends.

Axis letters: B batch, L tokens in a sequence, C code channels, N trajectories.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
from distilled_decoding.losses import (
    ImageDistance,
    Totals,
    TrajectoryLosses,
    corrupt,
    distillation_loss,
    perceptual_loss,
)
from distilled_decoding.noise import gaussian_noise
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.student import StudentOutput, soft_sequence
from distilled_decoding.teacher import Teacher


@dataclass(frozen=True, eq=False)
class Trajectories:
    """The method `trajectories`, a `distill.Method`.

    Attributes:
        teacher: made the trajectories; gives order, codebook and decoder.
        trajectories: what the student learns; each process reads its own rows of every update.
        table: what they were asked for.
        settings: see there.
        split_block: where sampling will go over from the logits to the code head; the perceptual loss follows it.
        image_distance: the perceptual distance, needed when its weight is positive.

    Raises:
        ValueError: settings that do not fit the teacher, or a distance that is missing.
    """

    teacher: Teacher
    trajectories: Shard | TrajectoryStore
    table: ConditionTable
    settings: DistillSettings
    split_block: int
    image_distance: ImageDistance | None = None

    def __post_init__(self) -> None:
        self.settings.check(self.teacher.order, self.split_block)
        weight = self.settings.loss.perceptual_weight
        if weight > 0 and self.image_distance is None:
            raise ValueError(f"a perceptual weight of {weight} needs an image distance")

    @property
    def networks(self) -> Mapping[str, tuple[nn.Module, float]]:
        """None beside the student."""
        return {}

    def steps(self, update: int) -> Iterator[tuple[str, LossesOf]]:
        """See `distill.Method`: one step, the student's."""
        index_B = batch_indices(update, self.settings, len(self.trajectories))
        known_blocks_B = start_blocks_of(update, self.settings)

        def losses_of(forwards: Mapping[str, Forward], part: slice) -> TrajectoryLosses:
            batch, settings = self.trajectories[index_B[part]], self.settings
            condition, student = self.table[batch.label_N], forwards[STUDENT]
            return batch_loss(
                self.teacher,
                student,
                batch,
                condition,
                known_blocks_B,
                settings,
                self.split_block,
                self.image_distance,
                part,
            )

        yield STUDENT, losses_of


def batch_loss(
    teacher: Teacher,
    student: Callable[[Tensor, Condition, Tensor], StudentOutput],
    batch: Shard,
    condition: Condition,
    known_blocks_B: Tensor,
    settings: DistillSettings,
    split_block: int,
    image_distance: ImageDistance | None = None,
    part: slice = slice(None),  # noqa: B008 - a slice is a constant
) -> TrajectoryLosses:
    """The loss of a student on some trajectories, each started from its own number of known blocks (Eq. 5, 6, 7).

    Args:
        teacher: see `Trajectories`, like the others that are not named here.
        student: predicts.
        batch: the trajectories of a part of an update.
        condition: what they were asked for.
        known_blocks_B: of all rows of the update.
        settings: see there.
        split_block: likewise.
        image_distance: likewise.
        part: the rows of the update that `batch` holds; the losses of all parts add up to those of the update.
    """
    order, codebook_VC = teacher.order, teacher.codebook
    device = codebook_VC.device
    own_blocks_B = known_blocks_B[part].to(device)
    code_BLC = lookup(batch.token_NL.to(device), codebook_VC)
    noise_BLC = gaussian_noise(batch.key_N.to(device), order.length, codebook_VC.shape[1])
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        x_BLC = corrupt(noise_BLC, code_BLC, order.known_BL(own_blocks_B))
        output = student(x_BLC, condition.to(device), own_blocks_B)
    return output_loss(teacher, output, batch, known_blocks_B, settings, split_block, image_distance, part)


def output_loss(
    teacher: Teacher,
    output: StudentOutput,
    batch: Shard,
    known_blocks_B: Tensor,
    settings: DistillSettings,
    split_block: int,
    image_distance: ImageDistance | None,
    part: slice,
) -> TrajectoryLosses:
    """The loss of what a student predicted from the states of some trajectories (Eq. 7).

    Args:
        teacher: see `batch_loss`, like all others.
        output: what the student predicted.
        batch: the trajectories.
        known_blocks_B: of all rows of the update.
        settings: of the training.
        split_block: of the sampling.
        image_distance: where its weight is positive.
        part: the rows.
    """
    order, codebook_VC = teacher.order, teacher.codebook
    device = codebook_VC.device
    token_BL, known_blocks_B = batch.token_NL.to(device), known_blocks_B.to(device)
    code_BLC = lookup(token_BL, codebook_VC)
    weight_L = token_weights(order, settings, device)
    totals = Totals.of(order.known_BL(known_blocks_B), weight_L)
    known_BL = order.known_BL(known_blocks_B[part])
    perceptual = None
    if settings.loss.perceptual_weight > 0:
        assert image_distance is not None
        predicted_BLC = soft_sequence(output, codebook_VC, order.tokens_before(split_block))
        predicted_BLC = torch.where(known_BL.unsqueeze(-1), code_BLC, predicted_BLC)
        share = len(batch) / len(known_blocks_B)
        perceptual = share * perceptual_loss(predicted_BLC, code_BLC, teacher.decode, image_distance)
    return distillation_loss(output, token_BL, code_BLC, known_BL, settings.loss, weight_L, perceptual, totals)
