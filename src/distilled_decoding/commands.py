"""The long commands as functions: each claims its folder, shows progress, can be stopped, and goes on when run again.

Axis letters: N B images, H W image.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilled_decoding import trajectories, zoo
from distilled_decoding.checkpoint import save_json, save_text
from distilled_decoding.condition import Condition
from distilled_decoding.distill import DistillSettings, Update, distill
from distilled_decoding.evaluate import EvaluationSettings, evaluate, markdown_table, summary
from distilled_decoding.export import read_pngs, write_npz, write_pngs
from distilled_decoding.flow import FlowSettings
from distilled_decoding.losses import ImageDistance
from distilled_decoding.metrics.perceptual import classifier_distance, effnet_lite0_distance, lpips_distance
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, Steps, grid
from distilled_decoding.progress import Stopped, progress_bar, stop_signal
from distilled_decoding.records import claim, environment
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import TeacherSampling


@dataclass(frozen=True)
class SampleRun:
    """Everything that determines the images of a `sample` run."""

    model: str
    labels: tuple[int, ...]
    num: int
    steps: Steps
    schedule: tuple[int, ...] | None
    teacher_span: tuple[int, int] | None
    seed: int


def sample_images(
    run: SampleRun, pipeline: Pipeline, out: Path | None, picture: Path | None, npz: Path | None
) -> dict[str, Any]:
    """Generate images into a folder of PNGs, one picture, or the ADM evaluator's file.

    Args:
        run: what to generate; image i follows from the seed, i and its label alone.
        pipeline: the model.
        out: folder of PNGs; images found there are not made again.
        picture: one PNG with all images, ten in a row.
        npz: file with `arr_0` and `arr_1`.

    Returns:
        How many images were made and found, and the seconds it took.

    Raises:
        ValueError: no place to write, counts that are not positive, unknown labels, a plan that cannot be done.
        Stopped: the user asked to stop.
    """
    if run.num < 1:
        raise ValueError(f"--num must be at least 1, got {run.num}")
    if out is None and picture is None and npz is None:
        raise ValueError("nowhere to write: give --out FOLDER, --grid FILE or --npz FILE")
    condition = _conditions(run, pipeline.num_classes)
    plan = pipeline.plan(run.steps, run.schedule, run.teacher_span)
    key_N = image_keys("sampling", run.seed, range(run.num))
    if out is not None:
        claim(out, "sample", run)
    kept: list[Tensor] = []
    made = 0
    begin = time.perf_counter()
    with stop_signal() as stop, progress_bar("sampling", run.num) as bar:
        for first in range(0, run.num, pipeline.config.micro_batch):
            stop.check()
            numbers = range(first, min(first + pipeline.config.micro_batch, run.num))
            images = None if out is None else read_pngs(out, numbers)
            if images is None:
                part = slice(numbers.start, numbers.stop)
                images = next(pipeline.images(plan, condition[part], key_N[part]))
                made += len(images)
                if out is not None:
                    write_pngs(out, first, images)
            if picture is not None or npz is not None:
                kept.append(images)
            bar.advance(len(numbers))
    if picture is not None:
        picture.parent.mkdir(parents=True, exist_ok=True)
        grid(torch.cat(kept), columns=10).save(picture)
    if npz is not None:
        write_npz(npz, torch.cat(kept), condition.label_B)
    return {"images": run.num, "made": made, "seconds": round(time.perf_counter() - begin, 3)}


def _conditions(run: SampleRun, num_classes: int) -> Condition:
    if not run.labels:
        return Condition.balanced(run.num, num_classes)
    return Condition.labels([run.labels[i % len(run.labels)] for i in range(run.num)], num_classes)


def make_trajectories(
    pipeline: Pipeline, out: Path, num: int, settings: trajectories.TrajectorySettings
) -> dict[str, Any]:
    """Write trajectories 0..num-1 of a model into a folder; asking for more later adds to it.

    Returns:
        How many there are, how many were made now, and the seconds it took.

    Raises:
        ValueError: counts that are not positive, or a folder that holds another run.
        Stopped: the user asked to stop.
    """
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    store = TrajectoryStore.create(out, settings.manifest(pipeline.teacher, pipeline.fingerprint))
    found = store.num_trajectories
    begin = time.perf_counter()
    with stop_signal() as stop, progress_bar("trajectories", num) as bar:

        def progress(items: int) -> None:
            bar.advance(items)
            stop.check()

        trajectories.generate(pipeline.teacher, store, settings, num, progress)
    seconds = time.perf_counter() - begin
    return {
        "trajectories": store.num_trajectories,
        "made": store.num_trajectories - found,
        "seconds": round(seconds, 3),
    }


@dataclass(frozen=True)
class DistillRun:
    """Everything that determines a student."""

    model: str
    teacher: str
    trajectories: str
    num_trajectories: int
    init_seed: int
    split_block: int
    settings: DistillSettings


def distill_student(
    model: str,
    pipeline: Pipeline,
    store: TrajectoryStore,
    out: Path,
    settings: DistillSettings,
    split_block: int | None = None,
    image_distance: ImageDistance | None = None,
) -> Pipeline:
    """Train a student on a model's trajectories and write the whole pipeline to `out`.

    The state of the training lies in `out/checkpoints`, its log in `out/log.jsonl`.

    Args:
        model: name for the record.
        pipeline: the teacher; a student it may have is not used.
        store: trajectories of this very teacher.
        out: folder of the new pipeline.
        settings: of the training; no starting blocks means those of the model.
        split_block: of the new pipeline; None means the model's.
        image_distance: for a perceptual weight.

    Raises:
        ValueError: trajectories of another teacher, settings that do not fit, a folder that holds another run.
        Stopped: the user asked to stop; the same call goes on.
    """
    if store.manifest["teacher"] != pipeline.fingerprint:
        raise ValueError(f"{store.folder} holds trajectories of another teacher than {model}; make its own")
    settings = replace(settings, start_blocks=settings.start_blocks or pipeline.config.start_blocks)
    settings.check(pipeline.teacher.order)
    split_block = pipeline.config.split_block if split_block is None else split_block
    shard = store.load()
    run = DistillRun(model, pipeline.fingerprint, str(store.folder), len(shard), settings.seed, split_block, settings)
    claim(out, "distill", run)
    teacher = replace(
        pipeline.config,
        sampling=TeacherSampling(**store.manifest["sampling"]),
        flow=FlowSettings(**store.manifest["flow"]),
    )
    trained = Pipeline(pipeline.teacher, None, teacher)
    state, log = out / "checkpoints" / "state.safetensors", out / "log.jsonl"
    with stop_signal() as stop, progress_bar("distilling", settings.num_steps) as bar, log.open("a") as lines:

        def on_update(update: Update) -> bool:
            text = None
            if update.step % 20 == 0:
                record = _record(update)
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                text = f"distilling, loss {record['total']:.3f}, argmax right {record['accuracy']:.1%}"
            bar.at(update.step, text)
            return not stop.requested

        student = distill(
            pipeline.teacher,
            pipeline.new_student(settings.seed),
            shard,
            settings,
            state,
            on_update,
            image_distance,
        )
    if student is None:
        raise Stopped
    trained = trained.with_student(student, settings.start_blocks, split_block)
    trained.save_pretrained(out)
    return trained


def _record(update: Update) -> dict[str, float]:
    losses = {name: round(float(value.detach()), 5) for name, value in vars(update.losses).items()}
    return {"step": update.step, "learning_rate": update.learning_rate, **losses}


def info(pipeline: Pipeline) -> dict[str, Any]:
    """What a model is: family, classes, blocks, sizes, sampling."""
    order = pipeline.teacher.order
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in pipeline.teacher.named_children()}
    if pipeline.student is not None:
        parameters["student"] = sum(p.numel() for p in pipeline.student.parameters())
    return {
        "family": pipeline.config.family,
        "classes": list(pipeline.config.class_names),
        "blocks": order.num_blocks,
        "tokens": order.length,
        "codebook": list(pipeline.teacher.codebook.shape),
        "parameters": parameters,
        "sampling": asdict(pipeline.config.sampling),
        "flow": asdict(pipeline.config.flow),
        "start_blocks": list(pipeline.config.start_blocks),
        "split_block": pipeline.config.split_block,
        "student": pipeline.student is not None,
        "teacher_hash": pipeline.fingerprint,
    }


def image_distance(name: str, device: str) -> ImageDistance | None:
    """A perceptual distance by name: `none`, `classifier` (the shipped one's features), `effnet-lite0` or `lpips`.

    Raises:
        ValueError: the packages that it needs are not there.
    """
    if name == "none":
        return None
    if name == "classifier":
        return classifier_distance(zoo.classifier().to(device))
    return effnet_lite0_distance(device) if name == "effnet-lite0" else lpips_distance(device)


def evaluate_model(
    pipeline: Pipeline, out: Path, settings: EvaluationSettings, onestep: Path | None = None
) -> dict[str, Any]:
    """Measure a shipped model's methods on the features of the shipped classifier.

    Args:
        pipeline: the model.
        out: folder of the results.
        settings: what to measure.
        onestep: folder of trajectories, for the independent baseline.

    Returns:
        The summary of `evaluate`, which is also in `out/summary.json`, as a table in `out/table.md`.

    Raises:
        ValueError: methods that the model cannot do, or a folder that holds another run.
        Stopped: the user asked to stop.
    """
    shard = None if onestep is None else TrajectoryStore.open(onestep).load()
    classifier, reference = zoo.classifier().to(pipeline.device), zoo.real_images()
    total = settings.num * len(settings.methods) * len(settings.seeds)
    with stop_signal() as stop, progress_bar("measuring", total) as bar:

        def progress(items: int) -> None:
            bar.advance(items)
            stop.check()

        values = summary(evaluate(pipeline, classifier, settings, reference, out, shard, progress))
    values |= environment()
    save_json(out / "summary.json", values)
    save_text(out / "table.md", markdown_table(values))
    return values
