"""The reference's configurations as ours."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilled_decoding.condition import Labels
from distilled_decoding.families.published import Published, load_published
from distilled_decoding.families.var.checkpoint import FAMILY
from distilled_decoding.families.var.student import StudentConfig, VARStudent
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, TokenizerConfig
from distilled_decoding.families.var.transformer import Transformer, TransformerConfig
from distilled_decoding.teacher import Guidance
from tests.golden import Case


def tokenizer(case: Case) -> MultiScaleTokenizer:
    vae = case.config.get("vae", case.config)
    assert vae["share_quant_resi"] == 4 and vae["quant_resi"] == 0.5
    assert vae["quant_conv_ks"] == 3 and not vae["using_znorm"]
    config = TokenizerConfig(
        image_channels=3,
        ch=vae["ch"],
        ch_mult=tuple(vae["ch_mult"]),
        num_res_blocks=vae["num_res_blocks"],
        z_channels=vae["z_channels"],
        codebook_size=vae["vocab_size"],
        patch_nums=tuple(vae["patch_nums"]),
    )
    model = MultiScaleTokenizer(config)
    load_published(model, Published(case.weights["vae"], "vae"), FAMILY.published)
    return model.eval()


def sizes(case: Case, role: str) -> dict[str, Any]:
    """The sizes of a transformer or a student, some of which its case states of the tokenizer."""
    model, vae = case.config[role], case.config["vae"]
    renamed = {"dim": "embed_dim", "num_layers": "depth"}
    same = ("num_heads", "num_classes", "mlp_ratio", "norm_eps", "attn_l2_norm", "shared_aln")
    of_codes = {"vocab_size": vae["vocab_size"], "code_dim": vae["z_channels"]}
    of_model = {ours: model[theirs] for ours, theirs in renamed.items()} | {name: model[name] for name in same}
    return of_model | of_codes | {"patch_nums": tuple(model["patch_nums"])}


def transformer(case: Case) -> Transformer:
    model = Transformer(TransformerConfig(**sizes(case, "var")))
    load_published(model, Published(case.weights["var"], "var"), FAMILY.published)
    return model.eval()


def student(case: Case) -> VARStudent:
    model = VARStudent(StudentConfig(**sizes(case, "dd")))
    load_published(model, Published(case.weights["dd"], "dd"), FAMILY.published)
    return model.eval()


def teacher(case: Case) -> VARTeacher:
    """The case's transformer, or, where only the order and the codebook matter, one that was never trained."""
    untrained = "var" not in case.config
    model = Transformer(TransformerConfig(**sizes(case, "dd"))) if untrained else transformer(case)
    return VARTeacher(tokenizer(case), model.eval())


def labels(case: Case, num_classes: int) -> Labels:
    return Labels(case.inputs["label"], num_classes)


def guidance(case: Case) -> Guidance:
    return Guidance(1 + case.config["cfg"], "linear")


def noise(case: Case) -> Tensor:
    """The case's initial noise, made by its `noise_rule` where none is stored."""
    if "noise" in case.inputs:
        return case.inputs["noise"]
    random, vae = np.random.RandomState(case.config["noise_seed"]), case.config["vae"]
    length = sum(side**2 for side in vae["patch_nums"])
    return torch.from_numpy(random.standard_normal((1, length, vae["z_channels"]))).float()


def image(case: Case) -> Tensor:
    """The case's image, made by its `image_rule`."""
    random, side = np.random.RandomState(case.config["image_seed"]), case.config["reso"]
    return torch.from_numpy(random.uniform(-1, 1, (1, 3, side, side))).float()


def excerpts(image_B3HW: Tensor) -> dict[str, Tensor]:
    """What a case stores of a large image: every eighth pixel, and a patch."""
    return {"sub8": image_B3HW[:, :, ::8, ::8], "crop": image_B3HW[:, :, 96:128, 64:96]}


def shown(image_B3HW: Tensor) -> Tensor:
    """An image as the reference returns it, clamped to [0, 1]."""
    return (image_B3HW.clamp(-1, 1) + 1) / 2
