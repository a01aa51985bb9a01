from dataclasses import replace

import pytest
import torch

from distilled_decoding.codebook import lookup
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, SharedPhi, TokenizerConfig, scale_order
from tests.families.var import reference
from tests.golden import load_case

CASE = load_case("var_vqvae")
MODEL = reference.tokenizer(CASE)
ORDER = scale_order(MODEL.config.patch_nums)


@torch.no_grad()
def test_encoding_matches_the_reference() -> None:
    image = CASE.inputs["image"]
    CASE.check("enc", MODEL.encoder(image))
    CASE.check("f", MODEL.features(image))
    token_BL = MODEL.encode(image)
    nothing, *sums = MODEL.partial_sums(lookup(token_BL, MODEL.codebook_VC))
    assert token_BL.shape[1] == ORDER.length and len(sums) == ORDER.num_blocks and not nothing.any()
    for scale, sum_BChw in enumerate(sums):
        CASE.check(f"idx_s{scale}", token_BL[:, ORDER.span(scale)])
        CASE.check(f"fhat_s{scale}", sum_BChw)


@torch.no_grad()
def test_decoding_matches_the_reference() -> None:
    token_BL = torch.cat([CASE.outputs[f"idx_s{scale}"] for scale in range(ORDER.num_blocks)], dim=1)
    code_BLC = lookup(token_BL, MODEL.codebook_VC)
    CASE.check("rec", MODEL.decode(code_BLC).clamp(-1, 1))
    _, coarsest_BChw = MODEL.partial_sums(code_BLC[:, :1])
    CASE.check("rec_first_scale_only", MODEL.decode_features(coarsest_BChw).clamp(-1, 1))
    raw = MODEL.decode_features(CASE.inputs["fhat"])
    CASE.check("fhat_img_raw", raw)
    CASE.check("fhat_img", raw.clamp(-1, 1))
    CASE.check("var_input", MODEL.next_inputs(MODEL.partial_sums(code_BLC)))


@torch.no_grad()
def test_published_structure_matches_the_reference() -> None:
    case = load_case("struct_var_vqvae")
    model, image = reference.tokenizer(case), reference.image(case)
    case.check("f", model.features(image))
    token_BL = model.encode(image)
    case.check("ids", token_BL)
    code_BLC = lookup(token_BL, model.codebook_VC)
    case.check("var_input_sub", model.next_inputs(model.partial_sums(code_BLC))[:, ::5])
    for part, excerpt in reference.excerpts(model.decode(code_BLC).clamp(-1, 1)).items():
        case.check(f"rec_{part}", excerpt)


@pytest.mark.parametrize("chosen", ["0011122333", "001233", "00112233"])
def test_each_scale_has_the_references_convolution(chosen: str) -> None:
    """Of ten scales, 2 and 7 lie halfway between two ticks: the last bit decides."""
    phi = SharedPhi(1)
    for scale, index in enumerate(map(int, chosen)):
        assert phi.of_scale(scale, len(chosen)) is phi.qresi_ls[index]


@pytest.mark.parametrize("num_scales", [3, 5, 7, 9])
def test_the_middle_of_odd_scales_rounds_as_the_reference_does(num_scales: int) -> None:
    """Half is as far from the second tick as from the third; the last bit decides."""
    phi = SharedPhi(1)
    assert phi.of_scale(num_scales // 2, num_scales) is phi.qresi_ls[2]


def fine_tokenizer() -> MultiScaleTokenizer:
    """One channel whose codebook has all numbers in steps of 1/64, and a phi that keeps its input."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_channels=1,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=1,
        codebook_size=1025,
        patch_nums=(1, 3, 8),
    )
    model = MultiScaleTokenizer(config).eval()
    with torch.no_grad():
        model.codebook_VC.copy_(torch.linspace(-8, 8, 1025)[:, None])
        for phi in model.quantize.quant_resi.qresi_ls:
            torch.nn.init.dirac_(phi.weight)
            torch.nn.init.zeros_(phi.bias)
    return model


@torch.no_grad()
def test_encoding_and_decoding_lose_what_the_codebook_rounds_and_no_more() -> None:
    model, image = fine_tokenizer(), torch.randn(2, 1, 16, 16)
    f_BChw = model.features(image)
    code_BLC = lookup(model.encode(image), model.codebook_VC)
    sum_BChw = model.partial_sums(code_BLC)[-1]
    torch.testing.assert_close(sum_BChw, f_BChw, rtol=0, atol=1 / 128 + 1e-6)
    assert torch.equal(model.decode(code_BLC), model.decode_features(sum_BChw))


@torch.no_grad()
def test_the_leading_scales_give_the_leading_sums_and_inputs() -> None:
    code_BLC = torch.randn(2, ORDER.length, 8)
    sums = MODEL.partial_sums(code_BLC)
    input_BLC = MODEL.next_inputs(sums)
    assert input_BLC.shape == (2, ORDER.length - 1, 8)
    for scales in range(ORDER.num_blocks):
        part = MODEL.partial_sums(code_BLC[:, : ORDER.tokens_before(scales)])
        assert len(part) == scales + 1
        assert all(torch.equal(a, b) for a, b in zip(part, sums, strict=False))
        assert torch.equal(MODEL.next_inputs(part), input_BLC[:, : ORDER.tokens_before(scales + 1) - 1])


@torch.no_grad()
def test_images_of_a_batch_do_not_mix() -> None:
    image = CASE.inputs["image"]
    token_BL = MODEL.encode(image)
    assert torch.equal(MODEL.encode(image.flip(0)), token_BL.flip(0))
    code_BLC = torch.randn(2, ORDER.length, 8)
    torch.testing.assert_close(MODEL.decode(code_BLC)[1:], MODEL.decode(code_BLC[1:]))


@pytest.mark.parametrize("patch_nums", [(), (1,), (2, 3), (1, 3, 2)])
def test_sides_that_are_no_scales_are_refused(patch_nums: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"patch_nums .* got \(") as error:
        replace(MODEL.config, patch_nums=patch_nums)
    assert str(patch_nums) in str(error.value)
