from dataclasses import asdict, replace

import pytest
import torch

from distilled_decoding.condition import Labels
from distilled_decoding.families.var.transformer import Transformer, TransformerConfig
from tests import tiny
from tests.families.var import reference
from tests.golden import load_case

PATCH_NUMS = (1, 2, 3, 4)
CONFIG = TransformerConfig(
    dim=32, num_layers=2, num_heads=2, vocab_size=24, code_dim=4, patch_nums=PATCH_NUMS, num_classes=5
)
LENGTH = 30
PUBLISHED = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def randomised(transformer: Transformer) -> Transformer:
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


@pytest.fixture
def transformer() -> Transformer:
    torch.manual_seed(0)
    return randomised(Transformer(CONFIG))


@pytest.fixture
def condition() -> Labels:
    return Labels.checked([4, 0, 2], 5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["var_l2norm_tf", "var_plain_tf"])
def test_golden_teacher_forced_logits(name: str) -> None:
    case = load_case(name)
    case.check("logits", reference.transformer(case)(case.inputs["x_BLCv_wo_first_l"], reference.labels(case, 10)))


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
def test_a_position_reads_its_own_scale_and_the_coarser_ones(transformer, condition) -> None:
    input_BLC = torch.randn(3, LENGTH - 1, 4)
    before = transformer(input_BLC, condition)
    block_L = transformer.levels.block_L()
    for position in (1, 7, 29):
        changed_BLC = input_BLC.clone()
        changed_BLC[:, position - 1] += 1
        moved_L = (transformer(changed_BLC, condition) != before).any(-1).any(0)
        assert torch.equal(moved_L, block_L >= block_L[position])


@torch.no_grad()
def test_forward_may_stop_behind_any_scale(transformer, condition) -> None:
    input_BLC = torch.randn(3, LENGTH - 1, 4)
    whole = transformer(input_BLC, condition)
    for blocks in (1, 2, 3):
        length = transformer.levels.tokens_before(blocks)
        part = transformer(input_BLC[:, : length - 1], condition)
        torch.testing.assert_close(part, whole[:, :length])


@torch.no_grad()
def test_a_shared_modulation_equals_one_of_each_layer_with_the_same_values(condition) -> None:
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


@pytest.mark.parametrize("shared_aln", [False, True])
def test_a_fresh_transformer_predicts_uniformly_and_learns(shared_aln: bool) -> None:
    torch.manual_seed(0)
    transformer = Transformer(replace(CONFIG, shared_aln=shared_aln))
    token_BL, condition = torch.randint(24, (8, LENGTH)), tiny.labels(8, 5)
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


def test_wrong_sizes_are_refused_with_their_value() -> None:
    with pytest.raises(ValueError, match="33"):
        TransformerConfig(**asdict(CONFIG) | {"dim": 33})
    with pytest.raises(ValueError, match=r"\(1, 4, 3\)"):
        TransformerConfig(**asdict(CONFIG) | {"patch_nums": (1, 4, 3)})
