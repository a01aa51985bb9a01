"""The teacher made of LlamaGen's transformer and its tokenizer: cached decoding, one token a step.

Axis letters: B batch, L positions or tokens, K tokens of a block, V codebook entries, C code channels, D width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition
from distilled_decoding.families.layers import CacheShelf, CacheSlot, KVCache
from distilled_decoding.families.llamagen.tokenizer import VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, attention_mask, leading_mask, rope_table
from distilled_decoding.teacher import Guidance

# A step reads the cache up to a multiple of this many positions: few shapes to compile, little read in vain.
_SPAN = 128


@dataclass
class DecodingState:
    """A generation between two tokens; feeding it changes it.

    Attributes:
        guidance: applied to the logits; if active, the batch of the cache is 2B, conditional then unconditional.
        scale_L: the guidance scale on every token.
        rope: rotations of all positions.
        attended_BP: see `Backbone.attended`; P counts all positions.
        cache: keys and values of all positions up to the last token.
        position_1: the position behind them, `cache.length` on the device.
        logits_B1V: guided, of the next token.
    """

    guidance: Guidance
    scale_L: Tensor
    rope: Tensor
    attended_BP: Tensor | None
    cache: KVCache
    position_1: Tensor
    logits_B1V: Tensor


class LlamaGenTeacher(nn.Module):
    """A LlamaGen transformer and its tokenizer as a `Teacher` of one token a block.

    Raises:
        ValueError: transformer and tokenizer disagree on the number of codes.
    """

    def __init__(self, tokenizer: VQTokenizer, transformer: Transformer) -> None:
        super().__init__()
        self.tokenizer = tokenizer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.transformer = transformer
        self._take_cache: Callable[..., KVCache] = KVCache
        codes, vocab_size = len(self.codebook), transformer.config.vocab_size
        if codes != vocab_size:
            raise ValueError(f"the tokenizer has {codes} codes but the transformer predicts {vocab_size}")

    @cached_property
    def order(self) -> BlockOrder:
        """One token a block, row by row."""
        return BlockOrder.raster(self.transformer.config.num_tokens)

    @property
    def codebook(self) -> Tensor:
        """The tokenizer's normalised codes, [V, C]."""
        return self.tokenizer.codebook_VC.detach()

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null class; 0 if captions are read."""
        return self.transformer.config.num_classes

    @property
    def caption_shape(self) -> tuple[int, int]:
        """See `Teacher`: (0, 0) if classes are read."""
        return self.transformer.config.caption_tokens, self.transformer.config.caption_dim

    @torch.no_grad()
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> DecodingState:
        """See `Teacher.start`: runs the condition's positions and the prefix in one causal pass."""
        if prefix_BL is None:
            prefix_BL = torch.empty(len(condition), 0, dtype=torch.int64, device=self.codebook.device)
        if prefix_BL.shape[1] >= self.order.length:
            raise ValueError(f"a prefix of {prefix_BL.shape[1]} tokens leaves none of {self.order.length} to predict")
        if guidance.is_active:
            condition, prefix_BL = condition.with_null(), prefix_BL.repeat(2, 1)
        config, like = self.transformer.config, self.transformer.norm.weight
        # The last token is never fed.
        shape = (len(condition), config.num_heads, config.num_positions - 1, config.head_dim)
        cache = self._take_cache(config.num_layers, shape, like)
        attended_BP = self.transformer.attended(condition)
        rope, scale_L = rope_table(config, like.device), guidance.at_tokens(self.order, like.device)
        logits_B1V = self._begin(prefix_BL, condition, guidance, attended_BP, rope, scale_L, cache)
        cache.length = config.condition_tokens + prefix_BL.shape[1]
        position_1 = torch.tensor([cache.length], device=like.device)
        return DecodingState(guidance, scale_L, rope, attended_BP, cache, position_1, logits_B1V)

    def next_logits(self, state: DecodingState) -> Tensor:
        """See `Teacher.next_logits`."""
        return state.logits_B1V

    @torch.no_grad()
    def feed(self, state: DecodingState, token_BK: Tensor) -> DecodingState:
        """See `Teacher.feed`; the state given is itself carried on."""
        capacity = self.transformer.config.num_positions - 1
        assert state.cache.length < capacity
        state.cache.length += 1
        span = min(math.ceil(state.cache.length / _SPAN) * _SPAN, capacity)
        state.logits_B1V = self._decode(token_BK, span, state)
        state.position_1 = state.position_1 + 1
        return state

    def compile_steps(self, compiler: Callable[..., Any]) -> None:
        """Compile what a generation calls again and again, in place; see `Teacher`."""
        self._decode = compiler(self._decode, few_rows=True)  # type: ignore[method-assign]
        for name in ("_begin", "decode"):
            setattr(self, name, compiler(getattr(self, name)))
        self._take_cache = CacheShelf().take

    def _begin(
        self,
        prefix_BL: Tensor,
        condition: Condition,
        guidance: Guidance,
        attended_BP: Tensor | None,
        rope: Tensor,
        scale_L: Tensor,
        cache: KVCache,
    ) -> Tensor:
        """Guided logits of the token behind a prefix."""
        x_BLD = self.transformer.embed(prefix_BL, condition)
        length = x_BLD.shape[1]
        mask = leading_mask(attended_BP, length)
        hidden_BLD = self.transformer.run_layers(x_BLD, rope[:length], mask, cache)
        return guidance.apply(self.transformer.logits(hidden_BLD[:, -1:]), scale_L[prefix_BL.shape[1]])

    def _decode(self, token_B1: Tensor, span: int, state: DecodingState) -> Tensor:
        """Guided logits of the token behind `token_B1`, which reads the first `span` positions that are run."""
        if state.guidance.is_active:
            token_B1 = token_B1.repeat(2, 1)
        x_B1D = self.transformer.tok_embeddings(token_B1)
        mask = attention_mask(state.attended_BP, state.position_1, span)
        slot = CacheSlot(state.cache, state.position_1, span)
        hidden_B1D = self.transformer.run_layers(x_B1D, state.rope[state.position_1], mask, slot)
        scale_1 = state.scale_L[state.position_1 - self.transformer.config.condition_tokens + 1]
        return state.guidance.apply(self.transformer.logits(hidden_B1D), scale_1)

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        """See `Teacher.forced_logits`."""
        if guidance.is_active:
            condition, token_BL = condition.with_null(), token_BL.repeat(2, 1)
        scale_L = guidance.at_tokens(self.order, token_BL.device)
        return guidance.apply(self.transformer(token_BL, condition), scale_L[:, None])

    def forced_features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """See `Teacher`."""
        return self.transformer.features(token_BL, condition)

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """See `Teacher.encode`."""
        return self.tokenizer.encode(image_B3HW)

    def decode(self, code_BLC: Tensor) -> Tensor:
        """See `Teacher.decode`."""
        return self.tokenizer.decode(code_BLC)
