"""What the names of `evaluate --methods` stand for: the student, the teacher, both, or a baseline.

Axis letters: B batch, L tokens in a sequence, N samples of the teacher.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor

from distilled_decoding.baselines import OneStep, Skip
from distilled_decoding.condition import Classes, ConditionTable, Labels
from distilled_decoding.pipeline import Codes, Pipeline
from distilled_decoding.records import identity

_NAME = re.compile(r"teacher|teacher-ancestral|onestep|\d+|skip:\d+|span:\d+:\d+|refine:\d+:\d+")


@dataclass(frozen=True, eq=False)
class Method:
    """A way to make images.

    Attributes:
        codes: makes the codes of one batch.
        table: of the conditions that it reads for the numbers that images are asked for by.
        passes: forward passes of an image.
        made_from: everything that determines the images, as JSON gives it back.
    """

    codes: Codes
    table: ConditionTable
    passes: int
    made_from: dict[str, Any]


def check_names(names: tuple[str, ...]) -> None:
    """Refuse names that mean nothing, before a model is at hand.

    Raises:
        ValueError: an unknown name, or a baseline without the teacher that it draws from.
    """
    for name in names:
        if not _NAME.fullmatch(name):
            ways = "a number of steps, teacher, teacher-ancestral, span:A:B, refine:K:N, onestep or skip:N"
            raise ValueError(f"unknown method {name!r}; use {ways}")
    if "onestep" in names and "teacher" not in names:
        raise ValueError("onestep draws from the teacher's samples; name the method teacher, too")


def method(
    pipeline: Pipeline, table: ConditionTable, name: str, samples: Callable[[], tuple[Tensor, Labels]]
) -> Method:
    """The method of a name: a number of student steps; `teacher` or `teacher-ancestral`; `span:a:b`, the student with
    the teacher on blocks a..b-1; `refine:k:n`, k student steps and n passes of the teacher over all blocks; `onestep`
    or `skip:n`, see `baselines`.

    Args:
        pipeline: the model.
        table: what images are asked for.
        name: one that `check_names` accepts.
        samples: gives tokens [N, L] of the teacher and the numbers they were asked for by, when `onestep` draws first.

    Raises:
        ValueError: this model cannot do it.
    """
    num_blocks = pipeline.teacher.order.num_blocks
    kind, *numbers = name.split(":")
    if kind in ("onestep", "skip"):
        teacher = pipeline.plan("teacher" if kind == "onestep" else "teacher-ancestral")
        made_from = {"baseline": name, **identity(pipeline, teacher)}
        if kind == "skip":
            skip = Skip(pipeline, int(numbers[0]))
            return Method(skip, table, num_blocks - skip.num_skipped, made_from)
        baseline = cache(lambda: OneStep(pipeline, *samples()))
        # It knows what the teacher made of a number, whatever that stands for.
        return Method(lambda condition, key_B: baseline()(condition, key_B), Classes(len(table)), 1, made_from)
    if kind == "span":
        first, end = map(int, numbers)
        # Where the span leaves nothing to do before or behind it, the student takes no step there.
        schedule = (0, end)[: 1 + (end < num_blocks)]
        plan = pipeline.plan(schedule=schedule, teacher_span=(first, end))
        return Method(
            partial(pipeline.codes, plan),
            table,
            len(schedule) - (first == 0) + end - first,
            identity(pipeline, plan),
        )
    if kind == "refine":
        steps, refine = map(int, numbers)
        plan = pipeline.plan(steps, refine=refine)
        return Method(partial(pipeline.codes, plan), table, steps + refine, identity(pipeline, plan))
    plan = pipeline.plan(int(name) if name.isdecimal() else name)  # type: ignore[arg-type]
    passes = len(plan.schedule) or num_blocks
    return Method(partial(pipeline.codes, plan), table, passes, identity(pipeline, plan))
