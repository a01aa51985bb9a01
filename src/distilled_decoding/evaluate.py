"""Measure a pipeline: Fréchet distances, class accuracy and time of each way to sample, over seeds.

Every (method, seed) is a run of its own, saved when it is done, so that stopping loses at most one of them.
All methods of a seed begin from the same keys; samples are compared with the teacher's samples of another
seed, so that shared noise cannot bring them together, and the teacher compared in this way is the floor.

Axis letters: B batch, C image channels, H W image, N images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from distilled_decoding.baselines import OneStep, onestep_images
from distilled_decoding.checkpoint import load_json, load_tensors, save_json, save_tensors
from distilled_decoding.condition import Labels
from distilled_decoding.metrics.features import Classifier
from distilled_decoding.metrics.frechet import Statistics, frechet_distance
from distilled_decoding.metrics.reference import Measured, check_reference, measure
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.records import first_difference, identity, record
from distilled_decoding.store import Shard
from distilled_decoding.trajectories import Progress

_NAMED = ("teacher", "teacher-ancestral", "onestep")
_COLUMNS = {
    "frechet_distance": ("Fréchet distance", "{:.3f}"),
    "ratio_to_teacher": ("ratio to teacher", "{:.2f}"),
    "distance_to_teacher": ("distance to teacher's samples", "{:.3f}"),
    "accuracy": ("class accuracy", "{:.1%}"),
    "seconds_per_image": ("s/image", "{:.2g}"),
}


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        methods: `teacher`, `teacher-ancestral`, `onestep`, or a number of student steps.
        num: samples of each method and seed, the labels in turn.
        seeds: run seeds; three or more give a spread worth reading.
        keep: this many first images of each run are kept for a grid; 0 keeps none.

    Raises:
        ValueError: an unknown method, something named twice, or too few samples.
    """

    methods: tuple[str, ...] = ("teacher", "1", "2")
    num: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)
    keep: int = 64

    def __post_init__(self) -> None:
        for name in self.methods:
            if name not in _NAMED and not name.isdecimal():
                raise ValueError(f"unknown method {name!r}; use {', '.join(_NAMED)} or a number of steps")
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} must be given, each once, got {values}")
        if self.num < 2 or self.keep < 0:
            raise ValueError(f"num must be at least 2 and keep at least 0, got {self.num} and {self.keep}")


@dataclass(frozen=True)
class Result:
    """One method at one seed.

    Attributes:
        method: see `EvaluationSettings`.
        seed: the run seed.
        frechet_distance: to the real images.
        ratio_to_teacher: that over the teacher's at the same seed; None when the teacher was not measured.
        distance_to_teacher: Fréchet distance to the teacher's samples of the next seed (after the last comes the
            first); None when the teacher was not measured or there is one seed only.
        accuracy: share of samples that the classifier gives the label they were asked for.
        seconds_per_image: sampling and decoding, without measuring.
    """

    method: str
    seed: int
    frechet_distance: float
    ratio_to_teacher: float | None
    distance_to_teacher: float | None
    accuracy: float
    seconds_per_image: float


@dataclass(frozen=True, eq=False)
class Evaluation:
    """All results, one a method and seed, with the real images they were measured against.

    The times depend on `batch_size`, the images generated at once.
    """

    settings: EvaluationSettings
    reference: Statistics
    batch_size: int
    results: tuple[Result, ...]


@dataclass(frozen=True, eq=False)
class _Method:
    """A way to make uint8 images [B, C, H, W] batch by batch, and everything that determines them."""

    images: Callable[[Labels, Tensor], Iterator[Tensor]]
    made_from: dict[str, Any]


@dataclass(frozen=True, eq=False)
class _Run:
    """What is kept of one method at one seed."""

    measured: Measured
    seconds_per_image: float


_Runs = dict[tuple[str, int], _Run]


def evaluate(
    pipeline: Pipeline,
    classifier: Classifier,
    settings: EvaluationSettings,
    reference: Statistics,
    out: Path,
    shard: Shard | None = None,
    progress: Progress = lambda num: None,
) -> Evaluation:
    """Measure every method at every seed that `out` does not have yet, and compare them all.

    Args:
        pipeline: the model.
        classifier: in evaluation mode; gives the features and judges the classes.
        settings: what to measure.
        reference: `real_statistics` of the same classifier.
        out: folder of the runs, a safetensors and a JSON file each, and the record of what was asked first.
        shard: trajectories, from which `onestep` takes its frequencies.
        progress: called with the number of images finished, those of runs found on disk included.

    Raises:
        ValueError: model, classifier, reference, methods and what is in `out` do not fit each other.
    """
    check_reference(reference, classifier, pipeline.num_classes)
    condition = Labels.balanced(settings.num, pipeline.num_classes)
    shared = {"num": settings.num, "keep": settings.keep, "extractor": reference.extractor}
    methods = {name: _method(pipeline, name, shard, shared) for name in settings.methods}
    keys = [(name, seed) for name in settings.methods for seed in settings.seeds]
    # All are read before any is made: a folder that does not fit is refused at once, not after hours.
    found = {key: _load(_path(out, *key), methods[key[0]]) for key in keys}
    made_from = {name: method.made_from for name, method in methods.items()}
    record(out, "evaluate", {**asdict(settings), "made_from": made_from}, {"reference": reference.images})
    runs: _Runs = {}
    for (name, seed), run in found.items():
        if run is not None:
            progress(settings.num)
        runs[name, seed] = run or _measure(_path(out, name, seed), seed, methods[name], condition, classifier, progress)
    following = dict(zip(settings.seeds, (*settings.seeds[1:], settings.seeds[0]), strict=True))
    results = tuple(_compare(runs, name, seed, following[seed], reference) for name, seed in keys)
    return Evaluation(settings, reference, pipeline.config.micro_batch, results)


def kept_images(out: Path, method: str, seed: int) -> Tensor:
    """The first images of a run, uint8 [N, C, H, W]; place by place one seed's runs share label and noise."""
    return load_tensors(_path(out, method, seed).with_suffix(".images.safetensors"))[0]["image_NCHW"]


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Everything measured, as JSON: every quantity of every method with its mean, spread and value per seed.

    The fields are those of `Result`, null where not measured; the teacher's `distance_to_teacher` is the
    floor of all others. A spread is the standard deviation over seeds (n - 1), 0 for a single seed.
    """
    settings, reference = evaluation.settings, evaluation.reference
    methods = {}
    for name in settings.methods:
        results = [result for result in evaluation.results if result.method == name]
        methods[name] = {field: _moments([getattr(result, field) for result in results]) for field in _COLUMNS}
    real = {"images": reference.images, "count": reference.count, "extractor": reference.extractor}
    sampled = {"num": settings.num, "seeds": list(settings.seeds), "batch_size": evaluation.batch_size}
    return {**sampled, "reference": real, "methods": methods}


def markdown_table(summary: Mapping[str, Any]) -> str:
    """A `summary` as a Markdown table with the lines that say how to read it."""
    titles = [title for title, _ in _COLUMNS.values()]
    rows = [["method", *titles], ["---"] * (len(titles) + 1)]
    for name, measured in summary["methods"].items():
        title = f"{name} step{'s' * (name != '1')}" if name.isdecimal() else name
        rows.append([title, *(_cell(measured[field], form) for field, (_, form) in _COLUMNS.items())])
    real, seeds = summary["reference"], ", ".join(map(str, summary["seeds"]))
    note = (
        f"{summary['num']:,} balanced samples at each of seeds {seeds}; mean ± standard deviation over seeds. "
        f"Fréchet distances in the features of classifier {real['extractor'][:12]}, to {real['count']:,} "
        f"{real['images']}, and to the teacher's samples of another seed, where the teacher's own row is the "
        f"floor. Times include decoding, {summary['batch_size']} images at once."
    )
    return "\n".join([f"| {' | '.join(row)} |" for row in rows]) + f"\n\n{note}\n"


def _method(pipeline: Pipeline, name: str, shard: Shard | None, shared: Mapping[str, Any]) -> _Method:
    if name == "onestep":
        if shard is None:
            raise ValueError("onestep takes its frequencies from trajectories; give some, or leave it out")
        baseline = OneStep.fit(shard, pipeline.num_classes, len(pipeline.teacher.codebook))
        frequencies = sha256(baseline.frequency.numpy().tobytes()).hexdigest()
        made_from = {"teacher": pipeline.fingerprint, "micro_batch": pipeline.config.micro_batch}
        images = partial(onestep_images, pipeline, baseline)
        return _Method(images, {**shared, **made_from, "frequencies": frequencies})
    plan = pipeline.plan(int(name) if name.isdecimal() else name)  # type: ignore[arg-type]
    return _Method(partial(pipeline.images, plan), {**shared, **identity(pipeline, plan)})


def _measure(
    path: Path, seed: int, method: _Method, condition: Labels, classifier: Classifier, progress: Progress
) -> _Run:
    """Sample, score and save one run; its JSON goes last, so that half a run is never taken for one."""
    num, keep = len(condition), method.made_from["keep"]
    kept: list[Tensor] = []
    seconds = 0.0

    def watched() -> Iterator[Tensor]:
        nonlocal seconds
        seen = 0
        for image_BCHW, spent in _timed(method.images(condition, image_keys("evaluation", seed, range(num)))):
            seconds += spent
            kept.append(image_BCHW[: max(0, keep - seen)])
            seen += len(image_BCHW)
            yield image_BCHW
            progress(len(image_BCHW))

    measured = measure(classifier, watched(), condition.label_B, f"{path.stem}, {num} samples")
    measured.statistics.save(path.with_suffix(".safetensors"))
    save_tensors(path.with_suffix(".images.safetensors"), {"image_NCHW": torch.cat(kept)})
    values = {"accuracy": measured.accuracy, "seconds_per_image": seconds / num}
    save_json(path, {"made_from": method.made_from, **values})
    return _Run(measured, seconds / num)


def _timed(images: Iterable[Tensor]) -> Iterator[tuple[Tensor, float]]:
    """Each batch with the seconds that it took to make."""
    begin = perf_counter()
    for image_BCHW in images:
        yield image_BCHW, perf_counter() - begin
        begin = perf_counter()


def _load(path: Path, method: _Method) -> _Run | None:
    """A finished run, or None; one made from something else is an error."""
    if not path.is_file():
        return None
    saved = load_json(path)
    try:
        found, accuracy, seconds = saved["made_from"], saved["accuracy"], saved["seconds_per_image"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by `evaluate`; choose another --out") from error
    if difference := first_difference(found, method.made_from):
        raise ValueError(f"{path} was made from something else: its {difference}; choose another --out")
    return _Run(Measured(Statistics.load(path.with_suffix(".safetensors")), accuracy), seconds)


def _compare(runs: _Runs, name: str, seed: int, next_seed: int, reference: Statistics) -> Result:
    run, teacher = runs[name, seed], runs.get(("teacher", seed))
    other = runs.get(("teacher", next_seed)) if next_seed != seed else None
    distance = frechet_distance(run.measured.statistics, reference)
    return Result(
        method=name,
        seed=seed,
        frechet_distance=distance,
        ratio_to_teacher=distance / frechet_distance(teacher.measured.statistics, reference) if teacher else None,
        distance_to_teacher=frechet_distance(run.measured.statistics, other.measured.statistics) if other else None,
        accuracy=run.measured.accuracy,
        seconds_per_image=run.seconds_per_image,
    )


def _moments(values: list[float | None]) -> dict[str, Any] | None:
    """Mean, spread and the values; None when they were not measured."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    spread = stdev(measured) if len(measured) > 1 else 0.0
    return {"mean": fmean(measured), "spread": spread, "per_seed": measured}


def _cell(moments: Mapping[str, Any] | None, form: str) -> str:
    return f"{form.format(moments['mean'])} ± {form.format(moments['spread'])}" if moments else "-"


def _path(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-seed{seed}.json"
