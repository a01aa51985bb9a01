"""What a job will need - memory, time, disk - before it runs, and before there are any weights.

The job's own code runs on tensors that have shapes but no numbers, while its operations and the bytes that it holds
are counted. This knows no family, and a model of any size is planned in seconds.

Axis letters: B batch, L tokens in a sequence, K tokens in a block, V codebook entries.
"""

import copy
import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from torch.utils.weak import WeakIdKeyDictionary

from distilled_decoding.condition import Condition, stand_ins
from distilled_decoding.distill import STUDENT, DistillSettings, attention_on
from distilled_decoding.distill_trajectories import batch_loss
from distilled_decoding.flow import flow_map
from distilled_decoding.losses import Losses
from distilled_decoding.on_policy import OnPolicy, tracker_name
from distilled_decoding.parallel import RunSettings, recompute_layers
from distilled_decoding.store import Shard
from distilled_decoding.teacher import TeacherSampling, log_probabilities
from distilled_decoding.trajectories import TrajectorySettings

# The share of the speed of large matrix products that a whole job reaches. On two CPU cores the four jobs behind the
# shipped models took 0.8 to 1.2 times what these give (EXPERIMENTS.md); elsewhere they are good within a factor of two.
_TRAJECTORY_EFFICIENCY = 0.3
_DISTILLATION_EFFICIENCY = 0.4
# The flow map goes through its rows in chunks, which take less than this on a GPU and far less on a CPU.
_FLOW_CHUNK_BYTES = 2**30


@dataclass(frozen=True)
class Cost:
    """What a job needs.

    Attributes:
        flops: operations of its matrix products, attention and convolutions.
        seconds: how long it runs, good within a factor of two.
        memory_bytes: most that its tensors hold at a time.
        fixed_bytes: the part of them that a smaller batch leaves: weights and what belongs to each weight.
        disk_bytes: the tensors in the files that it leaves; a file being replaced is there twice for a moment.
    """

    flops: int
    seconds: float
    memory_bytes: int
    fixed_bytes: int
    disk_bytes: int

    def readable(self) -> dict[str, float]:
        """The same in GiB, hours and 10^12 operations, three digits each."""
        values = {
            "memory_gib": self.memory_bytes / 2**30,
            "fixed_gib": self.fixed_bytes / 2**30,
            "disk_gib": self.disk_bytes / 2**30,
            "hours": self.seconds / 3600,
            "teraflop": self.flops / 1e12,
        }
        return {name: float(f"{value:.3g}") for name, value in values.items()}


def trajectory_cost(teacher: Any, settings: TrajectorySettings, num: int, flops_per_second: float) -> Cost:
    """What it takes to make trajectories.

    The operations are exact for a teacher whose steps grow evenly with the tokens before them, as with a cache of
    keys and values; for one that reads all of them anew they are an upper bound. How many codes top-p leaves is not
    known before, so the flow map is charged for nearly all.

    Args:
        teacher: a `Teacher` and `nn.Module`; its weights are not read and may be on the meta device.
        settings: as `generate` takes them.
        num: how many trajectories.
        flops_per_second: of the device, in float32.
    """
    order, size, guidance = teacher.order, settings.micro_batch, settings.sampling.guidance
    vocab_size, channels = teacher.codebook.shape
    row = _flow_row(vocab_size, channels, settings)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), _Meter() as meter:
        teacher = _shapes_of(teacher)
        fixed_bytes = meter.held
        condition = stand_ins(teacher, size)
        token_BL = torch.zeros(size, order.length, dtype=torch.int64)

        def step(state: Any, block: int) -> tuple[Any, _Count]:
            """One block: the teacher reads the one before, and the flow map picks the tokens."""
            with meter.counting() as count:
                if block:
                    state = teacher.feed(state, token_BL[:, order.span(block - 1)])
                else:
                    state = teacher.start(condition, guidance)
                log_p_BKV = log_probabilities(teacher.next_logits(state), settings.sampling)
                rows = len(log_p_BKV) * order.sizes[block]
                torch.empty(min(rows * row.peak, _FLOW_CHUNK_BYTES), dtype=torch.uint8)
            return state, _Count(count.flops + rows * row.flops, count.peak)

        state, flops, peak = None, 0, 0
        for run in _runs(order.sizes):
            state, first = step(state, run[0])
            last = first
            if len(run) > 1:
                state = teacher.start(condition, guidance, token_BL[:, : order.starts[run[-1] - 1]])
                state, last = step(state, run[-1])
            flops += len(run) * (first.flops + last.flops) // 2
            peak = max(peak, first.peak, last.peak)
    flops *= math.ceil(num / size)
    # A token is stored as uint16, a label as int32, a key as int64.
    disk_bytes = num * (2 * order.length + 4 + 8)
    return Cost(flops, flops / flops_per_second / _TRAJECTORY_EFFICIENCY, peak, fixed_bytes, disk_bytes)


def distillation_cost(
    teacher: Any,
    student: nn.Module,
    settings: DistillSettings,
    flops_per_second: float,
    device: torch.device,
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
    kind: type[OnPolicy] | None = None,
    tracker: nn.Module | None = None,
    sampling: TeacherSampling = TeacherSampling(),  # noqa: B008 - frozen
) -> Cost:
    """What it takes to train a student; `settings.compile` needs less.

    Of a perceptual loss the decoder is counted, the network that compares the images is not; of a method with trackers
    every start counts as if no block were known.

    Args:
        teacher: a `Teacher` and `nn.Module`; its weights are not read and may be on the meta device.
        student: a `Student`, likewise.
        settings: as `distill` takes them, with or without starting blocks.
        flops_per_second: of the device, in bfloat16 if the settings say so.
        device: where it will run, in one process; attention keeps its scores for the backward pass on a CPU, not on a
            GPU.
        run: as `distill` takes it; `sharded` is not looked at.
        kind: the method, None for `trajectories`.
        tracker: what it begins its trackers with, see `OnPolicy.new_tracker`.
        sampling: the teacher's distribution, for it.
    """
    order, settings = teacher.order, replace(settings, start_blocks=settings.start_blocks or (0,))
    attention = nullcontext() if device.type == "cpu" else _FlashAttention()
    with FakeTensorMode(allow_non_fake_inputs=True), _Meter() as meter, attention:
        size = run.micro_batch or settings.batch_size
        part, zero_B = slice(0, size), torch.zeros(settings.batch_size, dtype=torch.int64)
        shard = Shard(zero_B[part].expand(order.length, -1).T.contiguous(), zero_B[part], zero_B[part])
        begun_bytes = meter.held
        teacher, student = _shapes_of(teacher), _shapes_of(student).train().requires_grad_(True)
        method = None
        if kind is not None:
            table, new_tracker = _StandIns(teacher), partial(_trainable_shapes_of, tracker)
            method = kind(teacher, new_tracker, table, sampling, settings, shard, F.mse_loss)
        trackers = [] if method is None else [network for network, _ in method.networks.values()]
        average = [torch.empty_like(parameter) for parameter in student.parameters()]
        learnt = [p for network in (student, *trackers) for p in network.parameters() if p.requires_grad]
        moments = [torch.empty_like(parameter) for parameter in learnt for _ in ("first", "second")]
        for parameter in learnt:
            parameter.grad = torch.empty_like(parameter)
        fixed_bytes = meter.held - begun_bytes
        if run.recompute:
            for network in (student, *trackers):
                recompute_layers(network)

        def step(network: nn.Module, losses: Callable[[], Losses]) -> _Count:
            with meter.counting() as count, attention_on(device):
                if size >= settings.batch_size:
                    network.zero_grad()  # otherwise the gradients of the parts before are there
                losses().total.backward()
            return count

        condition, split, num_updates = stand_ins(teacher, size), order.num_blocks, settings.num_updates
        counts: list[tuple[int, _Count]] = []
        if method is None:

            def trajectory_losses() -> Losses:
                return batch_loss(teacher, student, shard, condition, zero_B, settings, split, F.mse_loss, part)

            counts.append((num_updates, step(student, trajectory_losses)))
        else:
            networks = {STUDENT: student, tracker_name(0): trackers[0]}
            first, each = settings.first_update, settings.on_policy.tracker_updates
            for update, updates in [(0, first)] * (first > 0) + [(first, num_updates - first)]:
                lesson, students = method.lessons(update)
                counts.append((updates * each, step(trackers[0], partial(lesson, shard, 0, networks, part))))
                if students is not None:
                    counts.append((updates, step(student, partial(students, shard, 0, networks, part))))
        del average, moments
        # The state of the training holds the student, its average, the trackers, and of each parameter two moments and
        # a counter.
        state_bytes = 2 * _file_bytes(student) + sum(2 * p.nbytes + 4 for p in learnt)
        state_bytes += sum(p.nbytes for network in trackers for p in network.parameters() if p.requires_grad)
        disk_bytes = state_bytes + _file_bytes(teacher) + _file_bytes(student)
    flops = sum(times * count.flops for times, count in counts) * settings.batch_size
    flops //= min(size, settings.batch_size)
    seconds = flops / flops_per_second / _DISTILLATION_EFFICIENCY
    return Cost(flops, seconds, max(count.peak for _, count in counts), fixed_bytes, disk_bytes)


def flops_per_second(device: torch.device, bf16: bool) -> float:
    """What large matrix products reach on a device, in bfloat16 or float32: the median of a few, after a warm-up."""
    side = 512 if device.type == "cpu" else 4096
    factor = torch.ones(side, side, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)

    def seconds() -> float:
        begin = perf_counter()
        torch.mm(factor, factor)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return perf_counter() - begin

    return 2 * side**3 / median([seconds() for _ in range(8)][3:])


@dataclass
class _Count:
    """Operations of some code, and the most bytes that were held during it."""

    flops: int = 0
    peak: int = 0


# torch knows the operations of attention's kernels for GPUs, but not of those for CPUs.
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS = {
    **flop_registry,
    _ATTENTION: sdpa_flop,
    _ATTENTION_BACKWARD: sdpa_backward_flop,
}


class _Meter(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that are made while it is on, for as long as they live.

    `FlopCounterMode` would count the operations too, but changes what autograd keeps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.held = self.peak = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.overloadpacket in _FLOPS:
            self.flops += _FLOPS[func.overloadpacket](*args, **kwargs, out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.seen:
                self.seen[storage] = True
                self.held += storage.nbytes()
                weakref.finalize(storage, self._release, storage.nbytes())
        self.peak = max(self.peak, self.held)
        return result

    def _release(self, nbytes: int) -> None:
        self.held -= nbytes

    @contextmanager
    def counting(self) -> Iterator[_Count]:
        """Count what runs inside; the count is complete at the end."""
        count, before, self.peak = _Count(), self.flops, self.held
        yield count
        count.flops, count.peak = self.flops - before, self.peak


class _FlashAttention(TorchFunctionMode):
    """Attention as on a GPU, which stores no scores, where the code would choose otherwise for a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_attention = func is F.scaled_dot_product_attention
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) if is_attention else nullcontext():
            return func(*args, **(kwargs or {}))


def _shapes_of(module: Any) -> Any:
    """A copy whose parameters and buffers are made anew, without numbers under `FakeTensorMode`."""
    new: dict[int, Any] = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in module.buffers()}
    for p in module.parameters():
        new[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=False)
    return copy.deepcopy(module, new)


def _trainable_shapes_of(module: Any) -> Any:
    """`_shapes_of`, in which the same parameters require a gradient."""
    copied = _shapes_of(module)
    for new, old in zip(copied.parameters(), module.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return copied


class _StandIns:
    """A table of the `stand_ins` of a teacher."""

    prompts = ()

    def __init__(self, teacher: Any) -> None:
        self._teacher = teacher

    def check(self) -> None:
        """Nothing lies on disk."""

    @property
    def identity(self) -> dict[str, Any]:
        """Nobody asks for it."""
        return {}

    def __len__(self) -> int:
        return 1

    def __getitem__(self, number_B: Tensor) -> Condition:
        return stand_ins(self._teacher, len(number_B))


def _flow_row(vocab_size: int, channels: int, settings: TrajectorySettings) -> _Count:
    """The flow map on one token, run for real: what it does depends on how many codes truncation leaves."""
    # Nearly flat, so that top-p leaves nearly all; without ties, so that top-k leaves k.
    logits_BKV = torch.linspace(0, 1, vocab_size).view(1, 1, -1)
    log_p_BKV = log_probabilities(logits_BKV, settings.sampling)
    with _Meter() as meter, meter.counting() as count:
        flow_map(torch.zeros(1, 1, channels), log_p_BKV, torch.zeros(vocab_size, channels), settings.flow)
    return count


def _runs(sizes: tuple[int, ...]) -> list[list[int]]:
    """The blocks, those together whose steps differ in nothing but the number of tokens before them."""

    def step(block: int) -> tuple[bool, int, int]:
        return block == 0, sizes[block - 1], sizes[block]

    return [list(run) for _, run in groupby(range(len(sizes)), step)]


def _file_bytes(module: nn.Module) -> int:
    """Bytes of a module's file, floats as float32."""
    return sum(v.numel() * (4 if v.is_floating_point() else v.itemsize) for v in module.state_dict().values())
