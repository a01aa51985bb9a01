"""What the method asks of a student, and what becomes of its predictions.

A student reads known codes and noise in one pass. One with a code head reads the noise of a position too, and predicts
the position twice: as logits over the codebook and as a code vector. Blocks before `split_block` are taken from the
logits, later ones from the vectors. One with a flow head reads only what stands before the position's block, predicts
how the token is distributed, and leaves it to the flow map to take the position's own noise there.

Axis letters: B batch, L tokens in a sequence, V codebook entries, C code channels.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition
from distilled_decoding.flow import FlowSettings, full_flow_map
from distilled_decoding.teacher import draw

Head = Literal["code", "flow"]
"""How a student comes from a position's noise to its code: by learning it, or by the flow map of its logits."""

STUDENT_STREAM = 10
"""The stream of an image's key that its student's draws come from."""


@dataclass(frozen=True, eq=False)
class StudentOutput:
    """A student's predictions of the positions that it read.

    Attributes:
        logits_BLV: over the tokens of each position, or of as many leading ones as were asked for, float32.
        code_BLC: the code at each position, float32; None of a student with a flow head.
    """

    logits_BLV: Tensor
    code_BLC: Tensor | None


class Student(Protocol):
    """A model that finishes a sequence, noise in its later blocks, in one pass."""

    @property
    def order(self) -> BlockOrder:
        """The blocks of a sequence, the teacher's."""
        ...

    def __call__(
        self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor, num_logits: int | None = None
    ) -> StudentOutput:
        """Predict every position of a sequence from it and from the blocks before its own (Eq. 6).

        With a flow head, from those blocks alone (Eq. 20).

        Args:
            code_BLC: codes in the leading known blocks, noise in the others; all blocks of a sequence, or only the
                leading ones, which do not depend on the others.
            condition: one entry per sequence.
            known_blocks_B: number of leading blocks that are known, int [B].
            num_logits: how many leading positions need logits; None is all. A student may give more.
        """
        ...


def draw_tokens(logits_BLV: Tensor, temperature: float, uniform_BL: Tensor) -> Tensor:
    """Tokens [B, L] drawn from a student's logits.

    Args:
        logits_BLV: of a sequence or of its leading tokens.
        temperature: divides them, positive.
        uniform_BL: numbers in (0, 1) for as many tokens or more.
    """
    return draw((logits_BLV / temperature).log_softmax(-1), uniform_BL[:, : logits_BLV.shape[1]])


def final_sequence(
    output: StudentOutput,
    codebook_VC: Tensor,
    split: int,
    temperature: float = 0.0,
    uniform_BL: Tensor | None = None,
) -> Tensor:
    """The sequence to decode, code_BLC (Eq. 8): the first `split` tokens from the logits, predicted codes behind.

    Logits that are not a number give a code that is none, so that nobody takes it for an image.

    Args:
        output: the student's predictions.
        codebook_VC: the codes.
        split: tokens that come from the logits.
        temperature: of the draw from the logits; 0 takes the most likely.
        uniform_BL: numbers in (0, 1), one a token, for the draw; None without one.
    """
    logits_BLV = output.logits_BLV[:, :split]
    best_BL, token_BL = logits_BLV.max(-1)
    if temperature > 0:
        assert uniform_BL is not None
        token_BL = draw_tokens(logits_BLV, temperature, uniform_BL)
    chosen_BLC = codebook_VC[token_BL].masked_fill(best_BL.isnan()[..., None], math.nan)
    assert output.code_BLC is not None
    if split == output.code_BLC.shape[1]:
        return chosen_BLC  # a compiled student then spares its code head
    return torch.cat([chosen_BLC, output.code_BLC[:, split:]], dim=1)


def flow_tokens(logits_BLV: Tensor, noise_BLC: Tensor, codebook_VC: Tensor, flow: FlowSettings) -> Tensor:
    """The tokens [B, L] to which the flow map of a student's logits takes the noise of their positions (Eq. 20).

    Where logits are not numbers all tokens are as likely.
    """
    known_BL1 = logits_BLV.isfinite().all(-1, keepdim=True)
    return full_flow_map(noise_BLC, logits_BLV.masked_fill(~known_BL1, 0).log_softmax(-1), codebook_VC, flow)


def flow_sequence(logits_BLV: Tensor, noise_BLC: Tensor, codebook_VC: Tensor, flow: FlowSettings) -> Tensor:
    """The codes of `flow_tokens`; as in `final_sequence`, logits that are not numbers give a code that is none."""
    code_BLC = lookup(flow_tokens(logits_BLV, noise_BLC, codebook_VC, flow), codebook_VC)
    return code_BLC.masked_fill(~logits_BLV.isfinite().all(-1, keepdim=True), math.nan)


def soft_sequence(output: StudentOutput, codebook_VC: Tensor, split: int) -> Tensor:
    """`final_sequence` with the expected code in place of the most likely one, so that gradients flow."""
    expected_BLC = output.logits_BLV[:, :split].softmax(-1) @ codebook_VC
    assert output.code_BLC is not None
    return torch.cat([expected_BLC, output.code_BLC[:, split:]], dim=1)
