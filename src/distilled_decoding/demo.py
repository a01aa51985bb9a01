"""`distilled-decoding demo`: trajectories, a fresh student, samples and a comparison, in minutes on a CPU.

Axis letters: B batch, N images.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from distilled_decoding import commands, training_command, zoo
from distilled_decoding.checkpoint import save_json, save_text
from distilled_decoding.condition import Asked
from distilled_decoding.distill import DistillSettings
from distilled_decoding.images import grid
from distilled_decoding.metrics.frechet import frechet_distance
from distilled_decoding.metrics.reference import check_reference, measure
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, Steps
from distilled_decoding.progress import Bar, StopSignal, progress_bar, stop_signal
from distilled_decoding.records import environment, record
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.trajectories import TrajectorySettings


@dataclass(frozen=True)
class DemoSize:
    """How much the demo does.

    Attributes:
        trajectories: pairs of noise and tokens.
        updates: of the fresh student.
        samples: measured of each row of the table.
    """

    trajectories: int
    updates: int
    samples: int


FULL = DemoSize(trajectories=8192, updates=250, samples=1000)
FAST = DemoSize(trajectories=1024, updates=20, samples=250)
_SEED = 1234
_TIMED = 8


@dataclass(frozen=True)
class _Row:
    """A row of the table: a name, a pipeline, how it samples, and how it samples when only time counts."""

    name: str
    pipeline: Pipeline
    steps: Steps
    timed_steps: Steps


def run_demo(model: str, out: Path, fast: bool) -> dict[str, Any]:
    """Distil a fresh student of a shipped teacher, compare, and write `grid.png`, `table.md` and `demo.json` to `out`.

    Raises:
        ValueError: an unknown model, one without a student, or a folder that holds another demo.
        Stopped: the user asked to stop; the same call goes on.
    """
    size = FAST if fast else FULL
    begin = perf_counter()
    shipped = Pipeline.from_pretrained(model)
    if not shipped.num_classes:
        raise ValueError(f"{model} reads prompts; the demo is for fashion-llamagen and fashion-var, which read classes")
    shipped.plan(2)
    check_reference(zoo.reference(), zoo.extractor("classifier"), shipped.num_classes, shipped.image_shape)
    record(out, "demo", {"teacher": shipped.fingerprint, "seed": _SEED, **asdict(size)}, {"model": model})
    fresh = _fresh_student(model, shipped, out / ("fast" if fast else "full"), size)
    measured = _compare(shipped, fresh, size.samples)
    picture = out / "grid.png"
    images = torch.stack([m.pop("images") for m in measured], 1).flatten(0, 1)
    grid(images, columns=len(measured), scale=3).save(picture)
    seconds = round(perf_counter() - begin, 1)
    summary = {"rows": measured, **asdict(size), "seconds": seconds, "picture": str(picture), **environment()}
    save_json(out / "demo.json", summary)
    save_text(out / "table.md", demo_table(summary))
    return summary


def _fresh_student(model: str, shipped: Pipeline, folder: Path, size: DemoSize) -> Pipeline:
    settings = TrajectorySettings(shipped.config.sampling, shipped.config.flow, _SEED, shard_size=1024)
    trajectories = folder / "trajectories"
    commands.make_trajectories(model, shipped, trajectories, size.trajectories, settings, "1/3 trajectories")
    training = DistillSettings(num_updates=size.updates, warmup=size.updates // 10, ema_rate=0.98)
    store = TrajectoryStore.open(trajectories)
    return training_command.distill_student(model, shipped, store, folder / "student", training, title="2/3 distilling")


def _compare(shipped: Pipeline, fresh: Pipeline, num: int) -> list[dict[str, Any]]:
    rows = [
        _Row("teacher", shipped, "teacher", "teacher-ancestral"),
        _Row("fresh student, 1 step", fresh, 1, 1),
        _Row("shipped student, 1 step", shipped, 1, 1),
        _Row("shipped student, 2 steps", shipped, 2, 2),
    ]
    total = len(rows) * (num + _TIMED)
    with stop_signal() as stop, progress_bar("3/3", total) as bar:
        measured = [_measure(row, num, bar, stop) for row in rows]
    for values in measured:
        values["speed_up"] = measured[0]["ms_per_image"] / values["ms_per_image"]
    return measured


def _measure(row: _Row, num: int, bar: Bar, stop: StopSignal) -> dict[str, Any]:
    """Fréchet distance, class accuracy, milliseconds, and the first images of each class."""
    asked = Asked.in_turn(row.pipeline.table(), num)
    key_N = image_keys("evaluation", _SEED, range(num))
    kept: list[Tensor] = []

    def watched() -> Iterator[Tensor]:
        for image_BCHW in row.pipeline.images(row.pipeline.plan(row.steps), asked, key_N):
            kept.append(image_BCHW)
            yield image_BCHW
            bar.advance(len(image_BCHW))
            stop.check()

    bar.say(f"3/3 measuring {row.name}")
    extractor = zoo.extractor("classifier")
    measured = measure(extractor, watched(), asked.number_N, row.name)
    bar.say(f"3/3 timing {row.name}")
    return {
        "name": row.name,
        "steps": _passes(row),
        "frechet_distance": frechet_distance(measured.statistics, zoo.reference().statistics),
        "accuracy": measured.accuracy,
        "ms_per_image": _milliseconds(row, bar, stop),
        "images": torch.cat(kept)[: row.pipeline.num_classes],
    }


def _passes(row: _Row) -> int:
    return row.pipeline.teacher.order.num_blocks if isinstance(row.steps, str) else row.steps


def _milliseconds(row: _Row, bar: Bar, stop: StopSignal) -> float:
    """Milliseconds from a label to an image, one image at a time, after a warm-up; median of the rest."""
    times = []
    for seed in range(_TIMED):
        begin = perf_counter()
        row.pipeline([seed % row.pipeline.num_classes], [seed], row.timed_steps)
        times.append(perf_counter() - begin)
        bar.advance(1)
        stop.check()
    return median(times[1:]) * 1000


def demo_table(summary: dict[str, Any]) -> str:
    """The demo's comparison as a Markdown table."""
    lines = [
        "| | passes | Fréchet distance | class accuracy | ms/image | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for row in summary["rows"]:
        lines.append(
            f"| {row['name']} | {row['steps']} | {row['frechet_distance']:.2f} | {row['accuracy']:.1%} | "
            f"{row['ms_per_image']:.2f} | {row['speed_up']:.1f}x |"
        )
    note = (
        f"\n{summary['samples']:,} samples a row, same labels and seeds; the fresh student had "
        f"{summary['updates']} updates on {summary['trajectories']:,} trajectories.\n"
        "Times are from one label to one image; the teacher's is that of ordinary sampling.\n"
        f"Picture: {summary['picture']} (columns in the order of the rows).\n"
    )
    return "\n".join(lines) + "\n" + note
