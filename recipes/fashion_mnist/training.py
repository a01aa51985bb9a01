"""The loop the recipes share: progress, learning rate, and stopping and continuing without a trace."""

import json
import math
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.optim import Optimizer

from distilled_decoding.checkpoint import load_training, save_training


def cosine(step: int, num_steps: int, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def run(
    name: str,
    out: Path,
    num_steps: int,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    update: Callable[[int], dict[str, float]],
    save_every: int = 200,
) -> float:
    """Call `update(step)` for every step, saving as it goes; the same call again goes on where it stopped.

    Returns:
        Seconds spent in this process.
    """
    state, log = out / "state.safetensors", out / "log.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    first = load_training(state, modules, optimizers) if state.is_file() else 0
    stop: list[int] = []
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, _: stop.append(number))
    begin = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, log.open("a") as lines:
        task = progress.add_task(name, total=num_steps, completed=first)
        for step in range(first, num_steps):
            losses = update(step)
            progress.advance(task)
            if step % 20 == 0:
                text = " ".join(f"{k} {v:.3f}" for k, v in losses.items())
                progress.update(task, description=f"{name} {text}")
                seconds = round(time.perf_counter() - begin, 1)
                lines.write(json.dumps({"step": step, "seconds": seconds, **losses}) + "\n")
                lines.flush()
            if stop or (step + 1) % save_every == 0 or step + 1 == num_steps:
                save_training(state, modules, optimizers, step + 1)
            if stop:
                raise SystemExit(f"stopped after {step + 1} of {num_steps} steps; the same command goes on")
    return time.perf_counter() - begin
