"""Training in several processes, or in less memory: what is learnt stays the same up to rounding.

Every process takes its rows of an update, in parts that fit its memory, and the gradients of all parts are added up:
by DistributedDataParallel, where each process holds the whole student, or by FSDP2, where each holds a share of it.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distilled_decoding.losses import Losses
from distilled_decoding.processes import first_acts, rank, world_size

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RunSettings:
    """How a training is run; what is learnt stays the same up to rounding.

    Attributes:
        micro_batch: most trajectories that a process has in memory at once (gradient accumulation); 0: all of its own.
        recompute: keep only what enters each layer, and compute the rest again for the gradients (activation
            checkpointing): less memory, a third more work.
        sharded: every process holds a share of the student, its average and its optimizer (FSDP2), for students of a
            billion parameters and more.
        patience: updates in a row that may be skipped because they are not finite, before the run gives up.

    Raises:
        ValueError: a setting outside its range.
    """

    micro_batch: int = 0
    recompute: bool = False
    sharded: bool = False
    patience: int = 10

    def __post_init__(self) -> None:
        if self.micro_batch < 0:
            raise ValueError(f"micro_batch must not be negative, got {self.micro_batch}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")


def own_parts(batch_size: int, micro_batch: int) -> list[slice]:
    """The rows of an update that this process takes, a part of at most `micro_batch` at a time (0: all at once).

    Every process takes equally many parts, none of them empty.

    Raises:
        ValueError: there are more processes than rows.
    """
    size = world_size()
    if batch_size < size:
        raise ValueError(f"batch_size {batch_size} is less than the {size} processes; start fewer or enlarge it")
    first, end = (batch_size * (rank() + i) // size for i in (0, 1))
    most = math.ceil(batch_size / size)
    num = min(math.ceil(most / (micro_batch or most)), batch_size // size)
    cuts = [first + (end - first) * i // num for i in range(num + 1)]
    return [slice(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def recompute_layers(module: nn.Module) -> None:
    """Let each layer keep only its inputs for the backward pass."""
    for layer in layers_of(module):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]


def shard(module: nn.Module) -> None:
    """Leave every process a share of a module's parameters, in place, and the whole of those that are not trained.

    What is gathered together is each of the larger parts of a layer, and the rest: a layer's parts may be called
    apart from it.

    Raises:
        ValueError: there is only one process.
    """
    if world_size() == 1:
        raise ValueError("a sharded training needs several processes: start it with torchrun, or leave out --sharded")
    mesh = init_device_mesh(next(module.parameters()).device.type, (world_size(),))
    for layer in layers_of(module):
        for part in layer.children():
            if any(parameter.ndim > 1 and parameter.requires_grad for parameter in part.parameters()):
                fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params={p for p in module.parameters() if not p.requires_grad})


def whole(module: nn.Module, like: nn.Module) -> nn.Module:
    """Give `like`, a module of the same shape that is not sharded, the values of a sharded one; all take part."""
    values = module.state_dict()
    with torch.no_grad():
        for name, target in like.state_dict().items():
            value = values[name]
            target.copy_(value.full_tensor() if isinstance(value, DTensor) else value)
    return like


class Trainee:
    """A network that all processes train together.

    Args:
        network: trained in place; after `shard` each process holds a share of it, otherwise all hold the whole.
        compiled: use torch.compile.

    Attributes:
        forward: calls the network.
    """

    def __init__(self, network: nn.Module, compiled: bool) -> None:
        self._network = network
        self.forward: Any = network
        if world_size() > 1 and not isinstance(network, FSDPModule):
            self.forward = DistributedDataParallel(network)
        self._ddp = self.forward if isinstance(self.forward, DistributedDataParallel) else None
        if compiled:
            self.forward = torch.compile(self.forward)

    def gradients(self, losses_of: Callable[[slice], Losses], parts: list[slice]) -> Losses:
        """Add up the gradients of an update over its parts and all processes.

        Args:
            losses_of: the losses of a part; those of all parts of all processes make up the update's.
            parts: of this process.

        Returns:
            The losses of the update, of the same kind, without a graph.
        """
        found = []
        for part in parts:
            with self._exchanging(last=part is parts[-1]):
                losses = losses_of(part)
                # Processes exchange the mean of their gradients, where the sum is meant.
                (losses.total * world_size()).backward()
            found.append(torch.stack([value.detach() for value in vars(losses).values()]))
        return type(losses)(*_add_up(torch.stack(found).sum(0)))

    def clip_gradients(self, max_norm: float) -> float:
        """Scale the gradients down to a norm and return the one that they had."""
        norm = nn.utils.clip_grad_norm_(self._network.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _exchanging(self, last: bool) -> AbstractContextManager[None]:
        """After its last part a process gives its gradients to the others."""
        if isinstance(self._network, FSDPModule):
            self._network.set_requires_gradient_sync(last)
        return self._ddp.no_sync() if self._ddp is not None and not last else nullcontext()


def any_process(flag: bool) -> bool:
    """Whether the flag is up in any process: what one is told, all hear at the same place."""
    return bool(_add_up(torch.tensor(float(flag))))


def told_by_first(ask: Callable[[], Answer]) -> Answer:
    """What the first process finds out, known to all; when it fails, all end."""
    answers: list[Any] = [None]

    def act() -> None:
        answers[0] = ask()

    first_acts(act)
    if world_size() > 1:
        dist.broadcast_object_list(answers, src=0)
    return answers[0]


def layers_of(module: nn.Module) -> list[nn.Module]:
    """What lies in a module's `ModuleList`s."""
    return [layer for child in module.modules() if isinstance(child, nn.ModuleList) for layer in child]


def _add_up(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(value)
    return value
