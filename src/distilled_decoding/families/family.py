"""What a family of teachers brings, and how its models become folders: one sub-folder a component.

A family of your own is one `Family`, made known with `families.register`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilled_decoding.checkpoint import load_component, load_config, save_component
from distilled_decoding.families.published import PublishedNames
from distilled_decoding.student import Head

Component = tuple[type[Any], type[Any]]
"""A part of a model with a folder of its own: its class, and the dataclass that this takes and keeps as `config`."""


@dataclass(frozen=True)
class Family:
    """The classes of a family.

    Attributes:
        name: what `model_index.json` calls it.
        components: what the teacher is made of; a name is the sub-folder, the teacher's attribute and its keyword.
            One called `tokenizer` stays in float32, whatever dtype the others are given.
        teacher: makes a `Teacher` (a module) of the components, given by keyword.
        student: a `Student` with a class method `from_teacher(teacher, seed)`; its config has `vocab_size` and
            `code_dim`. Of several heads, the method takes which it is to be, and its config has `head`.
        published: how files that others published are read; None when there are none.
        plain_loop: samples as the published code does, codes from (teacher, condition, sampling, generator): what
            speed is compared with; None when there is none.
        heads: those that a student can have.
    """

    name: str
    components: Mapping[str, Component]
    teacher: Callable[..., Any]
    student: Component
    published: PublishedNames | None = None
    plain_loop: Callable[..., Tensor] | None = None
    heads: tuple[Head, ...] = ("code",)

    def class_names(self, student: bool) -> dict[str, str]:
        """The class of every component by its name, with the student's or without."""
        parts = {**self.components, "student": self.student} if student else self.components
        return {name: kind.__name__ for name, (kind, _) in parts.items()}

    def load_teacher(self, folder: Path) -> Any:
        """Read the teacher's components, strictly.

        Raises:
            ValueError: a file is missing, damaged, or does not fit its config, or the components do not fit together.
        """
        return self.teacher(**{name: self.load(name, folder / name) for name in self.components})

    def load_student(self, folder: Path) -> Any:
        """Read `student/`, strictly.

        Raises:
            ValueError: a file is missing, damaged, or does not fit its config.
        """
        return self.load("student", folder / "student")

    def load(self, name: str, folder: Path) -> Any:
        """Read one component, or the student, from its own folder, strictly.

        Raises:
            ValueError: a file is missing, damaged, or does not fit its config.
        """
        kind, config = self.kinds(name)
        with torch.device("meta"):
            module = kind(load_config(config, folder / "config.json"))
        load_component(folder, module)
        return module

    def kinds(self, name: str) -> Component:
        """The class of a component, or of the student, and that of its config."""
        return self.student if name == "student" else self.components[name]

    def save_teacher(self, folder: Path, teacher: Any, dtype: torch.dtype) -> None:
        """Write the teacher's components."""
        for name in self.components:
            part = getattr(teacher, name)
            save_component(folder / name, part, part.config, dtype)

    def save_student(self, folder: Path, student: Any, dtype: torch.dtype) -> None:
        """Write `student/`."""
        save_component(folder / "student", student, student.config, dtype)

    def new_student(self, teacher: Any, seed: int, head: Head = "code") -> Any:
        """A student that begins where the teacher stands.

        Raises:
            ValueError: a head that students of this family do not have.
        """
        if head not in self.heads:
            raise ValueError(f"a student of {self.name} has no {head} head; choose {' or '.join(self.heads)}")
        return self.student[0].from_teacher(teacher, seed, *([head] if len(self.heads) > 1 else []))

    def head(self, student: Any) -> Head:
        """Which head a student has."""
        return student.config.head if len(self.heads) > 1 else self.heads[0]  # type: ignore[no-any-return]
