"""The training loop: a student learns to jump from noise to the end of the teacher's trajectories.

Every random choice of update s follows from (seed, s) alone, so a stopped run that goes on equals one that was
never stopped.

Axis letters: B batch, L tokens in a sequence, C code channels, N trajectories, S blocks.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.checkpoint import load_training, save_training
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition
from distilled_decoding.losses import ImageDistance, Losses, LossWeights, corrupt, distillation_loss
from distilled_decoding.noise import gaussian_noise
from distilled_decoding.store import Shard
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Teacher


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained.

    Attributes:
        num_steps: updates.
        batch_size: trajectories in an update.
        learning_rate: peak of the schedule: linear warm-up, then a cosine to a hundredth.
        warmup: updates until the peak.
        weight_decay: AdamW's, on matrices only.
        grad_clip: largest norm of the gradient.
        ema_rate: of the weights that are sampled from; at first min(ema_rate, (s + 1) / (s + 10)).
        start_blocks: where the student learns to start; 0 is first.
        start_weights: how often each of them is drawn; () draws all alike.
        block_weights: weight of each block in the loss; () weighs all tokens alike.
        loss: weights of the parts of the loss.
        bf16: run the student under bfloat16 autocast.
        compile: use torch.compile: about twice as fast, after a wait; needs a C++ compiler on a CPU.
        seed: of the training order and the starting blocks.

    Raises:
        ValueError: a setting outside its range.
    """

    num_steps: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_rate: float = 0.998
    start_blocks: tuple[int, ...] = (0,)
    start_weights: tuple[float, ...] = ()
    block_weights: tuple[float, ...] = ()
    loss: LossWeights = field(default_factory=LossWeights)
    bf16: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning rate must be positive, got {self.learning_rate}")
        if not 0 <= self.ema_rate < 1:
            raise ValueError(f"EMA rate must lie in 0..1 (1 excluded), got {self.ema_rate}")
        if self.start_weights and len(self.start_weights) != len(self.start_blocks):
            raise ValueError(
                f"{len(self.start_weights)} start weights do not fit {len(self.start_blocks)} start blocks"
            )

    def check(self, order: BlockOrder) -> None:
        """Compare with the teacher's blocks.

        Raises:
            ValueError: start blocks that leave the sequence, or weights that do not fit its blocks.
        """
        order.check_schedule(self.start_blocks, self.start_blocks)
        if self.block_weights and len(self.block_weights) != order.num_blocks:
            raise ValueError(f"{len(self.block_weights)} block weights do not fit {order.num_blocks} blocks")


@dataclass(frozen=True)
class Update:
    """What is reported after an update: its number, counted from 1, its losses and learning rate."""

    step: int
    losses: Losses
    learning_rate: float


def learning_rate_at(step: int, settings: DistillSettings) -> float:
    """The learning rate of update `step`, counted from 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.num_steps - settings.warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def batch_indices(step: int, settings: DistillSettings, num_trajectories: int) -> Tensor:
    """The trajectories of update `step`, int64 [B]: seeded permutations laid end to end."""
    places_B = torch.arange(step * settings.batch_size, (step + 1) * settings.batch_size)
    epoch_B = places_B // num_trajectories
    orders = {
        int(e): torch.randperm(num_trajectories, generator=_generator(settings, 0, int(e))) for e in epoch_B.unique()
    }
    return torch.stack([orders[int(e)][int(p)] for e, p in zip(epoch_B, places_B % num_trajectories, strict=True)])


def start_blocks_of(step: int, settings: DistillSettings) -> Tensor:
    """How many blocks are known to the student in each row of update `step`, int64 [B]."""
    weights = torch.tensor(settings.start_weights or (1.0,) * len(settings.start_blocks))
    choice_B = torch.multinomial(weights, settings.batch_size, True, generator=_generator(settings, 1, step))
    return torch.tensor(settings.start_blocks)[choice_B]


def _generator(settings: DistillSettings, stream: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((settings.seed * 2 + stream) * 1_000_000_007 + number)


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.Optimizer:
    """AdamW whose weight decay spares vectors (norms, biases)."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, step: int, settings: DistillSettings) -> None:
    """Move the averaged weights towards the student's after update `step`, counted from 0."""
    rate = min(settings.ema_rate, (step + 1) / (step + 10))
    for average, value in zip(ema.parameters(), student.parameters(), strict=True):
        average.lerp_(value, 1 - rate)


def batch_loss(
    teacher: Teacher,
    student: Callable[[Tensor, Condition, Tensor], StudentOutput],
    batch: Shard,
    known_blocks_B: Tensor,
    settings: DistillSettings,
    image_distance: ImageDistance | None = None,
) -> Losses:
    """The loss of a student on some trajectories, each started from its own number of known blocks (Eq. 5 to 7)."""
    order, codebook_VC = teacher.order, teacher.codebook
    device = codebook_VC.device
    token_BL, known_blocks_B = batch.token_NL.to(device), known_blocks_B.to(device)
    code_BLC = lookup(token_BL, codebook_VC)
    noise_BLC = gaussian_noise(batch.key_N.to(device), order.length, codebook_VC.shape[1])
    known_BL = order.known_BL(known_blocks_B)
    condition = Condition(batch.label_N, teacher.num_classes).to(device)
    with _autocast(device, settings):
        output = student(corrupt(noise_BLC, code_BLC, known_BL), condition, known_blocks_B)
    weight_L = (
        torch.tensor(settings.block_weights, device=device)[order.block_L(device)] if settings.block_weights else None
    )
    return distillation_loss(
        output, token_BL, code_BLC, known_BL, settings.loss, weight_L, teacher.decode, image_distance
    )


def _autocast(device: torch.device, settings: DistillSettings) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16)


def distill(
    teacher: Teacher,
    student: nn.Module,
    trajectories: Shard,
    settings: DistillSettings,
    state: Path,
    on_update: Callable[[Update], bool],
    image_distance: ImageDistance | None = None,
    save_every: int = 500,
) -> nn.Module | None:
    """Train a student and return its averaged weights.

    Args:
        teacher: made the trajectories; gives order, codebook and decoder.
        student: trained in place, on the teacher's device.
        trajectories: what it learns.
        settings: see there.
        state: file that holds the run; when it is there, the run goes on from it.
        on_update: hears of every update; when it returns False the run is saved and stops.
        image_distance: the perceptual distance, needed when its weight is positive.
        save_every: updates between saves.

    Returns:
        The averaged student, or None when the run was stopped before its end.

    Raises:
        ValueError: settings that do not fit the teacher.
    """
    settings.check(teacher.order)
    if settings.loss.perceptual_weight > 0 and image_distance is None:
        raise ValueError(f"a perceptual weight of {settings.loss.perceptual_weight} needs an image distance")
    ema = copy.deepcopy(student).requires_grad_(False)
    optimizer = make_optimizer(student, settings)
    modules, optimizers = {"student": student, "ema": ema}, {"optimizer": optimizer}
    first = load_training(state, modules, optimizers) if state.is_file() else 0
    forward = torch.compile(student.train()) if settings.compile else student.train()
    for step in range(first, settings.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, settings)
        batch = trajectories[batch_indices(step, settings, len(trajectories))]
        losses = batch_loss(teacher, forward, batch, start_blocks_of(step, settings), settings, image_distance)
        optimizer.zero_grad()
        losses.total.backward()
        nn.utils.clip_grad_norm_(student.parameters(), settings.grad_clip)
        optimizer.step()
        update_ema(ema, student, step, settings)
        keep_on = on_update(Update(step + 1, losses, group["lr"]))
        if not keep_on or (step + 1) % save_every == 0 or step + 1 == settings.num_steps:
            save_training(state, modules, optimizers, step + 1)
        if not keep_on:
            return None
    return ema.eval()
