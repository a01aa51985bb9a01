from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Captions, Condition, Labels
from distilled_decoding.families.var.teacher import DecodingState, VARTeacher
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, TokenizerConfig
from distilled_decoding.families.var.transformer import Transformer
from distilled_decoding.teacher import Guidance
from tests.families.var import reference
from tests.families.var.test_transformer import CONFIG, LENGTH, PATCH_NUMS, randomised
from tests.golden import load_case

GUIDED = Guidance(2.5, "linear")


def small_tokenizer(codebook_size: int = 24, patch_nums: tuple[int, ...] = PATCH_NUMS) -> MultiScaleTokenizer:
    config = TokenizerConfig(
        image_channels=3,
        ch=32,
        ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=4,
        codebook_size=codebook_size,
        patch_nums=patch_nums,
    )
    return MultiScaleTokenizer(config).eval()


@pytest.fixture
def teacher() -> VARTeacher:
    torch.manual_seed(0)
    return VARTeacher(small_tokenizer(), randomised(Transformer(CONFIG)))


@pytest.fixture
def token_BL(teacher: VARTeacher) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (3, LENGTH))


@pytest.fixture
def condition() -> Condition:
    return Labels.checked([4, 0, 2], 5)


def inputs(teacher: VARTeacher, token_BL: Tensor) -> Tensor:
    """What the transformer reads of these tokens, teacher-forced."""
    tokenizer = teacher.tokenizer
    return tokenizer.next_inputs(tokenizer.partial_sums(lookup(token_BL, teacher.codebook)))


def fed(teacher: VARTeacher, state: DecodingState, token_BL: Tensor, start: int, stop: int) -> DecodingState:
    for block in range(start, stop):
        state = teacher.feed(state, token_BL[:, teacher.order.span(block)])
    return state


def step_by_step(teacher: VARTeacher, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
    """The logits of given tokens, from cached generation."""
    state = teacher.start(condition, guidance)
    logits = [teacher.next_logits(state)]
    for block in range(teacher.order.num_blocks - 1):
        state = fed(teacher, state, token_BL, block, block + 1)
        logits.append(teacher.next_logits(state))
    return torch.cat(logits, dim=1)


def greedy(teacher: VARTeacher, condition: Condition, guidance: Guidance) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens and guided logits of every scale."""
    state = teacher.start(condition, guidance)
    tokens: list[Tensor] = []
    guided: list[Tensor] = []
    for block in range(teacher.order.num_blocks):
        guided.append(teacher.next_logits(state))
        tokens.append(guided[-1].argmax(-1))
        if block + 1 < teacher.order.num_blocks:
            state = teacher.feed(state, tokens[-1])
    return tokens, guided


@torch.no_grad()
@pytest.mark.parametrize("name", ["var_l2norm_ar_cfg1.5", "var_plain_ar_cfg1.5"])
def test_golden_greedy_generation(name: str) -> None:
    case = load_case(name)
    teacher, condition, guidance = reference.teacher(case), reference.labels(case, 10), reference.guidance(case)
    tokens, guided = greedy(teacher, condition, guidance)
    token_BL = torch.cat(tokens, dim=1)
    code_BLC = lookup(token_BL, teacher.codebook)
    forced_BLV = teacher.forced_logits(token_BL, condition, guidance)
    unconditional_BLV = teacher.forced_logits(token_BL, condition.null(), Guidance())
    _, *sums = teacher.tokenizer.partial_sums(code_BLC)
    for scale in range(teacher.order.num_blocks):
        case.check(f"idx_s{scale}", tokens[scale])
        case.check(f"logits_cfg_s{scale}", guided[scale])
        case.check(f"logits_cfg_s{scale}", forced_BLV[:, teacher.order.span(scale)])
        case.check(f"fhat_s{scale}", sums[scale])
        if case.config["keep_uncond"]:
            case.check(f"logits_uncond_s{scale}", unconditional_BLV[:, teacher.order.span(scale)])
    case.check("image", reference.shown(teacher.decode(code_BLC)))


@torch.no_grad()
def test_golden_greedy_generation_at_the_published_structure() -> None:
    case = load_case("struct_var_ar")
    teacher, condition = reference.teacher(case), reference.labels(case, 1000)
    tokens, guided = greedy(teacher, condition, reference.guidance(case))
    token_BL, logits_BLV = torch.cat(tokens, dim=1), torch.cat(guided, dim=1)
    case.check("ids", token_BL)
    case.check("logits_cfg_sub", logits_BLV[:, ::7, ::61])
    case.check("top1_logit", logits_BLV.amax(-1))
    sums = teacher.tokenizer.partial_sums(lookup(token_BL, teacher.codebook))
    case.check("fhat_sub2", sums[-1][:, :, ::2, ::2])
    for part, excerpt in reference.excerpts(reference.shown(teacher.tokenizer.decode_features(sums[-1]))).items():
        case.check(f"image_{part}", excerpt)
    case.check("tf_logits_sub", teacher.transformer(teacher.tokenizer.next_inputs(sums), condition)[:, ::7, ::61])


@torch.no_grad()
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.5), GUIDED, Guidance(2.5, num_blocks=2)])
def test_cached_decoding_equals_one_forced_pass(teacher, token_BL, condition, guidance: Guidance) -> None:
    logits_BLV = step_by_step(teacher, token_BL, condition, guidance)
    torch.testing.assert_close(logits_BLV, teacher.forced_logits(token_BL, condition, guidance))


@torch.no_grad()
@pytest.mark.parametrize("change", [{"attn_l2_norm": False}, {"shared_aln": True}, {"mlp_ratio": 2.5}])
def test_cached_decoding_equals_one_forced_pass_in_every_variant(token_BL, condition, change: dict) -> None:
    teacher = VARTeacher(small_tokenizer(), randomised(Transformer(replace(CONFIG, **change))))
    logits_BLV = step_by_step(teacher, token_BL, condition, GUIDED)
    torch.testing.assert_close(logits_BLV, teacher.forced_logits(token_BL, condition, GUIDED))


@torch.no_grad()
@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED])
def test_starting_from_a_prefix_equals_feeding_it(
    teacher, token_BL, condition, blocks: int, guidance: Guidance
) -> None:
    slow = fed(teacher, teacher.start(condition, guidance), token_BL, 0, blocks)
    fast = teacher.start(condition, guidance, token_BL[:, : teacher.order.tokens_before(blocks)])
    torch.testing.assert_close(teacher.next_logits(fast), teacher.next_logits(slow))
    slow, fast = (fed(teacher, state, token_BL, blocks, 3) for state in (slow, fast))
    torch.testing.assert_close(teacher.next_logits(fast), teacher.next_logits(slow))


@torch.no_grad()
def test_an_unmasked_prefix_is_another_model_behind_it(teacher, token_BL, condition) -> None:
    """The reference lets coarse scales of a prefix see the finer ones, which generation cannot."""
    for blocks in range(4):
        prefix_BL = token_BL[:, : teacher.order.tokens_before(blocks)]
        states = [start(condition, GUIDED, prefix_BL) for start in (teacher.start, teacher.start_unmasked)]
        logits = [teacher.next_logits(state) for state in states]
        assert torch.allclose(*logits, rtol=1e-3, atol=1e-3) == (blocks == 0)


def test_a_prefix_must_be_whole_scales_and_leave_one_to_predict(teacher, token_BL, condition) -> None:
    with pytest.raises(ValueError, match="prefix of 30 tokens"):
        teacher.start(condition, Guidance(), token_BL)
    with pytest.raises(ValueError, match="4 tokens are not whole blocks"):
        teacher.start(condition, Guidance(), token_BL[:, :4])


@torch.no_grad()
def test_logits_depend_on_the_tokens_of_earlier_scales_only(teacher, token_BL, condition) -> None:
    before = teacher.forced_logits(token_BL, condition, GUIDED)
    block_L = teacher.order.block_L()
    for block in range(4):
        position = teacher.order.tokens_before(block + 1) - 1
        changed_BL = token_BL.clone()
        changed_BL[:, position] = (token_BL[:, position] + 1) % CONFIG.vocab_size
        moved_L = (teacher.forced_logits(changed_BL, condition, GUIDED) != before).any(-1).any(0)
        assert torch.equal(moved_L, block_L > block)


@torch.no_grad()
def test_guidance_scale_one_is_the_conditional_model(teacher, token_BL, condition) -> None:
    conditional = teacher.transformer(inputs(teacher, token_BL), condition)
    assert torch.equal(teacher.forced_logits(token_BL, condition, Guidance(1.0, "linear")), conditional)
    unconditional = teacher.transformer(inputs(teacher, token_BL), condition.null())
    torch.testing.assert_close(teacher.forced_logits(token_BL, condition, Guidance(0.0)), unconditional)


@torch.no_grad()
def test_the_references_guidance_grows_from_none_on_the_first_scale(teacher, token_BL, condition) -> None:
    guided = teacher.forced_logits(token_BL, condition, Guidance(1 + 1.5, "linear"))
    input_BLC = inputs(teacher, token_BL)
    cond, uncond = (teacher.transformer(input_BLC, asked) for asked in (condition, condition.null()))
    for block in range(4):
        span, t = teacher.order.span(block), 1.5 * block / 3
        torch.testing.assert_close(guided[:, span], (1 + t) * cond[:, span] - t * uncond[:, span])


@torch.no_grad()
def test_generation_under_autocast_stays_near_float32(teacher, token_BL, condition) -> None:
    exact = teacher.forced_logits(token_BL, condition, GUIDED)
    with torch.autocast("cpu", torch.bfloat16):
        state = teacher.start(condition, GUIDED, token_BL[:, :5])
        logits_BKV = teacher.next_logits(teacher.feed(state, token_BL[:, 5:14]))
    assert logits_BKV.dtype == torch.float32
    torch.testing.assert_close(logits_BKV, exact[:, 14:], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_images_and_tokens_pass_through_the_tokenizer(teacher, token_BL) -> None:
    code_BLC = teacher.codebook[token_BL]
    assert not code_BLC.requires_grad
    image = teacher.decode(code_BLC)
    assert image.shape == (3, 3, 8, 8)
    assert torch.equal(image, teacher.tokenizer.decode(code_BLC))
    assert torch.equal(teacher.encode(image), teacher.tokenizer.encode(image))
    assert teacher.encode(image).shape == (3, LENGTH)
    assert teacher.order.sizes == (1, 4, 9, 16) and teacher.num_classes == 5


@torch.no_grad()
def test_the_last_scale_is_not_read(teacher, token_BL) -> None:
    assert torch.equal(inputs(teacher, token_BL[:, :14]), inputs(teacher, token_BL))


def test_captions_are_refused(teacher, token_BL) -> None:
    text = Captions(torch.zeros(3, 7, 6), torch.ones(3, 7, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    for guidance in (Guidance(), GUIDED):
        with pytest.raises(ValueError, match="reads Labels, got Captions; give Labels"):
            teacher.start(text, guidance)
        with pytest.raises(ValueError, match="reads Labels, got Captions; give Labels"):
            teacher.forced_logits(token_BL, text, guidance)


def test_transformer_and_tokenizer_must_fit_each_other() -> None:
    with pytest.raises(ValueError, match=r"\(20, 4\) .* \(24, 4\)"):
        VARTeacher(small_tokenizer(20), Transformer(CONFIG))
    with pytest.raises(ValueError, match=r"\(1, 2, 4\) .* \(1, 2, 3, 4\)"):
        VARTeacher(small_tokenizer(patch_nums=(1, 2, 4)), Transformer(CONFIG))
