"""Blocks: the order in which an autoregressive teacher samples a sequence, one block a step.

VAR has blocks of 1, 4, 9 ... tokens (scales), LlamaGen blocks of one token. Which tokens are known, who may
attend to whom and where a student may start are all questions about blocks, and are answered here once.

Axis letters: B batch, L tokens in a sequence, S blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockOrder:
    """A sequence cut into blocks, in the order the teacher samples them.

    Attributes:
        sizes: tokens in each block, S positive integers.

    Raises:
        ValueError: when there is no block, or a block without tokens.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes=() has no block; give at least one block size")
        if min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} has a block without tokens; every size must be at least 1")

    @classmethod
    def raster(cls, length: int) -> "BlockOrder":
        """Return `length` blocks of one token each."""
        return cls((1,) * length)

    @property
    def length(self) -> int:
        """Number of tokens in the sequence, L."""
        return sum(self.sizes)

    @property
    def num_blocks(self) -> int:
        """Number of blocks, S."""
        return len(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """First token of each block, S integers."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    def tokens_before(self, block: int) -> int:
        """Return how many tokens lie before a block; `num_blocks` gives the length."""
        return sum(self.sizes[:block])

    def blocks_in(self, num_tokens: int) -> int:
        """Return how many blocks the first tokens make.

        Raises:
            ValueError: when they end inside a block, or there are more than the sequence has.
        """
        ends = [*self.starts, self.length]
        if num_tokens not in ends:
            raise ValueError(f"{num_tokens} tokens are not whole blocks; blocks end after {ends[1:]} tokens")
        return ends.index(num_tokens)

    def span(self, block: int) -> slice:
        """Return the tokens of one block, as a slice of the sequence.

        Raises:
            ValueError: when there is no such block.
        """
        if not 0 <= block < self.num_blocks:
            raise ValueError(f"block {block} does not exist; blocks are numbered 0 to {self.num_blocks - 1}")
        return slice(self.starts[block], self.starts[block] + self.sizes[block])

    def block_L(self, device: torch.device | str | None = None) -> Tensor:
        """Return the block of each token, int64 [L]."""
        sizes_S = torch.tensor(self.sizes, device=device)
        return torch.arange(self.num_blocks, device=device).repeat_interleave(sizes_S, output_size=self.length)

    def known_BL(self, known_blocks_B: Tensor) -> Tensor:
        """Return which tokens are known when the first blocks are.

        Args:
            known_blocks_B: number of leading blocks that hold codes, int [B].

        Returns:
            bool [B, L] on the same device: the token belongs to a block before `known_blocks`.
        """
        return self.block_L(known_blocks_B.device) < known_blocks_B[:, None]

    def attends_LL(self, own_block: bool, device: torch.device | str | None = None) -> Tensor:
        """Return which token may attend to which.

        Args:
            own_block: whether a token sees its whole block (the teacher) or in it only itself (the student).
            device: where to build the mask.

        Returns:
            bool [L, L]: query i (row) may attend to key j (column). Earlier blocks are always seen.
        """
        block_L = self.block_L(device)
        earlier_LL = block_L[None, :] < block_L[:, None]
        if own_block:
            return earlier_LL | (block_L[None, :] == block_L[:, None])
        return earlier_LL | torch.eye(self.length, dtype=torch.bool, device=device)

    def check_schedule(self, blocks: Sequence[int], start_blocks: Sequence[int]) -> tuple[int, ...]:
        """Check the blocks from which a student is asked to start, one for each of its steps.

        Args:
            blocks: the schedule, such as (0, 80).
            start_blocks: the blocks the student was trained to start from.

        Returns:
            The schedule as a tuple.

        Raises:
            ValueError: when it does not begin at 0, does not ascend, leaves the sequence or was not trained.
        """
        schedule = tuple(blocks)
        if schedule[:1] != (0,):
            raise ValueError(f"schedule {schedule} must begin with block 0, where everything is noise")
        if any(later <= earlier for earlier, later in pairwise(schedule)):
            raise ValueError(f"schedule {schedule} must strictly ascend")
        if schedule[-1] >= self.num_blocks:
            raise ValueError(f"block {schedule[-1]} of the schedule is past the last, {self.num_blocks - 1}")
        if untrained := set(schedule) - set(start_blocks):
            raise ValueError(f"the student cannot start at blocks {sorted(untrained)}; use {tuple(start_blocks)}")
        return schedule
