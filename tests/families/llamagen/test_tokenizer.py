import pytest
import torch

from distilled_decoding.codebook import lookup
from tests.families.llamagen import reference
from tests.golden import load_case

CASE = load_case("llamagen_vq")
MODEL = reference.tokenizer(CASE)


def as_image(code_BLC: torch.Tensor) -> torch.Tensor:
    return code_BLC.transpose(1, 2).unflatten(2, (6, 6))


@torch.no_grad()
def test_encoding_matches_the_reference() -> None:
    image = CASE.inputs["image"]
    CASE.check("h", MODEL.quant_conv(MODEL.encoder(image)))
    CASE.check("ids", MODEL.encode(image))
    CASE.check("codebook", MODEL.codebook_VC)
    # The reference's straight-through sum equals the code up to rounding.
    CASE.check("quant", as_image(lookup(MODEL.encode(image), MODEL.codebook_VC)))


@torch.no_grad()
def test_decoding_matches_the_reference() -> None:
    CASE.check("entries", as_image(lookup(CASE.outputs["ids"], MODEL.codebook_VC)))
    CASE.check("rec", MODEL.decode(lookup(CASE.outputs["ids"], MODEL.codebook_VC)))
    CASE.check("dec_ids_img", MODEL.decode(lookup(CASE.inputs["ids"], MODEL.codebook_VC)))
    CASE.check("dec_z_img", MODEL.decode_features(CASE.inputs["z"]))


@torch.no_grad()
@pytest.mark.parametrize("name", ["struct_llamagen_vq16", "struct_llamagen_vq8"])
def test_published_structures_match_the_reference(name: str) -> None:
    case = load_case(name)
    model, image = reference.tokenizer(case), reference.image(case)
    token_BL = model.encode(image)
    case.check("ids", token_BL)
    code_BLC = lookup(token_BL, model.codebook_VC)
    case.check("quant", code_BLC.mT.unflatten(2, case.outputs["quant"].shape[2:]))
    decoded = model.decode(code_BLC)
    assert decoded.shape == image.shape
    for part, excerpt in reference.excerpts(decoded).items():
        case.check(f"rec_{part}", excerpt)


def test_a_code_is_its_own_token() -> None:
    codebook_VC = MODEL.codebook_VC
    assert torch.allclose(codebook_VC.norm(dim=1), torch.ones(len(codebook_VC)))
    z_BChw = MODEL.features(CASE.inputs["image"])
    assert torch.allclose(z_BChw.norm(dim=1), torch.ones(2, 6, 6))
