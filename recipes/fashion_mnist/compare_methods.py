"""Methods at equal time: python -m recipes.fashion_mnist.compare_methods --curves NAME=RUN NAME=RUN,RUN --out FILE.

Draws, from the logs of trainings with --watch-every, how far one-step samples are from the teacher's after how many
seconds. A curve of several runs is of a student that went from one to the next. Also prints the last point of each.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """Draw the distance to the teacher against the time of training."""

    curves: tuple[str, ...]
    out: Path
    title: str = ""


def points(folders: list[Path]) -> Iterator[tuple[float, float]]:
    """Seconds of training and the distance then, over runs that followed one another."""
    before = 0.0
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        yield from (
            (before + line["seconds"], line["distance_to_teacher"]) for line in lines if "distance_to_teacher" in line
        )
        before += lines[-1]["seconds"]


def main(settings: Settings) -> None:
    """Draw and print."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(settings.curves):
        name, folders = curve.split("=", 1)
        second, distance = zip(*points([Path(folder) for folder in folders.split(",")]), strict=True)
        axes.plot(second, distance, marker="os^Dv"[number % 5], label=name)
        print(f"{name}: {distance[-1]:.3f} after {second[-1]:.0f} s, least {min(distance):.3f}")
    axes.set(xlabel="seconds of training", ylabel="Fréchet distance to the teacher's samples", title=settings.title)
    axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(settings.out, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Settings))
