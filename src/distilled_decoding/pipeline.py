"""The pipeline: a teacher, its student, and everything needed to turn labels and seeds into images.

Axis letters: B batch, L tokens in a sequence, C code channels, H W image.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from distilled_decoding.checkpoint import load_json, save_json
from distilled_decoding.condition import Condition
from distilled_decoding.families import family
from distilled_decoding.flow import FlowSettings
from distilled_decoding.noise import image_keys
from distilled_decoding.sampling import Callback, Plan, check_plan, sample, spread_schedule
from distilled_decoding.teacher import TeacherSampling
from distilled_decoding.zoo import resolve

Steps = int | Literal["teacher", "teacher-ancestral"]


@dataclass(frozen=True)
class PipelineConfig:
    """What `model_index.json` says besides the components.

    Attributes:
        family: which family's classes the components are.
        class_names: names of the classes, in label order.
        sampling: the teacher's distribution.
        flow: the solver that made the student's trajectories.
        start_blocks: where the student can start; () without a student.
        split_block: blocks before it come from the student's logits, the rest from its code head.
        micro_batch: images generated at once.
    """

    family: str
    class_names: tuple[str, ...]
    sampling: TeacherSampling
    flow: FlowSettings
    start_blocks: tuple[int, ...]
    split_block: int
    micro_batch: int

    @classmethod
    def from_json(cls, values: dict[str, Any], source: Path) -> "PipelineConfig":
        """Read what `to_json` wrote, strictly.

        Raises:
            ValueError: a field is missing, unknown or outside its range.
        """
        try:
            return cls(
                family=values["family"],
                class_names=tuple(values["class_names"]),
                sampling=TeacherSampling(**values["sampling"]),
                flow=FlowSettings(**values["flow"]),
                start_blocks=tuple(values["start_blocks"]),
                split_block=values["split_block"],
                micro_batch=values["micro_batch"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source} lacks or misnames a field: {error}") from error


@dataclass(frozen=True)
class Output:
    """What a pipeline call returns.

    Attributes:
        images: one PIL image per label, grey or RGB.
        code_BLC: their codes.
    """

    images: list[Image.Image]
    code_BLC: Tensor


class Pipeline:
    """A teacher with its student, as loaded from a folder."""

    def __init__(self, teacher: Any, student: Any | None, config: PipelineConfig) -> None:  # noqa: ANN401
        self.teacher = teacher
        self.student = student
        self.config = config

    @classmethod
    def from_pretrained(cls, model: str | Path, device: str = "cpu") -> "Pipeline":
        """Load a shipped name, a folder or a hub id.

        Raises:
            ValueError: there is no such model, or it is incomplete or damaged.
        """
        folder = resolve(model)
        index = load_json(folder / "model_index.json")
        config = PipelineConfig.from_json(index, folder / "model_index.json")
        reader = family(config.family)
        teacher = reader.load_teacher(folder).to(device).eval().requires_grad_(False)
        student = None
        if "student" in index:
            student = reader.load_student(folder).to(device).eval().requires_grad_(False)
        return cls(teacher, student, config)

    def save_pretrained(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Write a folder that `from_pretrained` reads; the index goes last, so half a folder is never taken for one."""
        reader = family(self.config.family)
        index: dict[str, Any] = {"_class_name": "Pipeline", **asdict(self.config)}
        index |= {name: ["distilled_decoding", kind] for name, kind in reader.COMPONENTS.items()}
        reader.save_teacher(folder, self.teacher, dtype)
        if self.student is not None:
            reader.save_student(folder, self.student, dtype)
            index["student"] = ["distilled_decoding", type(self.student).__name__]
        save_json(folder / "model_index.json", index)

    def with_student(self, student: nn.Module, start_blocks: tuple[int, ...], split_block: int) -> "Pipeline":
        """The same teacher with another student."""
        return Pipeline(self.teacher, student, replace(self.config, start_blocks=start_blocks, split_block=split_block))

    def new_student(self, seed: int) -> nn.Module:
        """An untrained student that begins where the teacher stands, on its device."""
        return family(self.config.family).new_student(self.teacher, seed)

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self.teacher.codebook.device

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.teacher.num_classes

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the teacher's weights; trajectories and measurements carry it."""
        return fingerprint(self.teacher)

    def plan(
        self,
        steps: Steps = 1,
        schedule: Sequence[int] | None = None,
        teacher_span: tuple[int, int] | None = None,
    ) -> Plan:
        """How to sample: student steps, an explicit schedule, or the teacher alone.

        Args:
            steps: number of student steps, spread over its starting blocks; `teacher` maps the image's own
                noise through the teacher, `teacher-ancestral` samples from it.
            schedule: starting blocks, instead of `steps`.
            teacher_span: blocks a..b-1 that the teacher predicts in between.

        Raises:
            ValueError: the plan cannot be carried out.
        """
        if schedule is None and isinstance(steps, str):
            if steps not in ("teacher", "teacher-ancestral"):
                raise ValueError(f"steps must be a number, teacher or teacher-ancestral, got {steps!r}")
            if teacher_span is not None:
                raise ValueError(f"teacher span {teacher_span} goes with student steps, not with steps={steps!r}")
            return Plan((), ancestral=steps == "teacher-ancestral")
        if self.student is None:
            raise ValueError("this model has no student yet: sample with steps teacher, or make one with `distill`")
        blocks = spread_schedule(int(steps), self.config.start_blocks) if schedule is None else tuple(schedule)
        return check_plan(Plan(blocks, teacher_span), self.teacher.order, self.config.start_blocks)

    def codes(self, plan: Plan, condition: Condition, key_B: Tensor, callback: Callback | None = None) -> Tensor:
        """The codes [B, L, C] of one batch of images."""
        return sample(
            plan,
            self.teacher,
            self.student,
            condition.to(self.device),
            key_B.to(self.device),
            self.config.sampling,
            self.config.flow,
            self.config.split_block,
            callback,
        )

    @torch.no_grad()
    def images(
        self, plan: Plan, condition: Condition, key_B: Tensor, callback: Callback | None = None
    ) -> Iterator[Tensor]:
        """Images as uint8 [B, 1 or 3, H, W] on the CPU, a micro-batch at a time.

        The last micro-batch is filled up and cut again, so that every image is computed at one batch size.
        """
        size = self.config.micro_batch
        for index_B in torch.arange(len(condition)).split(size):
            filled_B = torch.cat([index_B, index_B[-1:].expand(size - len(index_B))])
            code_BLC = self.codes(plan, condition[filled_B], key_B[filled_B], callback)
            yield to_uint8(self.teacher.decode(code_BLC[: len(index_B)])).cpu()

    def __call__(
        self,
        labels: Sequence[int],
        seeds: Sequence[int] | None = None,
        steps: Steps = 1,
        schedule: Sequence[int] | None = None,
        teacher_span: tuple[int, int] | None = None,
        callback: Callback | None = None,
    ) -> Output:
        """Generate one image per label.

        Args:
            labels: a class for each image.
            seeds: a seed for each image; by default 0, 1, 2 ...
            steps: see `plan`.
            schedule: see `plan`.
            teacher_span: see `plan`.
            callback: hears of every step.

        Raises:
            ValueError: a label or plan that does not exist, or as many seeds as labels are not given.
        """
        plan = self.plan(steps, schedule, teacher_span)
        condition = Condition.labels(labels, self.num_classes)
        seeds = range(len(labels)) if seeds is None else seeds
        if len(seeds) != len(labels):
            raise ValueError(f"{len(seeds)} seeds do not fit {len(labels)} labels; give one for each")
        key_B = torch.cat([image_keys("image", seed, [0]) for seed in seeds])
        with torch.no_grad():
            code_BLC = self.codes(plan, condition, key_B, callback)
            return Output(to_pil(to_uint8(self.teacher.decode(code_BLC)).cpu()), code_BLC)


def fingerprint(module: nn.Module) -> str:
    """The sha256 of a module's parameter names and float32 values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_uint8(image_B3HW: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, as uint8."""
    return (image_B3HW.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_pil(image_B3HW: Tensor) -> list[Image.Image]:
    """uint8 images [B, 1 or 3, H, W] as PIL images, grey or RGB."""
    return [Image.fromarray(i.permute(1, 2, 0).squeeze(-1).numpy()) for i in image_B3HW]


def grid(image_NBHW: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """uint8 images [N, 1 or 3, H, W] as one picture, row by row, each pixel `scale` wide."""
    rows = [torch.cat(list(row), dim=2) for row in image_NBHW.split(columns)]
    width = rows[0].shape[2]
    padded = [nn.functional.pad(row, (0, width - row.shape[2])) for row in rows]
    picture = torch.cat(padded, dim=1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return to_pil(picture.unsqueeze(0))[0]
