"""What an image is asked to show: one class label per image, with the null label that guidance needs.

Axis letters: B batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Condition:
    """A batch of class labels. `len(condition)` is the batch size; indexing selects images.

    Attributes:
        label_B: int64 class of each image; `num_classes` stands for "no class".
        num_classes: number of real classes, which is also the null label.
    """

    label_B: Tensor
    num_classes: int

    @classmethod
    def labels(cls, labels: Sequence[int] | Tensor, num_classes: int) -> "Condition":
        """Checked labels as a condition.

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
    def balanced(cls, num: int, num_classes: int) -> "Condition":
        """The labels in turn, 0, 1, ..., num_classes-1, 0, 1, ..., until there are `num`."""
        return cls(torch.arange(num) % num_classes, num_classes)

    @classmethod
    def cat(cls, conditions: Sequence["Condition"]) -> "Condition":
        """Several batches as one, in order.

        Raises:
            ValueError: the conditions do not share one set of classes.
        """
        classes = {condition.num_classes for condition in conditions}
        if len(classes) != 1:
            raise ValueError(f"conditions to join must share one num_classes, got {sorted(classes)}")
        return cls(torch.cat([condition.label_B for condition in conditions]), classes.pop())

    def null(self) -> "Condition":
        """As many null conditions."""
        return Condition(torch.full_like(self.label_B, self.num_classes), self.num_classes)

    def with_null(self) -> "Condition":
        """This batch followed by its null, length 2B: what one guided pass of a teacher reads."""
        return Condition.cat([self, self.null()])

    def to(self, device: torch.device | str) -> "Condition":
        """The same condition on another device."""
        return Condition(self.label_B.to(device), self.num_classes)

    def __len__(self) -> int:
        return len(self.label_B)

    def __getitem__(self, index: slice | Tensor) -> "Condition":
        return Condition(self.label_B[index], self.num_classes)
