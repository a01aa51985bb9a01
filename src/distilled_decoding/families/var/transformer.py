"""VAR's class-conditional transformer (arXiv 2404.02905, section 3).

A step predicts all tokens of one scale at once from the sum of the coarser scales; a position attends to its own
scale and those before it. The class enters as the first scale's input and, in every layer, through the scales and
shifts of adaptive layer norm. Parameter names are those of the published files.

Axis letters: B batch, L positions or tokens, V codebook entries, C code channels, D width, H heads, E head channels.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition, Labels
from distilled_decoding.families.layers import KVCache
from distilled_decoding.families.var.tokenizer import scale_order


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes of the transformer.

    Attributes:
        dim: width D.
        num_layers: number of blocks of attention and feed-forward.
        num_heads: attention heads H.
        vocab_size: codebook entries V.
        code_dim: code channels C.
        patch_nums: side of each scale's token map.
        num_classes: classes; the embedding has one row more, for the null class.
        mlp_ratio: width inside the feed-forward, in units of `dim`.
        norm_eps: added to the variance in the norms.
        attn_l2_norm: whether queries and keys have length 1, with a learned temperature for each head.
        shared_aln: whether all layers share the projection of the class into scales and shifts.

    Raises:
        ValueError: the width does not divide into heads, or the scales do not ascend.
    """

    dim: int
    num_layers: int
    num_heads: int
    vocab_size: int
    code_dim: int
    patch_nums: tuple[int, ...]
    num_classes: int
    mlp_ratio: float = 4.0
    norm_eps: float = 1e-6
    attn_l2_norm: bool = True
    shared_aln: bool = False

    def __post_init__(self) -> None:
        scale_order(self.patch_nums)
        if self.dim % self.num_heads:
            raise ValueError(f"dim must be a multiple of num_heads = {self.num_heads}, got {self.dim}")

    @property
    def num_tokens(self) -> int:
        """Tokens of an image, of all scales."""
        return scale_order(self.patch_nums).length


class Attention(nn.Module):
    """Self-attention; queries and values have biases, keys have none."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attn_l2_norm = config.attn_l2_norm
        self.mat_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)
        # Without unit queries and keys, the published scale is a quarter of the usual.
        self.scale = 1.0 if config.attn_l2_norm else 0.25 / math.sqrt(config.dim // config.num_heads)
        if config.attn_l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, config.num_heads, 1, 1), math.log(4)))

    def forward(self, x_BLD: Tensor, mask_LL: Tensor | None, layer: int, cache: KVCache | None) -> Tensor:
        """Attend to the cached positions and, as far as the mask allows, to the new ones."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x_BLD, self.mat_qkv.weight, bias).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            query = F.normalize(query, dim=-1) * self.scale_mul_1H11.clamp(max=math.log(100)).exp()
            key = F.normalize(key, dim=-1)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        out_BHLE = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_LL, scale=self.scale)
        return self.proj(out_BHLE.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden_dim = round(config.dim * config.mlp_ratio)
        self.fc1 = nn.Linear(config.dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, config.dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Position by position."""
        return self.fc2(F.gelu(self.fc1(x_BLD), approximate="tanh"))


class Layer(nn.Module):
    """Attention, then feed-forward, each scaled, shifted and gated by the class."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, elementwise_affine=False)
        self.attn = Attention(config)
        self.ffn = FeedForward(config)
        if config.shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.dim))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))

    def modulation(self, class_BD: Tensor, shared_B16D: Tensor | None) -> Tensor:
        """Gates, scales and shifts of attention and feed-forward, [B, 1, 6, D]."""
        if shared_B16D is not None:
            return self.ada_gss + shared_B16D
        return self.ada_lin(class_BD).unflatten(-1, (1, 6, -1))

    def forward(
        self,
        x_BLD: Tensor,
        modulation_B16D: Tensor,
        mask_LL: Tensor | None,
        layer: int,
        cache: KVCache | None,
        between_BLD: Tensor | None,
    ) -> Tensor:
        """`layer` is this layer's place in the cache; `between_BLD` is added behind the attention."""
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = modulation_B16D.unbind(2)
        x_BLD = x_BLD + gate_1 * self.attn(self.norm(x_BLD) * (1 + scale_1) + shift_1, mask_LL, layer, cache)
        if between_BLD is not None:
            x_BLD = x_BLD + between_BLD
        return x_BLD + gate_2 * self.ffn(self.norm(x_BLD) * (1 + scale_2) + shift_2)


class HeadNorm(nn.Module):
    """The norm in front of the logits head, scaled and shifted by the class."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 2 * config.dim))

    def forward(self, hidden_BLD: Tensor, class_BD: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        scale_B1D, shift_B1D = self.ada_lin(class_BD).unsqueeze(1).chunk(2, dim=-1)
        return self.norm(hidden_BLD) * (1 + scale_B1D) + shift_B1D


class Backbone(nn.Module):
    """What teacher and student share; they differ in their levels and in what they read at a position.

    Args:
        config: sizes.
        levels: the positions of each level; the first is one position, which reads the class.
    """

    def __init__(self, config: TransformerConfig, levels: BlockOrder) -> None:
        super().__init__()
        self.config = config
        self.levels = levels
        self.class_emb = nn.Embedding(config.num_classes + 1, config.dim)
        self.word_embed = nn.Linear(config.code_dim, config.dim)
        self.pos_start = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_1LC = nn.Parameter(torch.empty(1, levels.length, config.dim))
        self.lvl_embed = nn.Embedding(levels.num_blocks, config.dim)
        if config.shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.head_nm = HeadNorm(config)
        self.head = nn.Linear(config.dim, config.vocab_size)

    def embed_class(self, condition: Condition) -> Tensor:
        """Its row of the class embedding for each image, [B, D]."""
        return self.class_emb(Labels.require(condition).label_B)

    def start(self, class_BD: Tensor) -> Tensor:
        """The first position, [B, 1, D]."""
        return class_BD[:, None] + self.pos_start + self.place(slice(0, 1))

    def embed(self, input_BLC: Tensor, span: slice) -> Tensor:
        """The later positions `span`, [B, L, D], which read `input_BLC`."""
        return self.word_embed(input_BLC.to(self.word_embed.weight.dtype)) + self.place(span)

    def place(self, span: slice) -> Tensor:
        """Position and level embedding, [1, L, D]."""
        return self.pos_1LC[:, span] + self.lvl_embed(self.levels.block_L(self.pos_1LC.device)[span])

    def modulations(self, class_BD: Tensor) -> list[Tensor]:
        """What the class does to each layer, [B, 1, 6, D] each."""
        shared = self.shared_ada_lin(class_BD).unflatten(-1, (1, 6, -1)) if self.config.shared_aln else None
        return [layer.modulation(class_BD, shared) for layer in cast(Iterable[Layer], self.blocks)]

    def run_layers(
        self,
        x_BLD: Tensor,
        modulations: Sequence[Tensor],
        mask_LL: Tensor | None,
        cache: KVCache | None = None,
        between: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of consecutive positions; `cache` takes their keys and values."""
        for index, layer in enumerate(self.blocks):
            between_BLD = None if between is None else between[index]
            x_BLD = layer(x_BLD, modulations[index], mask_LL, index, cache, between_BLD)
        return x_BLD

    def logits(self, hidden_BLD: Tensor, class_BD: Tensor) -> Tensor:
        """The logits head on hidden states, float32 [B, L, V]."""
        return self.head(self.head_nm(hidden_BLD, class_BD)).float()

    def reset_parameters(self) -> None:
        """Draw a fresh start from torch's global generator.

        Deviation 0.02, less where many residuals add up; every gate is open and all logits are zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for position in (self.pos_start, self.pos_1LC):
            nn.init.normal_(position, std=0.02)
        for layer in cast(Iterable[Layer], self.blocks):
            for last in (layer.attn.proj, layer.ffn.fc2):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * self.config.num_layers))
            if self.config.shared_aln:
                nn.init.ones_(layer.ada_gss[:, :, :2])
            else:
                nn.init.ones_(cast(nn.Linear, layer.ada_lin[1]).bias[: 2 * self.config.dim])
        nn.init.zeros_(self.head.weight)


class Transformer(Backbone):
    """VAR's transformer: a level is a scale, and a position reads what the coarser scales sum to there."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, scale_order(config.patch_nums))
        self.reset_parameters()

    def forward(self, input_BLC: Tensor, condition: Condition) -> Tensor:
        """Logits of every token given the scales before its own, float32 [B, L, V].

        Args:
            input_BLC: what each scale but the first reads (see `MultiScaleTokenizer.next_inputs`); those of the last
                scales may be left out, and so are their logits then.
            condition: one entry per sequence.
        """
        return self.head(self.features(input_BLC, condition)).float()

    def features(self, input_BLC: Tensor, condition: Condition) -> Tensor:
        """What those logits are read from, [B, L, D]."""
        class_BD = self.embed_class(condition)
        length = 1 + input_BLC.shape[1]
        x_BLD = torch.cat([self.start(class_BD), self.embed(input_BLC, slice(1, length))], dim=1)
        mask_LL = self.levels.attends_LL(own_block=True, device=x_BLD.device)[:length, :length]
        return self.head_nm(self.run_layers(x_BLD, self.modulations(class_BD), mask_LL), class_BD)
