"""VAR models as pipeline folders, and how the published files name the same parameters."""

import re
from collections.abc import Mapping

from torch import Tensor

from distilled_decoding.families.family import Family
from distilled_decoding.families.var.student import StudentConfig, VARStudent
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, TokenizerConfig
from distilled_decoding.families.var.transformer import Transformer, TransformerConfig

FAMILY = Family(
    name="var",
    components={
        "tokenizer": (MultiScaleTokenizer, TokenizerConfig),
        "transformer": (Transformer, TransformerConfig),
    },
    teacher=VARTeacher,
    student=(VARStudent, StudentConfig),
)

BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
"""Last part of the names of what is in the published files but follows from the sizes, or is not read."""

_RENAMED = (
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
    (r"\.down\.(\d+)\.", r".conv_blocks.\1."),
    (r"\.(conv_blocks\.\d+)\.block\.", r".\1.res."),
)


def from_published(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of a published tokenizer, transformer or student under our names.

    The tokenizer's convolutions are named as in the other family; its decoder counts the levels from the lowest
    resolution, and queries, keys and values are apart. Transformer and student have the published names.
    """
    levels = [int(found[1]) for name in weights if (found := re.match(r"decoder\.up\.(\d+)\.", name))]
    ours: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.split(".")[-1] in BUFFERS:
            continue
        name = re.sub(r"\.up\.(\d+)\.", lambda level: f".conv_blocks.{max(levels) - int(level[1])}.", name)
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        parts = dict(zip("qkv", value.chunk(3), strict=True)) if ".qkv." in name else {"": value}
        ours |= {name.replace(".qkv.", f".{part}."): tensor for part, tensor in parts.items()}
    return ours
