"""Trajectories and training a second, in a naive loop, in one process and in two: a Markdown table.

The naive loop is what one writes first: one trajectory after the other, one row at a time through a student in float32.
Ours are the commands themselves, without their start: of two runs of different length the difference counts. Processes
share the cores.

`python benchmarks/scaling.py --model fashion-llamagen`

Axis letters: B batch, L tokens, C code channels.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
import tyro

from distilled_decoding.condition import Labels, stand_ins
from distilled_decoding.distill_trajectories import batch_loss
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.records import environment
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import by_flow, rollout


def seconds(processes: int, *words: object) -> float:
    """How long a command takes in a number of processes."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "--"]
    command = [sys.executable, *(start if processes > 1 else ["-m"]), "distilled_decoding", *map(str, words)]
    begin = perf_counter()
    environ = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return perf_counter() - begin


def rate(processes: int, small: int, large: int, *words: object, count: str, folder: Path) -> float:
    """Items a second between a run of a small number of them and a run of a large one."""
    times = [
        seconds(processes, *words, count, num, "--out", folder / f"{words[0]}-{processes}-{num}")
        for num in (small, large)
    ]
    return (large - small) / (times[1] - times[0])


@torch.no_grad()
def naive_trajectories(pipeline: Pipeline, num: int = 8) -> float:
    """One trajectory after the other: how many a second."""
    teacher, config = pipeline.teacher, pipeline.config
    begin = perf_counter()
    for index in range(num):
        key_1 = image_keys("trajectories", 0, [index])
        noise_1LC = gaussian_noise(key_1, teacher.order.length, teacher.codebook.shape[1])
        choose = by_flow(teacher.order, noise_1LC, teacher.codebook, config.sampling, config.flow)
        rollout(teacher, stand_ins(teacher, 1), config.sampling.guidance, choose)
    return num / (perf_counter() - begin)


def naive_training(pipeline: Pipeline, store: TrajectoryStore, num: int = 64) -> float:
    """One row after the other through the student and back, in float32: how many a second."""
    settings = replace(pipeline.config.training, bf16=False)
    student = pipeline.new_student(0).train()
    begin = perf_counter()
    for index in range(num):
        batch, known_blocks_1 = store[torch.tensor([index])], torch.zeros(1, dtype=torch.int64)
        condition, split_block = Labels(batch.label_N, pipeline.num_classes), pipeline.config.split_block
        loss = batch_loss(pipeline.teacher, student, batch, condition, known_blocks_1, settings, split_block)
        loss.total.backward()
    return num / (perf_counter() - begin)


def main(model: str = "fashion-llamagen", batch_size: int = 64) -> None:
    """Print the table.

    Args:
        model: shipped name, folder or hub id.
        batch_size: trajectories in an update.
    """
    pipeline = Pipeline.from_pretrained(model)
    print("| | naive loop | one process | two processes |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = ("trajectories", model, "--micro-batch", 64, "--shard-size", 128)
        rates = [rate(n, 256, 2304, *make, count="--num", folder=folder) for n in (1, 2)]
        print(f"| trajectories a second | {naive_trajectories(pipeline):.1f} | {rates[0]:.1f} | {rates[1]:.1f} |")
        made = folder / "trajectories-1-2304"
        learn = ("distill", model, "--trajectories", made, "--batch-size", batch_size, "--no-compile")
        rates = [batch_size * rate(n, 4, 44, *learn, count="--num-updates", folder=folder) for n in (1, 2)]
        naive = naive_training(pipeline, TrajectoryStore.open(made))
        print(f"| training samples a second | {naive:.1f} | {rates[0]:.1f} | {rates[1]:.1f} |")
        size = sum(path.stat().st_size for path in made.glob("shard-*")) / 2304
    machine = environment()["machine"]
    print(
        f"\n`{model}`, {pipeline.teacher.order.length} tokens, {size:.0f} bytes a trajectory on disk in shards of 128; "
        f"{machine['processor']}, {machine['cores']} cores, torch {torch.__version__}."
    )


if __name__ == "__main__":
    tyro.cli(main)
