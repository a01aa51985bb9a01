"""LlamaGen models as pipeline folders: tokenizer, transformer, student, each with its config and weights."""

from pathlib import Path

import torch

from distilled_decoding.checkpoint import load_component, load_config, save_component
from distilled_decoding.families.llamagen.student import LlamaGenStudent, StudentConfig
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import LlamaGenTeacher, Transformer, TransformerConfig

COMPONENTS = {"tokenizer": "VQTokenizer", "transformer": "Transformer"}


def load_teacher(folder: Path) -> LlamaGenTeacher:
    """Read `tokenizer/` and `transformer/`, strictly.

    Raises:
        ValueError: a file is missing, damaged, or does not fit its config.
    """
    tokenizer = VQTokenizer(load_config(TokenizerConfig, folder / "tokenizer" / "config.json"))
    load_component(folder / "tokenizer", tokenizer)
    transformer = Transformer(load_config(TransformerConfig, folder / "transformer" / "config.json"))
    load_component(folder / "transformer", transformer)
    return LlamaGenTeacher(tokenizer, transformer)


def load_student(folder: Path) -> LlamaGenStudent:
    """Read `student/`, strictly.

    Raises:
        ValueError: a file is missing, damaged, or does not fit its config.
    """
    student = LlamaGenStudent(load_config(StudentConfig, folder / "student" / "config.json"))
    load_component(folder / "student", student)
    return student


def save_teacher(folder: Path, teacher: LlamaGenTeacher, dtype: torch.dtype) -> None:
    """Write `tokenizer/` and `transformer/`."""
    save_component(folder / "tokenizer", teacher.tokenizer, teacher.tokenizer.config, dtype)
    save_component(folder / "transformer", teacher.transformer, teacher.transformer.config, dtype)


def save_student(folder: Path, student: LlamaGenStudent, dtype: torch.dtype) -> None:
    """Write `student/`."""
    save_component(folder / "student", student, student.config, dtype)


def new_student(teacher: LlamaGenTeacher, seed: int) -> LlamaGenStudent:
    """A student that begins where the teacher stands."""
    return LlamaGenStudent.from_teacher(teacher, seed)
