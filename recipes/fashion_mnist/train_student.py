"""The student: python -m recipes.fashion_mnist.train_student --model DIR --trajectories DIR --out DIR.

Regression on trajectories first, which teaches it what noise stands for, then the teacher's judgement of what it makes
itself. The whole model lies in OUT/model; the same command goes on where it was stopped.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from distilled_decoding.distill import DistillSettings, MethodName, usual_settings
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.student import Head
from distilled_decoding.training_command import distill_student


@dataclass(frozen=True)
class Settings:
    """Train a student in two stretches, with the settings of fashion-llamagen's unless said.

    Regression reads `start_weights` and what stands from `num_updates` to `muon_rate`. Then comes `method`, with its
    usual settings and the weights called `matching`: block weights are those of a row of eight tokens, of the others in
    front of the second start, and of the rest; where none are given all blocks weigh alike.
    """

    model: Path
    trajectories: Path
    out: Path
    head: Head = "code"
    start_blocks: tuple[int, ...] = (0, 20)
    start_weights: tuple[float, ...] = (0.7, 0.3)
    num_updates: int = 3500
    warmup: int = 200
    muon_rate: float = 3.0
    method: MethodName = "token-scores"
    matching_start_weights: tuple[float, ...] = (0.6, 0.4)
    matching_block_weights: tuple[float, ...] = (4.0,) * 8 + (2.0,) * 12 + (1.0,) * 44


def main(settings: Settings) -> None:
    """Train and write both models."""
    torch.set_num_threads(2)
    first = DistillSettings(
        head=settings.head,
        num_updates=settings.num_updates,
        warmup=settings.warmup,
        muon_rate=settings.muon_rate,
        start_blocks=settings.start_blocks,
        start_weights=settings.start_weights,
        compile=True,
    )
    then = replace(
        usual_settings(settings.method, first, first.head),
        start_weights=settings.matching_start_weights,
        block_weights=settings.matching_block_weights,
    )
    teacher, store = Pipeline.from_pretrained(settings.model), TrajectoryStore.open(settings.trajectories)
    # What does not fit the second stretch shall be known before the first, which takes half an hour.
    then.check(teacher.teacher.order, teacher.config.split_block)
    folder = settings.out / "regressed"
    regressed = distill_student(str(settings.model), teacher, store, folder, first, title="1/2 regression")
    matched, title = settings.out / "matched", f"2/2 {settings.method}"
    student = distill_student(str(folder), regressed, None, matched, then, title=title, start="student")
    # The second stretch needs the first one's student, so what `distill` does by default with this model is the first.
    student.with_settings(training=first).save_pretrained(settings.out / "model")


if __name__ == "__main__":
    main(tyro.cli(Settings))
