"""Commands in processes of their own that can be killed or run short of disk at a chosen point.

They are forked from a server that has imported everything, so that one takes no longer than its work.
"""

import importlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from distilled_decoding import cli

CONTEXT = multiprocessing.get_context("forkserver")
# torch loads its compiler when a model is made without weights; that takes longer than all else.
CONTEXT.set_forkserver_preload(["tests.children", "tests.tiny", "torch._dynamo", "torch._refs"])


class Fault(NamedTuple):
    """SIGKILL at the n-th call of a function, by the module that calls it; `half` of a written file first."""

    module: str
    function: str
    call: int
    half: bool = False


def inject(fault: Fault) -> None:
    module, calls = importlib.import_module(f"distilled_decoding.{fault.module}"), []
    real = getattr(module, fault.function)

    def deadly(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) < fault.call:
            return real(*given, **named)
        if fault.half:
            real(*given, **named)
            path = next(value for value in given if isinstance(value, Path))
            os.truncate(path, path.stat().st_size // 2)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, fault.function, deadly)


def _command(
    words: list[str], error: Path, fault: Fault | None, file_bytes: int | None, environment: dict[str, str]
) -> None:
    os.dup2(os.open(error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ |= environment
    if fault:
        inject(fault)
    if file_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.argv = ["distilled-decoding", *words]
    cli.main()


def start(target: Callable, *given: Any) -> Any:
    process = CONTEXT.Process(target=target, args=given)
    process.start()
    return process


def command(
    words: list,
    error: Path,
    fault: Fault | None = None,
    file_bytes: int | None = None,
    environment: dict[str, str] | None = None,
) -> Any:
    """Start a command; `error` becomes its standard error, `file_bytes` the most that it may write into one file."""
    return start(_command, [str(word) for word in words], error, fault, file_bytes, environment or {})


def ranks(words: list, errors: list[Path]) -> list:
    """Start a command as torchrun would, one process for each file of standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(errors))}
    return [command(words, error, environment={**shared, "RANK": str(rank)}) for rank, error in enumerate(errors)]


def exit_code(process: Any) -> int:
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode
