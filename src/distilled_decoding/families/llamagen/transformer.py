"""LlamaGen's transformer, conditioned on a class or on a caption.

The class position or the caption's positions come first, then the grid's tokens row by row. Attention is causal and
leaves out a caption's padding, and the output at a position predicts the token that follows it. Parameter names are
those of the published files.

Axis letters: B batch, L positions or tokens, P positions of a whole sequence, T caption positions, F caption feature
channels, V codebook entries, D width, H heads, E head channels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.condition import Captions, Condition, Labels
from distilled_decoding.families.layers import CacheSlot, KVCache

Cache = KVCache | CacheSlot


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the transformer.

    Attributes:
        dim: width D.
        num_layers: number of blocks of attention and feed-forward.
        num_heads: attention heads H; each takes dim / num_heads channels, a multiple of 4.
        vocab_size: codebook entries V.
        num_tokens: tokens of an image, a square number.
        num_classes: classes; the embedding has one row more, for the null class. 0 if captions are read instead.
        norm_eps: added to the mean square in the norms.
        rope_base: base of the position frequencies.
        caption_tokens: positions T of a caption; 0 if classes are read.
        caption_dim: channels F of a caption's features; 0 if classes are read.

    Raises:
        ValueError: the tokens form no square grid, the width does not divide into heads, or it is not clear whether
            classes or captions are read.
    """

    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    num_tokens: int
    num_classes: int
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    caption_tokens: int = 0
    caption_dim: int = 0

    def __post_init__(self) -> None:
        if self.grid**2 != self.num_tokens:
            raise ValueError(f"num_tokens must be a square number (the image's token grid), got {self.num_tokens}")
        if self.dim % (4 * self.num_heads):
            raise ValueError(f"dim must be a multiple of 4 * num_heads = {4 * self.num_heads}, got {self.dim}")
        conditions = (self.num_classes > 0, self.caption_tokens > 0, self.caption_dim > 0)
        if conditions not in ((True, False, False), (False, True, True)):
            raise ValueError(
                "give num_classes alone, or caption_tokens and caption_dim with num_classes 0, got "
                f"num_classes {self.num_classes}, caption_tokens {self.caption_tokens}, caption_dim {self.caption_dim}"
            )

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return math.isqrt(self.num_tokens)

    @property
    def condition_tokens(self) -> int:
        """Positions in front of the image's tokens: those of a caption, or one for a class."""
        return self.caption_tokens or 1

    @property
    def num_positions(self) -> int:
        """The condition's positions and the tokens', P."""
        return self.condition_tokens + self.num_tokens

    @property
    def head_dim(self) -> int:
        """Channels of one head, E."""
        return self.dim // self.num_heads

    @property
    def hidden_dim(self) -> int:
        """Width inside the feed-forward: two thirds of 4 * dim, up to the next multiple of 256."""
        return math.ceil(int(8 * self.dim / 3) / 256) * 256


def rope_table(config: TransformerConfig, device: torch.device | None = None) -> Tensor:
    """Rotations of query and key channel pairs, cosine and sine, float32 [P, E / 2, 2].

    The first half of the pairs turns with the token's row, the second with its column. The condition's positions
    have zeros, not the identity, as in the published models: their keys vanish, so that every token scores them 0.
    """
    exponent = torch.arange(0, config.head_dim // 2, 2, device=device) / (config.head_dim // 2)
    angle = torch.outer(torch.arange(config.grid, device=device), config.rope_base**-exponent)
    row = angle[:, None].expand(-1, config.grid, -1)
    column = angle[None].expand(config.grid, -1, -1)
    angle_LE = torch.cat([row, column], dim=-1).flatten(0, 1)
    return F.pad(torch.stack([angle_LE.cos(), angle_LE.sin()], dim=-1), (0, 0, 0, 0, config.condition_tokens, 0))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """`x` [B, L, ..., H, E] with channel pairs (2i, 2i+1) turned by `rope` [L, E / 2, 2], in float32."""
    rope = rope.view(len(rope), *[1] * (x.ndim - 3), -1, 2)
    pair = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler fuses real arithmetic but not complex; uncompiled, the complex product is several times faster.
        (even, odd), (cos, sin) = pair.unbind(-1), rope.unbind(-1)
        turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pair) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def attention_mask(attended_BP: Tensor | None, position_L: Tensor, span: int) -> Tensor:
    """Which of the first `span` positions each of `position_L` attends to, bool [B or 1, 1, L, span].

    It is those of `attended_BP` (None: all) up to its own, and itself in any case: a row of padding would be empty
    otherwise.
    """
    key_P, query_L1 = torch.arange(span, device=position_L.device), position_L[:, None]
    mask_BLP = (key_P <= query_L1)[None]
    if attended_BP is not None:
        mask_BLP = mask_BLP & attended_BP[:, None, :span] | (key_P == query_L1)
    return mask_BLP[:, None]


def leading_mask(attended_BP: Tensor | None, length: int) -> Tensor | None:
    """The `attention_mask` of the first positions among themselves; None where each attends to all up to its own."""
    if attended_BP is None:
        return None
    return attention_mask(attended_BP, torch.arange(length, device=attended_BP.device), length)


class Attention(nn.Module):
    """Causal self-attention with rotated queries and keys."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, rope: Tensor, mask: Tensor | None, layer: int, cache: Cache | None) -> Tensor:
        """Without a mask the positions are the first of their sequence."""
        qkv = self.wqkv(x_BLD).unflatten(-1, (3, self.num_heads, -1))
        query, key = rotate(qkv[:, :, :2], rope).transpose(1, 3).unbind(2)
        value = qkv[:, :, 2].transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        assert mask is not None or query.shape == key.shape
        out_BHLE = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None)
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

    def forward(self, x_BLD: Tensor, rope: Tensor, mask: Tensor | None, layer: int, cache: Cache | None) -> Tensor:
        """`layer` is this layer's place in the cache."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), rope, mask, layer, cache)
        return x_BLD + self.feed_forward(self.ffn_norm(x_BLD))


class LabelEmbedding(nn.Module):
    """One row per class and, last, one for the null class."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)

    def forward(self, condition: Condition) -> Tensor:
        """The class position, [B, 1, D]."""
        return self.embedding_table(Labels.require(condition).label_B)[:, None]


class CaptionProjection(nn.Module):
    """Two linear layers without biases, GELU between."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.caption_dim, config.dim, bias=False)
        self.fc2 = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, feature_BTF: Tensor) -> Tensor:
        """[B, T, F] -> [B, T, D], position by position."""
        return self.fc2(F.gelu(self.fc1(feature_BTF), approximate="tanh"))


class CaptionEmbedding(nn.Module):
    """A caption's features, or the null caption's in their place, brought to the width of the transformer."""

    uncond_embedding: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.cap_proj = CaptionProjection(config)
        # Random and never trained, but a part of the model: a buffer in the published files too.
        uncond_embedding = torch.randn(config.caption_tokens, config.caption_dim) / math.sqrt(config.caption_dim)
        self.register_buffer("uncond_embedding", uncond_embedding)

    def forward(self, condition: Condition) -> Tensor:
        """The caption's positions, [B, T, D]."""
        captions, null_TF = Captions.require(condition), self.uncond_embedding
        if captions.feature_BTF.shape[1:] != null_TF.shape:
            found, expected = list(captions.feature_BTF.shape[1:]), list(null_TF.shape)
            raise ValueError(f"captions must have {expected} positions and channels for this model, got {found}")
        # The null caption has features at padding too; there the mask alone leaves it out.
        feature_BTF = captions.feature_BTF.to(null_TF.dtype).masked_fill(~captions.mask_BT[..., None], 0)
        return self.cap_proj(torch.where(captions.null_B[:, None, None], null_TF, feature_BTF))


class Backbone(nn.Module):
    """What teacher and student share: the condition's embedding, layers and logits head, but not how tokens come in."""

    def __init__(self, config: TransformerConfig, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = CaptionEmbedding(config) if config.caption_tokens else LabelEmbedding(config)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(Layer(config, dropout) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def attended(self, condition: Condition) -> Tensor | None:
        """Which positions may be attended to: all but a caption's padding, bool [B, P]; None for classes: all."""
        if not isinstance(condition, Captions):
            return None
        return F.pad(condition.mask_BT, (0, self.config.num_tokens), value=True)

    def run_layers(self, x_BLD: Tensor, rope: Tensor, mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Hidden states of consecutive positions, whose rotations are `rope`; `cache` takes their keys and values.

        `mask` is an `attention_mask`; without, the positions are the first, and each attends to all up to its own.
        """
        x_BLD = self.dropout(x_BLD)
        for index, layer in enumerate(self.layers):
            x_BLD = layer(x_BLD, rope, mask, index, cache)
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
    """The LlamaGen transformer.

    Args:
        config: sizes.
        dropout: in training, on the input embeddings and on what each attention and feed-forward adds.
    """

    def __init__(self, config: TransformerConfig, dropout: float = 0.0) -> None:
        super().__init__(config, dropout)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.reset_parameters()

    def embed(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """The condition's positions and the tokens behind them, [B, condition_tokens + L, D].

        Raises:
            ValueError: a condition of another kind than the model reads, or captions of another size.
        """
        return torch.cat([self.cls_embedding(condition), self.tok_embeddings(token_BL)], dim=1)

    def forward(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """Logits of each token given the condition and the tokens before it, float32 [B, L, V].

        Args:
            token_BL: int64 tokens. The last of a whole sequence is not read and may be left out; after fewer
                tokens, n of them, come n + 1 predictions.
            condition: one entry per sequence.
        """
        return self.output(self.features(token_BL, condition)).float()

    def features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """What those logits are read from, [B, L, D]."""
        x_BLD = self.embed(token_BL[:, : self.config.num_tokens - 1], condition)
        length = x_BLD.shape[1]
        mask = leading_mask(self.attended(condition), length)
        hidden_BLD = self.run_layers(x_BLD, rope_table(self.config, x_BLD.device)[:length], mask)
        return self.norm(hidden_BLD[:, self.config.condition_tokens - 1 :])
