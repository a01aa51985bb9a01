"""What the method asks of a student, and what becomes of its two predictions.

A student reads known codes and noise in one pass and predicts every position twice: as logits over the
codebook and as a code vector. Blocks before `split_block` are taken from the logits, later ones from the
vectors.

Axis letters: B batch, L tokens in a sequence, V codebook entries, C code channels.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition


@dataclass(frozen=True, eq=False)
class StudentOutput:
    """A student's two predictions of whole sequences.

    Attributes:
        logits_BLV: over the tokens of each position, float32.
        code_BLC: the code at each position, float32.
    """

    logits_BLV: Tensor
    code_BLC: Tensor


class Student(Protocol):
    """A model that finishes a sequence, noise in its later blocks, in one pass."""

    @property
    def order(self) -> BlockOrder:
        """The blocks of a sequence, the teacher's."""
        ...

    def __call__(self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor) -> StudentOutput:
        """Predict every position of a sequence from it and from the blocks before its own (Eq. 6).

        Args:
            code_BLC: codes in the leading known blocks, noise in the others.
            condition: one entry per sequence.
            known_blocks_B: number of leading blocks that are known, int [B].
        """
        ...


def pass_known(output: StudentOutput, code_BLC: Tensor, token_BL: Tensor, known_BL: Tensor) -> StudentOutput:
    """Put what is known in place of what was predicted for it.

    Args:
        output: the student's predictions.
        code_BLC: what the student read; kept as the code where known.
        token_BL: the tokens nearest to `code_BLC`, int64; made certain in the logits where known.
        known_BL: bool, which positions are known.
    """
    other_BLV = torch.arange(output.logits_BLV.shape[-1], device=token_BL.device) != token_BL[..., None]
    certain_BLV = torch.zeros_like(output.logits_BLV).masked_fill(other_BLV, -math.inf)
    known_BL1 = known_BL[..., None]
    return StudentOutput(
        logits_BLV=torch.where(known_BL1, certain_BLV, output.logits_BLV),
        code_BLC=torch.where(known_BL1, code_BLC, output.code_BLC),
    )


def final_sequence(output: StudentOutput, codebook_VC: Tensor, order: BlockOrder, split_block: int) -> Tensor:
    """The sequence to decode, code_BLC (Eq. 8): most likely codes before `split_block`, predicted ones from it on.

    Args:
        output: the student's predictions.
        codebook_VC: the codes.
        order: the blocks of the sequence.
        split_block: 0 takes every position from the code head, `order.num_blocks` every one from the logits.

    Raises:
        ValueError: `split_block` is outside 0..num_blocks.
    """
    if not 0 <= split_block <= order.num_blocks:
        raise ValueError(f"split_block must lie in 0..{order.num_blocks}, the number of blocks, got {split_block}")
    split = order.tokens_before(split_block)
    chosen_BLC = codebook_VC[output.logits_BLV[:, :split].argmax(-1)]
    return torch.cat([chosen_BLC, output.code_BLC[:, split:]], dim=1)


def soft_sequence(output: StudentOutput, codebook_VC: Tensor, order: BlockOrder, split_block: int) -> Tensor:
    """`final_sequence` with the expected code in place of the most likely one, so that gradients flow."""
    split = order.tokens_before(split_block)
    expected_BLC = output.logits_BLV[:, :split].softmax(-1) @ codebook_VC
    return torch.cat([expected_BLC, output.code_BLC[:, split:]], dim=1)
