"""The reference's configurations as ours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilled_decoding.condition import Captions, Labels
from distilled_decoding.families.llamagen.checkpoint import FAMILY
from distilled_decoding.families.llamagen.student import LlamaGenStudent, StudentConfig
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig
from distilled_decoding.families.published import Published, load_published
from tests.golden import Case


def sizes(gpt: dict[str, Any]) -> dict[str, Any]:
    assert gpt["multiple_of"] == 256 and gpt["cls_token_num"] == {"c2i": 1, "t2i": 120}[gpt["model_type"]]
    renamed = {"num_layers": "n_layer", "num_heads": "n_head", "num_tokens": "block_size"}
    same = ("dim", "vocab_size", "num_classes", "norm_eps", "rope_base")
    ours = {name: gpt[theirs] for name, theirs in renamed.items()} | {name: gpt[name] for name in same}
    if gpt["model_type"] == "t2i":
        # The reference states classes here too, and does not use them.
        ours |= {"num_classes": 0, "caption_tokens": gpt["cls_token_num"], "caption_dim": gpt["caption_dim"]}
    return ours


def transformer(case: Case) -> Transformer:
    model = Transformer(TransformerConfig(**sizes(case.config["gpt"])))
    load_published(model, Published(case.weights["gpt"], "gpt"), FAMILY.published)
    return model.eval()


def student(case: Case) -> LlamaGenStudent:
    dd = case.config["dd"]
    model = LlamaGenStudent(StudentConfig(**sizes(dd), code_dim=dd["codebook_dim"]))
    load_published(model, Published(case.weights["dd"], "dd"), FAMILY.published)
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
    load_published(model, Published(case.weights["vq"], "vq"), FAMILY.published)
    return model.eval()


def teacher(case: Case) -> LlamaGenTeacher:
    """The case's transformer, or, where only the order and the codebook matter, one that was never trained."""
    untrained = "gpt" not in case.config
    model = Transformer(TransformerConfig(**sizes(case.config["dd"]))) if untrained else transformer(case)
    return LlamaGenTeacher(tokenizer(case), model.eval())


def noise(case: Case) -> Tensor:
    """The case's initial noise, made by its `noise_rule` where none is stored."""
    if "noise" in case.inputs:
        return case.inputs["noise"]
    dd, random = case.config["dd"], np.random.RandomState(case.config["noise_seed"])
    return torch.from_numpy(random.standard_normal((1, dd["block_size"], dd["codebook_dim"]))).float()


def image(case: Case) -> Tensor:
    """The case's image, made by its `image_rule`."""
    random, side = np.random.RandomState(case.config["image_seed"]), case.config["reso"]
    return torch.from_numpy(random.uniform(-1, 1, (1, 3, side, side))).float()


def excerpts(image_B3HW: Tensor) -> dict[str, Tensor]:
    """What a case stores of a large image: every eighth pixel, and a patch."""
    top, left = (96, 64) if image_B3HW.shape[-1] >= 128 else (0, 0)
    patch = image_B3HW[:, :, top : top + 32, left : left + 32]
    return {"sub8": image_B3HW[:, :, ::8, ::8], "crop": patch}


def labels(case: Case, num_classes: int) -> Labels:
    return Labels(case.inputs["label"], num_classes)


def captions(case: Case, masked: bool) -> Captions:
    """The case's captions; unmasked, their padding is read as if it were text, as the reference does without a mask."""
    feature_BTF = case.inputs["caption"]
    mask_BT = case.inputs["emb_mask"].bool() if masked else torch.ones(feature_BTF.shape[:2], dtype=torch.bool)
    return Captions(feature_BTF, mask_BT, torch.zeros(len(feature_BTF), dtype=torch.bool))
