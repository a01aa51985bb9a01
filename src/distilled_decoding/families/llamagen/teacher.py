"""The teacher made of LlamaGen's transformer and its tokenizer: cached decoding, one token a step.

Axis letters: B batch, L positions or tokens, K tokens of a block, V codebook entries, C code channels, D width.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition
from distilled_decoding.families.layers import KVCache
from distilled_decoding.families.llamagen.tokenizer import VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, attention_mask, rope_table
from distilled_decoding.teacher import Guidance


@dataclass
class DecodingState:
    """A generation between two tokens; feeding it changes it.

    Attributes:
        guidance: applied to the logits; if active, the batch below is 2B, conditional then unconditional.
        rope: rotations of all positions.
        attended_BP: see `Transformer.attended`; P counts all positions.
        cache: keys and values of all positions up to the last token.
        logits: [B, 1, V] of the next token, before guidance.
    """

    guidance: Guidance
    rope: Tensor
    attended_BP: Tensor | None
    cache: KVCache
    logits: Tensor = field(init=False)


class LlamaGenTeacher(nn.Module):
    """A LlamaGen transformer and its tokenizer as a `Teacher` of one token a block.

    Raises:
        ValueError: transformer and tokenizer disagree on the number of codes.
    """

    def __init__(self, tokenizer: VQTokenizer, transformer: Transformer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.transformer = transformer
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

    @torch.no_grad()
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> DecodingState:
        """See `Teacher.start`: runs the condition's positions and the prefix in one causal pass."""
        if prefix_BL is None:
            prefix_BL = torch.empty(len(condition), 0, dtype=torch.int64, device=self.codebook.device)
        if prefix_BL.shape[1] >= self.order.length:
            raise ValueError(f"a prefix of {prefix_BL.shape[1]} tokens leaves none of {self.order.length} to predict")
        if guidance.is_active:
            condition, prefix_BL = condition.with_null(), prefix_BL.repeat(2, 1)
        x_BLD = self.transformer.embed(prefix_BL, condition)
        config = self.transformer.config
        rope, attended_BP = rope_table(config, x_BLD.device), self.transformer.attended(condition)
        cache = KVCache(config.num_layers, config.num_heads, len(rope), x_BLD)
        return self._advance(DecodingState(guidance, rope, attended_BP, cache), x_BLD)

    def next_logits(self, state: DecodingState) -> Tensor:
        """See `Teacher.next_logits`."""
        block = state.cache.length - self.transformer.config.condition_tokens
        total_blocks = self.order.num_blocks
        assert block < total_blocks
        return state.guidance.apply(state.logits, state.guidance.at(block, total_blocks))

    @torch.no_grad()
    def feed(self, state: DecodingState, token_BK: Tensor) -> DecodingState:
        """See `Teacher.feed`; the state given is itself carried on."""
        if state.guidance.is_active:
            token_BK = token_BK.repeat(2, 1)
        return self._advance(state, self.transformer.tok_embeddings(token_BK))

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        """See `Teacher.forced_logits`."""
        if guidance.is_active:
            condition, token_BL = condition.with_null(), token_BL.repeat(2, 1)
        scale_L = guidance.at_tokens(self.order, token_BL.device)
        return guidance.apply(self.transformer(token_BL, condition), scale_L[:, None])

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """See `Teacher.encode`."""
        return self.tokenizer.encode(image_B3HW)

    def decode(self, code_BLC: Tensor) -> Tensor:
        """See `Teacher.decode`."""
        return self.tokenizer.decode(code_BLC)

    def _advance(self, state: DecodingState, x_BLD: Tensor) -> DecodingState:
        first, end = state.cache.length, state.cache.length + x_BLD.shape[1]
        mask = attention_mask(state.attended_BP, first, end)
        hidden_BLD = self.transformer.run_layers(x_BLD, state.rope[first:end], mask, state.cache)
        state.logits = self.transformer.logits(hidden_BLD[:, -1:])
        return state
