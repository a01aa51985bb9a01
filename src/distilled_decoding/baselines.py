"""The baseline any few-step method has to beat: every position drawn for itself.

A one-step predictor whose positions are independent given the class can do no better than the true frequency
of every token at every position; this is that predictor. What it lacks is exactly what distillation keeps.

Axis letters: B batch, L tokens in a sequence, V codebook entries, N trajectories.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Labels
from distilled_decoding.noise import uniform
from distilled_decoding.pipeline import Pipeline, to_uint8
from distilled_decoding.store import Shard
from distilled_decoding.teacher import draw

_STREAM = 2


@dataclass(frozen=True, eq=False)
class OneStep:
    """Independent token frequencies of each class (the paper's `onestep`).

    Attributes:
        frequency: float32 [num_classes, L, V], each row over V sums to 1. Four bytes an entry: 1.3 MB for
            10 classes, 64 tokens and 512 codes, but 17 GB for ImageNet at 256 tokens and 16,384 codes.
    """

    frequency: Tensor

    @classmethod
    def fit(cls, shard: Shard, num_classes: int, vocab_size: int) -> "OneStep":
        """Count the tokens of trajectories.

        Args:
            shard: trajectories of every class.
            num_classes: classes to count apart.
            vocab_size: codebook entries, V.

        Raises:
            ValueError: a label or token out of range, or a class without trajectories.
        """
        for name, value, end in (
            ("label", shard.label_N, num_classes),
            ("token", shard.token_NL, vocab_size),
        ):
            if len(shard) and not 0 <= int(value.min()) <= int(value.max()) < end:
                raise ValueError(
                    f"{name}s of the trajectories run over {int(value.min())}..{int(value.max())}, but the "
                    f"model knows 0..{end - 1}; use trajectories of this model"
                )
        missing = torch.bincount(shard.label_N, minlength=num_classes).eq(0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"no trajectory has label {missing[0]}; make more of them")
        shape = (num_classes, shard.token_NL.shape[1], vocab_size)
        row_NL = shard.label_N[:, None] * shape[1] + torch.arange(shape[1])
        count = torch.bincount((row_NL * vocab_size + shard.token_NL).flatten(), minlength=torch.Size(shape).numel())
        return cls(torch.nn.functional.normalize(count.view(shape).float(), p=1, dim=-1))

    def draw(self, condition: Labels, key_B: Tensor) -> Tensor:
        """Draw every position from its class's own frequency.

        Args:
            condition: one entry per image, without null labels.
            key_B: one key per image; the only source of randomness.

        Returns:
            token_BL, int64, on the device of the frequencies. [B, L, V] float64 exist meanwhile.
        """
        device = self.frequency.device
        uniform_BL = uniform(key_B.to(device), self.frequency.shape[1], _STREAM)
        return draw(self.frequency[condition.label_B.to(device)].log(), uniform_BL)


@torch.no_grad()
def onestep_images(pipeline: Pipeline, baseline: OneStep, condition: Labels, key_B: Tensor) -> Iterator[Tensor]:
    """The baseline's images through the pipeline's decoder, as `Pipeline.images` gives them."""
    for index_B in torch.arange(len(condition)).split(pipeline.config.micro_batch):
        token_BL = baseline.draw(condition[index_B], key_B[index_B]).to(pipeline.device)
        yield to_uint8(pipeline.teacher.decode(lookup(token_BL, pipeline.teacher.codebook))).cpu()
