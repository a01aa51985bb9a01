"""The `distill` command as functions: it claims its folder, trains, tells of it, and writes the whole pipeline."""

from contextlib import ExitStack, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from distilled_decoding import processes, trajectories, zoo
from distilled_decoding.commands import trajectory_count, trajectory_table
from distilled_decoding.condition import ConditionTable
from distilled_decoding.cost import distillation_cost, flops_per_second
from distilled_decoding.distill import DistillSettings, Method, Update, distill
from distilled_decoding.distill_scores import Scores
from distilled_decoding.distill_token_scores import TokenScores
from distilled_decoding.distill_tokens import Tokens
from distilled_decoding.distill_trajectories import Trajectories
from distilled_decoding.losses import ImageDistance
from distilled_decoding.metrics.perceptual import classifier_distance, effnet_lite0_distance, lpips_distance
from distilled_decoding.on_policy import OnPolicy
from distilled_decoding.parallel import RunSettings
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.progress import Bar, progress_bar, stop_signal
from distilled_decoding.records import claim
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.training_log import TrainingLog
from distilled_decoding.training_state import Checkpoints
from distilled_decoding.watch import Watch

ON_POLICY: dict[str, type[OnPolicy]] = {"tokens": Tokens, "token-scores": TokenScores, "scores": Scores}
"""The methods that need no trajectories."""

Start = Literal["teacher", "student"]
"""What a new student begins as: what its family makes of the teacher, or the student that the model has."""


@dataclass(frozen=True)
class Upkeep:
    """What is written while a student trains.

    Attributes:
        save_every: updates between checkpoints.
        keep_last: checkpoints that are kept.
        resume: a checkpoint to go on from, instead of the newest in the folder.
        watch_every: updates between pictures of samples, with a quick Fréchet distance to the teacher's samples
            for a model of the shipped models' images; 0: none.
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


def distill_student(
    model: str,
    pipeline: Pipeline,
    store: TrajectoryStore | None,
    out: Path,
    settings: DistillSettings,
    split_block: int | None = None,
    perceptual: str = "none",
    title: str = "distilling",
    upkeep: Upkeep = Upkeep(),  # noqa: B008 - frozen
    run: RunSettings = RunSettings(),  # noqa: B008 - frozen
    prompts: Path | None = None,
    start: Start = "teacher",
) -> Pipeline:
    """Train a student of a model and write the whole pipeline to `out`.

    The state of the training lies in `out/checkpoints`, its log in `out/log.jsonl`. Under torchrun every process calls
    this alike.

    Args:
        model: name for the record.
        pipeline: the teacher, and the student to start from.
        store: trajectories of this very teacher; None where the method needs none.
        out: folder of the new pipeline.
        settings: of the training; no starting blocks means those of the model.
        split_block: of the new pipeline; None means the model's.
        perceptual: name of the distance of decoded images, for a perceptual weight; see `image_distance`.
        title: what the progress bar says.
        upkeep: what is written while it trains.
        run: how the work is laid out.
        prompts: see `trajectory_table`; without trajectories, what `Pipeline.table` takes.
        start: what the student begins as.

    Raises:
        ValueError: no trajectories where they are needed, or those of another teacher or of other prompts, settings
            that do not fit, a model without a student to start from, a folder that holds another run or that another
            process writes, no valid checkpoint.
        FloatingPointError: the training diverged.
        Stopped: the user asked to stop; the same call goes on.
    """
    settings, split_block = _resolved(pipeline, settings, split_block, perceptual)
    new = _new_student(pipeline, start, settings)
    table = _table(model, pipeline, store, prompts)
    pipeline = _learnt_from(pipeline, store, settings, split_block)
    method = _method(pipeline, store, table, image_distance(perceptual, str(pipeline.device)))
    determined: dict[str, Any] = {
        "teacher": pipeline.fingerprint,
        "settings": asdict(settings),
        "split_block": split_block,
        "perceptual": perceptual,
    }
    notes: dict[str, Any] = {"model": model}
    if store is None:
        determined |= {"asked": table.identity, "sampling": asdict(pipeline.config.sampling)}
    else:
        determined |= {"trajectories": store.identity}
        notes |= {"trajectories": str(store.folder), "num_trajectories": len(store)}
    if start == "student":
        determined |= {"student": pipeline.student_fingerprint}
    checkpoints = Checkpoints(out / "checkpoints", determined, upkeep.save_every, upkeep.keep_last)
    with ExitStack() as stack:
        stack.enter_context(processes.group(str(pipeline.device)))
        processes.first_acts(table.check)
        if store is not None:
            processes.first_acts(store.check)
        processes.first_acts(lambda: claim(out, "distill", determined, {**notes, "device": str(pipeline.device)}))
        processes.first_acts(lambda: stack.enter_context(processes.only_writer(checkpoints.folder)))
        stop = stack.enter_context(stop_signal())
        bar = stack.enter_context(progress_bar(title, settings.num_updates))
        report = _Report(pipeline, table, out, upkeep, bar, title)

        def on_update(update: Update) -> bool:
            report.write(update)
            return not stop.requested

        student = distill(method, new, checkpoints, on_update, run, upkeep.resume)
        if student is None:
            raise stop.stopped()
        trained = pipeline.with_student(student, settings.start_blocks, split_block)
        processes.first_acts(lambda: trained.save_pretrained(out))
    return trained


def _resolved(
    pipeline: Pipeline, settings: DistillSettings, split_block: int | None, perceptual: str
) -> tuple[DistillSettings, int]:
    """The settings and the split of a training, where not given those of the model, checked against its blocks."""
    settings = replace(settings, start_blocks=settings.start_blocks or pipeline.config.start_blocks)
    num_blocks = pipeline.teacher.order.num_blocks
    on_policy = settings.method in ON_POLICY
    trained = (0, "code head") if settings.method == "scores" else (num_blocks, "logits")
    one_head = on_policy or settings.head == "flow"
    default = trained[0] if one_head else pipeline.config.split_block
    split_block = default if split_block is None else split_block
    if one_head and split_block != default:
        flag = f"--method {settings.method}" if on_policy else f"--head {settings.head}"
        raise ValueError(
            f"{flag} trains the {trained[1]} alone, from which all {num_blocks} blocks are then "
            f"taken, and not those of --split-block {split_block}; leave it out"
        )
    settings.check(pipeline.teacher.order, split_block)
    weight = settings.loss.perceptual_weight * (settings.on_policy.trajectory_weight if on_policy else 1)
    if (perceptual == "none") != (weight == 0):
        raise ValueError(
            f"--perceptual {perceptual} does not fit a perceptual weight of {weight}; give both or neither"
        )
    return settings, split_block


def _table(model: str, pipeline: Pipeline, store: TrajectoryStore | None, prompts: Path | None) -> ConditionTable:
    """What the student is asked for; trajectories must be of this very model."""
    if store is None:
        return pipeline.table(prompts)
    config = pipeline.config
    origin = trajectories.origin(pipeline.teacher, pipeline.fingerprint, config.sampling, config.flow)
    store.refuse_other(origin, f"make trajectories of {model} in another folder")
    return trajectory_table(pipeline, store, prompts)


def _learnt_from(
    pipeline: Pipeline, store: TrajectoryStore | None, settings: DistillSettings, split_block: int
) -> Pipeline:
    """The teacher with the settings of the new pipeline: it samples from what the student sees."""
    num = {} if store is None else {"num_trajectories": len(store)}
    draws = settings.method == "tokens" and settings.head == "code"
    temperature = settings.tokens.draw_temperature if draws else 0.0
    return pipeline.with_settings(
        start_blocks=settings.start_blocks,
        split_block=split_block,
        student_temperature=temperature,
        training=settings,
        **num,
    )


def _method(
    pipeline: Pipeline, store: TrajectoryStore | None, table: ConditionTable, distance: ImageDistance | None
) -> Method:
    """What the settings of a pipeline say that its student learns from."""
    config = pipeline.config
    if kind := ON_POLICY.get(config.training.method):
        models = (pipeline.teacher, pipeline.new_tracker)
        return kind(*models, table, config.sampling, config.training, store, distance, config.flow)
    if store is None:
        raise ValueError("--method trajectories needs trajectories: make some, and give --trajectories FOLDER")
    return Trajectories(pipeline.teacher, store, table, config.training, config.split_block, distance)


def _new_student(pipeline: Pipeline, start: Start, settings: DistillSettings) -> nn.Module:
    """The student before its training."""
    if start == "teacher":
        return pipeline.new_student(settings.seed % 2**63, settings.head)  # as far as torch's generators go
    if pipeline.student is None:
        raise ValueError("--start student needs a model that has one; leave it out to start from the teacher")
    if pipeline.head != settings.head:
        raise ValueError(
            f"--start student goes on with a {pipeline.head} head, not with --head {settings.head}; "
            f"give --head {pipeline.head}, or leave --start out for a new student"
        )
    return deepcopy(pipeline.student).requires_grad_(True)


class _Report:
    """What the user sees of a training: the bar, the log and the pictures, all made by the first process."""

    def __init__(
        self, pipeline: Pipeline, table: ConditionTable, out: Path, upkeep: Upkeep, bar: Bar, title: str
    ) -> None:
        self._log = TrainingLog(out, upkeep.tensorboard) if processes.is_first() else None
        self._watch = Watch(pipeline, table, out / "watch") if upkeep.watch_every else None
        self._watch_every = upkeep.watch_every
        self._bar = bar
        self._title = title

    def write(self, update: Update) -> None:
        """Tell of every twentieth update and of each that was skipped; look at the student when it is time."""
        if update.number % 20 == 0 or not update.finite:
            self._say(update)
        if self._watch is not None and update.number % self._watch_every == 0:
            with self._log.untimed() if self._log is not None else nullcontext():
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
        self._bar.say(f"{self._title}, {update.losses}{skipped}")


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
        num: trajectories; None means as many as the model's settings say, and none where the method needs none.
        settings: as `distill_student` takes them, like the next two.
        split_block: of the new pipeline.
        perceptual: name of the distance of decoded images.
        device: where it will run.
        run: how the work is laid out; the plan is for one process.

    Raises:
        ValueError: settings that do not fit the model.
    """
    on_policy = ON_POLICY.get(settings.method)
    num = 0 if on_policy and num is None else trajectory_count(pipeline, num)
    settings, _ = _resolved(pipeline, settings, split_block, perceptual)
    student = pipeline.student
    if student is None or pipeline.head != settings.head:
        student = pipeline.new_student(0, settings.head)
    speed = flops_per_second(torch.device(device), settings.bf16)
    tracker = pipeline.new_tracker() if on_policy else None
    sampling = pipeline.config.sampling
    cost = distillation_cost(
        pipeline.teacher, student, settings, speed, torch.device(device), run, on_policy, tracker, sampling
    )
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
