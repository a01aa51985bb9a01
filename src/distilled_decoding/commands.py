"""The long commands as functions: each claims its folder, shows progress, can be stopped, and goes on when run again.

Axis letters: N images.
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from distilled_decoding import processes, trajectories, zoo
from distilled_decoding.checkpoint import from_json, save_json, save_text
from distilled_decoding.condition import Labels
from distilled_decoding.cost import distillation_cost, flops_per_second, trajectory_cost
from distilled_decoding.describe import info
from distilled_decoding.distill import DistillSettings, Update, distill
from distilled_decoding.evaluate import EvaluationSettings, evaluate, kept_images, summary
from distilled_decoding.export import check_file, png_path, read_pngs, write_npz, write_picture, write_pngs
from distilled_decoding.flow import FlowSettings
from distilled_decoding.images import grid
from distilled_decoding.index import INDEX
from distilled_decoding.losses import ImageDistance
from distilled_decoding.metrics.features import FeatureName
from distilled_decoding.metrics.perceptual import classifier_distance, effnet_lite0_distance, lpips_distance
from distilled_decoding.metrics.reference import read_reference
from distilled_decoding.noise import image_keys
from distilled_decoding.parallel import RunSettings
from distilled_decoding.pipeline import Pipeline, Steps, problems
from distilled_decoding.progress import Bar, StopSignal, progress_bar, stop_signal
from distilled_decoding.records import claim, identity, record
from distilled_decoding.report import markdown_table
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import Prefix, TeacherSampling
from distilled_decoding.training_log import TrainingLog
from distilled_decoding.training_state import Checkpoints
from distilled_decoding.watch import Watch

_PICTURED = 20


@dataclass(frozen=True)
class Upkeep:
    """What is written while a student trains.

    Attributes:
        save_every: updates between checkpoints.
        keep_last: checkpoints that are kept.
        resume: a checkpoint to go on from, instead of the newest in the folder.
        watch_every: updates between pictures of samples, with a quick Fréchet distance for a model of the shipped
            models' images; 0: none.
        tensorboard: also write files for TensorBoard.

    Raises:
        ValueError: a setting outside its range.
    """

    save_every: int = 500
    keep_last: int = 3
    resume: Path | None = None
    watch_every: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.watch_every < 0:
            raise ValueError(f"watch_every must not be negative, got {self.watch_every}")


@dataclass(frozen=True)
class SampleRun:
    """What `sample` was asked for; `model` is for the record."""

    model: str
    labels: tuple[int, ...]
    num: int
    steps: Steps | None
    schedule: tuple[int, ...] | None
    teacher_span: tuple[int, int] | None
    prefix: Prefix
    seed: int


def sample_images(
    run: SampleRun, pipeline: Pipeline, out: Path | None, picture: Path | None, npz: Path | None
) -> dict[str, Any]:
    """Generate images into a folder of PNGs, one picture, or the ADM evaluator's file.

    Args:
        run: what to generate; image i follows from the seed, i and its label alone.
        pipeline: the model.
        out: folder of PNGs; images found there are not made again. Without it the PNGs wait in a folder beside the
            file, `FILE.partial`, until that is complete.
        picture: one PNG with all images, ten in a row; a file that exists is replaced.
        npz: file with `arr_0` and `arr_1`, likewise.

    Returns:
        How many images were asked for and made, and the seconds it took.

    Raises:
        ValueError: no place to write, counts that are not positive, unknown labels, a plan that cannot be done.
        Stopped: the user asked to stop.
    """
    if run.num < 1:
        raise ValueError(f"--num must be at least 1, got {run.num}")
    folder, way_out = out, "choose another --out"
    if folder is None:
        file = npz or picture
        if file is None:
            raise ValueError("nowhere to write: give --out FOLDER, --grid FILE or --npz FILE")
        folder, way_out = file.with_name(f"{file.name}.partial"), "delete it or write to another file"
    check_file(picture, ".png")
    check_file(npz, ".npz")
    pipeline.check_labels()
    labels = run.labels or tuple(range(pipeline.num_classes))
    condition = Labels.checked([labels[i % len(labels)] for i in range(run.num)], pipeline.num_classes)
    plan = pipeline.plan(run.steps, run.schedule, run.teacher_span, run.prefix)
    settings = {"labels": labels, "num": run.num, "seed": run.seed, **identity(pipeline, plan)}
    claim(folder, "sample", settings, {"model": run.model, "device": str(pipeline.device)}, way_out)
    size = pipeline.config.micro_batch
    parts = [range(first, min(first + size, run.num)) for first in range(0, run.num, size)]
    # A micro-batch is made again as a whole, so that every image keeps its place in it: the same bits as unbroken.
    missing = [i for part in parts if not all(png_path(folder, i).is_file() for i in part) for i in part]
    key_N = image_keys("sampling", run.seed, missing)
    images = pipeline.images(plan, condition[torch.tensor(missing, dtype=torch.int64)], key_N)
    begin = time.perf_counter()
    with stop_signal() as stop, progress_bar("sampling", run.num) as bar:
        bar.at(run.num - len(missing))
        _write_images(folder, missing, images, bar, stop)

        def written() -> Iterator[Tensor]:
            for part in parts:
                stop.check()
                yield read_pngs(folder, part)

        if picture is not None:
            write_picture(picture, grid(torch.cat(list(written())), columns=10))
        if npz is not None:
            bar.say(f"writing {npz.name}")
            write_npz(npz, written(), condition.label_B)
        if out is None:
            shutil.rmtree(folder)
    return {"images": run.num, "made": len(missing), "seconds": round(time.perf_counter() - begin, 3)}


def _write_images(folder: Path, indices: list[int], images: Iterator[Tensor], bar: Bar, stop: StopSignal) -> None:
    done = 0
    for image_BCHW in images:
        write_pngs(folder, indices[done : done + len(image_BCHW)], image_BCHW)
        done += len(image_BCHW)
        bar.advance(len(image_BCHW))
        stop.check()


def make_trajectories(
    model: str,
    pipeline: Pipeline,
    out: Path,
    num: int | None,
    settings: trajectories.TrajectorySettings,
    title: str = "trajectories",
) -> dict[str, Any]:
    """Write trajectories 0..num-1 of a model into a folder; asking for more later adds to it.

    Args:
        model: name for the record.
        pipeline: the model; its student is not used.
        out: folder of the shards.
        num: how many there shall be; None means as many as the model's settings say.
        settings: what determines them.
        title: what the progress bar says.

    Returns:
        How many there are, how many were made now, and the seconds it took.

    Raises:
        ValueError: counts that are not positive, or a folder that holds another run or that another process writes.
        Stopped: the user asked to stop.
    """
    num = _count(pipeline, num)
    pipeline.check_labels()
    manifest = settings.manifest(pipeline.teacher, pipeline.fingerprint)
    begin = time.perf_counter()
    with processes.group(str(pipeline.device)) as shared, ExitStack() as held:

        def prepare() -> None:
            held.enter_context(processes.only_writer(out))
            TrajectoryStore.create(out, manifest, num)
            record(out, "trajectories", {**manifest, "num": num}, {"model": model, "device": str(pipeline.device)})

        processes.first_acts(prepare)
        store = TrajectoryStore.open(out)
        made = _fill_store(pipeline, store, settings, shared, title)
    return {"trajectories": len(store), "made": made, "seconds": round(time.perf_counter() - begin, 3)}


def _fill_store(
    pipeline: Pipeline,
    store: TrajectoryStore,
    settings: trajectories.TrajectorySettings,
    shared: Store,
    title: str,
) -> int:
    """Make this process's part of what is missing; the first waits for the others and returns how many all made."""
    with stop_signal() as stop, progress_bar(title, len(store)) as bar:

        def progress(items: int) -> None:
            bar.at(shared.add("finished", items))
            stop.check()

        numbers = processes.deal(store.num_shards, shared)
        made = shared.add("made", trajectories.generate(pipeline.teacher, store, settings, progress, numbers))
        processes.first_waits(shared, lambda: progress(0))
        if processes.is_first():
            bar.at(shared.add("finished", 0))
            made = shared.add("made", 0)
    return made


def distill_student(
    model: str,
    pipeline: Pipeline,
    store: TrajectoryStore,
    out: Path,
    settings: DistillSettings,
    split_block: int | None = None,
    perceptual: str = "none",
    title: str = "distilling",
    upkeep: Upkeep = Upkeep(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> Pipeline:
    """Train a student on a model's trajectories and write the whole pipeline to `out`.

    The state of the training lies in `out/checkpoints`, its log in `out/log.jsonl`. Under torchrun every process calls
    this alike.

    Args:
        model: name for the record.
        pipeline: the teacher; a student it may have is not used.
        store: trajectories of this very teacher.
        out: folder of the new pipeline.
        settings: of the training; no starting blocks means those of the model.
        split_block: of the new pipeline; None means the model's.
        perceptual: name of the distance of decoded images, for a perceptual weight; see `image_distance`.
        title: what the progress bar says.
        upkeep: what is written while it trains.
        run: how the work is laid out.

    Raises:
        ValueError: trajectories of another teacher, settings that do not fit, a folder that holds another run or that
            another process writes, no valid checkpoint.
        FloatingPointError: the training diverged.
        Stopped: the user asked to stop; the same call goes on.
    """
    config = pipeline.config
    origin = trajectories.origin(pipeline.teacher, pipeline.fingerprint, config.sampling, config.flow)
    store.refuse_other(origin, f"make trajectories of {model} in another folder")
    settings, split_block = _resolved(pipeline, settings, split_block, perceptual)
    distance = image_distance(perceptual, str(pipeline.device))
    determined = {
        "teacher": pipeline.fingerprint,
        "trajectories": store.identity,
        "settings": asdict(settings),
        "split_block": split_block,
        "perceptual": perceptual,
    }
    notes = {"model": model, "trajectories": str(store.folder), "num_trajectories": len(store)}
    checkpoints = Checkpoints(out / "checkpoints", determined, upkeep.save_every, upkeep.keep_last)
    new = pipeline.new_student(settings.seed % 2**63)  # as far as torch's generators go
    with ExitStack() as stack:
        stack.enter_context(processes.group(str(pipeline.device)))
        processes.first_acts(store.check)
        processes.first_acts(lambda: claim(out, "distill", determined, {**notes, "device": str(pipeline.device)}))
        processes.first_acts(lambda: stack.enter_context(processes.only_writer(checkpoints.folder)))
        stop = stack.enter_context(stop_signal())
        bar = stack.enter_context(progress_bar(title, settings.num_updates))
        report = _Report(pipeline, out, settings, split_block, upkeep, bar, title)

        def on_update(update: Update) -> bool:
            report.write(update)
            return not stop.requested

        student = distill(
            pipeline.teacher, new, store, settings, split_block, checkpoints, on_update, distance, run, upkeep.resume
        )
        if student is None:
            raise stop.stopped()
        trained = _with_student(pipeline, store, student, settings, split_block)
        processes.first_acts(lambda: trained.save_pretrained(out))
    return trained


def _resolved(
    pipeline: Pipeline, settings: DistillSettings, split_block: int | None, perceptual: str
) -> tuple[DistillSettings, int]:
    """The settings and the split of a training, where not given those of the model, checked against its blocks."""
    settings = replace(settings, start_blocks=settings.start_blocks or pipeline.config.start_blocks)
    split_block = pipeline.config.split_block if split_block is None else split_block
    settings.check(pipeline.teacher.order, split_block)
    weight = settings.loss.perceptual_weight
    if (perceptual == "none") != (weight == 0):
        raise ValueError(
            f"--perceptual {perceptual} does not fit a perceptual weight of {weight}; give both or neither"
        )
    return settings, split_block


class _Report:
    """What the user sees of a training: the bar, the log and the pictures, all made by the first process."""

    def __init__(
        self,
        pipeline: Pipeline,
        out: Path,
        settings: DistillSettings,
        split_block: int,
        upkeep: Upkeep,
        bar: Bar,
        title: str,
    ) -> None:
        self._log = TrainingLog(out, upkeep.tensorboard) if processes.is_first() else None
        self._watch: Watch | None = None
        if upkeep.watch_every:
            start = pipeline.with_settings(start_blocks=settings.start_blocks, split_block=split_block)
            self._watch = Watch(start, out / "watch")
        self._watch_every = upkeep.watch_every
        self._bar = bar
        self._title = title

    def write(self, update: Update) -> None:
        """Tell of every twentieth update and of each that was skipped; look at the student when it is time."""
        if update.number % 20 == 0 or not update.finite:
            self._say(update)
        if self._watch is not None and update.number % self._watch_every == 0:
            seen = self._watch.look(update.average, update.number)
            if self._log is not None and seen:
                self._log.write(update.number, seen)
        self._bar.at(update.number)

    def _say(self, update: Update) -> None:
        losses = {name: round(float(value), 5) for name, value in vars(update.losses).items()}
        beside = {"gradient_norm": round(update.gradient_norm, 5), "skipped": update.skipped}
        if self._log is not None:
            self._log.write(update.number, {"learning_rate": update.learning_rate, **losses, **beside})
        skipped = f", {update.skipped} skipped" if update.skipped else ""
        self._bar.say(f"{self._title}, loss {losses['total']:.3f}, argmax right {losses['accuracy']:.1%}{skipped}")


def _with_student(
    pipeline: Pipeline, store: TrajectoryStore, student: Any, settings: DistillSettings, split_block: int
) -> Pipeline:
    """The new pipeline: its teacher samples from what the student has seen."""
    config = replace(
        pipeline.config,
        sampling=TeacherSampling(**store.manifest["sampling"]),
        flow=FlowSettings(**store.manifest["flow"]),
        num_trajectories=len(store),
        training=settings,
    )
    return Pipeline(pipeline.teacher, None, config).with_student(student, settings.start_blocks, split_block)


def save_converted(pipeline: Pipeline, out: Path) -> dict[str, Any]:
    """Write a pipeline of published files as a folder and return what `info` says of it.

    Raises:
        ValueError: the folder holds a model already.
    """
    if (out / INDEX).exists():
        raise ValueError(f"{out} holds a model already; choose another --out")
    pipeline.save_pretrained(out)
    return {"pipeline": str(out), **info(pipeline)}


def trajectory_settings(
    pipeline: Pipeline, seed: int, micro_batch: int | None, shard_size: int | None
) -> trajectories.TrajectorySettings:
    """How to make a model's trajectories; None leaves the micro-batch to the model, and about 4,096 to a file."""
    config = pipeline.config
    size = config.micro_batch if micro_batch is None else micro_batch
    in_file = max(1, 4096 // max(size, 1)) * size if shard_size is None else shard_size
    return trajectories.TrajectorySettings(config.sampling, config.flow, seed, size, in_file)


def _count(pipeline: Pipeline, num: int | None) -> int:
    num = pipeline.config.num_trajectories if num is None else num
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}")
    return num


def plan_trajectories(
    pipeline: Pipeline, num: int | None, settings: trajectories.TrajectorySettings, device: str
) -> dict[str, Any]:
    """What `make_trajectories` would need: time, memory, disk; nothing is written.

    Args:
        pipeline: the model, with or without weights.
        num: as `make_trajectories` takes it.
        settings: likewise.
        device: where it will run.

    Raises:
        ValueError: a count that is not positive, or a model that reads captions.
    """
    num = _count(pipeline, num)
    pipeline.check_labels()
    cost = trajectory_cost(pipeline.teacher, settings, num, flops_per_second(torch.device(device), bf16=False))
    return {"trajectories": num, "micro_batch": settings.micro_batch, "device": device, **cost.readable()}


def plan_distillation(
    pipeline: Pipeline,
    num: int | None,
    settings: DistillSettings,
    split_block: int | None,
    perceptual: str,
    device: str,
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
) -> dict[str, Any]:
    """What `distill_student` would need: time, memory, disk; nothing is written.

    Args:
        pipeline: the model, with or without weights.
        num: trajectories; None means as many as the model's settings say.
        settings: as `distill_student` takes them, like the next two.
        split_block: of the new pipeline.
        perceptual: name of the distance of decoded images.
        device: where it will run.
        run: how the work is laid out; the plan is for one process.

    Raises:
        ValueError: settings that do not fit the model, or a model that reads captions.
    """
    pipeline.check_labels()
    num = _count(pipeline, num)
    settings, _ = _resolved(pipeline, settings, split_block, perceptual)
    student = pipeline.student if pipeline.student is not None else pipeline.new_student(0)
    speed = flops_per_second(torch.device(device), settings.bf16)
    cost = distillation_cost(pipeline.teacher, student, settings, speed, torch.device(device), run)
    what = {"updates": settings.num_updates, "batch_size": settings.batch_size, "trajectories": num}
    return {**what, "device": device, **cost.readable()}


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
    model: str,
    pipeline: Pipeline,
    out: Path,
    settings: EvaluationSettings,
    features: FeatureName = "classifier",
    reference: Path | None = None,
    inception_weights: Path | None = None,
) -> dict[str, Any]:
    """Measure a model's methods against real images.

    Args:
        model: for the record.
        pipeline: the model.
        out: folder of the results.
        settings: what to measure.
        features: the network that sees the images.
        reference: real images or their statistics, see `read_reference`; None takes those of the shipped models.
        inception_weights: file of the weights of `inception`.

    Returns:
        The summary of `evaluate` and where it was measured; also in `out/summary.json`, a table in `out/table.md`,
        and in `out/grid.png` a row of images per method, equal labels and noise in a column.

    Raises:
        ValueError: methods that the model cannot do, a reference that does not fit, or a folder that holds another run.
        Stopped: the user asked to stop.
    """
    pipeline.check_labels()
    extractor = zoo.extractor(features, str(pipeline.device), inception_weights)
    if reference is None and features != "classifier":
        raise ValueError(f"--features {features} needs real images: give --reference FILE or FOLDER")
    total = settings.num * len(settings.methods) * len(settings.seeds)
    with stop_signal() as stop, progress_bar("measuring", total) as bar:

        def progress(items: int) -> None:
            bar.advance(items)
            stop.check()

        real = zoo.reference() if reference is None else read_reference(reference, extractor)
        runs = evaluate(pipeline, extractor, settings, real, out, progress)
    values = summary(runs, settings, pipeline, model, extractor, real)
    save_json(out / "summary.json", values)
    save_text(out / "table.md", markdown_table(values))
    kept = [kept_images(out, method, settings.seeds[0])[:_PICTURED] for method in settings.methods]
    if settings.keep:
        grid(torch.cat(kept), columns=min(_PICTURED, settings.keep, settings.num)).save(out / "grid.png")
    return values


def verify(path: Path) -> dict[str, Any]:
    """Check every hash of a folder of trajectories or of a pipeline.

    Returns:
        Which kind of folder it is, and its problems, a sentence each.

    Raises:
        ValueError: it is neither.
    """
    if (path / "manifest.json").is_file():
        return {"kind": "trajectories", "problems": TrajectoryStore.open(path).problems()}
    if (path / "model_index.json").is_file():
        return {"kind": "pipeline", "problems": problems(path)}
    raise ValueError(f"{path} holds neither trajectories (manifest.json) nor a pipeline (model_index.json)")


def repair(path: Path, model: str, device: str) -> dict[str, Any]:
    """Make the trajectories of a folder again that are missing, damaged or foreign, bit for bit; the others stay.

    Args:
        path: the folder.
        model: the one that made it.
        device: where the model runs; the bits are those of the same kind of machine.

    Returns:
        What was wrong and is mended, and what is still wrong, a sentence each.

    Raises:
        ValueError: it holds no trajectories, or those of another model.
        Stopped: the user asked to stop.
    """
    store, pipeline = TrajectoryStore.open(path), Pipeline.from_pretrained(model, device)
    names = [field.name for field in fields(trajectories.TrajectorySettings)]
    settings = from_json(trajectories.TrajectorySettings, {name: store.manifest.get(name) for name in names}, path)
    found = store.problems()
    make_trajectories(model, pipeline, path, len(store), settings, "repairing")
    for stray in store.strays():
        stray.unlink()
    return {"kind": "trajectories", "repaired": found, "problems": store.problems()}


def check_device(name: str) -> str:
    """The name of a device that torch can use here: `cpu`, `cuda`, `cuda:1` ... or `mps`.

    Of several processes, each gets a GPU of its own for `cuda`.

    Raises:
        ValueError: there is no such device.
    """
    name = processes.own_device(name)
    index = re.fullmatch(r"cuda(?::(\d+))?", name)
    known = {"cpu"} | ({"mps"} if torch.backends.mps.is_available() else set())
    if name in known or (index and int(index[1] or 0) < torch.cuda.device_count()):
        return name
    known |= {f"cuda:{i}" for i in range(torch.cuda.device_count())}
    raise ValueError(f"no device {name!r} here; --device can be {', '.join(sorted(known))}")
