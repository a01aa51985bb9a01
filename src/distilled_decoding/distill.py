"""The training loop: a student learns to jump from noise to the end of the teacher's trajectories.

Every random choice of an update follows from the seed and its number alone, so a stopped run that goes on equals
one that was never stopped, and any number of processes learn the same in the same order.

Axis letters: B batch, L tokens in a sequence, C code channels, N trajectories, S blocks.
"""

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition, ConditionTable
from distilled_decoding.losses import (
    ImageDistance,
    Losses,
    LossWeights,
    Totals,
    corrupt,
    distillation_loss,
    perceptual_loss,
)
from distilled_decoding.noise import gaussian_noise, image_keys, shuffled, uniform
from distilled_decoding.parallel import (
    RunSettings,
    Trainee,
    any_process,
    own_parts,
    recompute_layers,
    shard,
    whole,
)
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.student import StudentOutput, soft_sequence
from distilled_decoding.teacher import Teacher, draw
from distilled_decoding.training_state import Checkpoints


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained.

    Attributes:
        num_updates: updates.
        batch_size: trajectories in an update.
        learning_rate: peak of the schedule: linear warm-up, then a cosine to a hundredth.
        warmup: updates until the peak.
        weight_decay: AdamW's, on matrices only.
        grad_clip: largest norm of the gradient.
        ema_rate: of the weights that are sampled from; at first min(ema_rate, (s + 1) / (s + 10)).
        start_blocks: where the student learns to start, 0 first; () means those of the model.
        start_weights: how often each of them is drawn; () draws all alike.
        block_weights: weight of each block in the loss; () weighs all tokens alike.
        loss: weights of the parts of the loss.
        bf16: run the student under bfloat16 autocast.
        compile: use torch.compile: about twice as fast, after a wait; needs a C++ compiler on a CPU.
        seed: of the training order and the starting blocks.

    Raises:
        ValueError: a setting outside its range.
    """

    num_updates: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema_rate: float = 0.998
    start_blocks: tuple[int, ...] = ()
    start_weights: tuple[float, ...] = ()
    block_weights: tuple[float, ...] = ()
    loss: LossWeights = field(default_factory=LossWeights)
    bf16: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_rate < 1:
            raise ValueError(f"ema_rate must lie in 0..1 (1 excluded), got {self.ema_rate}")
        for name in ("start_weights", "block_weights"):
            weights = getattr(self, name)
            if weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
                raise ValueError(f"{name} must not be negative and one must be positive, got {weights}")
        if self.start_weights and len(self.start_weights) != len(self.start_blocks):
            raise ValueError(
                f"{len(self.start_weights)} start weights do not fit {len(self.start_blocks)} start blocks; "
                "give one for each"
            )

    def check(self, order: BlockOrder, split_block: int) -> None:
        """Compare with the teacher's blocks.

        Raises:
            ValueError: start blocks or a split that leave the sequence, or weights that do not fit its blocks.
        """
        order.check_schedule(self.start_blocks, self.start_blocks)
        if not 0 <= split_block <= order.num_blocks:
            raise ValueError(f"split_block must lie in 0..{order.num_blocks}, the number of blocks, got {split_block}")
        if self.block_weights and len(self.block_weights) != order.num_blocks:
            raise ValueError(f"{len(self.block_weights)} block weights do not fit {order.num_blocks} blocks")


@dataclass(frozen=True)
class Update:
    """What is reported after an update.

    Attributes:
        number: counted from 1.
        losses: of the whole update, whatever part of it this process took.
        learning_rate: its own.
        gradient_norm: before clipping.
        finite: whether loss and gradient were; the update was skipped if not.
        skipped: skipped updates in all.
        average: the averaged student as it is now.
    """

    number: int
    losses: Losses
    learning_rate: float
    gradient_norm: float
    finite: bool
    skipped: int
    average: nn.Module


def learning_rate_at(update: int, settings: DistillSettings) -> float:
    """The learning rate of an update, counted from 0."""
    if update < settings.warmup:
        return settings.learning_rate * (update + 1) / settings.warmup
    done = (update - settings.warmup) / max(1, settings.num_updates - settings.warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def batch_indices(update: int, settings: DistillSettings, num_trajectories: int) -> Tensor:
    """The trajectories of an update, int64 [B]: passes over all of them, in ever new orders, laid end to end."""
    place_B = torch.arange(update * settings.batch_size, (update + 1) * settings.batch_size)
    epoch_B, index_B = place_B // num_trajectories, place_B % num_trajectories
    for epoch in epoch_B.unique().tolist():
        chosen_B = epoch_B == epoch
        key_1 = image_keys("training", settings.seed, [epoch])
        index_B[chosen_B] = shuffled(index_B[chosen_B], num_trajectories, key_1)
    return index_B


def start_blocks_of(update: int, settings: DistillSettings) -> Tensor:
    """How many blocks are known to the student in each row of an update, int64 [B]."""
    weight = torch.tensor(settings.start_weights or (1.0,) * len(settings.start_blocks), dtype=torch.float64)
    key_1 = image_keys("training", settings.seed, [update])
    choice_B = draw(weight.log().expand(1, settings.batch_size, -1), uniform(key_1, settings.batch_size, stream=3))
    return torch.tensor(settings.start_blocks)[choice_B[0]]


def make_optimizer(student: nn.Module, settings: DistillSettings) -> torch.optim.Optimizer:
    """AdamW whose weight decay spares vectors (norms, biases), its moments at zero."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
    for parameter in student.parameters():
        moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
    return optimizer


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, update: int, settings: DistillSettings) -> None:
    """Move the averaged weights towards the student's after an update, counted from 0."""
    rate = min(settings.ema_rate, (update + 1) / (update + 10))
    for average, value in zip(ema.parameters(), student.parameters(), strict=True):
        average.lerp_(value, 1 - rate)


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
) -> Losses:
    """The loss of a student on some trajectories, each started from its own number of known blocks (Eq. 5, 6, 7).

    Args:
        teacher: see `distill`, like the others that are not named here.
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
    token_BL, known_blocks_B = batch.token_NL.to(device), known_blocks_B.to(device)
    weight_L = None
    if settings.block_weights:
        weight_L = torch.tensor(settings.block_weights, device=device)[order.block_L(device)]
    totals = Totals.of(order.known_BL(known_blocks_B), weight_L)
    share = len(batch) / len(known_blocks_B)
    known_blocks_B = known_blocks_B[part]
    code_BLC = lookup(token_BL, codebook_VC)
    noise_BLC = gaussian_noise(batch.key_N.to(device), order.length, codebook_VC.shape[1])
    known_BL = order.known_BL(known_blocks_B)
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
        output = student(corrupt(noise_BLC, code_BLC, known_BL), condition.to(device), known_blocks_B)
    perceptual = None
    if settings.loss.perceptual_weight > 0:
        assert image_distance is not None
        predicted_BLC = soft_sequence(output, codebook_VC, order.tokens_before(split_block))
        predicted_BLC = torch.where(known_BL.unsqueeze(-1), code_BLC, predicted_BLC)
        perceptual = share * perceptual_loss(predicted_BLC, code_BLC, teacher.decode, image_distance)
    return distillation_loss(output, token_BL, code_BLC, known_BL, settings.loss, weight_L, perceptual, totals)


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """What forward and backward pass run in."""
    # On a CPU the fused kernel's backward pass in bfloat16 takes three times as long as plain attention's.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def distill(
    teacher: Teacher,
    student: nn.Module,
    trajectories: Shard | TrajectoryStore,
    table: ConditionTable,
    settings: DistillSettings,
    split_block: int,
    checkpoints: Checkpoints,
    on_update: Callable[[Update], bool],
    image_distance: ImageDistance | None = None,
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
    resume: Path | None = None,
) -> nn.Module | None:
    """Train a student and return its averaged weights.

    All processes of a run call this alike, within `processes.group`, and have the same result.

    Args:
        teacher: made the trajectories; gives order, codebook and decoder.
        student: trained in place, on the teacher's device.
        trajectories: what it learns; each process reads its own rows of every update.
        table: what they were asked for.
        settings: see there.
        split_block: where sampling will go over from the logits to the code head; the perceptual loss follows it.
        checkpoints: hold the run; when there are some, the run goes on from the newest.
        on_update: hears of every update, in every process; when it returns False in any, the run is saved and stops.
        image_distance: the perceptual distance, needed when its weight is positive.
        run: see there.
        resume: a checkpoint to go on from instead.

    Returns:
        The averaged student, or None when the run was stopped before its end.

    Raises:
        ValueError: settings that do not fit the teacher or the processes, or no valid checkpoint among those there are.
        FloatingPointError: too many updates in a row were not finite.
    """
    settings.check(teacher.order, split_block)
    if settings.loss.perceptual_weight > 0 and image_distance is None:
        raise ValueError(f"a perceptual weight of {settings.loss.perceptual_weight} needs an image distance")
    parts = own_parts(settings.batch_size, run.micro_batch)
    average = copy.deepcopy(student).requires_grad_(False).eval()
    result = copy.deepcopy(average) if run.sharded else average
    if run.recompute:
        recompute_layers(student)
    if run.sharded:
        shard(student)
        shard(average)
    optimizer = make_optimizer(student, settings)
    tensors = _state(student, average, optimizer)
    counts = checkpoints.load_newest(tensors) if resume is None else checkpoints.load(resume, tensors)
    trainee = Trainee(student.train(), settings.compile)
    while counts.updates < settings.num_updates:
        update = counts.updates
        rate = learning_rate_at(update, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        index_B = batch_indices(update, settings, len(trajectories))
        known_blocks_B = start_blocks_of(update, settings)

        def losses_of(part: slice, index_B: Tensor = index_B, known_blocks_B: Tensor = known_blocks_B) -> Losses:
            batch, forward = trajectories[index_B[part]], trainee.forward
            condition = table[batch.label_N]
            return batch_loss(
                teacher, forward, batch, condition, known_blocks_B, settings, split_block, image_distance, part
            )

        optimizer.zero_grad()
        with attention_on(teacher.codebook.device):
            losses = trainee.gradients(losses_of, parts)
        norm = trainee.clip_gradients(settings.grad_clip)
        finite = math.isfinite(losses.total) and math.isfinite(norm)
        if finite:
            optimizer.step()
            update_ema(average, student, update, settings)
        counts = counts.after(finite)
        if counts.skipped_in_row == run.patience:
            path = checkpoints.save(tensors, counts, "failed")
            raise FloatingPointError(
                f"{run.patience} updates in a row were not finite (at the last, {counts.updates}, the loss was "
                f"{losses.total:g}, the gradient's norm {norm:g}); the state is in {path}; try a lower learning rate"
            )
        keep_on = on_update(Update(counts.updates, losses, rate, norm, finite, counts.skipped, average))
        stop = any_process(not keep_on)
        if stop or counts.updates == settings.num_updates or checkpoints.due(counts.updates):
            checkpoints.save(tensors, counts)
        if stop:
            return None
    return whole(average, result) if run.sharded else average


def _state(student: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that training changes, by name; the tensors themselves."""
    tensors = {f"student/{name}": value for name, value in student.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    for name, parameter in student.named_parameters():
        tensors |= {f"optimizer/{name}/{field}": value for field, value in optimizer.state[parameter].items()}
    return tensors
