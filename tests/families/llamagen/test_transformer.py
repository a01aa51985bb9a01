import pytest
import torch
from torch import Tensor

from distilled_decoding.condition import Condition, Labels
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import (
    DecodingState,
    LlamaGenTeacher,
    Transformer,
    TransformerConfig,
    rope_table,
    rotate,
)
from distilled_decoding.teacher import Guidance
from tests.families.llamagen import reference
from tests.golden import Case, load_case

CONFIG = TransformerConfig(dim=32, num_layers=2, num_heads=2, vocab_size=24, num_tokens=16, num_classes=5)
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


def randomised(transformer: Transformer) -> Transformer:
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


@pytest.fixture
def teacher() -> LlamaGenTeacher:
    torch.manual_seed(0)
    return LlamaGenTeacher(small_tokenizer(CONFIG.vocab_size), randomised(Transformer(CONFIG)))


@pytest.fixture
def token_BL(teacher: LlamaGenTeacher) -> Tensor:
    return torch.randint(CONFIG.vocab_size, (3, CONFIG.num_tokens))


@pytest.fixture
def condition() -> Condition:
    return Labels.checked([4, 0, 2], 5)


def greedy(teacher: LlamaGenTeacher, condition: Condition, guidance: Guidance) -> tuple[Tensor, Tensor]:
    """Tokens [B, L] and the logits [B, L, V] they were chosen from."""
    state = teacher.start(condition, guidance)
    tokens: list[Tensor] = []
    logits: list[Tensor] = []
    for _ in range(teacher.order.num_blocks):
        logits.append(teacher.next_logits(state))
        tokens.append(logits[-1].argmax(-1))
        state = teacher.feed(state, tokens[-1])
    return torch.cat(tokens, dim=1), torch.cat(logits, dim=1)


def run_golden(name: str) -> tuple[Case, Tensor, Tensor]:
    case = load_case(name)
    transformer = reference.transformer(case)
    teacher = LlamaGenTeacher(small_tokenizer(transformer.config.vocab_size), transformer)
    interval = case.config["cfg_interval"]
    guidance = Guidance(case.config["cfg_scale"], num_blocks=None if interval < 0 else interval + 2)
    token_BL, logits_BLV = greedy(teacher, reference.labels(case, teacher.num_classes), guidance)
    case.check("ids", token_BL)
    forced_BLV = teacher.forced_logits(token_BL, reference.labels(case, teacher.num_classes), guidance)
    return case, logits_BLV, forced_BLV


@torch.no_grad()
def test_golden_teacher_forced_logits_and_rope_table():
    case = load_case("llamagen_gpt_c2i_tf")
    transformer = reference.transformer(case)
    case.check("logits", transformer(case.inputs["idx"], reference.labels(case, 10)))
    case.check("freqs_cis", torch.view_as_real(rope_table(transformer.config)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["nocfg", "cfg2_interval-1", "cfg2_interval3"])
def test_golden_greedy_generation(name: str):
    case, logits_BLV, forced_BLV = run_golden(f"llamagen_gpt_c2i_{name}")
    case.check("step_logits", logits_BLV)
    case.check("step_logits", forced_BLV)


@torch.no_grad()
def test_golden_greedy_generation_at_the_published_structure():
    case, logits_BLV, _ = run_golden("struct_llamagen_gpt")
    case.check("step_logits_sub", logits_BLV[:, :, ::31])
    case.check("top1_logit", logits_BLV.amax(-1))


def test_parameters_of_the_published_model():
    with torch.device("meta"):
        config = TransformerConfig(
            dim=768, num_layers=12, num_heads=12, vocab_size=16384, num_tokens=256, num_classes=1000
        )
        model = Transformer(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 110_888_448
    assert len(shapes) == 4 + 12 * 7
    assert shapes["cls_embedding.embedding_table.weight"] == (1001, 768)
    assert shapes["tok_embeddings.weight"] == shapes["output.weight"] == (16384, 768)
    assert shapes["layers.11.attention.wqkv.weight"] == (2304, 768)
    assert shapes["layers.11.attention.wo.weight"] == (768, 768)
    assert shapes["layers.11.feed_forward.w1.weight"] == shapes["layers.11.feed_forward.w3.weight"] == (2048, 768)
    assert shapes["layers.11.feed_forward.w2.weight"] == (768, 2048)
    assert shapes["layers.11.attention_norm.weight"] == shapes["layers.11.ffn_norm.weight"] == (768,)
    assert shapes["norm.weight"] == (768,)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [Guidance(), Guidance(2.5), Guidance(2.5, "linear"), GUIDED])
def test_cached_decoding_equals_one_forced_pass(teacher, condition, guidance: Guidance):
    token_BL, logits_BLV = greedy(teacher, condition, guidance)
    torch.testing.assert_close(logits_BLV, teacher.forced_logits(token_BL, condition, guidance))


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
def test_forward_reads_neither_more_nor_less_than_it_needs(teacher, token_BL, condition):
    whole = teacher.transformer(token_BL, condition)
    assert torch.equal(teacher.transformer(token_BL[:, :-1], condition), whole)
    torch.testing.assert_close(teacher.transformer(token_BL[:, :4], condition), whole[:, :5])


@torch.no_grad()
def test_generation_under_autocast_stays_near_float32(teacher, token_BL, condition):
    exact = teacher.forced_logits(token_BL, condition, GUIDED)
    with torch.autocast("cpu", torch.bfloat16):
        state = teacher.start(condition, GUIDED, token_BL[:, :6])
        logits_BKV = teacher.next_logits(teacher.feed(state, token_BL[:, 6:7]))
    assert logits_BKV.dtype == torch.float32
    torch.testing.assert_close(logits_BKV, exact[:, 7:8], rtol=0.1, atol=0.1)


def test_a_fresh_transformer_predicts_uniformly_and_learns():
    torch.manual_seed(0)
    transformer = Transformer(CONFIG, dropout=0.1)
    token_BL, condition = torch.randint(24, (8, 16)), Labels.balanced(8, 5)
    assert not transformer(token_BL, condition).any()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        logits_BLV = transformer(token_BL, condition)
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), token_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


@torch.no_grad()
def test_images_and_tokens_pass_through_the_tokenizer(teacher, token_BL):
    code_BLC = teacher.codebook[token_BL]
    assert not code_BLC.requires_grad
    image = teacher.decode(code_BLC)
    assert image.shape == (3, 3, 8, 8)
    row_by_row = code_BLC.view(3, 4, 4, 4).permute(0, 3, 1, 2)
    assert torch.equal(image, teacher.tokenizer.decode_features(row_by_row))
    assert torch.equal(teacher.encode(image), teacher.tokenizer.encode(image))


def test_wrong_sizes_are_refused_with_their_value():
    sizes = dict(dim=32, num_layers=1, num_heads=2, vocab_size=24, num_tokens=16, num_classes=5)
    with pytest.raises(ValueError, match="15"):
        TransformerConfig(**sizes | {"num_tokens": 15})
    with pytest.raises(ValueError, match="36"):
        TransformerConfig(**sizes | {"dim": 36})
    with pytest.raises(ValueError, match="20 codes .* 24"):
        LlamaGenTeacher(small_tokenizer(20), Transformer(CONFIG))


def test_compiled_rotation_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(dim=48, num_layers=1, num_heads=2, vocab_size=8, num_tokens=9, num_classes=2)
    x = torch.randn(3, 10, 2, 2, 24)
    plain = rotate(x, rope_table(config))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rope_table(config)), plain, rtol=1e-6, atol=1e-6)
