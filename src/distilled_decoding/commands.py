"""The long commands as functions: each claims its folder, shows progress, can be stopped, and goes on when run again.

Axis letters: N images.
"""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from distilled_decoding import processes, trajectories, zoo
from distilled_decoding.checkpoint import from_json, save_json, save_text
from distilled_decoding.condition import Labels
from distilled_decoding.cost import flops_per_second, trajectory_cost
from distilled_decoding.describe import info
from distilled_decoding.evaluate import EvaluationSettings, evaluate, kept_images, summary
from distilled_decoding.export import check_file, png_path, read_pngs, write_npz, write_picture, write_pngs
from distilled_decoding.images import grid
from distilled_decoding.index import INDEX
from distilled_decoding.metrics.features import FeatureName
from distilled_decoding.metrics.reference import read_reference
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, Steps, problems
from distilled_decoding.progress import Bar, StopSignal, progress_bar, stop_signal
from distilled_decoding.prompts import CaptionTable, EncodedPrompts
from distilled_decoding.records import claim, identity, record
from distilled_decoding.report import markdown_table
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import Prefix

_PICTURED = 20


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
    num = trajectory_count(pipeline, num)
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


def trajectory_count(pipeline: Pipeline, num: int | None) -> int:
    """How many trajectories are asked for; None means as many as the model's settings say.

    Raises:
        ValueError: a count that is not positive.
    """
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
    num = trajectory_count(pipeline, num)
    pipeline.check_labels()
    cost = trajectory_cost(pipeline.teacher, settings, num, flops_per_second(torch.device(device), bf16=False))
    return {"trajectories": num, "micro_batch": settings.micro_batch, "device": device, **cost.readable()}


def evaluate_model(
    model: str,
    pipeline: Pipeline,
    out: Path,
    settings: EvaluationSettings,
    prompts: Path | None = None,
    column: str | None = None,
    features: FeatureName | None = None,
    reference: Path | None = None,
    inception_weights: Path | None = None,
) -> dict[str, Any]:
    """Measure a model's methods against real images.

    Args:
        model: for the record.
        pipeline: the model.
        out: folder of the results.
        settings: what to measure.
        prompts: of a model of captions, what its images are asked for, see `Pipeline.table`.
        column: of the prompts in a .csv or .parquet file.
        features: the network that sees the images; None takes that of the shipped models of this kind.
        reference: real images or their statistics, see `read_reference`; None takes those of the shipped models.
        inception_weights: file of the weights of `inception`.

    Returns:
        The summary of `evaluate` and where it was measured; also in `out/summary.json`, a table in `out/table.md`,
        and in `out/grid.png` a row of images per method, equal labels and noise in a column.

    Raises:
        ValueError: methods that the model cannot do, a reference that does not fit, or a folder that holds another run.
        Stopped: the user asked to stop.
    """
    usual: FeatureName = "classifier" if pipeline.num_classes else "effnet-lite0"
    extractor = zoo.extractor(features or usual, str(pipeline.device), inception_weights)
    if reference is None and extractor.name != usual:
        raise ValueError(f"--features {features} needs real images: give --reference FILE or FOLDER")
    table = pipeline.table(prompts, column)
    judge = None
    if isinstance(table, CaptionTable | EncodedPrompts):
        judge = zoo.judge(table.prompts, pipeline.image_shape, pipeline.device)
    total = settings.num * len(settings.methods) * len(settings.seeds)
    with stop_signal() as stop, progress_bar("measuring", total) as bar:

        def progress(items: int) -> None:
            bar.advance(items)
            stop.check()

        if reference is not None:
            real = read_reference(reference, extractor)
        else:
            real = zoo.reference() if pipeline.num_classes else zoo.emoji_reference(extractor)
        runs = evaluate(pipeline, table, extractor, settings, real, out, progress, judge)
    values = summary(runs, settings, pipeline, table, model, extractor, real, judge)
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
