"""The training loop, one for all methods: checkpoints, average, schedule, processes, updates that are not finite.

Every random choice of an update follows from the seed and its number alone, so a stopped run that goes on equals
one that was never stopped, and any number of processes learn the same in the same order. What is learnt is a method's
to say: `distill_trajectories`, `distill_tokens`, `distill_token_scores`, `distill_scores`.

Axis letters: B batch, L tokens in a sequence, S blocks.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.losses import Losses, LossWeights, OnPolicySettings, ScoreSettings, TokenSettings
from distilled_decoding.noise import image_keys, shuffled, uniform
from distilled_decoding.optimizer import Optimizer
from distilled_decoding.parallel import (
    RunSettings,
    Trainee,
    any_process,
    own_parts,
    recompute_layers,
    shard,
    whole,
)
from distilled_decoding.student import Head
from distilled_decoding.teacher import Teacher, draw
from distilled_decoding.training_state import Checkpoints

MethodName = Literal["trajectories", "tokens", "token-scores", "scores"]


@dataclass(frozen=True)
class DistillSettings:
    """How a student is trained.

    Attributes:
        num_updates: updates.
        batch_size: images in an update.
        learning_rate: peak of the schedule: linear warm-up, then a cosine to a hundredth.
        warmup: updates until the peak.
        weight_decay: on matrices only.
        muon_rate: learning rate of the matrices of layers, which Muon then moves, in units of the others'; 0: AdamW
            moves all.
        grad_clip: largest norm of the gradient.
        ema_rate: of the weights that are sampled from; at first min(ema_rate, (s + 1) / (s + 10)).
        start_blocks: where the student learns to start, 0 first; () means those of the model.
        start_weights: how often each of them is drawn; () draws all alike.
        block_weights: weight of each block in the loss; () weighs all tokens alike.
        head: of a new student: a `code` head learns to come from a position's noise to its code, as published; a `flow`
            head learns how its tokens are distributed, and leaves that way to the flow map.
        method: what it learns from: the teacher's `trajectories`, or the teacher's judgement of what it makes itself:
            of the `tokens` that it draws, by their likelihood; of its likeliest tokens, by scores (`token-scores`); of
            its vectors, by `scores`.
        loss: weights of the parts of the loss on trajectories.
        on_policy: of all methods but `trajectories`.
        tokens: of the method `tokens` alone.
        scores: of the method `scores`; `token-scores` reads `noised` alone.
        bf16: run student, trackers and teacher under bfloat16 autocast.
        compile: use torch.compile: about twice as fast, after a wait; needs a C++ compiler on a CPU.
        seed: of the training order, the starting blocks and, without trajectories, the noise.

    Raises:
        ValueError: a setting outside its range.
    """

    num_updates: int = 3000
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    muon_rate: float = 0.0
    grad_clip: float = 1.0
    ema_rate: float = 0.998
    start_blocks: tuple[int, ...] = ()
    start_weights: tuple[float, ...] = ()
    block_weights: tuple[float, ...] = ()
    head: Head = "code"
    method: MethodName = "trajectories"
    loss: LossWeights = field(default_factory=LossWeights)
    on_policy: OnPolicySettings = field(default_factory=OnPolicySettings)
    tokens: TokenSettings = field(default_factory=TokenSettings)
    scores: ScoreSettings = field(default_factory=ScoreSettings)
    bf16: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(MethodName):
            raise ValueError(f"unknown method {self.method!r}; choose one of {', '.join(get_args(MethodName))}")
        for name in ("num_updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "muon_rate"):
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
        if self.head not in get_args(Head):
            raise ValueError(f"unknown head {self.head!r}; choose one of {', '.join(get_args(Head))}")
        if self.head == "flow":
            self._check_flow_head()
        if self.first_update >= self.num_updates:
            raise ValueError(
                f"of {self.num_updates} updates the first {self.first_update} are the trackers' alone "
                "(tracker_first), which leaves none to the student; give more, or fewer of those"
            )

    def _check_flow_head(self) -> None:
        """Refuse what needs a code head, or another draw than the flow map's."""
        if self.method in ("token-scores", "scores"):
            raise ValueError(
                f"the method {self.method} trains a student with a code head, but head is flow; "
                "give --head code, or another method"
            )
        if self.loss.perceptual_weight > 0:
            weight = self.loss.perceptual_weight
            raise ValueError(f"a perceptual weight of {weight} needs a code head, but head is flow; leave it out")
        if self.tokens.draw_temperature != 1:
            raise ValueError(
                f"a flow head draws at temperature 1, got draw_temperature {self.tokens.draw_temperature}; leave it out"
            )

    @property
    def first_update(self) -> int:
        """The update, counted from 0, in which the student begins to learn."""
        return 0 if self.method == "trajectories" else self.on_policy.tracker_first

    @property
    def unread(self) -> set[str]:
        """Names of the settings of losses that have no part in this training."""
        kinds = (LossWeights, OnPolicySettings, TokenSettings, ScoreSettings)
        loss, on_policy, tokens, scores = ({each.name for each in fields(kind)} for kind in kinds)
        read = {
            "trajectories": loss,
            "tokens": on_policy | tokens,
            "token-scores": on_policy | {"noised"},
            "scores": on_policy | scores,
        }[self.method]
        if self.on_policy.trajectory_weight > 0:
            read |= loss
        if self.head == "flow":
            read = read - {"code_weight"}
        return (loss | on_policy | tokens | scores) - read

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
        last = self.start_blocks[-1]
        if self.block_weights and not any(self.block_weights[last:]):
            raise ValueError(f"block weights {self.block_weights} leave a start at block {last} nothing to learn")


_MATCHING: dict[str, Any] = {"warmup": 50, "ema_rate": 0.99, "muon_rate": 0.0}
_USUAL: dict[MethodName, tuple[float, dict[str, Any]]] = {
    "trajectories": (1.0, {"num_updates": 3000, "warmup": 100, "ema_rate": 0.998}),
    "tokens": (0.1, _MATCHING | {"num_updates": 450, "on_policy": OnPolicySettings(), "tokens": TokenSettings()}),
    "token-scores": (
        0.1,
        _MATCHING
        | {
            "num_updates": 200,
            "on_policy": OnPolicySettings(tracker_first=40, tracker_updates=4),
            "scores": ScoreSettings(noised=8),
        },
    ),
    "scores": (
        0.1,
        _MATCHING
        | {
            "num_updates": 1000,
            "on_policy": OnPolicySettings(tracker_first=500, tracker_updates=4),
            "scores": ScoreSettings(),
        },
    ),
}


def usual_settings(method: MethodName, trained: DistillSettings, head: Head) -> DistillSettings:
    """What a method takes where nothing else is said: all of the model's settings, where it was trained by this method.

    Otherwise what the method reads alone is its own, and so are length and warm-up, which suit models of the shipped
    size. All methods but trajectories learn at a tenth of its rate.
    """
    if method == trained.method:
        return trained
    rate, own = _USUAL[method]
    learning_rate = trained.learning_rate * rate / _USUAL[trained.method][0]
    return replace(trained, method=method, head=head, learning_rate=learning_rate, **own)


@dataclass(frozen=True)
class Update:
    """What is reported after an update.

    Attributes:
        number: counted from 1.
        losses: of the student in the whole update, whatever part of it this process took; before it begins to learn,
            of what learnt last.
        learning_rate: the student's.
        gradient_norm: before clipping, of what the losses are of.
        finite: whether all losses and gradients were; a network whose own were not was left as it was.
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


def learning_rate_at(update: int, settings: DistillSettings, first_update: int = 0) -> float:
    """The learning rate of an update, counted from 0, for what learns from the first on."""
    update, num_updates = update - first_update, settings.num_updates - first_update
    if update < 0:
        return 0.0
    if update < settings.warmup:
        return settings.learning_rate * (update + 1) / settings.warmup
    done = (update - settings.warmup) / max(1, num_updates - settings.warmup)
    return settings.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def batch_indices(batch: int, settings: DistillSettings, num: int) -> Tensor:
    """What of `num` trajectories or conditions a batch takes, int64 [B]: passes over all, in ever new orders."""
    place_B = torch.arange(batch * settings.batch_size, (batch + 1) * settings.batch_size)
    epoch_B, index_B = place_B // num, place_B % num
    for epoch in epoch_B.unique().tolist():
        chosen_B = epoch_B == epoch
        key_1 = image_keys("training", settings.seed, [epoch])
        index_B[chosen_B] = shuffled(index_B[chosen_B], num, key_1)
    return index_B


def start_blocks_of(update: int, settings: DistillSettings) -> Tensor:
    """How many blocks are known to the student in each row of an update, int64 [B]."""
    weight = torch.tensor(settings.start_weights or (1.0,) * len(settings.start_blocks), dtype=torch.float64)
    key_1 = image_keys("training", settings.seed, [update])
    choice_B = draw(weight.log().expand(1, settings.batch_size, -1), uniform(key_1, settings.batch_size, stream=3))
    return torch.tensor(settings.start_blocks)[choice_B[0]]


def token_weights(order: BlockOrder, settings: DistillSettings, device: torch.device) -> Tensor | None:
    """The weight of every token in the loss, float32 [L]; None weighs all alike."""
    if not settings.block_weights:
        return None
    return torch.tensor(settings.block_weights, device=device)[order.block_L(device)]


@torch.no_grad()
def update_ema(ema: nn.Module, student: nn.Module, update: int, settings: DistillSettings) -> None:
    """Move the averaged weights towards the student's after an update, counted from 0."""
    rate = min(settings.ema_rate, (update + 1) / (update + 10))
    for average, value in zip(ema.parameters(), student.parameters(), strict=True):
        average.lerp_(value, 1 - rate)


def attention_on(device: torch.device) -> AbstractContextManager[None]:
    """What forward and backward pass run in."""
    # On a CPU the fused kernel's backward pass in bfloat16 takes three times as long as plain attention's.
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


Forward = Callable[..., Any]
"""Calls a network, in whatever way it is trained."""

LossesOf = Callable[[Mapping[str, Forward], slice], Losses]
"""The losses of a part of an update's rows, given all networks of the run; those of all parts add up."""

STUDENT = "student"
"""What the student is called among the networks of a run."""


class Method(Protocol):
    """What a student learns from: the part of a training that is not the loop."""

    @property
    def teacher(self) -> Teacher:
        """It is distilled."""
        ...

    @property
    def settings(self) -> DistillSettings:
        """How the student is trained."""
        ...

    @property
    def networks(self) -> Mapping[str, tuple[nn.Module, float]]:
        """What is trained beside the student, by name, with the peak of its learning rate."""
        ...

    def steps(self, update: int) -> Iterator[tuple[str, LossesOf]]:
        """The steps of an update, counted from 0: which network learns, and what.

        The student's comes last, and not before its first update, see `DistillSettings.first_update`.
        """
        ...


@dataclass(frozen=True)
class _Step:
    """What came of a step: the losses over all processes, the gradient's norm, and whether all were finite."""

    losses: Losses
    gradient_norm: float
    finite: bool


class _Learner:
    """A network with its optimizer, trained by all processes together."""

    def __init__(self, network: nn.Module, settings: DistillSettings, run: RunSettings, first_update: int = 0) -> None:
        if run.recompute:
            recompute_layers(network)
        if run.sharded:
            shard(network)
        self._network = network
        self._settings = settings
        self._first_update = first_update
        self._optimizer = Optimizer(network, settings.weight_decay, settings.muon_rate)
        self._trainee = Trainee(network, settings.compile)
        self.forward: Forward = self._trainee.forward

    def step(self, losses_of: Callable[[slice], Losses], parts: list[slice], update: int) -> _Step:
        """Learn from the rows of an update, unless loss or gradient are not finite."""
        self._network.zero_grad()
        losses = self._trainee.gradients(losses_of, parts)
        norm = self._trainee.clip_gradients(self._settings.grad_clip)
        finite = math.isfinite(losses.total) and math.isfinite(norm)
        if finite:
            self._optimizer.step(learning_rate_at(update, self._settings, self._first_update))
        return _Step(losses, norm, finite)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Everything of the optimizer that changes, by name; the tensors themselves."""
        return self._optimizer.state()


def distill(
    method: Method,
    student: nn.Module,
    checkpoints: Checkpoints,
    on_update: Callable[[Update], bool],
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
    resume: Path | None = None,
) -> nn.Module | None:
    """Train a student and return its averaged weights.

    All processes of a run call this alike, within `processes.group`, and have the same result.

    Args:
        method: what the student learns from.
        student: trained in place, on the teacher's device.
        checkpoints: hold the run; when there are some, the run goes on from the newest.
        on_update: hears of every update, in every process; when it returns False in any, the run is saved and stops.
        run: see there.
        resume: a checkpoint to go on from instead.

    Returns:
        The averaged student, or None when the run was stopped before its end.

    Raises:
        ValueError: settings that do not fit the processes, or no valid checkpoint among those there are.
        FloatingPointError: too many updates in a row were not finite.
    """
    settings, parts = method.settings, own_parts(method.settings.batch_size, run.micro_batch)
    average = copy.deepcopy(student).eval()
    result = copy.deepcopy(average).requires_grad_(False) if run.sharded else average
    learners = {STUDENT: _Learner(student.train(), settings, run, settings.first_update)}
    for name, (network, learning_rate) in method.networks.items():
        learners[name] = _Learner(network, replace(settings, learning_rate=learning_rate), run)
    if run.sharded:
        shard(average)
    average.requires_grad_(False)
    tensors = _state(student, average, learners, method)
    counts = checkpoints.load_newest(tensors) if resume is None else checkpoints.load(resume, tensors)
    forwards = {name: learner.forward for name, learner in learners.items()}
    while counts.updates < settings.num_updates:
        update = counts.updates
        steps: list[_Step] = []
        for name, losses_of in method.steps(update):
            with attention_on(method.teacher.codebook.device):
                steps.append(learners[name].step(partial(losses_of, forwards), parts, update))
        finite, last = all(step.finite for step in steps), steps[-1]
        if last.finite and update >= settings.first_update:
            update_ema(average, student, update - settings.first_update, settings)
        counts = counts.after(finite)
        if counts.skipped_in_row == run.patience:
            path = checkpoints.save(tensors, counts, "failed")
            raise FloatingPointError(
                f"{run.patience} updates in a row were not finite (at the last, {counts.updates}, the loss was "
                f"{last.losses.total:g}, the gradient's norm {last.gradient_norm:g}); the state is in {path}; try a "
                "lower learning rate"
            )
        rate = learning_rate_at(update, settings, settings.first_update)
        heard = Update(counts.updates, last.losses, rate, last.gradient_norm, finite, counts.skipped, average)
        stop = any_process(not on_update(heard))
        if stop or counts.updates == settings.num_updates or checkpoints.due(counts.updates):
            checkpoints.save(tensors, counts)
        if stop:
            return None
    return whole(average, result) if run.sharded else average


def _state(
    student: nn.Module, average: nn.Module, learners: Mapping[str, _Learner], method: Method
) -> dict[str, Tensor]:
    """Everything that training changes, by name; the tensors themselves."""
    tensors = {f"{STUDENT}/{name}": value for name, value in student.state_dict().items()}
    tensors |= {f"average/{name}": value for name, value in average.state_dict().items()}
    for own, (network, _) in method.networks.items():
        tensors |= {f"{own}/{name}": p.detach() for name, p in network.named_parameters() if p.requires_grad}
    for own, learner in learners.items():
        optimizer = "optimizer" if own == STUDENT else f"{own}-optimizer"
        tensors |= {f"{optimizer}/{name}": value for name, value in learner.optimizer_state().items()}
    return tensors
