"""What an image is asked to show: a class label or a caption, with the null that guidance needs.

A table holds the conditions that images are asked for by number; image i of a run is asked for number i, counted round.

Axis letters: B batch, N images of a run, T caption positions, F caption feature channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor


class Condition(ABC):
    """A batch of conditions, one an image: all that the method needs to know of them.

    `len(condition)` is the batch size; indexing selects images.
    """

    @classmethod
    def require(cls, condition: "Condition") -> Self:
        """The condition itself, which must be of this kind for the model that asks.

        Raises:
            ValueError: the condition is of another kind.
        """
        if not isinstance(condition, cls):
            raise ValueError(f"this model reads {cls.__name__}, got {type(condition).__name__}; give {cls.__name__}")
        return condition

    @classmethod
    @abstractmethod
    def cat(cls, conditions: Sequence[Self]) -> Self:
        """Several batches as one, in order.

        Raises:
            ValueError: the conditions are not for one and the same model.
        """

    @abstractmethod
    def null(self) -> Self:
        """As many null conditions."""

    def with_null(self) -> Self:
        """This batch followed by its null, length 2B: what one guided pass of a teacher reads."""
        return self.cat([self, self.null()])

    @abstractmethod
    def to(self, device: torch.device | str) -> Self:
        """The same condition on another device."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: slice | Tensor) -> Self: ...


@dataclass(frozen=True, eq=False)
class Labels(Condition):
    """A batch of class labels.

    Attributes:
        label_B: int64 class of each image; `num_classes` stands for "no class".
        num_classes: number of real classes, which is also the null label.
    """

    label_B: Tensor
    num_classes: int

    @classmethod
    def checked(cls, labels: Sequence[int] | Tensor, num_classes: int) -> Self:
        """Labels that a user gave.

        Raises:
            ValueError: a label is outside 0..num_classes-1, or the labels are not one flat sequence.
        """
        label_B = torch.as_tensor(labels, dtype=torch.int64)
        if label_B.ndim != 1:
            raise ValueError(f"labels must be one flat sequence, got shape {tuple(label_B.shape)}")
        wrong_N = label_B[(label_B < 0) | (label_B >= num_classes)]
        if len(wrong_N):
            raise ValueError(f"label {int(wrong_N[0])} is outside 0..{num_classes - 1}, the classes known here")
        return cls(label_B, num_classes)

    @classmethod
    def cat(cls, conditions: Sequence[Self]) -> Self:
        """See `Condition.cat`; all must have one number of classes."""
        classes = {condition.num_classes for condition in conditions}
        if len(classes) != 1:
            raise ValueError(f"conditions to join must share one num_classes, got {sorted(classes)}")
        return cls(torch.cat([condition.label_B for condition in conditions]), classes.pop())

    def null(self) -> Self:
        """See `Condition.null`."""
        return replace(self, label_B=torch.full_like(self.label_B, self.num_classes))

    def to(self, device: torch.device | str) -> Self:
        """See `Condition.to`."""
        return replace(self, label_B=self.label_B.to(device))

    def __len__(self) -> int:
        return len(self.label_B)

    def __getitem__(self, index: slice | Tensor) -> Self:
        return replace(self, label_B=self.label_B[index])


@dataclass(frozen=True, eq=False)
class Captions(Condition):
    """A batch of captions as a text encoder's features, their text at the end of the positions.

    A null caption keeps the mask of the caption that it stands for; in place of features the model reads its own
    embedding of "no caption".

    Attributes:
        feature_BTF: floating point features; those of padding and of null captions have no influence.
        mask_BT: bool, where there is text; the rest is padding.
        null_B: bool, which captions are null.

    Raises:
        ValueError: tensors of other shapes or types.
    """

    feature_BTF: Tensor
    mask_BT: Tensor
    null_B: Tensor

    def __post_init__(self) -> None:
        feature_BTF, mask_BT, null_B = self.feature_BTF, self.mask_BT, self.null_B
        if feature_BTF.ndim != 3 or not feature_BTF.is_floating_point():
            raise ValueError(f"caption features must be floating point [B, T, F], got {_described(feature_BTF)}")
        for name, value, shape in (("mask", mask_BT, feature_BTF.shape[:2]), ("null", null_B, feature_BTF.shape[:1])):
            if value.shape != shape or value.dtype != torch.bool:
                fits = f"bool {list(shape)} beside features {list(feature_BTF.shape)}"
                raise ValueError(f"caption {name} must be {fits}, got {_described(value)}")

    @classmethod
    def right_padded(cls, feature_BTF: Tensor, mask_BT: Tensor) -> Self:
        """Captions with their text in front, as text encoders give them; none is null.

        Each is rotated so that its text comes last.

        Raises:
            ValueError: tensors of other shapes or types, or a mask with text behind padding.
        """
        given = cls(feature_BTF, mask_BT, mask_BT.new_zeros(len(mask_BT)))
        wrong_N = (mask_BT[:, 1:] & ~mask_BT[:, :-1]).any(1).nonzero()
        if len(wrong_N):
            raise ValueError(f"caption {int(wrong_N[0])} has text behind padding; give masks of text, then padding")
        length_B1 = mask_BT.sum(1, keepdim=True)
        index_BT = (torch.arange(mask_BT.shape[1], device=mask_BT.device) + length_B1) % mask_BT.shape[1]
        feature_BTF = feature_BTF.gather(1, index_BT[..., None].expand_as(feature_BTF))
        return replace(given, feature_BTF=feature_BTF, mask_BT=mask_BT.flip(1))

    @classmethod
    def cat(cls, conditions: Sequence[Self]) -> Self:
        """See `Condition.cat`; all must have the same positions and channels."""
        shapes = {tuple(condition.feature_BTF.shape[1:]) for condition in conditions}
        if len(shapes) != 1:
            raise ValueError(f"captions to join must share one shape [T, F], got {sorted(shapes)}")
        return cls(
            torch.cat([condition.feature_BTF for condition in conditions]),
            torch.cat([condition.mask_BT for condition in conditions]),
            torch.cat([condition.null_B for condition in conditions]),
        )

    def null(self) -> Self:
        """See `Condition.null`."""
        return replace(self, null_B=torch.ones_like(self.null_B))

    def to(self, device: torch.device | str) -> Self:
        """See `Condition.to`."""
        return type(self)(self.feature_BTF.to(device), self.mask_BT.to(device), self.null_B.to(device))

    def __len__(self) -> int:
        return len(self.feature_BTF)

    def __getitem__(self, index: slice | Tensor) -> Self:
        return type(self)(self.feature_BTF[index], self.mask_BT[index], self.null_B[index])


class ConditionTable(Protocol):
    """What images are asked for, by number: `len(table)`, `table[number_B]`."""

    @property
    def prompts(self) -> Sequence[str]:
        """The texts of captions, in order; none of classes."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What a manifest keeps of it, as JSON: two tables with one identity hold the same conditions."""
        ...

    def check(self) -> None:
        """Read once what it lies in on disk, if anywhere.

        Raises:
            ValueError: something is missing or damaged.
        """
        ...

    def __len__(self) -> int:
        """How many there are to ask for."""
        ...

    def __getitem__(self, number_B: Tensor) -> Condition:
        """The conditions of these numbers, int64 in 0..len-1."""
        ...


@dataclass(frozen=True)
class Classes:
    """The `ConditionTable` of a model of classes: number n is the label n."""

    num_classes: int

    @property
    def prompts(self) -> Sequence[str]:
        """None."""
        return ()

    @property
    def identity(self) -> dict[str, Any]:
        """See `ConditionTable.identity`."""
        return {"num_classes": self.num_classes}

    def check(self) -> None:
        """Nothing lies on disk."""

    def __len__(self) -> int:
        return self.num_classes

    def __getitem__(self, number_B: Tensor) -> Labels:
        return Labels(number_B, self.num_classes)


@dataclass(frozen=True, eq=False)
class Asked:
    """Conditions of a table in the order of a run, read a batch at a time, so that any number fits in memory.

    Attributes:
        table: holds the conditions.
        number_N: which of them each image is asked for, int64.
    """

    table: ConditionTable
    number_N: Tensor

    @classmethod
    def in_turn(cls, table: ConditionTable, num: int) -> Self:
        """The numbers in turn, 0, 1, ..., len(table)-1, 0, 1, ..., until there are `num`."""
        return cls(table, torch.arange(num) % len(table))

    def __len__(self) -> int:
        return len(self.number_N)

    def __getitem__(self, index: slice | Tensor) -> Condition:
        return self.table[self.number_N[index]]


def stand_ins(reader: Any, num: int) -> Condition:
    """Conditions for a model, where time, memory and promises do not depend on what they say.

    Args:
        reader: has `num_classes` and, where that is 0, a `caption_shape`, as teachers do.
        num: how many.

    Returns:
        Its classes in turn; or captions without padding, random features from a fixed seed.
    """
    if reader.num_classes:
        return Asked.in_turn(Classes(reader.num_classes), num)[:]
    feature_BTF = torch.randn(num, *reader.caption_shape, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.ones(feature_BTF.shape[:2], dtype=torch.bool)
    return Captions(feature_BTF, mask_BT, torch.zeros(num, dtype=torch.bool))


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
