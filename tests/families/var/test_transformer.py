from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition, Labels
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, TokenizerConfig
from distilled_decoding.families.var.transformer import DecodingState, Transformer, TransformerConfig, VARTeacher
from distilled_decoding.teacher import Guidance
from tests.families.var import reference
from tests.golden import load_case

PATCH_NUMS = (1, 2, 3, 4)
CONFIG = TransformerConfig(
    dim=32, num_layers=2, num_heads=2, vocab_size=24, code_dim=4, patch_nums=PATCH_NUMS, num_classes=5
)
LENGTH = 30
GUIDED = Guidance(2.5, "linear")
PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


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


def randomised(transformer: Transformer) -> Transformer:
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


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


def greedy(
    teacher: VARTeacher, condition: Condition, guidance: Guidance
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tokens, guided logits and unconditional logits of every scale."""
    state = teacher.start(condition, guidance)
    tokens: list[Tensor] = []
    guided: list[Tensor] = []
    unconditional: list[Tensor] = []
    for block in range(teacher.order.num_blocks):
        guided.append(teacher.next_logits(state))
        unconditional.append(state.logits.chunk(2)[1])
        tokens.append(guided[-1].argmax(-1))
        if block + 1 < teacher.order.num_blocks:
            state = teacher.feed(state, tokens[-1])
    return tokens, guided, unconditional


@torch.no_grad()
@pytest.mark.parametrize("name", ["var_l2norm_tf", "var_plain_tf"])
def test_golden_teacher_forced_logits(name: str) -> None:
    case = load_case(name)
    case.check("logits", reference.transformer(case)(case.inputs["x_BLCv_wo_first_l"], reference.labels(case, 10)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["var_l2norm_ar_cfg1.5", "var_plain_ar_cfg1.5"])
def test_golden_greedy_generation(name: str) -> None:
    case = load_case(name)
    teacher, condition, guidance = reference.teacher(case), reference.labels(case, 10), reference.guidance(case)
    tokens, guided, unconditional = greedy(teacher, condition, guidance)
    token_BL = torch.cat(tokens, dim=1)
    code_BLC = lookup(token_BL, teacher.codebook)
    forced_BLV = teacher.forced_logits(token_BL, condition, guidance)
    _, *sums = teacher.tokenizer.partial_sums(code_BLC)
    for scale in range(teacher.order.num_blocks):
        case.check(f"idx_s{scale}", tokens[scale])
        case.check(f"logits_cfg_s{scale}", guided[scale])
        case.check(f"logits_cfg_s{scale}", forced_BLV[:, teacher.order.span(scale)])
        case.check(f"fhat_s{scale}", sums[scale])
        if case.config["keep_uncond"]:
            case.check(f"logits_uncond_s{scale}", unconditional[scale])
    case.check("image", reference.shown(teacher.decode(code_BLC)))


@torch.no_grad()
def test_golden_greedy_generation_at_the_published_structure() -> None:
    case = load_case("struct_var_ar")
    teacher, condition = reference.teacher(case), reference.labels(case, 1000)
    tokens, guided, _ = greedy(teacher, condition, reference.guidance(case))
    token_BL, logits_BLV = torch.cat(tokens, dim=1), torch.cat(guided, dim=1)
    case.check("ids", token_BL)
    case.check("logits_cfg_sub", logits_BLV[:, ::7, ::61])
    case.check("top1_logit", logits_BLV.amax(-1))
    sums = teacher.tokenizer.partial_sums(lookup(token_BL, teacher.codebook))
    case.check("fhat_sub2", sums[-1][:, :, ::2, ::2])
    for part, excerpt in reference.excerpts(reference.shown(teacher.tokenizer.decode_features(sums[-1]))).items():
        case.check(f"image_{part}", excerpt)
    case.check("tf_logits_sub", teacher.transformer(teacher.tokenizer.next_inputs(sums), condition)[:, ::7, ::61])


def published_sizes(depth: int, patch_nums: tuple[int, ...] = PUBLISHED, shared_aln: bool = False) -> TransformerConfig:
    return TransformerConfig(
        dim=64 * depth,
        num_layers=depth,
        num_heads=depth,
        vocab_size=4096,
        code_dim=32,
        patch_nums=patch_nums,
        num_classes=1000,
        shared_aln=shared_aln,
    )


def published_shapes(depth: int, positions: int, levels: int, shared_aln: bool = False) -> dict[str, tuple[int, ...]]:
    """The parameters of a published VAR, which are also the first ones of its student."""
    width = 64 * depth
    linear = {
        "word_embed": (width, 32),
        "head_nm.ada_lin.1": (2 * width, width),
        "head": (4096, width),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "pos_start": (1, 1, width),
        "pos_1LC": (1, positions, width),
        "class_emb.weight": (1001, width),
        "lvl_embed.weight": (levels, width),
    }
    if shared_aln:
        linear["shared_ada_lin.1"] = (6 * width, width)
    for block in (f"blocks.{index}" for index in range(depth)):
        linear[f"{block}.attn.proj"] = (width, width)
        linear[f"{block}.ffn.fc1"] = (4 * width, width)
        linear[f"{block}.ffn.fc2"] = (width, 4 * width)
        shapes[f"{block}.attn.scale_mul_1H11"] = (1, depth, 1, 1)
        shapes[f"{block}.attn.q_bias"] = shapes[f"{block}.attn.v_bias"] = (width,)
        shapes[f"{block}.attn.mat_qkv.weight"] = (3 * width, width)
        if shared_aln:
            shapes[f"{block}.ada_gss"] = (1, 1, 6, width)
        else:
            linear[f"{block}.ada_lin.1"] = (6 * width, width)
    for name, (rows, columns) in linear.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


@pytest.mark.parametrize(
    ("depth", "parameters", "tensors"),
    [(16, 310_283_520, 202), (20, 600_917_136, 250), (24, 1_033_399_360, 298), (30, 2_010_020_356, 370)],
)
def test_parameters_of_the_published_models(depth: int, parameters: int, tensors: int) -> None:
    with torch.device("meta"):
        model = Transformer(published_sizes(depth))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(shapes) == tensors
    assert shapes == published_shapes(depth, 680, 10)


def test_parameters_of_the_published_model_with_one_shared_modulation() -> None:
    with torch.device("meta"):
        model = Transformer(published_sizes(36, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), shared_aln=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == 2_353_893_904
    assert len(shapes) == 408
    assert shapes == published_shapes(36, 2240, 10, shared_aln=True)


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
    unmasked = VARTeacher(teacher.tokenizer, teacher.transformer, masked_prefix=False)
    for blocks in range(4):
        prefix_BL = token_BL[:, : teacher.order.tokens_before(blocks)]
        state, other = (t.start(condition, GUIDED, prefix_BL) for t in (teacher, unmasked))
        same = torch.allclose(teacher.next_logits(state), unmasked.next_logits(other), rtol=1e-3, atol=1e-3)
        assert same == (blocks == 0)
    logits_BLV = step_by_step(unmasked, token_BL, condition, GUIDED)
    assert torch.equal(logits_BLV, step_by_step(teacher, token_BL, condition, GUIDED))


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
def test_a_position_reads_its_own_scale_and_the_coarser_ones(teacher, token_BL, condition) -> None:
    input_BLC = inputs(teacher, token_BL)
    before = teacher.transformer(input_BLC, condition)
    block_L = teacher.order.block_L()
    for position in (1, 7, 29):
        changed_BLC = input_BLC.clone()
        changed_BLC[:, position - 1] += 1
        moved_L = (teacher.transformer(changed_BLC, condition) != before).any(-1).any(0)
        assert torch.equal(moved_L, block_L >= block_L[position])


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
def test_forward_reads_neither_more_nor_less_than_it_needs(teacher, token_BL, condition) -> None:
    input_BLC = inputs(teacher, token_BL)
    assert torch.equal(inputs(teacher, token_BL[:, :14]), input_BLC)
    whole = teacher.transformer(input_BLC, condition)
    for blocks in (1, 2, 3):
        length = teacher.order.tokens_before(blocks)
        part = teacher.transformer(input_BLC[:, : length - 1], condition)
        torch.testing.assert_close(part, whole[:, :length])


@torch.no_grad()
def test_a_shared_modulation_equals_one_of_each_layer_with_the_same_values(token_BL, condition) -> None:
    """No reference data has `shared_aln`; this makes it a matter of the layers that have it."""
    torch.manual_seed(0)
    shared = randomised(Transformer(replace(CONFIG, shared_aln=True)))
    weights = shared.state_dict()
    weight, bias = weights.pop("shared_ada_lin.1.weight"), weights.pop("shared_ada_lin.1.bias")
    for index in range(CONFIG.num_layers):
        own = weights.pop(f"blocks.{index}.ada_gss").flatten()
        weights |= {f"blocks.{index}.ada_lin.1.weight": weight, f"blocks.{index}.ada_lin.1.bias": bias + own}
    plain = Transformer(CONFIG).eval()
    plain.load_state_dict(weights)
    input_BLC = torch.randn(3, LENGTH - 1, 4)
    torch.testing.assert_close(shared(input_BLC, condition), plain(input_BLC, condition))


@torch.no_grad()
def test_generation_under_autocast_stays_near_float32(teacher, token_BL, condition) -> None:
    exact = teacher.forced_logits(token_BL, condition, GUIDED)
    with torch.autocast("cpu", torch.bfloat16):
        state = teacher.start(condition, GUIDED, token_BL[:, :5])
        logits_BKV = teacher.next_logits(teacher.feed(state, token_BL[:, 5:14]))
    assert logits_BKV.dtype == torch.float32
    torch.testing.assert_close(logits_BKV, exact[:, 14:], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("shared_aln", [False, True])
def test_a_fresh_transformer_predicts_uniformly_and_learns(shared_aln: bool) -> None:
    torch.manual_seed(0)
    transformer = Transformer(replace(CONFIG, shared_aln=shared_aln))
    token_BL, condition = torch.randint(24, (8, LENGTH)), Labels.balanced(8, 5)
    input_BLC = torch.randn(8, LENGTH - 1, 4)
    assert not transformer(input_BLC, condition).any()
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        logits_BLV = transformer(input_BLC, condition)
        loss = torch.nn.functional.cross_entropy(logits_BLV.flatten(0, 1), token_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in transformer.parameters())


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


def test_wrong_sizes_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="33"):
        TransformerConfig(**asdict(CONFIG) | {"dim": 33})
    with pytest.raises(ValueError, match=r"\(1, 4, 3\)"):
        TransformerConfig(**asdict(CONFIG) | {"patch_nums": (1, 4, 3)})
    with pytest.raises(ValueError, match=r"\(20, 4\) .* \(24, 4\)"):
        VARTeacher(small_tokenizer(20), Transformer(CONFIG))
    with pytest.raises(ValueError, match=r"\(1, 2, 4\) .* \(1, 2, 3, 4\)"):
        VARTeacher(small_tokenizer(patch_nums=(1, 2, 4)), Transformer(CONFIG))
