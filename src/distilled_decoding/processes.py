"""Processes: those that torchrun starts share one run, and no two runs share one folder.

A process that was started alone is the first of one, and everything here works for it, too.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist

_LOCK = "writer.lock"


def rank() -> int:
    """The number of this process among those of the run."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes share the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks for all."""
    return rank() == 0


def own_device(name: str) -> str:
    """The device of this process: `cuda` means a GPU of its own."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" and world_size() > 1 else name


@contextmanager
def group(device: str = "cpu") -> Iterator[dist.Store]:
    """Join the other processes while the block runs.

    Args:
        device: where tensors lie that the processes exchange: gloo carries those on a CPU, nccl those on a GPU.

    Returns:
        What all can write and read, such as a counter (`add`); a process alone has it to itself.
    """
    if world_size() == 1:
        yield dist.HashStore()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    shared, number, size = next(iter(dist.rendezvous("env://")))
    dist.init_process_group(backend, store=dist.PrefixStore("group", shared), rank=number, world_size=size)
    try:
        yield dist.PrefixStore("shared", shared)
        # The first process holds what all share, so it leaves last.
        shared.add("left", 1)
        while is_first() and shared.add("left", 0) < size:
            time.sleep(0.01)
    finally:
        dist.destroy_process_group()


def deal(items: int, shared: dist.Store, name: str = "dealt") -> Iterator[int]:
    """The numbers 0 ... items - 1, each for one process alone: the one that is ready for it first.

    Args:
        items: how many.
        shared: what `group` gives.
        name: of this deal, when there are several.
    """
    while (number := shared.add(name, 1) - 1) < items:
        yield number


def first_acts(act: Callable[[], None]) -> None:
    """Let the first process do something while the others wait; when it fails, all end."""
    if world_size() == 1:
        act()
        return
    done_1 = torch.zeros(1)
    try:
        if is_first():
            act()
            done_1 += 1
    finally:
        dist.broadcast(done_1, src=0)
    if not done_1:
        time.sleep(5)  # torchrun ends all when one has ended: the first process shall say why before that
        raise SystemExit(2)


def meet(shared: dist.Store, look: Callable[[], None], name: str = "met") -> None:
    """Wait until every process has come here, however long; each calls `look` now and then.

    Args:
        shared: what `group` gives.
        look: such as a look at the progress of the others.
        name: of this meeting, when there are several.
    """
    shared.add(name, 1)
    while shared.add(name, 0) < world_size():
        look()
        time.sleep(0.1)


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder while the block runs; the lock of a process that has died holds nothing.

    Args:
        folder: made when it is not there.

    Raises:
        ValueError: another process holds it; says which.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK) as file:
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        try:
            yield
        finally:
            (folder / _LOCK).unlink()


def holds_files(folder: Path) -> bool:
    """Whether a folder is there and holds more than a lock and what a killed writer left half written."""
    return folder.exists() and any(path.name != _LOCK and path.suffix != ".part" for path in folder.iterdir())


def _locked(path: Path) -> TextIO:
    """The open lock file. The system drops the lock with its holder, so a stale one is told without asking for pids."""
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{path.parent} is being written by {_holder(file.read())}; wait or stop it") from None
        if _is(path, file):
            return file
        file.close()  # the holder before us removed it between our opening and locking it


def _is(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(text: str) -> str:
    try:
        values = json.loads(text)
    except json.JSONDecodeError:  # it has not written its name yet
        return "another process"
    return f"process {values['pid']} on {values['host']}"
