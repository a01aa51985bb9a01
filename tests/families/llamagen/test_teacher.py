from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distilled_decoding.check import check_teacher
from distilled_decoding.condition import Captions, Condition, Labels
from distilled_decoding.families.llamagen.teacher import DecodingState, LlamaGenTeacher
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer
from distilled_decoding.teacher import Guidance
from tests.families.llamagen import reference
from tests.families.llamagen.test_transformer import CAPTIONED, CONFIG, randomised
from tests.golden import Case, load_case

GUIDED = Guidance(scale=2.5, num_blocks=9)


def small_tokenizer(codebook_size: int) -> VQTokenizer:
    config = TokenizerConfig(
        image_channels=3,
        ch=32,
        encoder_ch_mult=(1, 1),
        decoder_ch_mult=(1, 1),
        num_res_blocks=1,
        z_channels=8,
        codebook_size=codebook_size,
        code_dim=4,
    )
    return VQTokenizer(config).eval()


def captions(lengths: Sequence[int]) -> Captions:
    feature_BTF = torch.randn(len(lengths), 7, 6, generator=torch.Generator().manual_seed(0))
    return Captions.right_padded(feature_BTF, torch.arange(7) < torch.tensor(lengths)[:, None])


CONDITIONS = {
    "labels": Labels.checked([4, 0, 2], 5),
    "captions": captions([3, 7, 1]),
    "captions without padding": captions([7, 7, 7]),
}


def teacher_of(condition: Condition) -> LlamaGenTeacher:
    torch.manual_seed(0)
    config = CONFIG if isinstance(condition, Labels) else CAPTIONED
    return LlamaGenTeacher(small_tokenizer(config.vocab_size), randomised(Transformer(config)))


@pytest.fixture(params=CONDITIONS)
def condition(request: pytest.FixtureRequest) -> Condition:
    return CONDITIONS[request.param]


@pytest.fixture
def teacher(condition: Condition) -> LlamaGenTeacher:
    return teacher_of(condition)


@pytest.fixture
def token_BL(teacher: LlamaGenTeacher) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (3, CONFIG.num_tokens))


def greedy(teacher: LlamaGenTeacher, condition: Condition, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] and the logits [B, L, V] they were chosen from."""
    state = teacher.start(condition, guidance)
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    for block in range(teacher.order.num_blocks):
        logits.append(teacher.next_logits(state))
        tokens.append(logits[-1].argmax(-1))
        if block + 1 < teacher.order.num_blocks:
            state = teacher.feed(state, tokens[-1])
    return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)


def run_golden(case: Case, condition: Condition) -> tuple[Tensor, Tensor]:
    """Logits of greedy decoding and, of the same tokens, in one pass."""
    transformer = reference.transformer(case)
    teacher = LlamaGenTeacher(small_tokenizer(transformer.config.vocab_size), transformer)
    interval = case.config["cfg_interval"]
    guidance = Guidance(case.config["cfg_scale"], num_blocks=None if interval < 0 else interval + 2)
    token_BL, logits_BLV = greedy(teacher, condition, guidance)
    case.check("ids", token_BL)
    return logits_BLV, teacher.forced_logits(token_BL, condition, guidance)


@torch.no_grad()
@pytest.mark.parametrize("name", ["nocfg", "cfg2_interval-1", "cfg2_interval3"])
def test_golden_greedy_generation(name: str):
    case = load_case(f"llamagen_gpt_c2i_{name}")
    for logits_BLV in run_golden(case, reference.labels(case, 10)):
        case.check("step_logits", logits_BLV)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["nomask", "mask"])
def test_golden_greedy_generation_from_captions(masked: bool):
    case = load_case(f"llamagen_gpt_t2i_cfg3_{'mask' if masked else 'nomask'}")
    for logits_BLV in run_golden(case, reference.captions(case, masked)):
        case.check("step_logits", logits_BLV)


@torch.no_grad()
def test_golden_greedy_generation_at_the_published_structure():
    case = load_case("struct_llamagen_gpt")
    logits_BLV, _ = run_golden(case, reference.labels(case, 1000))
    case.check("step_logits_sub", logits_BLV[:, :, ::31])
    case.check("top1_logit", logits_BLV.amax(-1))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.5), Guidance(2.5, "linear"), GUIDED])
def test_cached_decoding_equals_one_forced_pass(teacher, condition, guidance: Guidance):
    token_BL, logits_BLV = greedy(teacher, condition, guidance)
    torch.testing.assert_close(logits_BLV, teacher.forced_logits(token_BL, condition, guidance))


@torch.no_grad()
@pytest.mark.parametrize("span", [1, 5, 16, 64])
def test_how_much_of_the_cache_is_read_at_once_changes_nothing(
    teacher, condition, span: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("distilled_decoding.families.llamagen.teacher._SPAN", span)
    token_BL, logits_BLV = greedy(teacher, condition, GUIDED)
    torch.testing.assert_close(logits_BLV, teacher.forced_logits(token_BL, condition, GUIDED))


@torch.no_grad()
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED])
def test_starting_from_a_prefix_equals_feeding_it(teacher, token_BL, condition, guidance: Guidance):
    def fed(state: DecodingState, start: int, stop: int) -> DecodingState:
        for block in range(start, stop):
            state = teacher.feed(state, token_BL[:, block : block + 1])
        return state

    slow = fed(teacher.start(condition, guidance), 0, 11)
    fast = fed(teacher.start(condition, guidance, token_BL[:, :6]), 6, 11)
    torch.testing.assert_close(teacher.next_logits(fast), teacher.next_logits(slow))


def test_a_prefix_must_leave_a_block_to_predict(teacher, token_BL, condition):
    with pytest.raises(ValueError, match="prefix of 16 tokens"):
        teacher.start(condition, Guidance(), token_BL)


@torch.no_grad()
def test_logits_depend_on_earlier_tokens_only(teacher, token_BL, condition):
    before = teacher.forced_logits(token_BL, condition, GUIDED)
    for position in (0, 7, 15):
        changed_BL = token_BL.clone()
        changed_BL[:, position] = (token_BL[:, position] + 1) % CONFIG.vocab_size
        moved_L = (teacher.forced_logits(changed_BL, condition, GUIDED) != before).any(-1).any(0)
        assert moved_L.tolist() == [later > position for later in range(16)]


@torch.no_grad()
def test_guidance_scale_one_is_the_conditional_model(teacher, token_BL, condition):
    conditional = teacher.transformer(token_BL, condition)
    assert torch.equal(teacher.forced_logits(token_BL, condition, Guidance(1.0)), conditional)
    unconditional = teacher.transformer(token_BL, condition.null())
    torch.testing.assert_close(teacher.forced_logits(token_BL, condition, Guidance(0.0)), unconditional)


@torch.no_grad()
def test_generation_under_autocast_stays_near_float32(teacher, token_BL, condition):
    exact = teacher.forced_logits(token_BL, condition, GUIDED)
    with torch.autocast("cpu", torch.bfloat16):
        state = teacher.start(condition, GUIDED, token_BL[:, :6])
        logits_BKV = teacher.next_logits(teacher.feed(state, token_BL[:, 6:7]))
    assert logits_BKV.dtype == torch.float32
    torch.testing.assert_close(logits_BKV, exact[:, 7:8], rtol=0.1, atol=0.1)


@torch.no_grad()
def test_images_and_tokens_pass_through_the_tokenizer():
    teacher, token_BL = teacher_of(CONDITIONS["labels"]), torch.randint(CONFIG.vocab_size, (3, CONFIG.num_tokens))
    code_BLC = teacher.codebook[token_BL]
    assert not code_BLC.requires_grad
    image = teacher.decode(code_BLC)
    assert image.shape == (3, 3, 8, 8)
    row_by_row = code_BLC.view(3, 4, 4, 4).permute(0, 3, 1, 2)
    assert torch.equal(image, teacher.tokenizer.decode_features(row_by_row))
    assert torch.equal(teacher.encode(image), teacher.tokenizer.encode(image))


def test_the_teacher_keeps_its_promises(teacher, condition):
    assert teacher.num_classes == (5 if isinstance(condition, Labels) else 0)
    check_teacher(teacher, condition[:2])


@torch.no_grad()
def test_features_of_padding_and_of_null_captions_have_no_influence():
    padded = CONDITIONS["captions"]
    teacher, nan = teacher_of(padded), torch.tensor(torch.nan)
    filled = replace(padded, feature_BTF=torch.where(padded.mask_BT[..., None], padded.feature_BTF, nan))
    token_BL, logits_BLV = greedy(teacher, padded, GUIDED)
    others_BL, others_BLV = greedy(teacher, filled, GUIDED)
    assert torch.equal(others_BL, token_BL) and torch.equal(others_BLV, logits_BLV)
    unfilled_BLV = teacher.forced_logits(token_BL, padded, GUIDED)
    assert torch.equal(teacher.forced_logits(token_BL, filled, GUIDED), unfilled_BLV)
    null = padded.null()
    unread = replace(null, feature_BTF=torch.full_like(null.feature_BTF, torch.nan))
    null_BLV = teacher.forced_logits(token_BL, null, Guidance())
    assert torch.equal(teacher.forced_logits(token_BL, unread, Guidance()), null_BLV)


@torch.no_grad()
def test_the_mask_of_a_null_caption_matters():
    token_BL = torch.zeros(3, CONFIG.num_tokens, dtype=torch.int64)
    short, whole = captions([3, 3, 3]).null(), captions([7, 7, 7]).null()
    teacher = teacher_of(short)
    differ_BLV = teacher.forced_logits(token_BL, short, Guidance()) != teacher.forced_logits(
        token_BL, whole, Guidance()
    )
    assert differ_BLV.any(-1).all()


def test_a_condition_of_another_kind_or_size_is_refused():
    labels, text = CONDITIONS["labels"], CONDITIONS["captions"]
    longer = Captions(torch.zeros(3, 8, 6), torch.ones(3, 8, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    token_BL = torch.zeros(3, CONFIG.num_tokens, dtype=torch.int64)
    for own, wrong, message in (
        (labels, text, "reads Labels, got Captions; give Labels"),
        (text, labels, "reads Captions, got Labels; give Captions"),
        (text, longer, r"must have \[7, 6\] positions and channels for this model, got \[8, 6\]"),
    ):
        teacher = teacher_of(own)
        with pytest.raises(ValueError, match=message):
            teacher.start(wrong, Guidance())
        with pytest.raises(ValueError, match=message):
            teacher.forced_logits(token_BL, wrong, Guidance(2.0))


def test_transformer_and_tokenizer_must_fit_each_other():
    with pytest.raises(ValueError, match="20 codes .* 24"):
        LlamaGenTeacher(small_tokenizer(20), Transformer(CONFIG))
