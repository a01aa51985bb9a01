"""Speed of every way to sample a model, measured side by side in one process.

The teacher is timed three times: as its family's published code samples, as ours does, and ours compiled; a speed-up
is a number against each of them. What is timed runs from labels and keys on the device to codes, and on to bytes of
images on the host. Warm-up is left out, the ways take turns, and medians are reported.

Axis letters: B batch, L tokens, C code channels.
"""

import gc
import importlib.util
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from distilled_decoding.checkpoint import save_json, save_text
from distilled_decoding.condition import Condition, stand_ins
from distilled_decoding.families import family
from distilled_decoding.images import to_uint8
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, Steps, is_out_of_memory
from distilled_decoding.progress import Bar, progress_bar, stop_signal
from distilled_decoding.records import environment, record_anew
from distilled_decoding.sampling import Step

# A turn repeats short runs until this many seconds have passed: a generator that works is warm.
_TURN = 0.2

PLAIN, TEACHER, FORWARD = "teacher, plain loop", "teacher, compiled", "teacher, compiled, forward passes alone"
_COMPARED = {"plain_loop": PLAIN, "compiled_teacher": TEACHER}
_STEPS: dict[str, Steps] = {"teacher": "teacher-ancestral", "1 step": 1, "2 steps": 2}


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        batches: images at once, ascending; latency is that of the first, throughput the best of all.
        repeats: turns of each way at each batch; a short way runs several times in its turn.
        seconds: a way is not tried at the next batch when one run of it takes longer than this.

    Raises:
        ValueError: batches that do not ascend from 1 or more, or no repeat.
    """

    batches: tuple[int, ...] = (1, 8, 64)
    repeats: int = 5
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.batches or self.batches[0] < 1 or list(self.batches) != sorted(set(self.batches)):
            raise ValueError(f"batches must ascend from 1 or more, got {self.batches}")
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")


@dataclass(frozen=True)
class Way:
    """One way to sample.

    Attributes:
        name: in the table.
        passes: forward passes of the transformer.
        codes: the codes of a batch from its condition and keys.
        decode: the images of codes; None where there are no codes of images.
    """

    name: str
    passes: int
    codes: Callable[[Condition, Tensor], Tensor]
    decode: Callable[[Tensor], Tensor] | None


@dataclass
class Timing:
    """A way at one batch.

    Attributes:
        batch: images at once.
        codes: seconds of each run to the codes.
        images: seconds of each run to the images; empty where there are none.
        memory_bytes: the most that the device (or, on a CPU, the process) held, weights included.
    """

    batch: int
    codes: list[float]
    images: list[float]
    memory_bytes: int | None


def bench(pipeline: Pipeline, name: str, out: Path, settings: BenchSettings) -> dict[str, Any]:
    """Measure a model and write `bench.json`, `bench.md` and `bench.png` to `out`.

    Args:
        pipeline: with a student, on the device to measure; its weights may be random.
        name: of the model, for the record.
        out: a folder; results that it holds are replaced.
        settings: what is measured.

    Returns:
        What `bench.json` holds.

    Raises:
        ValueError: no student, or a folder that holds another command's results.
        Stopped: the user asked to stop.
    """
    pipeline.plan(2)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the figure needs matplotlib: pip install 'distilled-decoding[plot]'")
    made_of = {"teacher": pipeline.fingerprint, "dtype": _name(pipeline.dtype), "device": str(pipeline.device)}
    record_anew(out, "bench", {**made_of, **asdict(settings)}, {"model": name})
    ways, left_out = _ways(pipeline)
    timings: dict[str, list[Timing]] = {way.name: [] for way in ways}
    total = len(ways) * len(settings.batches) * (settings.repeats + 2)
    with stop_signal(goes_on=False) as stop, progress_bar("timing", total) as bar:
        for batch in settings.batches:
            _measure(pipeline, ways, timings, batch, settings, bar, stop.check)
    summary = {
        "model": name,
        "device": pipeline.device.type,
        "dtype": _name(pipeline.dtype),
        "tokens": pipeline.teacher.order.length,
        "sampling": asdict(pipeline.config.sampling),
        **asdict(settings),
        "ways": _rows(ways, timings),
        "left_out": left_out,
        **environment(),
    }
    save_json(out / "bench.json", summary)
    save_text(out / "bench.md", bench_table(summary))
    bench_figure(summary, out / "bench.png")
    return summary


def _ways(pipeline: Pipeline) -> tuple[list[Way], str | None]:
    """All ways to sample, and why the plain loop is not among them, if so."""
    fast, order, sampling = pipeline.compiled(), pipeline.teacher.order, pipeline.config.sampling
    ways, left_out = [], None
    plain_loop = family(pipeline.config.family).plain_loop
    if plain_loop is None:
        left_out = "this family has no published loop to compare with"
    else:
        generator = torch.Generator(pipeline.device).manual_seed(0)

        def plainly(condition: Condition, key_B: Tensor) -> Tensor:
            return plain_loop(pipeline.teacher, condition, sampling, generator)

        try:
            plainly(*_inputs(pipeline, 1))
            ways.append(Way(PLAIN, order.num_blocks, plainly, pipeline.teacher.decode))
        except ValueError as error:
            left_out = str(error)
    for name, steps in _STEPS.items():
        passes = count_passes(pipeline, steps)
        ways += [_way(f"{name}{kind}", passes, own, steps) for kind, own in (("", pipeline), (", compiled", fast))]
    ways.append(_way("teacher, flow map, compiled", count_passes(pipeline, "teacher"), fast, "teacher"))
    ways.append(Way(FORWARD, order.num_blocks, lambda condition, key_B: _forward_passes(fast, condition), None))
    return ways, left_out


def count_passes(pipeline: Pipeline, steps: Steps) -> int:
    """Forward passes that one image takes, counted while it is made."""
    passes = 0

    def counted(state: Any) -> Tensor:
        nonlocal passes
        passes += 1
        return pipeline.teacher.next_logits(state)

    def on_step(step: Step) -> None:
        nonlocal passes
        passes += step.name == "student"

    watched = copy(pipeline)
    watched.teacher = copy(pipeline.teacher)
    watched.teacher.next_logits = counted
    watched.codes(pipeline.plan(steps), *_inputs(pipeline, 1), on_step)
    return passes


def _way(name: str, passes: int, pipeline: Pipeline, steps: Steps) -> Way:
    plan = pipeline.plan(steps)
    return Way(name, passes, lambda condition, key_B: pipeline.codes(plan, condition, key_B), pipeline.teacher.decode)


@torch.no_grad()
def _forward_passes(pipeline: Pipeline, condition: Condition) -> Tensor:
    """What the transformer computes for one generation, of tokens that nobody chose; returns the last logits."""
    teacher = pipeline.teacher
    state = teacher.start(condition, pipeline.config.sampling.guidance)
    for size in teacher.order.sizes[:-1]:
        state = teacher.feed(state, torch.zeros(len(condition), size, dtype=torch.int64, device=pipeline.device))
    return teacher.next_logits(state)


def _inputs(pipeline: Pipeline, batch: int) -> tuple[Condition, Tensor]:
    condition = stand_ins(pipeline.teacher, batch).to(pipeline.device)
    return condition, image_keys("evaluation", 0, range(batch)).to(pipeline.device)


def _measure(
    pipeline: Pipeline,
    ways: list[Way],
    timings: dict[str, list[Timing]],
    batch: int,
    settings: BenchSettings,
    bar: Bar,
    check: Callable[[], None],
) -> None:
    """Time all ways at one batch, in turn; those that were too slow or too large at the last one are left out."""
    inputs, active = _inputs(pipeline, batch), []
    for way in ways:
        bar.say(f"batch {batch}, warming up: {way.name}")
        earlier = timings[way.name]
        slow = earlier and max(earlier[-1].images or earlier[-1].codes) > settings.seconds
        if slow or (batch != settings.batches[0] and not earlier):
            bar.advance(settings.repeats + 2)
            continue
        try:
            _run(way, inputs, pipeline.device)
            _reset_peak(pipeline.device)
            _run(way, inputs, pipeline.device)
            timings[way.name].append(Timing(batch, [], [], _peak(pipeline.device)))
            active.append(way)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            bar.advance(settings.repeats)
        bar.advance(2)
        check()
    for repeat, way in product(range(settings.repeats), active):
        bar.say(f"batch {batch}, run {repeat + 1}: {way.name}")
        gc.collect()
        begin = perf_counter()
        while True:
            codes, images = _run(way, inputs, pipeline.device)
            timings[way.name][-1].codes.append(codes)
            timings[way.name][-1].images.extend([] if images is None else [images])
            if perf_counter() - begin > _TURN:
                break
        bar.advance(1)
        check()


@torch.no_grad()
def _run(way: Way, inputs: tuple[Condition, Tensor], device: torch.device) -> tuple[float, float | None]:
    """Seconds to the codes, and to the images."""
    _synchronize(device)
    begin = perf_counter()
    code_BLC = way.codes(*inputs)
    _synchronize(device)
    codes = perf_counter() - begin
    if way.decode is None:
        return codes, None
    to_uint8(way.decode(code_BLC)).cpu()
    return codes, perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (path := Path("/proc/self/clear_refs")).exists():
        path.write_text("5")


def _peak(device: torch.device) -> int | None:
    """The most bytes held since `_reset_peak`; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _rows(ways: list[Way], timings: dict[str, list[Timing]]) -> list[dict[str, Any]]:
    """The ways as JSON: latency at the first batch, the best throughput, ratios to both teachers, and every run."""
    first = {name: runs[0] for name, runs in timings.items() if runs}
    rows: list[dict[str, Any]] = []
    for way in ways:
        if way.name not in first:
            continue
        own, best = first[way.name], max(timings[way.name], key=_throughput)
        rows.append(
            {
                "name": way.name,
                "passes": way.passes,
                "codes_ms": _ms(own.codes),
                "images_ms": _ms(own.images),
                "images_per_second": _throughput(best),
                "best_batch": best.batch,
                "memory_mib": None if best.memory_bytes is None else round(best.memory_bytes / 2**20),
                "speed_up": {key: _speed_up(first.get(other), own) for key, other in _COMPARED.items()},
                "runs": [asdict(run) for run in timings[way.name]],
            }
        )
    return rows


def _ms(seconds: list[float]) -> float | None:
    return median(seconds) * 1000 if seconds else None


def _throughput(timing: Timing) -> float:
    return timing.batch / median(timing.images or timing.codes)


def _speed_up(other: Timing | None, own: Timing) -> dict[str, float] | None:
    if other is None or not own.images:
        return None
    return {
        "codes": median(other.codes) / median(own.codes),
        "images": median(other.images) / median(own.images),
    }


def bench_table(summary: dict[str, Any]) -> str:
    """The measurement as a Markdown table, with what it was made on."""
    batch = summary["batches"][0]
    lines = [
        "| | passes | ms, codes | ms, image | times faster than the plain loop | than the compiled teacher "
        "| images/s (batch) | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in summary["ways"]:
        ratios = [_ratio(row["speed_up"][other]) for other in _COMPARED]
        best = f"{row['images_per_second']:.3g} ({row['best_batch']})"
        cells = [row["passes"], _number(row["codes_ms"]), _number(row["images_ms"]), *ratios, best, row["memory_mib"]]
        lines.append(f"| {row['name']} | {' | '.join('-' if cell is None else str(cell) for cell in cells)} |")
    machine, versions = summary["machine"], summary["versions"]
    where = machine["gpu"] if summary["device"] == "cuda" else f"{machine['processor']}, {machine['threads']} threads"
    left_out = f" No plain loop: {summary['left_out']}." if summary["left_out"] else ""
    note = (
        f"\n`{summary['model']}`, {summary['tokens']} tokens, {summary['dtype']}, {where}, torch {versions['torch']}. "
        f"Milliseconds at batch {batch}, medians over {summary['repeats']} turns; ratios are of times to "
        "images, in brackets of times to codes; memory is the most held, weights of teacher and student included."
        f"{left_out}\n"
    )
    return "\n".join(lines) + "\n" + note


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _ratio(ratio: dict[str, float] | None) -> str | None:
    return None if ratio is None else f"{ratio['images']:.3g} ({ratio['codes']:.3g})"


def bench_figure(summary: dict[str, Any], path: Path) -> None:
    """Milliseconds to codes and to images of every way, as dots on a logarithmic axis."""
    from matplotlib.figure import Figure

    rows = [row for row in reversed(summary["ways"]) if row["images_ms"] is not None]
    figure = Figure(figsize=(8, 1 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour = "#2b66b1" if "step" in row["name"] else "#b0662b"
        axes.plot([row["codes_ms"], row["images_ms"]], [place, place], color=colour, linewidth=1.5)
        axes.scatter(row["codes_ms"], place, s=36, facecolor="white", edgecolor=colour, linewidth=1.5, zorder=3)
        axes.scatter(row["images_ms"], place, s=36, color=colour, zorder=3)
        axes.text(1.12 * row["images_ms"], place, f"{_number(row['images_ms'])} ms", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xscale("log")
    axes.set_xlim(0.7 * min(row["codes_ms"] for row in rows), 2.5 * max(row["images_ms"] for row in rows))
    axes.set_xlabel(f"milliseconds, batch {summary['batches'][0]}: hollow to codes, full to images")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{summary['model']}, {summary['dtype']}", fontsize=10, loc="left")
    figure.savefig(path, dpi=150)
