from dataclasses import replace

import pytest
import torch

from distilled_decoding.condition import Labels
from distilled_decoding.families.llamagen.transformer import (
    Transformer,
    TransformerConfig,
    attention_mask,
    rope_table,
    rotate,
)
from tests import tiny
from tests.families.llamagen import reference
from tests.golden import load_case

CONFIG = TransformerConfig(dim=32, num_layers=2, num_heads=2, vocab_size=24, num_tokens=16, num_classes=5)
CAPTIONED = replace(CONFIG, num_classes=0, caption_tokens=7, caption_dim=6)


def randomised(transformer: Transformer) -> Transformer:
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


@torch.no_grad()
def test_golden_teacher_forced_logits_and_rope_table():
    case = load_case("llamagen_gpt_c2i_tf")
    transformer = reference.transformer(case)
    case.check("logits", transformer(case.inputs["idx"], reference.labels(case, 10)))
    case.check("freqs_cis", rope_table(transformer.config))


@torch.no_grad()
def test_golden_teacher_forced_logits_and_rope_table_of_captions():
    case = load_case("llamagen_gpt_t2i_tf")
    transformer = reference.transformer(case)
    case.check("logits", transformer(case.inputs["idx"], reference.captions(case, masked=False)))
    case.check("logits_masked", transformer(case.inputs["idx"], reference.captions(case, masked=True)))
    case.check("freqs_cis", rope_table(transformer.config))


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


def test_a_transformer_of_captions_has_the_published_names_where_classes_would_be():
    shapes = {name: tuple(tensor.shape) for name, tensor in Transformer(CAPTIONED).state_dict().items()}
    others = {name: tuple(tensor.shape) for name, tensor in Transformer(CONFIG).state_dict().items()}
    of_captions = {name.removeprefix("cls_embedding."): shapes[name] for name in shapes.keys() - others.keys()}
    assert of_captions == {
        "uncond_embedding": (7, 6),
        "cap_proj.fc1.weight": (32, 6),
        "cap_proj.fc2.weight": (32, 32),
    }
    assert others.keys() - shapes.keys() == {"cls_embedding.embedding_table.weight"}


def test_the_published_null_caption_is_no_parameter():
    with torch.device("meta"):
        config = TransformerConfig(
            dim=1280,
            num_layers=36,
            num_heads=20,
            vocab_size=16384,
            num_tokens=256,
            num_classes=0,
            caption_tokens=120,
            caption_dim=2048,
        )
        model = Transformer(config)
    assert sum(p.numel() for p in model.parameters()) == 777_678_080
    assert sum(b.numel() for b in model.buffers()) == 120 * 2048
    assert len(model.state_dict()) == 258


def test_padding_is_attended_to_by_itself_alone():
    attended_BP = torch.tensor([[True, True, True, True], [False, False, True, True]])
    whole = attention_mask(attended_BP, torch.arange(4), 4)
    assert whole.int().squeeze(1).tolist() == [
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]],
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]],
    ]
    for first, end in ((0, 2), (1, 3), (3, 4)):
        part = attention_mask(attended_BP, torch.arange(first, end), end)
        assert torch.equal(part, whole[:, :, first:end, :end])
    assert torch.equal(attention_mask(None, torch.arange(4), 4), whole[:1])


@torch.no_grad()
def test_forward_reads_neither_more_nor_less_than_it_needs():
    transformer, condition = randomised(Transformer(CONFIG)), Labels.checked([4, 0, 2], 5)
    token_BL = torch.randint(CONFIG.vocab_size, (3, CONFIG.num_tokens))
    whole = transformer(token_BL, condition)
    assert torch.equal(transformer(token_BL[:, :-1], condition), whole)
    torch.testing.assert_close(transformer(token_BL[:, :4], condition), whole[:, :5])


def test_a_fresh_transformer_predicts_uniformly_and_learns():
    torch.manual_seed(0)
    transformer = Transformer(CONFIG, dropout=0.1)
    token_BL, condition = torch.randint(24, (8, 16)), tiny.labels(8, 5)
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


def test_wrong_sizes_are_refused_with_their_value():
    sizes = dict(dim=32, num_layers=1, num_heads=2, vocab_size=24, num_tokens=16, num_classes=5)
    with pytest.raises(ValueError, match="15"):
        TransformerConfig(**sizes | {"num_tokens": 15})
    with pytest.raises(ValueError, match="36"):
        TransformerConfig(**sizes | {"dim": 36})
    for wrong in (
        {"num_classes": 0},
        {"caption_tokens": 7, "caption_dim": 6},
        {"num_classes": 0, "caption_tokens": 7},
        {"num_classes": 0, "caption_dim": 6},
    ):
        values = {"num_classes": 5, "caption_tokens": 0, "caption_dim": 0} | wrong
        with pytest.raises(ValueError, match="got " + ", ".join(f"{name} {value}" for name, value in values.items())):
            TransformerConfig(**sizes | wrong)


def test_compiled_rotation_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TransformerConfig(dim=48, num_layers=1, num_heads=2, vocab_size=8, num_tokens=9, num_classes=2)
    x = torch.randn(3, 10, 2, 2, 24)
    plain = rotate(x, rope_table(config))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(rotate(x, rope_table(config)), plain, rtol=1e-6, atol=1e-6)
