"""The baselines that any few-step method has to beat: tokens drawn at once, each for itself.

A predictor whose blocks are independent given what it has seen can do no better than the true distribution of every
block given that; these baselines are such predictors (section 6 of docs/method.md). What they lack is exactly what
distillation keeps.

Axis letters: B batch, L tokens in a sequence, K classes or prompts, N samples of the teacher.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition, Labels
from distilled_decoding.noise import uniform
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.teacher import Choose, by_chance, go_on, rollout

# Of a key's independent sequences, the teacher's own draws take number 1.
_POOL_STREAM = 2
_TAIL_STREAM = 3


@dataclass(frozen=True, eq=False)
class OneStep:
    """Every token drawn from its frequency among the teacher's samples of the class or prompt (the paper's `onestep`).

    A draw takes the token that a random sample has in that place, another sample for every place.

    Attributes:
        pipeline: whose codebook the tokens are of.
        token_NL: samples of the teacher.
        asked: which class or prompt each is of, as `Labels` of as many numbers as there are.

    Raises:
        ValueError: a class or prompt has no sample.
    """

    pipeline: Pipeline
    token_NL: Tensor
    asked: Labels

    def __post_init__(self) -> None:
        count_K = torch.bincount(self.asked.label_B, minlength=self.asked.num_classes)
        missing = count_K.eq(0).nonzero().flatten().tolist()
        if missing:
            raise ValueError(f"no sample of the teacher has number {missing[0]}; take a larger number of samples")

    def __call__(self, condition: Condition, key_B: Tensor) -> Tensor:
        """The codes [B, L, C] of one batch of images, asked for by number: `condition` is `Labels`, too."""
        label_B, label_N = Labels.require(condition).label_B, self.asked.label_B
        count_K, by_class_N = torch.bincount(label_N), label_N.argsort(stable=True)
        first_K = count_K.cumsum(0) - count_K
        uniform_BL = uniform(key_B, self.token_NL.shape[1], _POOL_STREAM)
        place_BL = first_K[label_B, None] + (uniform_BL * count_K[label_B, None]).long()
        token_BL = self.token_NL.gather(0, by_class_N[place_BL])
        return lookup(token_BL.to(self.pipeline.device), self.pipeline.teacher.codebook)


@dataclass(frozen=True, eq=False)
class Skip:
    """The teacher saves its last passes: one pass has to predict all blocks that are left (the paper's `skip-n`).

    Given the blocks before, each of those blocks is drawn from the teacher's distribution, independently of the
    others: it is the last block of a rollout of its own.

    Attributes:
        pipeline: the teacher and how it samples.
        num_skipped: passes saved; the last one predicts one block more than that.

    Raises:
        ValueError: nothing is skipped, no block is left to begin with, or the pipeline is compiled, whose teacher
            makes one generation at a time.
    """

    pipeline: Pipeline
    num_skipped: int

    def __post_init__(self) -> None:
        num_blocks = self.pipeline.teacher.order.num_blocks
        if self.pipeline.is_compiled:
            raise ValueError(f"skip:{self.num_skipped} needs a pipeline that is not compiled; leave --compile out")
        if not 1 <= self.num_skipped < num_blocks:
            raise ValueError(f"skip:{self.num_skipped} must lie in 1..{num_blocks - 1}, this teacher's blocks less one")

    def __call__(self, condition: Condition, key_B: Tensor) -> Tensor:
        """The codes [B, L, C] of one batch of images."""
        teacher, sampling = self.pipeline.teacher, self.pipeline.config.sampling
        order, device = teacher.order, self.pipeline.device
        condition, key_B = condition.to(device), key_B.to(device)

        def ancestral(stream: int) -> Choose:
            return by_chance(order, uniform(key_B, order.length, stream), sampling)

        first, prefix_BL = order.num_blocks - self.num_skipped - 1, None
        if first:
            prefix_BL = rollout(teacher, condition, sampling.guidance, ancestral(1), end_block=first)
        state = teacher.start(condition, sampling.guidance, prefix_BL)
        tokens = [] if prefix_BL is None else [prefix_BL]
        for block in range(first, order.num_blocks):
            tokens.append(go_on(teacher, deepcopy(state), range(first, block + 1), ancestral(_TAIL_STREAM + block))[-1])
        return lookup(torch.cat(tokens, 1), teacher.codebook)
