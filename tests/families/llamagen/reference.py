"""The reference's configurations as ours."""

from typing import Any

from distilled_decoding.condition import Condition
from distilled_decoding.families.llamagen.student import LlamaGenStudent, StudentConfig
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig
from tests.golden import Case


def sizes(gpt: dict[str, Any]) -> dict[str, Any]:
    assert gpt["multiple_of"] == 256 and gpt["cls_token_num"] == 1
    renamed = {"num_layers": "n_layer", "num_heads": "n_head", "num_tokens": "block_size"}
    same = ("dim", "vocab_size", "num_classes", "norm_eps", "rope_base")
    return {ours: gpt[theirs] for ours, theirs in renamed.items()} | {name: gpt[name] for name in same}


def transformer(case: Case) -> Transformer:
    model = Transformer(TransformerConfig(**sizes(case.config["gpt"])))
    model.load_state_dict(case.weights["gpt"])
    return model.eval()


def student(case: Case) -> LlamaGenStudent:
    dd = case.config["dd"]
    model = LlamaGenStudent(StudentConfig(**sizes(dd), code_dim=dd["codebook_dim"]))
    model.load_state_dict(case.weights["dd"])
    return model.eval()


def tokenizer(case: Case) -> VQTokenizer:
    vq = case.config.get("vq", case.config)
    config = TokenizerConfig(
        image_channels=3,
        ch=vq["ch"],
        encoder_ch_mult=tuple(vq["encoder_ch_mult"]),
        decoder_ch_mult=tuple(vq["decoder_ch_mult"]),
        num_res_blocks=vq["num_res_blocks"],
        z_channels=vq["z_channels"],
        codebook_size=vq["codebook_size"],
        code_dim=vq["codebook_embed_dim"],
    )
    model = VQTokenizer(config)
    weights = {k: v for k, v in case.weights["vq"].items() if k != "quantize.codebook_used"}
    model.load_state_dict(weights)
    return model.eval()


def labels(case: Case, num_classes: int) -> Condition:
    return Condition(case.inputs["label"], num_classes)
