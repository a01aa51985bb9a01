"""Methods at equal time: python -m recipes.fashion_mnist.compare_methods --model MODEL --curves CURVE CURVE --out FILE.

A curve is a method, NAME=SECONDS:DIR,SECONDS:DIR, a point of it the seconds that a student took, and a model or one of
the checkpoints of the training that made one. All are measured alike, in one step and by the shipped features: against
samples of MODEL's teacher and the real test images. Prints a table and draws both distances over time.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from distilled_decoding import zoo
from distilled_decoding.checkpoint import load_tensors
from distilled_decoding.condition import Asked
from distilled_decoding.metrics.features import Extractor
from distilled_decoding.metrics.frechet import frechet_distance
from distilled_decoding.metrics.precision_recall import precision_recall
from distilled_decoding.metrics.reference import Measured, measure
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, Steps


@dataclass(frozen=True)
class Settings:
    """Measure models on their way, by method."""

    model: str
    curves: tuple[str, ...]
    out: Path
    num: int = 2000
    num_teacher: int = 6000
    title: str = ""


def samples(pipeline: Pipeline, steps: Steps, num: int, seed: int, extractor: Extractor) -> Measured:
    """Features of balanced samples."""
    asked = Asked.in_turn(pipeline.table(), num)
    image_NCHW: Tensor = torch.cat(
        list(pipeline.images(pipeline.plan(steps), asked, image_keys("evaluation", seed, range(num))))
    )
    return measure(extractor, image_NCHW.split(250), asked.number_N, "samples")


def student_of(folder: Path) -> Pipeline:
    """A model, or the model of a training with the averaged student of one of its checkpoints."""
    state = folder / "state.safetensors"
    if not state.is_file():
        return Pipeline.from_pretrained(folder)
    pipeline = Pipeline.from_pretrained(folder.parent.parent)
    assert pipeline.student is not None
    tensors, _ = load_tensors(state)
    averaged = {name.removeprefix("average/"): value for name, value in tensors.items() if name.startswith("average/")}
    pipeline.student.load_state_dict(averaged)
    return pipeline


def draw(curves: dict[str, list[tuple[float, ...]]], title: str, out: Path) -> None:
    """Both distances over time; a point is seconds, distance to the teacher's samples, distance to the test images."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for column, (axes, whose) in enumerate(
        zip(figure.subplots(1, 2), ("teacher's samples", "test images"), strict=True), 1
    ):
        for number, (name, points) in enumerate(curves.items()):
            axes.plot(
                [p[0] for p in points],
                [p[column] for p in points],
                marker="os^Dv"[number % 5],
                label=name,
                ms=11 - 2 * (number % 5),
            )
        axes.set(xlabel="seconds of training", ylabel=f"Fréchet distance to the {whose}", ylim=(0, None))
        axes.grid(alpha=0.25)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(title)
    figure.savefig(out, dpi=150)


def parse(curve: str) -> tuple[str, list[tuple[str, Path]]]:
    """Name and points of a curve: seconds, as they were written, and folder."""
    name, equals, points = curve.partition("=")
    pairs = [point.partition(":") for point in points.split(",")]
    if not equals or not all(colon and seconds.isdecimal() for seconds, colon, _ in pairs):
        raise ValueError(f"a curve is NAME=SECONDS:DIR,SECONDS:DIR with whole seconds, got {curve!r}")
    return name, [(seconds, Path(folder)) for seconds, _, folder in pairs]


def main(settings: Settings) -> None:
    """Measure, print and draw."""
    curves = [parse(curve) for curve in settings.curves]
    torch.set_num_threads(2)
    extractor, real = zoo.extractor("classifier"), zoo.reference()
    assert real.feature_ND is not None
    teacher = Pipeline.from_pretrained(settings.model)
    taught = samples(teacher, "teacher-ancestral", settings.num_teacher, 11, extractor)
    print(
        "| | seconds | to the teacher's samples | to the test images | precision | recall |\n| - | - | - | - | - | - |"
    )
    drawn: dict[str, list[tuple[float, ...]]] = {}
    for name, points in curves:
        for seconds, folder in points:
            made = samples(student_of(folder), 1, settings.num, 7, extractor)
            distances = [frechet_distance(made.statistics, other.statistics) for other in (taught, real)]
            precision, recall = precision_recall(real.feature_ND, made.feature_ND)
            row = " | ".join(f"{value:.3f}" for value in (*distances, precision, recall))
            print(f"| {name} | {seconds} | {row} |", flush=True)
            drawn.setdefault(name, []).append((float(seconds), *distances))
    draw(drawn, settings.title, settings.out)


if __name__ == "__main__":
    main(tyro.cli(Settings))
