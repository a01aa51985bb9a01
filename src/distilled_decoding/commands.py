"""The long commands as functions: each claims its folder, shows progress, can be stopped, and goes on when run again.

Axis letters: N images.
"""

import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import Store

from distilled_decoding import processes, trajectories, zoo
from distilled_decoding.checkpoint import MANIFEST, PROMPTS, from_json, load_json, save_json, save_text
from distilled_decoding.condition import Asked, ConditionTable
from distilled_decoding.cost import flops_per_second, trajectory_cost
from distilled_decoding.describe import info
from distilled_decoding.evaluate import EvaluationSettings, evaluate, kept_images, summary
from distilled_decoding.export import check_file, png_path, read_pngs, write_npz, write_picture, write_pngs
from distilled_decoding.hub import is_id
from distilled_decoding.images import grid
from distilled_decoding.index import INDEX
from distilled_decoding.metrics.features import FeatureName
from distilled_decoding.metrics.reference import read_reference
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, Steps, problems
from distilled_decoding.progress import Bar, StopSignal, progress_bar, stop_signal
from distilled_decoding.prompts import EncodedPrompts, encode_prompts, is_encoded, prompt_identity
from distilled_decoding.records import claim, identity, record, recorded
from distilled_decoding.report import markdown_table
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import Prefix
from distilled_decoding.text import TextEncoder

_PICTURED = 20
_ENCODED = "prompts"
_GIVE_PROMPTS = "give the folder of the prompts that they were made with: --prompts FOLDER"


@dataclass(frozen=True)
class SampleRun:
    """What `sample` was asked for; `model` is for the record."""

    model: str
    labels: tuple[int, ...]
    prompts: tuple[str, ...]
    num: int
    steps: Steps | None
    schedule: tuple[int, ...] | None
    teacher_span: tuple[int, int] | None
    prefix: Prefix
    refine: int
    seed: int


def sample_images(
    run: SampleRun, pipeline: Pipeline, out: Path | None, picture: Path | None, npz: Path | None
) -> dict[str, Any]:
    """Generate images into a folder of PNGs, one picture, or the ADM evaluator's file.

    Args:
        run: what to generate; image i follows from the seed, i and its label or prompt alone.
        pipeline: the model.
        out: folder of PNGs; images found there are not made again. Without it the PNGs wait in a folder beside the
            file, `FILE.partial`, until that is complete.
        picture: one PNG with all images, ten in a row; a file that exists is replaced.
        npz: file with `arr_0` and `arr_1` (labels, or the numbers of the prompts), likewise.

    Returns:
        How many images were asked for and made, and the seconds it took.

    Raises:
        ValueError: no place to write, counts that are not positive, labels or prompts that the model does not read, a
            plan that cannot be done.
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
    asked = _asked(pipeline, run)
    plan = pipeline.plan(run.steps, run.schedule, run.teacher_span, run.prefix, run.refine)
    settings = {"labels": run.labels, **asked.table.identity, "num": run.num, "seed": run.seed}
    settings |= identity(pipeline, plan)
    notes = {"model": run.model, "device": str(pipeline.device), "prompts": asked.table.prompts}
    claim(folder, "sample", settings, notes, way_out)
    size = pipeline.config.micro_batch
    parts = [range(first, min(first + size, run.num)) for first in range(0, run.num, size)]
    # A micro-batch is made again as a whole, so that every image keeps its place in it: the same bits as unbroken.
    missing = [i for part in parts if not all(png_path(folder, i).is_file() for i in part) for i in part]
    key_N = image_keys("sampling", run.seed, missing)
    number_N = asked.number_N[torch.tensor(missing, dtype=torch.int64)]
    images = pipeline.images(plan, Asked(asked.table, number_N), key_N)
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
            write_npz(npz, written(), asked.number_N)
        if out is None:
            shutil.rmtree(folder)
    return {"images": run.num, "made": len(missing), "seconds": round(time.perf_counter() - begin, 3)}


def _asked(pipeline: Pipeline, run: SampleRun) -> Asked:
    """What the images are asked for: the labels or prompts given in turn, or all that the model has."""
    if run.labels and run.prompts:
        raise ValueError("give --labels or --prompt, not both")
    if run.labels:
        label_N = pipeline.labels(run.labels).label_B
        return Asked(pipeline.table(), label_N[torch.arange(run.num) % len(label_N)])
    return Asked.in_turn(pipeline.table((run.prompts or pipeline.prompts)[: run.num] or None), run.num)


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
    prompts: Path | None = None,
    column: str | None = None,
) -> dict[str, Any]:
    """Write trajectories 0..num-1 of a model into a folder; asking for more later adds to it.

    Args:
        model: name for the record.
        pipeline: the model; its student is not used.
        out: folder of the shards.
        num: how many there shall be; None means as many as the model's settings say.
        settings: what determines them.
        title: what the progress bar says.
        prompts: of a model of captions: a folder of them encoded, which stays where it is, or a file, which is encoded
            into `out/prompts`; None means the model's own.
        column: of the prompts in a .csv or .parquet file.

    Returns:
        How many there are, how many were made now, and the seconds it took.

    Raises:
        ValueError: counts that are not positive, prompts that the model does not read, or a folder that holds another
            run or that another process writes.
        Stopped: the user asked to stop.
    """
    num = trajectory_count(pipeline, num)
    folder, texts = _asked_from(pipeline, out, prompts, column)
    begin = time.perf_counter()
    with processes.group(str(pipeline.device)) as shared, ExitStack() as held:

        def prepare() -> None:
            held.enter_context(processes.only_writer(out))
            if texts:
                asked = prompt_identity(pipeline.require_text_encoder(), texts)
            else:
                asked = pipeline.table(folder).identity
            if folder and (out / MANIFEST).is_file():
                TrajectoryStore.open(out).refuse_other(asked, f"{_GIVE_PROMPTS}, or choose another --out")
            manifest = settings.manifest(pipeline.teacher, pipeline.fingerprint, asked)
            TrajectoryStore.create(out, manifest, num)
            notes = {"model": model, "device": str(pipeline.device), "prompts": prompts}
            record(out, "trajectories", {**manifest, "num": num}, notes)

        processes.first_acts(prepare)
        table, store = _encoded(pipeline, folder, texts, shared), TrajectoryStore.open(out)
        made = _fill_store(pipeline, table, store, settings, shared, title)
    return {"trajectories": len(store), "made": made, "seconds": round(time.perf_counter() - begin, 3)}


def _asked_from(
    pipeline: Pipeline, out: Path, prompts: Path | None, column: str | None
) -> tuple[Path | None, list[str]]:
    """The folder of the prompts that a run is asked for, None for classes, and those to be encoded into it first."""
    if pipeline.num_classes or (prompts is not None and prompts.is_dir()):
        pipeline.table(prompts, column)
        return prompts, []
    texts, folder = pipeline.texts(prompts, column), out / _ENCODED
    return folder, texts if processes.is_first() and not is_encoded(folder, texts) else []


def _encoded(pipeline: Pipeline, folder: Path | None, texts: Sequence[str], shared: Store) -> ConditionTable:
    """What a run is asked for, when the first process has encoded what was not, and read the folder once."""
    if processes.is_first():
        if folder and texts:
            save_prompts(pipeline.require_text_encoder(), texts, folder)
            pipeline.drop_text_encoder()
        pipeline.table(folder).check()
    processes.meet(shared, lambda: None, "prompts are encoded")
    return pipeline.table(folder)


def trajectory_table(pipeline: Pipeline, store: TrajectoryStore, prompts: Path | None) -> ConditionTable:
    """What trajectories were asked for.

    Args:
        pipeline: the model that made them.
        store: the trajectories.
        prompts: of a model of captions, the folder of its prompts; None means that beneath the trajectories.

    Raises:
        ValueError: there is no such folder, or its prompts are not those of the trajectories.
    """
    if prompts is None and not pipeline.num_classes:
        prompts = _beneath(store.folder)
    table = pipeline.table() if prompts is None else pipeline.encoded(prompts)
    store.refuse_other(table.identity, _GIVE_PROMPTS)
    return table


def _beneath(folder: Path) -> Path:
    """The folder of prompts beneath that of trajectories."""
    if not (folder / _ENCODED).is_dir():
        raise ValueError(f"the prompts of {folder} are not beneath it; {_GIVE_PROMPTS}")
    return folder / _ENCODED


def _fill_store(
    pipeline: Pipeline,
    table: ConditionTable,
    store: TrajectoryStore,
    settings: trajectories.TrajectorySettings,
    shared: Store,
    title: str,
) -> int:
    """Make this process's part of what is missing, wait for the others, and return how many all made."""
    with stop_signal() as stop, progress_bar(title, len(store)) as bar:

        def progress(items: int) -> None:
            bar.at(shared.add("finished", items))
            stop.check()

        numbers = processes.deal(store.num_shards, shared)
        made = trajectories.generate(pipeline.teacher, table, store, settings, progress, numbers)
        shared.add("made", made)
        processes.meet(shared, lambda: progress(0))
        bar.at(shared.add("finished", 0))
    return shared.add("made", 0)


def text_encoder(model: str | None, encoder: str | None, max_tokens: int | None, device: str) -> TextEncoder:
    """The text encoder of a model, or one by its own name.

    Args:
        model: shipped name, folder or hub id of a model of text.
        encoder: instead of it, a folder or hub id of a T5 encoder.
        max_tokens: positions of a caption, for `encoder`.
        device: where it goes.

    Raises:
        ValueError: not one of the two ways, a model of classes, or no such model or encoder.
    """
    if encoder is not None and max_tokens is not None and model is None:
        return TextEncoder.from_pretrained(encoder, max_tokens, device)
    if model is None or encoder is not None or max_tokens is not None:
        raise ValueError("give --model MODEL, or --encoder NAME with --max-tokens N")
    return Pipeline.from_pretrained(model, device).require_text_encoder()


def save_prompts(encoder: TextEncoder, prompts: Sequence[str], out: Path) -> dict[str, Any]:
    """Encode prompts into a folder.

    Returns:
        How many there are, how many of them are empty, their size, and the seconds it took.

    Raises:
        ValueError: a folder that holds something else or that another process writes.
        Stopped: the user asked to stop.
    """
    begin = time.perf_counter()
    with stop_signal() as stop, progress_bar("encoding", len(prompts)) as bar:

        def progress(items: int) -> None:
            bar.advance(items)
            stop.check()

        texts = encode_prompts(encoder, prompts, out, progress).prompts
    size = {"max_tokens": encoder.max_tokens, "width": encoder.width}
    seconds = round(time.perf_counter() - begin, 3)
    return {"prompts": len(texts), "empty": texts.count(""), **size, "seconds": seconds}


def with_text_encoder(pipeline: Pipeline, name: str) -> Pipeline:
    """A model of text that names another text encoder, which stays where it is.

    Args:
        pipeline: the model.
        name: folder or hub id.

    Raises:
        ValueError: a model of classes, or the name is neither a folder nor a hub id.
    """
    if pipeline.num_classes:
        raise ValueError("these files are of a model of classes, which has no text encoder; leave --text-encoder out")
    if Path(name).is_dir():
        return pipeline.with_settings(text_encoder=str(Path(name).resolve()))
    if not is_id(name):
        raise ValueError(f"no folder {name!r}; --text-encoder takes a folder or a hub id owner/name")
    return pipeline.with_settings(text_encoder=name)


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
        ValueError: a count that is not positive.
    """
    num = trajectory_count(pipeline, num)
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
    """Measure a model's methods against real images; processes that torchrun started share the runs.

    Args:
        model: for the record.
        pipeline: the model.
        out: folder of the results.
        settings: what to measure.
        prompts: of a model of captions, what its images are asked for, see `make_trajectories`.
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
    if reference is None and not pipeline.num_classes and zoo.emoji(pipeline.image_shape) is None:
        shape = "x".join(map(str, pipeline.image_shape))
        raise ValueError(f"no real pictures of {shape} are shipped: give --reference FILE or FOLDER")
    recorded(out, "evaluate")
    folder, texts = _asked_from(pipeline, out, prompts, column)
    total = settings.num * len(settings.methods) * len(settings.seeds)
    with processes.group(str(pipeline.device)) as shared:
        table = _encoded(pipeline, folder, texts, shared)
        judge = zoo.judge(table.prompts, pipeline.image_shape, pipeline.device) if table.prompts else None
        with stop_signal() as stop, progress_bar("measuring", total) as bar:

            def progress(items: int) -> None:
                bar.at(shared.add("finished", items))
                stop.check()

            if reference is not None:
                real = read_reference(reference, extractor)
            else:
                real = zoo.reference() if pipeline.num_classes else zoo.emoji_reference(extractor, pipeline.image_shape)
            runs = evaluate(pipeline, table, extractor, settings, real, out, progress, judge, shared)
    values = summary(runs, settings, pipeline, table, model, extractor, real, judge)
    if processes.is_first():
        save_json(out / "summary.json", values)
        save_text(out / "table.md", markdown_table(values))
        kept = [kept_images(out, method, settings.seeds[0])[:_PICTURED] for method in settings.methods]
        if settings.keep:
            grid(torch.cat(kept), columns=min(_PICTURED, settings.keep, settings.num)).save(out / "grid.png")
    return values


def verify(path: Path) -> dict[str, Any]:
    """Check every hash of a folder of trajectories and the prompts beneath, of encoded prompts or of a pipeline.

    Returns:
        Which kind of folder it is, and its problems, a sentence each.

    Raises:
        ValueError: it is none of these.
    """
    if (path / INDEX).is_file():
        return {"kind": "pipeline", "problems": problems(path)}
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} holds neither trajectories or prompts ({MANIFEST}) nor a pipeline ({INDEX})")
    if EncodedPrompts.made(load_json(path / MANIFEST)):
        return {"kind": "prompts", "problems": _problems_of_prompts(path)}
    found = TrajectoryStore.open(path).problems()
    if (path / _ENCODED).is_dir():
        found += _problems_of_prompts(path / _ENCODED)
    return {"kind": "trajectories", "problems": found}


def _problems_of_prompts(folder: Path) -> list[str]:
    try:
        return EncodedPrompts.open(folder).problems()
    except ValueError as error:
        return [str(error)]


def repair(path: Path, model: str, device: str, prompts: Path | None = None) -> dict[str, Any]:
    """Make again what is missing, damaged or foreign of a folder of trajectories, bit for bit; the rest stays.

    Args:
        path: the folder.
        model: the one that made it.
        device: where the model runs; the bits are those of the same kind of machine.
        prompts: see `trajectory_table`; those beneath the trajectories are mended, too.

    Returns:
        What was wrong and is mended, and what is still wrong, a sentence each.

    Raises:
        ValueError: it holds no trajectories, or those of another model.
        Stopped: the user asked to stop.
    """
    store, pipeline = TrajectoryStore.open(path), Pipeline.from_pretrained(model, device)
    names = [field.name for field in fields(trajectories.TrajectorySettings)]
    settings = from_json(trajectories.TrajectorySettings, {name: store.manifest.get(name) for name in names}, path)
    found = verify(path)["problems"]
    if prompts is None and not pipeline.num_classes:
        prompts = _beneath(path) / PROMPTS
    make_trajectories(model, pipeline, path, len(store), settings, "repairing", prompts)
    for stray in store.strays():
        stray.unlink()
    return {**verify(path), "repaired": found}


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
