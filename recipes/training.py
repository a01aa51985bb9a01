"""The loop the recipes share: progress, learning rate, and stopping and continuing without a trace."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from distilled_decoding.checkpoint import load_training, save_training
from distilled_decoding.progress import progress_bar, stop_signal
from distilled_decoding.records import claim


def cosine(step: int, num_steps: int, peak: float, warmup: int) -> float:
    """Learning rate: linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def start(name: str, settings: Any) -> None:
    """Claim the folder `settings.out` for these settings, or end with a sentence when it holds a run of others."""
    try:
        claim(settings.out, name, {key: value for key, value in vars(settings).items() if key != "out"})
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


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
        Seconds spent in all, those of earlier processes included.
    """
    state, log = out / "state.safetensors", out / "log.jsonl"
    first = load_training(state, modules, optimizers) if state.is_file() else 0
    earlier = _seconds(log)
    begin = time.perf_counter()
    seconds = earlier
    with stop_signal() as stop, progress_bar(name, num_steps) as bar, log.open("a") as lines:
        bar.at(first)
        for step in range(first, num_steps):
            losses = update(step)
            seconds = earlier + time.perf_counter() - begin
            bar.at(step + 1)
            save = stop.requested or (step + 1) % save_every == 0 or step + 1 == num_steps
            if step % 20 == 0 or save:
                bar.say(f"{name} " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()))
                lines.write(json.dumps({"step": step, "seconds": round(seconds, 1), **losses}) + "\n")
                lines.flush()
            if save:
                save_training(state, modules, optimizers, step + 1)
            if stop.requested:
                raise SystemExit(f"stopped after {step + 1} of {num_steps} steps; the same command goes on")
    return seconds


def _seconds(log: Path) -> float:
    """Seconds that earlier processes spent, from the last line of the log."""
    lines = log.read_text().splitlines() if log.is_file() else []
    return json.loads(lines[-1])["seconds"] if lines else 0.0
