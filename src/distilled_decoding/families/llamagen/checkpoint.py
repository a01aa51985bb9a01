"""LlamaGen models as pipeline folders, and what the published files, whose names are ours, tell of their sizes."""

from typing import Any

from distilled_decoding.families.family import Family
from distilled_decoding.families.llamagen.plain import plain_loop
from distilled_decoding.families.llamagen.student import LlamaGenStudent, StudentConfig
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig
from distilled_decoding.families.published import Origin, Published, PublishedNames


def component(published: Published) -> str | None:
    """Which component a state dict is, by names that only LlamaGen's have."""
    if published.holds(r"(encoder|decoder)\.conv_blocks\."):
        return "tokenizer"
    if not published.holds(r"layers\.\d+\.attention\."):
        return None
    return "student" if published.holds(r"final_layer_conti\.|n_d_embed\.") else "transformer"


def sizes(published: Published) -> dict[str, Any]:
    """What names and shapes tell of a component."""
    kind = component(published)
    if kind == "tokenizer":
        return _tokenizer_sizes(published)
    if kind == "student":
        return _transformer_sizes(published) | {"code_dim": published.size("tok_embeddings.weight", 1)}
    return _transformer_sizes(published)


def _tokenizer_sizes(published: Published) -> dict[str, Any]:
    ch = published.size("encoder.conv_in.weight", 0)
    levels = range(published.count("encoder.conv_blocks"))
    widths = [published.size(f"encoder.conv_blocks.{i}.res.0.conv1.weight", 0) for i in levels]
    decoder_levels = reversed(range(published.count("decoder.conv_blocks")))
    decoder_widths = [published.size(f"decoder.conv_blocks.{i}.res.0.conv1.weight", 0) for i in decoder_levels]
    return {
        "image_channels": published.size("encoder.conv_in.weight", 1),
        "ch": ch,
        "encoder_ch_mult": tuple(width // ch for width in widths),
        "decoder_ch_mult": tuple(width // ch for width in decoder_widths),
        "num_res_blocks": published.count("encoder.conv_blocks.0.res"),
        "z_channels": published.size("post_quant_conv.weight", 0),
        "codebook_size": published.size("quantize.embedding.weight", 0),
        "code_dim": published.size("quantize.embedding.weight", 1),
    }


def _transformer_sizes(published: Published) -> dict[str, Any]:
    """All but the number of heads and of tokens, of which no parameter's shape depends."""
    known = {
        "dim": published.size("norm.weight", 0),
        "num_layers": published.count("layers"),
        "vocab_size": published.size("output.weight", 0),
    }
    if published.holds(r"cls_embedding\.(cap_proj|uncond_embedding)"):
        tokens, channels = (published.size("cls_embedding.uncond_embedding", dim) for dim in (0, 1))
        return known | {"num_classes": 0, "caption_tokens": tokens, "caption_dim": channels}
    return known | {"num_classes": published.size("cls_embedding.embedding_table.weight", 0) - 1}


FAMILY = Family(
    name="llamagen",
    components={
        "tokenizer": (VQTokenizer, TokenizerConfig),
        "transformer": (Transformer, TransformerConfig),
    },
    teacher=LlamaGenTeacher,
    student=(LlamaGenStudent, StudentConfig),
    published=PublishedNames(component, sizes, lambda name, config: Origin(name)),
    plain_loop=plain_loop,
    heads=("code", "flow"),
)
