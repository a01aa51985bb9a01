"""`model_index.json`: what a pipeline folder says of itself, and whether its parts bear it out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from distilled_decoding.checkpoint import from_json
from distilled_decoding.distill import DistillSettings
from distilled_decoding.families import Family
from distilled_decoding.flow import FlowSettings
from distilled_decoding.teacher import TeacherSampling

INDEX = "model_index.json"
LIBRARY = "distilled_decoding"


@dataclass(frozen=True)
class PipelineConfig:
    """What `model_index.json` says besides the components.

    Attributes:
        family: which family's classes the components are.
        class_names: names of the classes, in label order.
        sampling: the teacher's distribution.
        flow: the solver that made the student's trajectories.
        start_blocks: where the student can start, or should learn to.
        split_block: blocks before it come from the student's logits, the rest from its code head.
        micro_batch: images generated at once.
        student_temperature: the student draws its tokens from its logits divided by it; 0 takes the most likely.
        num_trajectories: how many to distil it from.
        training: how to distil it, or how it was.
        preset: the published model that it is, whose results `info` shows; None for any other.
        text_encoder: folder or hub id of what turns prompts into captions; None where that lies in the model's own
            folder, or there is none.

    Raises:
        ValueError: a count that is not positive, a temperature that is negative, or starting blocks that do not ascend
            from 0.
    """

    family: str
    class_names: tuple[str, ...]
    sampling: TeacherSampling
    flow: FlowSettings
    start_blocks: tuple[int, ...]
    split_block: int
    micro_batch: int
    num_trajectories: int = 50_000
    training: DistillSettings = field(default_factory=DistillSettings)
    student_temperature: float = 0.0
    preset: str | None = None
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        for name in ("micro_batch", "num_trajectories"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.student_temperature < math.inf:
            raise ValueError(f"student_temperature must be 0 or more, got {self.student_temperature}")
        if self.start_blocks[:1] != (0,) or list(self.start_blocks) != sorted(set(self.start_blocks)):
            raise ValueError(f"start_blocks must ascend from 0, got {self.start_blocks}")

    @classmethod
    def from_json(cls, values: dict[str, Any], source: Path) -> "PipelineConfig":
        """Read the fields out of `model_index.json`, where hub tools keep their own beside them.

        Raises:
            ValueError: a field is missing or outside its range.
        """
        own = {field.name for field in fields(cls)}
        return from_json(cls, {name: value for name, value in values.items() if name in own}, source)


def match_components(index: Mapping[str, Any], reader: Family, source: Path) -> None:
    """Compare the classes that an index names with its family's.

    Raises:
        ValueError: a component is not named, or is of another class.
    """
    for name, kind in reader.class_names(student="student" in index).items():
        if index.get(name) != [LIBRARY, kind]:
            found = f"names {index[name]}" if name in index else "names nothing"
            raise ValueError(f"{source} {found} as {name}, where a {reader.name} model has a {kind}")


def match_teacher(config: PipelineConfig, teacher: Any, source: object) -> None:
    """Compare what an index says with the teacher beside it.

    Raises:
        ValueError: blocks that the teacher does not have, or not as many names as classes.
    """
    teacher.order.check_schedule(config.start_blocks, config.start_blocks)
    if not 0 <= config.split_block <= teacher.order.num_blocks:
        raise ValueError(f"{source}: split_block {config.split_block} leaves the sequence")
    if len(config.class_names) != teacher.num_classes:
        raise ValueError(f"{source} names {len(config.class_names)} of {teacher.num_classes} classes")


def match_student(student: Any, teacher: Any, source: object) -> None:
    """Compare a student's sizes with its teacher's.

    Raises:
        ValueError: other blocks, or codes of another number or length.
    """
    way_out = "take a student that was distilled from this teacher"
    own, other = student.order, teacher.order
    if own != other:
        sizes = f"{own.num_blocks} blocks ({own.length} tokens), its teacher {other.num_blocks} ({other.length})"
        raise ValueError(f"{source} has {sizes}; {way_out}")
    codes, channels = teacher.codebook.shape
    config = student.config
    if (config.vocab_size, config.code_dim) != (codes, channels):
        sizes = f"{config.vocab_size} codes of {config.code_dim} channels, its teacher {codes} of {channels}"
        raise ValueError(f"{source} has {sizes}; {way_out}")
