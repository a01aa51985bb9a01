"""VAR models as pipeline folders, and how the published files name the same parameters."""

import math
import re
from typing import Any

from distilled_decoding.families.family import Family
from distilled_decoding.families.published import Origin, Published, PublishedNames
from distilled_decoding.families.var.plain import plain_loop
from distilled_decoding.families.var.student import StudentConfig, VARStudent
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, TokenizerConfig
from distilled_decoding.families.var.transformer import Transformer, TransformerConfig

_RENAMED = (
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"encoder\.conv_blocks\.(\d+)\.", r"encoder.down.\1."),
    (r"\.res\.", ".block."),
)


def origin(name: str, config: Any) -> Origin:
    """Where a parameter comes from: transformer and student have the published names, the tokenizer has not.

    Its convolutions are named as in the other family. The published decoder counts its levels from the highest
    resolution, ours from the lowest, and the published queries, keys and values are one tensor.
    """
    if not isinstance(config, TokenizerConfig):
        return Origin(name)
    last = len(config.ch_mult) - 1
    name = re.sub(r"decoder\.conv_blocks\.(\d+)\.", lambda level: f"decoder.up.{last - int(level[1])}.", name)
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    apart = re.search(r"\.([qkv])\.(weight|bias)$", name)
    if apart is None:
        return Origin(name)
    return Origin(f"{name[: apart.start()]}.qkv.{apart[2]}", part="qkv".index(apart[1]), parts=3)


def component(published: Published) -> str | None:
    """Which component a state dict is, by names that only VAR's have."""
    if published.holds(r"encoder\.down\.|decoder\.up\.|quantize\.quant_resi\."):
        return "tokenizer"
    if published.holds(r"layerwise_n_d_embed\."):
        return "student"
    return "transformer" if published.holds(r"blocks\.\d+\.attn\.mat_qkv\.") else None


def sizes(published: Published) -> dict[str, Any]:
    """What names and shapes tell of a component."""
    kind = component(published)
    if kind == "tokenizer":
        return _tokenizer_sizes(published)
    return _transformer_sizes(published, class_levels=1 if kind == "student" else 0)


def _tokenizer_sizes(published: Published) -> dict[str, Any]:
    ch = published.size("encoder.conv_in.weight", 0)
    levels = range(published.count("encoder.down"))
    return {
        "image_channels": published.size("encoder.conv_in.weight", 1),
        "ch": ch,
        "ch_mult": tuple(published.size(f"encoder.down.{i}.block.0.conv1.weight", 0) // ch for i in levels),
        "num_res_blocks": published.count("encoder.down.0.block"),
        "z_channels": published.size("quantize.embedding.weight", 1),
        "codebook_size": published.size("quantize.embedding.weight", 0),
    }


def _transformer_sizes(published: Published, class_levels: int) -> dict[str, Any]:
    """`class_levels`: levels of one position in front of the scales, which a student has."""
    dim = published.size("word_embed.weight", 0)
    known: dict[str, Any] = {
        "dim": dim,
        "num_layers": published.count("blocks"),
        "vocab_size": published.size("head.weight", 0),
        "code_dim": published.size("word_embed.weight", 1),
        "num_classes": published.size("class_emb.weight", 0) - 1,
        "mlp_ratio": published.size("blocks.0.ffn.fc1.weight", 0) / dim,
        "attn_l2_norm": published.holds(r"blocks\.0\.attn\.scale_mul_1H11"),
        "shared_aln": published.holds(r"shared_ada_lin\."),
        "num_tokens": published.size("pos_1LC", 1) - class_levels,
    }
    if known["attn_l2_norm"]:
        known["num_heads"] = published.size("blocks.0.attn.scale_mul_1H11", 1)
    if "lvl_1L" in published and not published["lvl_1L"].is_meta:
        tokens_of_level = published["lvl_1L"].flatten().long().bincount().tolist()[class_levels:]
        known["patch_nums"] = tuple(math.isqrt(tokens) for tokens in tokens_of_level)
    return known


FAMILY = Family(
    name="var",
    components={
        "tokenizer": (MultiScaleTokenizer, TokenizerConfig),
        "transformer": (Transformer, TransformerConfig),
    },
    teacher=VARTeacher,
    student=(VARStudent, StudentConfig),
    published=PublishedNames(component, sizes, origin),
    plain_loop=plain_loop,
    heads=("code", "flow"),
)
