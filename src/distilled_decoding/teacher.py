"""What the method asks of a teacher, what its distribution p is, and the loop that samples from it.

Axis letters: B batch, L tokens in a sequence, K tokens in a block, S blocks, V codebook entries, C code
channels, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition
from distilled_decoding.flow import FlowSettings, flow_map

Ramp = Literal["constant", "linear"]

Prefix = Literal["causal", "unmasked"]
"""How a teacher reads tokens that it did not sample: as in its own generation, or each block seeing all others."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: how far the logits move from unconditional to conditional and beyond.

    Attributes:
        scale: 1 is the plain conditional model, 0 the unconditional one; more than 1 exaggerates.
        ramp: "constant" uses `scale` on every block; "linear" grows from 1 on the first block to `scale` on
            the last. VAR's own `cfg=c` is `Guidance(scale=1 + c, ramp="linear")`.
        num_blocks: guide only this many leading blocks; None guides all. LlamaGen's own `cfg_interval=c` with
            c >= 0 is `num_blocks=c + 2`.

    Raises:
        ValueError: a scale that is negative or not finite, an unknown ramp, or a negative number of blocks.
    """

    scale: float = 1.0
    ramp: Ramp = "constant"
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(f"guidance scale must be finite and at least 0, got {self.scale}; 1 is no guidance")
        if self.ramp not in get_args(Ramp):
            raise ValueError(f"unknown guidance ramp {self.ramp!r}; choose one of {', '.join(get_args(Ramp))}")
        if self.num_blocks is not None and self.num_blocks < 0:
            raise ValueError(f"guided blocks must be 0 or more, got {self.num_blocks}; None guides every block")

    @property
    def is_active(self) -> bool:
        """Whether any block needs the unconditional logits at all."""
        return self.scale != 1 and self.num_blocks != 0

    def at(self, block: int, total_blocks: int) -> float:
        """The scale on one block out of `total_blocks`."""
        if self.num_blocks is not None and block >= self.num_blocks:
            return 1.0
        if self.ramp == "constant":
            return self.scale
        return 1 + (self.scale - 1) * block / max(total_blocks - 1, 1)

    def at_tokens(self, order: BlockOrder, device: torch.device | None = None) -> Tensor:
        """The scale on every token of a sequence, float32 [L]."""
        scale_S = torch.tensor([self.at(block, order.num_blocks) for block in range(order.num_blocks)])
        return scale_S.to(device)[order.block_L(device)]

    def apply(self, logits: Tensor, scale: float | Tensor) -> Tensor:
        """The guided logits out of one pass of a teacher.

        Args:
            logits: [2B, ...] of a condition `with_null()`; while guidance is inactive, [B, ...] of the
                condition alone, which come back as they are.
            scale: from `at` or `at_tokens`; broadcasts against the logits.
        """
        if not self.is_active:
            return logits
        cond, uncond = logits.chunk(2)
        return combine_guidance(cond, uncond, scale)


def combine_guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Guided logits, uncond + scale * (cond - uncond), arranged so that scale 1 gives `cond` to the last bit.

    Args:
        cond: logits under the condition, any shape.
        uncond: logits under the null condition, same shape.
        scale: one number, or a tensor that broadcasts against the logits.
    """
    return cond + (scale - 1) * (cond - uncond)


class Teacher(Protocol):
    """A pretrained autoregressive image model with its tokenizer, sampled one block at a time.

    A generation is `state = start(...)`, then for each block `next_logits(state)` and
    `state = feed(state, token)`; after the last block nothing is fed. A state is the teacher's own, and
    is spent once it has been fed: the one that `feed` returns takes its place. A deep copy of it goes on by itself.

    A teacher that reads captions also has `caption_shape`, the positions T and channels F of their features.

    A teacher may also offer `forced_features(token_BL, condition)`, which score distillation trains in a copy: what the
    plain logits of `forced_logits` are read from, float [B, L, D], each from the blocks before its own. Gradients flow
    to the weights.

    A teacher may also offer `compile_steps(compiler)`, which compiles in place what a generation calls again and
    again. What differs from step to step must then be in tensors, or each value gets a graph of its own, and the
    teacher carries one generation at a time.
    """

    @property
    def order(self) -> BlockOrder:
        """The blocks in the order in which they are sampled."""
        ...

    @property
    def codebook(self) -> Tensor:
        """The code of every token, [V, C], as `decode` expects it."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes a condition may name; 0 if it reads captions."""
        ...

    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> Any:
        """The state in front of the first block, or in front of the block that follows a prefix.

        Args:
            condition: what to generate, one entry per image.
            guidance: applied by `next_logits`; while it is inactive the unconditional pass is not computed.
            prefix_BL: int64 tokens of whole leading blocks, the same number of blocks for every image.

        Raises:
            ValueError: the prefix does not end where a block ends, or leaves no block to predict.
        """
        ...

    def next_logits(self, state: Any) -> Tensor:
        """Guided logits of the next block, float32 [B, K, V]."""
        ...

    def feed(self, state: Any, token_BK: Tensor) -> Any:
        """The state after the next block turned out to be `token_BK`."""
        ...

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        """Guided logits of every token given the blocks before its own, in one pass, float32 [B, L, V].

        Gradients flow to the weights: token matching and token scores train a copy through this.

        Args:
            token_BL: int64 tokens of whole sequences.
            condition: one entry per sequence.
            guidance: as in `start`.
        """
        ...

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """The tokens of images in [-1, 1], int64 [B, L] in the order of `order`."""
        ...

    def decode(self, code_BLC: Tensor) -> Tensor:
        """Images [B, 3, H, W] around [-1, 1], not clamped, of codes that need not be in the codebook."""
        ...


@dataclass(frozen=True)
class TeacherSampling:
    """How the teacher turns logits into its distribution p; all of it is part of p, so it is distilled in.

    Attributes:
        guidance_scale: classifier-free guidance, see `Guidance`.
        guidance_ramp: see `Guidance`.
        guidance_blocks: see `Guidance.num_blocks`.
        temperature: divides the logits; 0 leaves the best code alone.
        top_k: keep this many best codes (and those tied with the last of them); 0 keeps all.
        top_p: keep the best codes whose probabilities sum to this; 1 keeps all.

    Raises:
        ValueError: a setting outside its range.
    """

    guidance_scale: float = 1.0
    guidance_ramp: Ramp = "constant"
    guidance_blocks: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        _ = self.guidance
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top-k must be 0 (off) or more, got {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top-p must lie in 0..1, got {self.top_p}; 1 keeps every code")

    @property
    def guidance(self) -> Guidance:
        """The guidance as the teacher takes it."""
        return Guidance(self.guidance_scale, self.guidance_ramp, self.guidance_blocks)


def log_probabilities(logits_BLV: Tensor, sampling: TeacherSampling) -> Tensor:
    """The teacher's log p after temperature, top-k, top-p, normalised; -inf where a code is dropped.

    Args:
        logits_BLV: guided logits, any leading shape.
        sampling: temperature, top-k and top-p; guidance is in the logits already.

    Returns:
        Log probabilities, float32, the shape of the logits.
    """
    logits_BLV = logits_BLV.float() / max(sampling.temperature, 1e-5)
    vocab_size = logits_BLV.shape[-1]
    top_k = min(sampling.top_k or vocab_size, vocab_size)
    if top_k == vocab_size and sampling.top_p == 1:
        return logits_BLV.log_softmax(-1)
    best_BLk = logits_BLV.topk(top_k).values
    kept_BLV = logits_BLV >= best_BLk[..., -1:]
    if sampling.top_p < 1:
        kept_BLV = _nucleus(logits_BLV, best_BLk, kept_BLV.sum(-1, keepdim=True), sampling.top_p)
    return logits_BLV.masked_fill(~kept_BLV, -math.inf).log_softmax(-1)


def _nucleus(logits_BLV: Tensor, best_BLk: Tensor, num_BL1: Tensor, top_p: float) -> Tensor:
    """Whether a code is among the best, lower tokens first, while those before it do not exceed top-p of `num` codes.

    Only the best codes are sorted, which is ten times faster than sorting all; codes tied with the last of them come
    behind it.
    """
    weight_BLk = (best_BLk - best_BLk[..., :1]).exp()
    last_BL1 = weight_BLk[..., -1:]
    tied_BL1 = num_BL1 - best_BLk.shape[-1]
    total_BL1 = weight_BLk.sum(-1, keepdim=True) + tied_BL1 * last_BL1
    before_BLk = weight_BLk.cumsum(-1) - weight_BLk
    kept_BL1 = (before_BLk <= top_p * total_BL1).sum(-1, keepdim=True)
    room_BL1 = (top_p * total_BL1 - before_BLk[..., -1:]) / last_BL1
    kept_BL1 += room_BL1.floor().clamp(min=0).minimum(tied_BL1).long()
    cut_BL1 = best_BLk.gather(-1, kept_BL1.clamp(1, best_BLk.shape[-1]) - 1)
    above_BLV, level_BLV = logits_BLV > cut_BL1, logits_BLV == cut_BL1
    return above_BLV | level_BLV & (level_BLV.cumsum(-1) <= kept_BL1 - above_BLV.sum(-1, keepdim=True))


def draw(log_p_BKV: Tensor, uniform_BK: Tensor) -> Tensor:
    """Tokens [B, K] drawn from p by inverting its cumulative sum at uniform numbers in (0, 1)."""
    cumulative_BKV = log_p_BKV.double().exp().cumsum(-1)
    target_BK1 = uniform_BK.unsqueeze(-1) * cumulative_BKV[..., -1:]
    # Where p is not a number, the search ends behind the last code.
    return torch.searchsorted(cumulative_BKV, target_BK1).squeeze(-1).clamp(max=log_p_BKV.shape[-1] - 1)


Choose = Callable[[int, Tensor], Tensor]
"""Picks the tokens [B, K] of a block (its index first) from the teacher's guided logits [B, K, V]."""


@torch.no_grad()
def rollout(
    teacher: Teacher,
    condition: Condition,
    guidance: Guidance,
    choose: Choose,
    prefix_BL: Tensor | None = None,
    end_block: int | None = None,
    prefix: Prefix = "causal",
) -> Tensor:
    """Let the teacher sample block after block.

    Args:
        teacher: the model.
        condition: one entry per image.
        guidance: the teacher's.
        choose: how a token is picked: at random, or by the flow map.
        prefix_BL: tokens of leading blocks that are already known.
        end_block: stop before this block; None goes to the end.
        prefix: how those tokens are read; "unmasked" only where the teacher has `start_unmasked`.

    Returns:
        token_BL, int64, the prefix included.

    Raises:
        ValueError: the teacher's logits are not finite.
    """
    order = teacher.order
    first = 0 if prefix_BL is None else order.blocks_in(prefix_BL.shape[1])
    last = order.num_blocks if end_block is None else end_block
    start = teacher.start if prefix == "causal" else teacher.start_unmasked  # type: ignore[attr-defined]
    tokens = go_on(teacher, start(condition, guidance, prefix_BL), range(first, last), choose)
    return torch.cat(tokens if prefix_BL is None else [prefix_BL, *tokens], 1)


@torch.no_grad()
def go_on(teacher: Teacher, state: Any, blocks: range, choose: Choose) -> list[Tensor]:
    """The tokens of each of the blocks behind a state, which is spent.

    Raises:
        ValueError: the teacher's logits are not finite.
    """
    tokens, finite = [], []
    for block in blocks:
        logits_BKV = teacher.next_logits(state)
        finite.append(logits_BKV.amax(-1).isfinite().all())
        tokens.append(choose(block, logits_BKV))
        if block + 1 < blocks.stop:
            state = teacher.feed(state, tokens[-1])
    # Asked once, behind the last block, so that draws do not make the host wait for the device.
    if not torch.stack(finite).all():
        raise ValueError("the teacher's logits are not finite: its weights are damaged, or the dtype is too narrow")
    return tokens


def by_chance(order: BlockOrder, uniform_BL: Tensor, sampling: TeacherSampling) -> Choose:
    """Ordinary ancestral sampling, every image from its own uniform numbers."""
    return lambda block, logits_BKV: draw(log_probabilities(logits_BKV, sampling), uniform_BL[:, order.span(block)])


def by_flow(
    order: BlockOrder, noise_BLC: Tensor, codebook_VC: Tensor, sampling: TeacherSampling, flow: FlowSettings
) -> Choose:
    """The flow map: the noise of a block determines its tokens (Eq. 4)."""

    def choose(block: int, logits_BKV: Tensor) -> Tensor:
        log_p_BKV = log_probabilities(logits_BKV, sampling)
        return flow_map(noise_BLC[:, order.span(block)], log_p_BKV, codebook_VC, flow)

    return choose
