"""LlamaGen's class-conditional transformer and the teacher made of it and its tokenizer.

One class position comes first, then the grid's tokens row by row. Attention is causal, and the output at a
position predicts the token that follows it. Parameter names are those of the published files.

Axis letters: B batch, L positions or tokens, V codebook entries, C code channels, D width, H heads, E head
channels.
"""

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition, Labels
from distilled_decoding.families.layers import KVCache
from distilled_decoding.families.llamagen.tokenizer import VQTokenizer
from distilled_decoding.teacher import Guidance


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the transformer.

    Attributes:
        dim: width D.
        num_layers: number of blocks of attention and feed-forward.
        num_heads: attention heads H; each takes dim / num_heads channels, a multiple of 4.
        vocab_size: codebook entries V.
        num_tokens: tokens of an image, a square number.
        num_classes: classes; the embedding has one row more, for the null class.
        norm_eps: added to the mean square in the norms.
        rope_base: base of the position frequencies.

    Raises:
        ValueError: the tokens form no square grid, or the width does not divide into heads.
    """

    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    num_tokens: int
    num_classes: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        if self.grid**2 != self.num_tokens:
            raise ValueError(f"num_tokens must be a square number (the image's token grid), got {self.num_tokens}")
        if self.dim % (4 * self.num_heads):
            raise ValueError(f"dim must be a multiple of 4 * num_heads = {4 * self.num_heads}, got {self.dim}")

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return math.isqrt(self.num_tokens)

    @property
    def head_dim(self) -> int:
        """Channels of one head, E."""
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width inside the feed-forward: two thirds of 4 * dim, up to the next multiple of 256."""
        return math.ceil(int(8 * self.dim / 3) / 256) * 256


def rope_table(config: TransformerConfig, device: torch.device | None = None) -> Tensor:
    """Rotations of query and key channel pairs, complex64 [1 + L, E / 2].

    The first half of the pairs turns with the token's row, the second with its column. The class position has
    zeros, not the identity, as in the published models: its key vanishes, so that every token scores it 0.
    """
    exponent = torch.arange(0, config.head_dim // 2, 2, device=device) / (config.head_dim // 2)
    angle = torch.outer(torch.arange(config.grid, device=device), config.rope_base**-exponent)
    row = angle[:, None].expand(-1, config.grid, -1)
    column = angle[None].expand(config.grid, -1, -1)
    angle_LE = torch.cat([row, column], dim=-1).flatten(0, 1)
    return F.pad(torch.polar(torch.ones_like(angle_LE), angle_LE), (0, 0, 1, 0))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """`x` [B, L, ..., H, E] with channel pairs (2i, 2i+1) turned by `rope` [L, E / 2], in float32."""
    rope = rope.view(len(rope), *[1] * (x.ndim - 3), -1)
    pair = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler fuses real arithmetic but not complex; uncompiled, the complex product is several times faster.
        even, odd = pair.unbind(-1)
        turned = torch.stack([even * rope.real - odd * rope.imag, even * rope.imag + odd * rope.real], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pair) * rope)
    return turned.flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, rope: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        """Several positions at once only at the start of a sequence; one at a time behind a cache."""
        qkv = self.wqkv(x_BLD).unflatten(-1, (3, self.num_heads, -1))
        query, key = rotate(qkv[:, :, :2], rope).transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        positions = query.shape[2]
        assert positions in (1, key.shape[2])
        out_BHLE = F.scaled_dot_product_attention(query, key, value, is_causal=positions > 1)
        return self.dropout(self.wo(out_BHLE.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Position by position."""
        return self.dropout(self.w2(F.silu(self.w1(x_BLD)) * self.w3(x_BLD)))


class Layer(nn.Module):
    """Attention, then feed-forward, each on the normalised input and added to it."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(config, dropout)
        self.feed_forward = FeedForward(config, dropout)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x_BLD: Tensor, rope: Tensor, layer: int, cache: KVCache | None) -> Tensor:
        """`layer` is this layer's place in the cache."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope, layer, cache)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))


class LabelEmbedding(nn.Module):
    """One row per class and, last, one for the null class."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, condition: Condition) -> Tensor:
        """The class position, [B, 1, D]."""
        return self.embedding_table(Labels.require(condition).label_B)[:, None]


class Backbone(nn.Module):
    """What teacher and student share: class embedding, layers and logits head, but not how tokens come in."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = LabelEmbedding(config)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def run_layers(self, x_BLD: Tensor, rope: Tensor, cache: KVCache | None = None) -> Tensor:
        """Hidden states of consecutive positions, whose rotations are `rope`; `cache` grows by them."""
        x_BLD = self.dropout(x_BLD)
        for index, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, rope, index, cache)
        if cache is not None:
            cache.length += x_BLD.shape[1]
        return x_BLD

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """The logits head on hidden states, float32 [B, L, V]."""
        return self.output(self.norm(hidden_BLD)).float()

    def reset_parameters(self) -> None:
        """Draw a fresh start from torch's global generator: deviation 0.02, and all logits zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.output.weight)


class Transformer(Backbone):
    """The class-conditional LlamaGen transformer.

    Args:
        config: sizes.
        dropout: in training, on the input embeddings and on what each attention and feed-forward adds.
    """

    def __init__(self, config: TransformerConfig, dropout: float = 0.0) -> None:
        super().__init__(config, dropout)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.reset_parameters()

    def embed(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """The class position and the tokens behind it, [B, 1 + L, D]."""
        return torch.cat([self.cls_embedding(condition), self.tok_embeddings(token_BL)], dim=1)

    def forward(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """Logits of each token given the condition and the tokens before it, float32 [B, L, V].

        Args:
            token_BL: int64 tokens. The last of a whole sequence is not read and may be left out; after fewer
                tokens, n of them, come n + 1 predictions.
            condition: one entry per sequence.
        """
        x_BLD = self.embed(token_BL[:, : self.config.num_tokens - 1], condition)
        rope = rope_table(self.config, x_BLD.device)[: x_BLD.shape[1]]
        return self.logits(self.run_layers(x_BLD, rope))


@dataclass
class DecodingState:
    """A generation between two tokens; feeding it changes it.

    Attributes:
        guidance: applied to the logits; if active, the batch below is 2B, conditional then unconditional.
        rope: rotations of all positions.
        cache: keys and values of all positions up to the last token.
        logits: [B, 1, V] of the next token, before guidance.
    """

    guidance: Guidance
    rope: Tensor
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
        """Number of classes; the null class is not counted."""
        return self.transformer.config.num_classes

    @torch.no_grad()
    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> DecodingState:
        """See `Teacher.start`: runs the class position and the prefix in one causal pass."""
        if prefix_BL is None:
            prefix_BL = torch.empty(len(condition), 0, dtype=torch.int64, device=self.codebook.device)
        if prefix_BL.shape[1] >= self.order.length:
            raise ValueError(f"a prefix of {prefix_BL.shape[1]} tokens leaves none of {self.order.length} to predict")
        if guidance.is_active:
            condition, prefix_BL = condition.with_null(), prefix_BL.repeat(2, 1)
        x_BLD = self.transformer.embed(prefix_BL, condition)
        config = self.transformer.config
        cache = KVCache(config.num_layers, config.num_heads, 1 + config.num_tokens, x_BLD)
        rope = rope_table(config, x_BLD.device)
        return self._advance(DecodingState(guidance, rope, cache), x_BLD)

    def next_logits(self, state: DecodingState) -> Tensor:
        """See `Teacher.next_logits`."""
        block, total_blocks = state.cache.length - 1, self.order.num_blocks
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
        end = state.cache.length + x_BLD.shape[1]
        hidden_BLD = self.transformer.run_layers(x_BLD, state.rope[state.cache.length : end], state.cache)
        state.logits = self.transformer.logits(hidden_BLD[:, -1:])
        return state
