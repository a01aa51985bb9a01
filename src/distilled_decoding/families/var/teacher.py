"""The teacher made of VAR's transformer and its tokenizer: cached decoding, one scale a step.

Axis letters: B batch, L positions or tokens, K tokens of one scale, V codebook entries, C code channels, D width,
h w full token grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition
from distilled_decoding.families.layers import CacheShelf, KVCache
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer
from distilled_decoding.families.var.transformer import Transformer
from distilled_decoding.teacher import Guidance


@dataclass
class DecodingState:
    """A generation between two scales; feeding it changes it.

    Attributes:
        guidance: applied to the logits; if active, the batch of the transformer is 2B, conditional first.
        class_BD: the class embedding.
        modulations: what the class does to each layer.
        cache: keys and values of all positions run.
        sum_BChw: the features that the scales so far sum to, of B images.
        block: the scale that is predicted next.
        logits_BKV: guided, of that scale.
    """

    guidance: Guidance
    class_BD: Tensor
    modulations: list[Tensor]
    cache: KVCache
    sum_BChw: Tensor
    block: int
    logits_BKV: Tensor


class VARTeacher(nn.Module):
    """A VAR transformer and its tokenizer as a `Teacher` of one scale a block.

    Raises:
        ValueError: transformer and tokenizer disagree on codes or scales.
    """

    def __init__(self, tokenizer: MultiScaleTokenizer, transformer: Transformer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.transformer = transformer
        self._take_cache: Callable[..., KVCache] = KVCache
        config = transformer.config
        if tuple(self.codebook.shape) != (config.vocab_size, config.code_dim):
            raise ValueError(
                f"the tokenizer has {tuple(self.codebook.shape)} codes and channels but the transformer expects "
                f"{(config.vocab_size, config.code_dim)}"
            )
        if tokenizer.config.patch_nums != config.patch_nums:
            raise ValueError(
                f"the tokenizer has scales {tokenizer.config.patch_nums} but the transformer {config.patch_nums}"
            )

    @cached_property
    def order(self) -> BlockOrder:
        """One scale a block, coarse to fine, each row by row."""
        return self.transformer.levels

    @property
    def codebook(self) -> Tensor:
        """The tokenizer's codes, [V, C]."""
        return self.tokenizer.codebook_VC.detach()

    @property
    def num_classes(self) -> int:
        """Number of classes; the null class is not counted."""
        return self.transformer.config.num_classes

    @torch.no_grad()
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> DecodingState:
        """See `Teacher.start`: runs the scales of the prefix and the one behind it in one pass."""
        return self._start(condition, guidance, prefix_BL, masked=True)

    @torch.no_grad()
    def start_unmasked(
        self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None
    ) -> DecodingState:
        """As `start`, but coarser scales of the prefix see finer ones, which they never do in generation.

        The published results with the teacher in the middle were made so.
        """
        return self._start(condition, guidance, prefix_BL, masked=False)

    def _start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None, masked: bool) -> DecodingState:
        if prefix_BL is None:
            prefix_BL = torch.empty(len(condition), 0, dtype=torch.int64, device=self.codebook.device)
        block = self.order.blocks_in(prefix_BL.shape[1])
        if block == self.order.num_blocks:
            raise ValueError(f"a prefix of {prefix_BL.shape[1]} tokens leaves none of {self.order.length} to predict")
        config = self.transformer.config
        rows = len(condition) * (2 if guidance.is_active else 1)
        shape = (rows, config.num_heads, self.order.length, config.dim // config.num_heads)
        cache = self._take_cache(config.num_layers, shape, self.transformer.pos_start)
        class_BD, modulations, sum_BChw, logits_BKV = self._begin(prefix_BL, condition, guidance, masked, cache, block)
        cache.length = self.order.tokens_before(block + 1)
        return DecodingState(guidance, class_BD, modulations, cache, sum_BChw, block, logits_BKV)

    def next_logits(self, state: DecodingState) -> Tensor:
        """See `Teacher.next_logits`."""
        return state.logits_BKV

    @torch.no_grad()
    def feed(self, state: DecodingState, token_BK: Tensor) -> DecodingState:
        """See `Teacher.feed`; the state given is itself carried on."""
        state.sum_BChw, state.logits_BKV = self._decode(token_BK, state)
        state.block += 1
        state.cache.length += self.order.sizes[state.block]
        return state

    def compile_steps(self, compiler: Callable[..., Any]) -> None:
        """Compile what a generation calls again and again, in place; see `Teacher`."""
        for name in ("_begin", "_decode", "decode"):
            setattr(self, name, compiler(getattr(self, name)))
        self._take_cache = CacheShelf().take

    def _begin(
        self, prefix_BL: Tensor, condition: Condition, guidance: Guidance, masked: bool, cache: KVCache, block: int
    ) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """What the state in front of `block` holds, behind a prefix: class, modulations, sum of features, logits."""
        sums = self.tokenizer.partial_sums(lookup(prefix_BL, self.codebook))
        input_BLC = self.tokenizer.next_inputs(sums)
        if guidance.is_active:
            condition, input_BLC = condition.with_null(), input_BLC.repeat(2, 1, 1)
        class_BD = self.transformer.embed_class(condition)
        length = self.order.tokens_before(block + 1)
        x_BLD = self.transformer.embed(input_BLC, slice(1, length))
        x_BLD = torch.cat([self.transformer.start(class_BD), x_BLD], dim=1)
        mask_LL = None
        if block > 0 and masked:
            mask_LL = self.order.attends_LL(own_block=True, device=x_BLD.device)[:length, :length]
        modulations = self.transformer.modulations(class_BD)
        logits_BKV = self._predict(x_BLD, class_BD, modulations, mask_LL, cache, block, guidance)
        return class_BD, modulations, sums[-1], logits_BKV

    def _decode(self, token_BK: Tensor, state: DecodingState) -> tuple[Tensor, Tensor]:
        """The sum of features with the scale `token_BK`, and guided logits of the scale behind it."""
        quantizer, block = self.tokenizer.quantize, state.block + 1
        sum_BChw = state.sum_BChw + quantizer.share(lookup(token_BK, self.codebook), state.block)
        input_BKC = quantizer.reduce(sum_BChw, block)
        if state.guidance.is_active:
            input_BKC = input_BKC.repeat(2, 1, 1)
        x_BKD = self.transformer.embed(input_BKC, self.order.span(block))
        logits_BKV = self._predict(x_BKD, state.class_BD, state.modulations, None, state.cache, block, state.guidance)
        return sum_BChw, logits_BKV

    def _predict(
        self,
        x_BLD: Tensor,
        class_BD: Tensor,
        modulations: list[Tensor],
        mask_LL: Tensor | None,
        cache: KVCache,
        block: int,
        guidance: Guidance,
    ) -> Tensor:
        """Guided logits of a scale, whose positions come last in `x_BLD`."""
        hidden_BLD = self.transformer.run_layers(x_BLD, modulations, mask_LL, cache)
        logits_BKV = self.transformer.logits(hidden_BLD[:, -self.order.sizes[block] :], class_BD)
        return guidance.apply(logits_BKV, guidance.at(block, self.order.num_blocks))

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        """See `Teacher.forced_logits`."""
        input_BLC = self._inputs(token_BL)
        if guidance.is_active:
            condition, input_BLC = condition.with_null(), input_BLC.repeat(2, 1, 1)
        scale_L = guidance.at_tokens(self.order, token_BL.device)
        return guidance.apply(self.transformer(input_BLC, condition), scale_L[:, None])

    def forced_features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """See `Teacher`."""
        return self.transformer.features(self._inputs(token_BL), condition)

    def _inputs(self, token_BL: Tensor) -> Tensor:
        """What each scale but the first reads of a whole sequence."""
        return self.tokenizer.next_inputs(self.tokenizer.partial_sums(lookup(token_BL, self.codebook)))

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """See `Teacher.encode`."""
        return self.tokenizer.encode(image_B3HW)

    def decode(self, code_BLC: Tensor) -> Tensor:
        """See `Teacher.decode`."""
        return self.tokenizer.decode(code_BLC)
