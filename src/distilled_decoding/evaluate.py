"""Measure a pipeline: how good each way to sample is, how close to the teacher, and how long it takes, over seeds.

Every (method, seed) is a run of its own, saved when it is done, so that stopping loses at most one of them.
All methods of a seed begin from the same keys; samples are compared with the teacher's samples of another
seed, so that shared noise cannot bring them together, and the teacher compared in this way is the floor.

Axis letters: B batch, S blocks, L tokens in a sequence, C image channels, H W image, D feature width, N images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed import HashStore, Store

from distilled_decoding import processes
from distilled_decoding.blocks import BlockOrder
from distilled_decoding.checkpoint import (
    fingerprint,
    first_difference,
    load_json,
    load_tensors,
    save_json,
    save_tensors,
)
from distilled_decoding.codebook import nearest
from distilled_decoding.condition import Asked, ConditionTable, Labels
from distilled_decoding.methods import Method, check_names, method
from distilled_decoding.metrics.alignment import Judge, share
from distilled_decoding.metrics.features import Extractor
from distilled_decoding.metrics.frechet import Statistics, frechet_distance, warn_if_few
from distilled_decoding.metrics.kernel_distance import kernel_distance
from distilled_decoding.metrics.precision_recall import precision_recall
from distilled_decoding.metrics.reference import MIN_IMAGES, Measured, Reference, check_reference, measure
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.records import environment, record
from distilled_decoding.trajectories import Progress


@dataclass(frozen=True)
class EvaluationSettings:
    """What is measured.

    Attributes:
        methods: see `methods.method`.
        num: samples of each method and seed, the labels or prompts in turn.
        seeds: run seeds; three or more give a spread worth reading.
        keep: this many first images of each run are kept for pictures; 0 keeps none.

    Raises:
        ValueError: an unknown method, something named twice, or too few samples.
    """

    methods: tuple[str, ...] = ("teacher", "1", "2")
    num: int = 10_000
    seeds: tuple[int, ...] = (0, 1, 2)
    keep: int = 64

    def __post_init__(self) -> None:
        check_names(self.methods)
        for what, values in (("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what} must be given, each once, got {values}")
        if self.num < MIN_IMAGES or self.keep < 0:
            raise ValueError(f"num must be at least {MIN_IMAGES} and keep at least 0, got {self.num} and {self.keep}")


@dataclass(frozen=True)
class Quality:
    """What one run is by itself; None where the extractor or the reference cannot tell.

    Attributes:
        frechet_distance: to the real images.
        kernel_distance: KID to the real images.
        inception_score: by the classes that the extractor knows.
        precision: share of samples that look like real images.
        recall: share of real images that look like samples.
        accuracy: share of samples that are given the label they were asked for.
        alignment: share of samples whose prompt's name is found among 100, see `metrics.alignment`.
        seconds_per_image: sampling and decoding, without the first batch, in which things warm up.
    """

    frechet_distance: float
    kernel_distance: float | None
    inception_score: float
    precision: float | None
    recall: float | None
    accuracy: float | None
    alignment: float | None
    seconds_per_image: float


@dataclass(frozen=True)
class Likeness:
    """How one run compares with the teacher and itself; None where the teacher, or a second seed, was not measured.

    Attributes:
        ratio_to_teacher: Fréchet distance over the teacher's at the same seed.
        distance_to_teacher: Fréchet distance to the teacher's samples of the next seed; after the last comes the first.
        agreement_S: per block, the share of tokens that equal the teacher's on the same noise.
        repeat_S: likewise, of tokens that equal its own of the next seed: what one label or prompt brings about,
            whatever the noise. The teacher's is what `agreement_S` is by chance.
    """

    ratio_to_teacher: float | None
    distance_to_teacher: float | None
    agreement_S: tuple[float, ...] | None
    repeat_S: tuple[float, ...] | None


@dataclass(frozen=True)
class Run:
    """One method at one seed.

    Attributes:
        method: see `EvaluationSettings`.
        seed: the run seed.
        passes: forward passes of an image.
        environment: versions, commit and machine when it was made.
        quality: measured when it was made.
        likeness: found when all runs are there.
    """

    method: str
    seed: int
    passes: int
    environment: dict[str, Any]
    quality: Quality
    likeness: Likeness


def evaluate(
    pipeline: Pipeline,
    table: ConditionTable,
    extractor: Extractor,
    settings: EvaluationSettings,
    reference: Reference,
    out: Path,
    progress: Progress = lambda num: None,
    judge: Judge | None = None,
    shared: Store | None = None,
) -> list[Run]:
    """Measure every method at every seed that `out` does not have yet, and compare them all.

    All processes of a run call this alike, within `processes.group`, and have the same result; each method and seed is
    measured by one of them.

    Args:
        pipeline: the model.
        table: what images are asked for: the classes, or prompts.
        extractor: gives the features, and judges the classes where it knows those of the model.
        settings: what to measure.
        reference: the real images, seen by the same extractor.
        out: folder of the runs, tensors and a JSON file each, and the record of what was asked first.
        progress: called with the number of images finished, those of runs found on disk included.
        judge: says which samples show what their prompts name.
        shared: what `processes.group` gives; None for a process alone.

    Raises:
        ValueError: model, extractor, reference, methods and what is in `out` do not fit each other.
    """
    check_reference(reference, extractor, pipeline.num_classes, pipeline.image_shape)
    if "onestep" in settings.methods and settings.num < len(table):
        what = "classes" if pipeline.num_classes else "prompts"
        raise ValueError(f"onestep needs samples of all {len(table)} {what}, got num {settings.num}")
    warn_if_few(min(settings.num, reference.statistics.count or settings.num), extractor)
    number_N = Asked.in_turn(table, settings.num).number_N
    keys = [(name, seed) for name in settings.methods for seed in settings.seeds]

    def samples(seed: int) -> tuple[Tensor, Labels]:
        return _tokens(out, "teacher", seed), Labels(number_N, len(table))

    methods = {(name, seed): method(pipeline, table, name, partial(samples, seed)) for name, seed in keys}
    made_from = {
        key: {
            **one.made_from,
            "asked": table.identity,
            "num": settings.num,
            "device": str(pipeline.device),
            "extractor": extractor.fingerprint,
            "reference": reference.identity,
            "retriever": judge and fingerprint(judge.retriever),
        }
        for key, one in methods.items()
    }

    def finished() -> dict[tuple[str, int], tuple[Quality, dict[str, Any]]]:
        return {key: one for key in keys if (one := _load(_path(out, *key), made_from[key]))}

    # All are read before any is made: a folder that does not fit is refused at once, not after hours.
    found = finished()
    asked = {name: made_from[name, settings.seeds[0]] for name in settings.methods}

    def begin() -> None:
        record(out, "evaluate", {**asdict(settings), "made_from": asked}, {"reference": reference.statistics.images})
        reference.save(out / "reference.safetensors")
        progress(settings.num * len(found))

    processes.first_acts(begin)
    shared = HashStore() if shared is None else shared
    # The independent baseline needs the teacher's samples; else long runs go first, so that processes end together.
    waiting = sorted((key for key in keys if key not in found), key=lambda key: -methods[key].passes)
    for needs_teacher in (False, True):
        turn = [key for key in waiting if (key[0] == "onestep") == needs_teacher]
        for number in processes.deal(len(turn), shared, f"runs of turn {needs_teacher:d}"):
            name, seed = turn[number]
            sampled = _Sampled(pipeline, methods[name, seed], number_N, seed, settings.keep, progress, judge)
            sampled.measure(_path(out, name, seed), extractor, reference, made_from[name, seed])
        processes.meet(shared, lambda: progress(0), f"end of turn {needs_teacher:d}")
    found = finished()
    qualities = {key: quality for key, (quality, _) in found.items()}
    likenesses = _compare(out, qualities, settings.seeds, pipeline.teacher.order, reference.statistics)
    return [Run(*key, methods[key].passes, found[key][1], qualities[key], likenesses[key]) for key in keys]


def kept_images(out: Path, method: str, seed: int) -> Tensor:
    """The first images of a run, uint8 [N, C, H, W]; place by place one seed's runs share label and noise."""
    return load_tensors(_path(out, method, seed).with_suffix(".images.safetensors"))[0]["image_NCHW"]


def kept_features(out: Path, method: str, seed: int) -> Tensor:
    """The features of all images of a run, float32 [N, D]."""
    return load_tensors(_path(out, method, seed).with_suffix(".features.safetensors"))[0]["feature_ND"]


def summary(
    runs: Sequence[Run],
    settings: EvaluationSettings,
    pipeline: Pipeline,
    table: ConditionTable,
    model: str,
    extractor: Extractor,
    reference: Reference,
    judge: Judge | None = None,
) -> dict[str, Any]:
    """Everything measured, as JSON: every quantity of every method with its mean, spread and value per seed.

    Null stands for what was not measured; the teacher's `distance_to_teacher` is the floor of all others. A spread
    is the standard deviation over seeds (n - 1), 0 for a single seed. `first` are the prompts of the kept images.
    Versions, commit and machine are those of the runs, not of this call.
    """
    order, real = pipeline.teacher.order, reference.statistics
    of = {name: [run for run in runs if run.method == name] for name in settings.methods}
    kept_N = Asked.in_turn(table, min(settings.keep, settings.num)).number_N
    return {
        "model": model,
        "asked": {
            "kind": "prompt" if table.prompts else "label",
            "count": len(table),
            "first": [table.prompts[number] for number in kept_N.tolist()] if table.prompts else [],
        },
        "blocks": list(order.sizes),
        "num": settings.num,
        "seeds": list(settings.seeds),
        "batch_size": pipeline.config.micro_batch,
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "compiled": pipeline.is_compiled,
        "sampling": asdict(pipeline.config.sampling),
        "features": {
            "name": extractor.name,
            "distance": extractor.distance,
            "extractor": extractor.fingerprint,
            "width": extractor.width,
        },
        "reference": {"images": real.images, "count": real.count, "alignment": judge and judge.real},
        "chance": _agreement([run.likeness.repeat_S for run in of.get("teacher", [])], order),
        "methods": {name: _summary(of[name], order) for name in settings.methods},
        **_common([run.environment for run in runs]),
    }


def _common(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record for all; a value in which they differ is "several"."""
    first = dict(records[0])
    for key, value in first.items():
        values = [record[key] for record in records]
        if isinstance(value, Mapping):
            first[key] = _common(values)
        elif any(other != value for other in values):
            first[key] = "several"
    return first


def _summary(runs: Sequence[Run], order: BlockOrder) -> dict[str, Any]:
    values: dict[str, Any] = {"passes": runs[0].passes}
    for part in ("quality", "likeness"):
        for field in fields(getattr(runs[0], part)):
            if not field.name.endswith("_S"):
                values[field.name] = _moments([getattr(getattr(run, part), field.name) for run in runs])
    for name in ("agreement", "repeat"):
        values[name] = _agreement([getattr(run.likeness, f"{name}_S") for run in runs], order)
    return values


class _Sampled:
    """A run in the making: images go by once, and what must outlive them is kept."""

    def __init__(
        self,
        pipeline: Pipeline,
        way: Method,
        number_N: Tensor,
        seed: int,
        keep: int,
        progress: Progress,
        judge: Judge | None,
    ) -> None:
        self.number_N, self.keep, self.progress, self.judge = number_N, keep, progress, judge
        self.codebook_VC = pipeline.teacher.codebook.cpu()
        assert len(self.codebook_VC) <= 2**16, "tokens are stored as uint16"
        key_N = image_keys("evaluation", seed, range(len(number_N)))
        self.made = pipeline.generate(way.codes, Asked(way.table, number_N), key_N)
        self.images: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.aligned: list[Tensor] = []
        self.seconds: list[tuple[float, int]] = []

    def __iter__(self) -> Iterator[Tensor]:
        done, begin = 0, perf_counter()
        for image_BCHW, code_BLC in self.made:
            self.seconds.append((perf_counter() - begin, len(image_BCHW)))
            self.images.append(image_BCHW[: max(0, self.keep - sum(map(len, self.images)))])
            self.tokens.append(nearest(code_BLC, self.codebook_VC).to(torch.uint16))
            if self.judge is not None:
                self.aligned.append(self.judge.aligned(image_BCHW, self.number_N[done : done + len(image_BCHW)]))
            done += len(image_BCHW)
            yield image_BCHW
            self.progress(len(image_BCHW))
            begin = perf_counter()

    def measure(self, path: Path, extractor: Extractor, reference: Reference, made_from: Mapping[str, Any]) -> None:
        """Score and save the run; its JSON goes last, so that half a run is never taken for one."""
        measured = measure(extractor, self, self.number_N, f"samples of {path.stem}")
        timed = self.seconds[1:] or self.seconds
        seconds = sum(s for s, _ in timed) / sum(num for _, num in timed)
        quality = _quality(measured, share(self.aligned), seconds, reference)
        save_tensors(path.with_suffix(".features.safetensors"), {"feature_ND": measured.feature_ND})
        save_tensors(path.with_suffix(".tokens.safetensors"), {"token_NL": torch.cat(self.tokens)})
        save_tensors(path.with_suffix(".images.safetensors"), {"image_NCHW": torch.cat(self.images)})
        save_json(path, {"made_from": made_from, **asdict(quality), "environment": environment()})


def _quality(measured: Measured, alignment: float | None, seconds: float, reference: Reference) -> Quality:
    real_MD = reference.feature_ND
    precision, recall = (None, None) if real_MD is None else precision_recall(real_MD, measured.feature_ND)
    return Quality(
        frechet_distance=frechet_distance(measured.statistics, reference.statistics),
        kernel_distance=None if real_MD is None else kernel_distance(real_MD, measured.feature_ND),
        inception_score=measured.inception_score,
        precision=precision,
        recall=recall,
        accuracy=measured.accuracy,
        alignment=alignment,
        seconds_per_image=seconds,
    )


def _load(path: Path, made_from: Mapping[str, Any]) -> tuple[Quality, dict[str, Any]] | None:
    """What a finished run measured, and where, or None; one made from something else is an error."""
    if not path.is_file():
        return None
    saved = load_json(path)
    try:
        quality = Quality(**{field.name: saved[field.name] for field in fields(Quality)})
        found, place = saved["made_from"], saved["environment"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} was not written by `evaluate`; choose another --out") from error
    if difference := first_difference(found, made_from):
        raise ValueError(f"{path} was made from something else: its {difference}; choose another --out")
    return quality, place


def _compare(
    out: Path, qualities: Mapping[tuple[str, int], Quality], seeds: Sequence[int], order: BlockOrder, real: Statistics
) -> dict[tuple[str, int], Likeness]:
    """Every run beside the teacher's of its own seed and of the next one, and beside its own of the next."""

    def statistics(name: str, seed: int) -> Statistics:
        return Statistics.of(kept_features(out, name, seed), real.extractor, "samples", real.image_shape)

    following = dict(zip(seeds, (*seeds[1:], seeds[0]), strict=True))
    teachers = {seed: statistics("teacher", seed) for seed in seeds if ("teacher", seed) in qualities}
    likenesses = {}
    for (name, seed), quality in qualities.items():
        token_NL, other = _tokens(out, name, seed), following[seed]
        with_other = other != seed
        repeat_S = _equal(token_NL, _tokens(out, name, other), order) if with_other else None
        if not teachers:
            likenesses[name, seed] = Likeness(None, None, None, repeat_S)
            continue
        of_teacher = qualities["teacher", seed].frechet_distance
        likenesses[name, seed] = Likeness(
            ratio_to_teacher=quality.frechet_distance / of_teacher if of_teacher > 0 else None,
            distance_to_teacher=frechet_distance(statistics(name, seed), teachers[other]) if with_other else None,
            agreement_S=_equal(token_NL, _tokens(out, "teacher", seed), order),
            repeat_S=repeat_S,
        )
    return likenesses


def _equal(token_NL: Tensor, other_NL: Tensor, order: BlockOrder) -> tuple[float, ...]:
    """Per block, the share of equal tokens."""
    equal_L = (token_NL == other_NL).double().mean(0)
    return tuple(equal_L[order.span(block)].mean().item() for block in range(order.num_blocks))


def _agreement(shares: Sequence[tuple[float, ...] | None], order: BlockOrder) -> dict[str, Any] | None:
    """Shares per block of several runs: of all tokens, and the mean of every block."""
    measured = [share_S for share_S in shares if share_S is not None]
    if not measured:
        return None
    tokens = [
        sum(share * size for share, size in zip(share_S, order.sizes, strict=True)) / order.length
        for share_S in measured
    ]
    return {"tokens": _moments(tokens), "blocks": [fmean(block) for block in zip(*measured, strict=True)]}


def _moments(values: Sequence[float | None]) -> dict[str, Any] | None:
    """Mean, spread and the values; None when they were not measured."""
    measured = [value for value in values if value is not None]
    if not measured:
        return None
    spread = stdev(measured) if len(measured) > 1 else 0.0
    return {"mean": fmean(measured), "spread": spread, "per_seed": measured}


def _tokens(out: Path, method: str, seed: int) -> Tensor:
    return load_tensors(_path(out, method, seed).with_suffix(".tokens.safetensors"))[0]["token_NL"].long()


def _path(out: Path, method: str, seed: int) -> Path:
    return out / f"{method.replace(':', '-')}-seed{seed}.json"
