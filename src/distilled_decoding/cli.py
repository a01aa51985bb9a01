"""The command line: arguments in, printing out. `distilled-decoding COMMAND --help` explains each command."""

import dataclasses
import json as json_format
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from tyro.conf import OmitArgPrefixes, Positional

from distilled_decoding import commands, describe, processes, training_command
from distilled_decoding.bench import BenchSettings, bench_table
from distilled_decoding.bench import bench as run_bench
from distilled_decoding.demo import demo_table, run_demo
from distilled_decoding.distill import DistillSettings, usual_settings
from distilled_decoding.evaluate import EvaluationSettings
from distilled_decoding.flags import flags_for, given_names, override
from distilled_decoding.metrics.features import FeatureName
from distilled_decoding.originals import Weights
from distilled_decoding.parallel import RunSettings
from distilled_decoding.pipeline import DTYPES, Pipeline, Steps
from distilled_decoding.progress import Stopped
from distilled_decoding.prompts import read_prompts
from distilled_decoding.report import markdown_table
from distilled_decoding.report import report as run_report
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import Prefix, TeacherSampling

Model = Positional[str]
Training: Any = flags_for(DistillSettings, own_defaults=("bf16", "compile", "seed"))
Sampling: Any = flags_for(TeacherSampling)
DType = Literal["float32", "bfloat16", "float16"]
Perceptual = Literal["none", "classifier", "effnet-lite0", "lpips"]


def info(model: Model, json: bool = False) -> None:
    """Show what a model is.

    Args:
        model: shipped name, folder or hub id, or the name of a published model (var-d16, llamagen-b ...).
        json: print one JSON object.
    """
    _print(describe.info(describe.skeleton(model)), json)


def sample(
    model: Model,
    labels: tuple[int, ...] = (),
    prompt: tuple[str, ...] = (),
    num: int = 10,
    steps: str | None = None,
    schedule: tuple[int, ...] | None = None,
    teacher_span: tuple[int, int] | None = None,
    prefix: Prefix = "causal",
    refine: int = 0,
    split_block: int | None = None,
    student_temperature: float | None = None,
    seed: int = 0,
    out: Path | None = None,
    grid: Path | None = None,
    npz: Path | None = None,
    device: str = "cpu",
    dtype: DType = "float32",
    compile: bool = False,
    json: bool = False,
) -> None:
    """Generate images; those of an unfinished --grid or --npz wait in a folder beside it, FILE.partial.

    Args:
        model: shipped name, folder or hub id.
        labels: classes, taken in turn; without them all that there are.
        prompt: texts, taken in turn, of a model that reads them; without them its own prompts.
        num: images in all.
        steps: student steps (1, 2 ...), `teacher` (its flow map on the same noise) or `teacher-ancestral`; by
            default 1.
        schedule: starting blocks of the student's steps, instead of --steps, such as 0 24.
        teacher_span: blocks that the teacher predicts in between, such as 16 24.
        prefix: how the teacher reads the blocks before its span; `unmasked` is how VAR's published results with it
            were made.
        refine: passes of the teacher over all blocks at once, behind the student's steps; each leads closer to the
            teacher's own image of the same noise.
        split_block: blocks before it come from the logits, the others from the code head; by default the model's.
        student_temperature: of the draw of tokens from the logits; 0 takes the most likely; by default the model's.
        seed: of the run.
        out: folder for one PNG an image.
        grid: .png file for one picture of all images, ten in a row.
        npz: .npz file for arr_0 (uint8 images) and arr_1 (labels, or numbers of prompts), as the ADM evaluator reads
            them.
        device: cpu, cuda, cuda:1 ... or mps.
        dtype: of the transformers.
        compile: worth it for many images: the first ones take a minute or more, the others less.
        json: print one JSON object.
    """
    run = commands.SampleRun(model, labels, prompt, num, _steps(steps), schedule, teacher_span, prefix, refine, seed)
    given = _given({"split_block": split_block, "student_temperature": student_temperature})
    pipeline = _load(model, device, dtype, compile).with_settings(**given)
    _print(commands.sample_images(run, pipeline, out, grid, npz), json)


def trajectories(
    model: Model,
    num: int | None = None,
    out: Path | None = None,
    prompts: Path | None = None,
    column: str | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    shard_size: int | None = None,
    device: str = "cpu",
    plan: bool = False,
    json: bool = False,
) -> None:
    """Let the teacher make trajectories: for each image its label or prompt, its noise and its tokens.

    Args:
        model: shipped name, folder or hub id.
        num: trajectories in all, by default as many as the model's settings say; asking for more later adds to the
            folder.
        out: folder of the shards.
        prompts: of a model that reads text: a folder made by encode-prompts, or a .txt (one a line), .csv or .parquet
            file, which is encoded into OUT/prompts; by default the model's own prompts.
        column: of the prompts in a .csv or .parquet file.
        seed: of the run.
        micro_batch: images the teacher samples at once; by default the model's.
        shard_size: trajectories in a file; by default as many micro-batches as go into 4,096.
        device: cpu, cuda, cuda:1 ... or mps.
        plan: only say what it would need; MODEL may then also be the name of a published model.
        json: print one JSON object.
    """
    device = commands.check_device(device)
    if plan:
        pipeline = describe.skeleton(model)
        settings = commands.trajectory_settings(pipeline, seed, micro_batch, shard_size)
        _print(commands.plan_trajectories(pipeline, num, settings, device), json)
        return
    out = _needed(out, "--out")
    pipeline = Pipeline.from_pretrained(model, device)
    settings = commands.trajectory_settings(pipeline, seed, micro_batch, shard_size)
    made = commands.make_trajectories(model, pipeline, out, num, settings, prompts=prompts, column=column)
    _print(made, json)


def distill(
    model: Model,
    settings: Training,
    trajectories: Path | None = None,
    out: Path | None = None,
    prompts: Path | None = None,
    start: training_command.Start = "teacher",
    split_block: int | None = None,
    perceptual: Perceptual = "none",
    upkeep: Annotated[training_command.Upkeep, OmitArgPrefixes] = training_command.Upkeep(),  # noqa: B008 - frozen
    run: Annotated[RunSettings, OmitArgPrefixes] = RunSettings(),  # noqa: B008 - frozen
    device: str = "cpu",
    plan: bool = False,
    json: bool = False,
) -> None:
    """Train a student of a model; `out` is a whole pipeline folder when done.

    Args:
        model: shipped name, folder or hub id: the teacher.
        settings: of the training.
        trajectories: folder that `trajectories` made with this model; only --method trajectories needs it.
        out: folder of the new pipeline; checkpoints and the log lie beneath.
        prompts: of a model that reads text, the folder of the encoded prompts; by default prompts/ in that of the
            trajectories, or without them the model's own prompts.
        start: what the student begins as: the teacher, or the student that MODEL has.
        split_block: blocks before it are sampled from the logits, the others from the code head.
        perceptual: features of the perceptual distance, needed with --perceptual-weight.
        upkeep: what is written while it trains.
        run: how the work is laid out; `torchrun --nproc-per-node N -m -- distilled_decoding distill ...` shares it.
        device: cpu, cuda, cuda:1 ... or mps.
        plan: only say what it would need; MODEL may then also be the name of a published model.
        json: print one JSON object.
    """
    if plan:
        num = None if trajectories is None else len(TrajectoryStore.open(trajectories))
        pipeline, device = describe.skeleton(model), commands.check_device(device)
        training = _training(pipeline, settings)
        _print(training_command.plan_distillation(pipeline, num, training, split_block, perceptual, device, run), json)
        return
    out = _needed(out, "--out")
    pipeline = _load(model, device)
    training = _training(pipeline, settings)
    if training.method == "trajectories":
        trajectories = _needed(trajectories, "--trajectories")
    trained = training_command.distill_student(
        model,
        pipeline,
        None if trajectories is None else TrajectoryStore.open(trajectories),
        out,
        training,
        split_block,
        perceptual,
        upkeep=upkeep,
        run=run,
        prompts=prompts,
        start=start,
    )
    if processes.is_first():
        _print({"pipeline": str(out), **describe.info(trained)}, json)


def convert(
    paths: Positional[tuple[Path, ...]],
    out: Path,
    sampling: Sampling,
    preset: str | None = None,
    weights: Weights | None = None,
    allow_namespace: bool = False,
    num_heads: int | None = None,
    num_tokens: int | None = None,
    patch_nums: tuple[int, ...] | None = None,
    start_blocks: tuple[int, ...] | None = None,
    split_block: int | None = None,
    text_encoder: str | None = None,
    json: bool = False,
) -> None:
    """Turn published files into a pipeline folder; what they are is told from names and shapes.

    Args:
        paths: the files of a tokenizer, a transformer and, if wanted, a student, in any order.
        out: the folder.
        sampling: the teacher's distribution.
        preset: which published model it is, where the files alone fit several.
        weights: averaged or raw, of a file that holds both; by default those that the publisher's own scripts take.
        allow_namespace: also read training checkpoints that hold an argparse.Namespace; no code is run.
        num_heads: attention heads, where neither the files nor a preset tell.
        num_tokens: tokens of an image, likewise.
        patch_nums: sides of a VAR model's scales, likewise.
        start_blocks: where the student can start; by default the preset's.
        split_block: blocks before it are sampled from the logits, the others from the code head; by default
            the preset's.
        text_encoder: folder or hub id of the T5 encoder that a model of text reads with; by default the preset's.
        json: print one JSON object.
    """
    sizes = {"num_heads": num_heads, "num_tokens": num_tokens, "patch_nums": patch_nums}
    pipeline = Pipeline.from_original(paths, preset, weights, allow_namespace, **_given(sizes))
    changes = _given({"start_blocks": start_blocks, "split_block": split_block})
    pipeline = pipeline.with_settings(sampling=override(pipeline.config.sampling, sampling), **changes)
    if text_encoder is not None:
        pipeline = commands.with_text_encoder(pipeline, text_encoder)
    _print(commands.save_converted(pipeline, out), json)


def encode_prompts(
    file: Positional[Path],
    out: Path,
    model: str | None = None,
    encoder: str | None = None,
    max_tokens: int | None = None,
    column: str | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Encode the prompts of a file once, so that no later command needs the text encoder.

    Args:
        file: .txt with one prompt a line (an empty line is an empty prompt), .csv or .parquet.
        out: the folder.
        model: shipped name, folder or hub id of the model that shall read them.
        encoder: instead of --model, a folder or hub id of a T5 encoder, such as google/flan-t5-xl.
        max_tokens: with --encoder, tokens of a caption; longer prompts are cut.
        column: of the prompts in a .csv or .parquet file.
        device: cpu, cuda, cuda:1 ... or mps.
        json: print one JSON object.
    """
    prompts = read_prompts(file, column)
    text_encoder = commands.text_encoder(model, encoder, max_tokens, commands.check_device(device))
    _print(commands.save_prompts(text_encoder, prompts, out), json)


def verify(
    path: Positional[Path],
    repair: str | None = None,
    prompts: Path | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Check the hashes of a folder of trajectories, prompts or a model; exit code 1 when something is wrong.

    Args:
        path: the folder.
        repair: the model that made the trajectories: makes those again that are missing or damaged, and no others.
        prompts: for --repair, the folder of the encoded prompts, if it is not beneath the trajectories.
        device: cpu, cuda, cuda:1 ... or mps; for --repair.
        json: print one JSON object.
    """
    device = commands.check_device(device)
    if prompts is not None and repair is None:
        raise ValueError("--prompts goes with --repair; a folder of prompts is verified by itself")
    found = commands.verify(path) if repair is None else commands.repair(path, repair, device, prompts)
    _print(found, json)
    if found["problems"]:
        raise SystemExit(1)


def evaluate(
    model: Model,
    out: Path,
    methods: tuple[str, ...] = EvaluationSettings.methods,
    num: int = EvaluationSettings.num,
    seeds: tuple[int, ...] = EvaluationSettings.seeds,
    keep: int = EvaluationSettings.keep,
    student_temperature: float | None = None,
    prompts: Path | None = None,
    column: str | None = None,
    features: FeatureName | None = None,
    reference: Path | None = None,
    inception_weights: Path | None = None,
    device: str = "cpu",
    dtype: DType = "float32",
    compile: bool = False,
    json: bool = False,
) -> None:
    """Measure samples against real images, against the teacher's samples and against the baselines.

    Args:
        model: shipped name, folder or hub id.
        out: folder of the results; what is there already is not measured again.
        methods: student steps (1, 2 ...), teacher, teacher-ancestral, span:A:B (the student with the teacher on blocks
            A to B-1), refine:K:N (K steps, then N passes of the teacher over all blocks), onestep (each token from its
            own frequency), skip:N (the teacher saves its last N passes).
        num: images of each method and seed, classes or prompts in turn.
        seeds: run seeds; mean and spread are over them.
        keep: images of each run that are kept for pictures.
        student_temperature: see `sample`.
        prompts: what a model of captions is asked for: a folder made by encode-prompts, or a file, which is encoded
            into OUT/prompts; by default the prompts that the model ships.
        column: of the prompts in a .csv or .parquet file.
        features: classifier (of the shipped models of classes, their default), effnet-lite0 (the default of models of
            captions), or inception, whose distance is FID.
        reference: the real images: a .npz as the ADM evaluator reads, a folder of images, or a reference.safetensors of
            an earlier evaluation; by default the test images of the shipped models, for models of captions
            every second of the real emoji that the shipped recipe trains on.
        inception_weights: file of Inception's weights.
        device: cpu, cuda, cuda:1 ... or mps.
        dtype: of the transformers.
        compile: worth it for many images.
        json: print one JSON object.
    """
    given = _given({"student_temperature": student_temperature})
    pipeline = _load(model, device, dtype, compile).with_settings(**given)
    settings = EvaluationSettings(methods, num, seeds, keep)
    summary = commands.evaluate_model(
        model, pipeline, out, settings, prompts, column, features, reference, inception_weights
    )
    _print(summary, json, markdown_table(summary))


def bench(
    model: Positional[str | None] = None,
    out: Path = Path("bench"),
    preset: str | None = None,
    random_weights: bool = False,
    batches: tuple[int, ...] = BenchSettings.batches,
    repeats: int = BenchSettings.repeats,
    seconds: float = BenchSettings.seconds,
    device: str = "cpu",
    dtype: DType = "float32",
    json: bool = False,
) -> None:
    """Measure speed: the teacher as published, ours, ours compiled; the student in one and two steps.

    Args:
        model: shipped name, folder or hub id.
        out: folder of bench.json, bench.md and bench.png.
        preset: instead of a model, the name of a published one (var-d16, llamagen-b ...), with --random-weights.
        random_weights: full published sizes, weights drawn at random: speed does not need trained ones.
        batches: images at once; latency is that of the first, throughput the best of all.
        repeats: turns of each way at each batch; a short way runs several times in its turn.
        seconds: a way whose run takes longer is not tried at the next batch.
        device: cpu, cuda, cuda:1 ... or mps.
        dtype: of the transformers.
        json: print one JSON object.
    """
    settings, device = BenchSettings(batches, repeats, seconds), commands.check_device(device)
    if (model is None) == (preset is None) or (preset is None) == random_weights:
        raise ValueError("give a MODEL, or --preset NAME with --random-weights")
    if preset is not None:
        pipeline = describe.random_weights(preset, device, DTYPES[dtype])
    else:
        pipeline = Pipeline.from_pretrained(str(model), device, DTYPES[dtype])
    summary = run_bench(pipeline, f"{preset}, random weights" if preset else str(model), out, settings)
    _print(summary, json, bench_table(summary))


def report(
    folders: Positional[tuple[Path, ...]],
    out: Path = Path("report"),
    training: Path | None = None,
    inception_weights: Path | None = None,
    device: str = "cpu",
    json: bool = False,
) -> None:
    """Put results of `evaluate` and `bench` on one page, with tables and figures.

    Args:
        folders: that `evaluate` or `bench` wrote, of one model or several.
        out: folder of report.md, report.html and the pictures.
        training: .npz (arr_0) or folder of the images that the models were trained on: shows those nearest to samples.
        inception_weights: file of the Inception weights, needed with --training where their features measured.
        device: cpu, cuda, cuda:1 ... or mps; for --training.
        json: print one JSON object.
    """
    markdown, page, *pictures = run_report(folders, out, training, inception_weights, commands.check_device(device))
    _print({"report": str(markdown), "html": str(page), "pictures": [str(path) for path in pictures]}, json)


def demo(
    model: str = "fashion-llamagen",
    out: Path = Path("demo"),
    fast: bool = False,
    json: bool = False,
) -> None:
    """The whole method in minutes: trajectories, a fresh student, samples and a comparison.

    Args:
        model: a shipped model.
        out: folder of the picture, the table and the fresh student.
        fast: a one-minute tour.
        json: print one JSON object.
    """
    summary = run_demo(model, out, fast)
    _print(summary, json, demo_table(summary))


_COMMANDS = (demo, info, sample, trajectories, distill, evaluate, bench, report, convert, encode_prompts, verify)
COMMANDS = {command.__name__.replace("_", "-"): command for command in _COMMANDS}


def main() -> None:
    """Run a command: exit code 0 when done, 1 when `verify` found something, 2 on bad input, 130 when stopped."""
    console = Console(stderr=True, highlight=False)
    warnings.showwarning = _show_warning
    # What torch tells its own developers while it compiles is of no use here.
    warnings.filterwarnings("ignore", module=r"torch\.")
    try:
        _check_processes(sys.argv[1:])
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="distilled-decoding", sort_subcommands=False)
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        where = "" if processes.is_first() else f" in process {processes.rank()}"
        console.print(Text.assemble((f"error{where}:", "red"), f" {_sentence(error)}"), soft_wrap=True)
        raise SystemExit(2) from None
    except Stopped as stopped:
        if processes.is_first():
            console.print(str(stopped))
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        console.print("stopped")
        raise SystemExit(130) from None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"warning: {message}", file=sys.stderr)  # not by the console: a progress bar would not make room


def _check_processes(words: Sequence[str]) -> None:
    command, size = " ".join(words[:1]), processes.world_size()
    if size > 1 and command not in ("trajectories", "distill", "evaluate"):
        raise ValueError(f"WORLD_SIZE is {size}, but {command} runs in one process; start it without torchrun")


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _load(model: str, device: str, dtype: DType = "float32", compile: bool = False) -> Pipeline:
    pipeline = Pipeline.from_pretrained(model, commands.check_device(device), DTYPES[dtype])
    return pipeline.compiled() if compile else pipeline


def _training(pipeline: Pipeline, flags: Any) -> DistillSettings:
    trained, given = pipeline.config.training, given_names(flags)
    if flags.method is not None:
        trained = usual_settings(flags.method, trained, flags.head or trained.head)
    if "start_blocks" in given:  # the model's weights belong to the model's starts
        trained = dataclasses.replace(trained, start_weights=())
    training = override(trained, flags)
    if unread := sorted(given & training.unread):
        headless = training.head == "flow" and unread[0] == "code_weight"
        mixable = hasattr(training.loss, unread[0]) and not headless
        flag, there = unread[0].replace("_", "-"), "head flow" if headless else f"method {training.method}"
        way_out = "give a --trajectory-weight, too" if mixable else "leave it out"
        raise ValueError(f"--{flag} changes nothing with --{there}; {way_out}")
    return training


def _needed(path: Path | None, flag: str) -> Path:
    if path is None:
        raise ValueError(f"{flag} is needed, except with --plan")
    return path


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _steps(text: str | None) -> Steps | None:
    if text is None:
        return None
    if text in ("teacher", "teacher-ancestral"):
        return text  # type: ignore[return-value]
    if not text.isdecimal():
        raise ValueError(f"--steps must be a number, teacher or teacher-ancestral, got {text!r}")
    return int(text)


def _print(values: Mapping[str, Any], as_json: bool, table: str | None = None) -> None:
    if not processes.is_first():
        return
    if as_json:
        print(json_format.dumps(values))
    elif table is not None:
        print(table)
    else:
        for key, value in values.items():
            print(f"{key.replace('_', ' ')}: {_short(value)}")


def _short(value: Any) -> Any:
    """The ends of a long list."""
    if isinstance(value, list) and len(value) > 20:
        return f"{value[0]} ... {value[-1]} ({len(value)})"
    return value
