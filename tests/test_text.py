"""Text encoders on a tiny T5 that reads bytes: no files, no network."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

from distilled_decoding.condition import Captions
from distilled_decoding.text import TextEncoder, clean
from tests import tiny

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny.text_encoder(MAX_TOKENS)


def alone(encoder: TextEncoder, text: str) -> torch.Tensor:
    """Features of a text without any padding, straight from transformers."""
    id_1T = torch.tensor([encoder.tokenizer(text)["input_ids"]])
    return encoder.encoder(id_1T).last_hidden_state[0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("  A Red\tApple\n", "a red apple"),
        ("fish &amp; chips", "fish & chips"),
        ("&lt;3", "<3"),
        ("Ärger İ", "ärger i̇"),
        ("\u2028", ""),
        ("", ""),
    ],
)
def test_prompts_are_cleaned(prompt: str, expected: str) -> None:
    assert clean(prompt) == expected


@torch.no_grad()
def test_captions_hold_the_encoders_features_at_their_end(encoder: TextEncoder) -> None:
    prompts = ["red", "a", "elevenbytes"]
    captions = encoder.encode(prompts)
    assert captions.feature_BTF.shape == (3, MAX_TOKENS, encoder.width) and captions.feature_BTF.dtype == torch.float32
    assert captions.mask_BT.sum(1).tolist() == [4, 2, 12] and captions.mask_BT[:, -1].all()
    assert not captions.null_B.any()
    for i, prompt in enumerate(prompts):
        mask_T = captions.mask_BT[i]
        torch.testing.assert_close(captions.feature_BTF[i, mask_T], alone(encoder, prompt), atol=1e-5, rtol=1e-5)
        assert not captions.feature_BTF[i, ~mask_T].any() and not (mask_T[:-1] & ~mask_T[1:]).any()


@torch.no_grad()
def test_left_padding_is_that_of_the_published_script(encoder: TextEncoder) -> None:
    """Which flips the mask and moves what is valid behind what is not, row by row."""
    words = encoder.tokenizer(["red", "an apple"], padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    feature_BTF = encoder.encoder(words.input_ids, attention_mask=words.attention_mask).last_hidden_state
    mask_BT = words.attention_mask
    rows = [torch.cat([x_TF[m_T.sum() :], x_TF[: m_T.sum()]]) for x_TF, m_T in zip(feature_BTF, mask_BT, strict=True)]
    emb_mask_BT = mask_BT.flip(-1)
    captions = encoder.encode(["red", "an apple"])
    assert torch.equal(captions.mask_BT, emb_mask_BT.bool())
    torch.testing.assert_close(captions.feature_BTF, torch.stack(rows) * emb_mask_BT[..., None])


def test_a_caption_does_not_depend_on_its_batch(encoder: TextEncoder) -> None:
    together, alone = encoder.encode(["red", "elevenbytes", ""]), encoder.encode(["red"])
    torch.testing.assert_close(together.feature_BTF[:1], alone.feature_BTF)


def test_an_empty_prompt_is_a_null_caption_of_one_end_token(encoder: TextEncoder) -> None:
    captions = encoder.encode(["", "a", " \n"])
    assert captions.null_B.tolist() == [True, False, True]
    assert captions.mask_BT[0].tolist() == [False] * (MAX_TOKENS - 1) + [True]
    assert torch.equal(captions.mask_BT[0], captions.mask_BT[2])


def test_too_long_a_prompt_is_cut_with_one_warning_that_says_where(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning) as caught:
        captions = encoder.encode(["a", "eleven byte is the most", "x" * 12])
    assert [str(warning.message) for warning in caught] == [
        '2 prompts are too long: prompt 2 is longer than 12 tokens and is cut after "…eleven byte"'
    ]
    torch.testing.assert_close(captions.feature_BTF[1], encoder.encode(["eleven byte"]).feature_BTF[0])
    with pytest.warns(UserWarning, match='^prompt 1 is longer than 12 tokens and is cut after "…x{11}"$'):
        encoder.encode(["x" * 12])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["x" * 11])


def test_a_character_that_is_cut_in_two_is_left_out_of_the_warning(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match='after "…äääää"$'):
        encoder.encode(["ä" * 6])


def test_no_prompts_are_refused(encoder: TextEncoder) -> None:
    with pytest.raises(ValueError, match="no prompts; give one at least"):
        encoder.encode([])


def test_gradients_flow_to_an_encoder_that_is_trained() -> None:
    encoder = tiny.text_encoder(MAX_TOKENS)
    encoder.encoder.requires_grad_(True)
    captions = encoder.features(encoder.tokens(["red"]))
    captions.feature_BTF.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.encoder.parameters())
    assert not encoder.encode(["red"]).feature_BTF.requires_grad


def same(one: Captions, other: Captions) -> bool:
    return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_what_is_saved_is_loaded_in_float32_from_two_folders_or_one(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"text_encoder", "text_tokenizer"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.suffix in (".bin", ".pt") for path in files)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files), "readable by all who use an installed package"
    loaded = TextEncoder.from_pretrained(tmp_path, MAX_TOKENS)
    assert loaded.identity == encoder.identity and loaded.width == encoder.width
    assert same(loaded.encode(["red", ""]), encoder.encode(["red", ""]))
    one = tmp_path / "one"
    tiny.text_encoder().encoder.half().save_pretrained(one)
    encoder.tokenizer.save_pretrained(one)
    halved = TextEncoder.from_pretrained(one, MAX_TOKENS)
    assert halved.encode(["red"]).feature_BTF.dtype == torch.float32
    assert halved.identity["weights"] != encoder.identity["weights"]
    assert not any(parameter.requires_grad for parameter in halved.encoder.parameters())


def test_the_identity_is_of_vocabulary_and_weights(encoder: TextEncoder) -> None:
    assert tiny.text_encoder(MAX_TOKENS + 1).identity == encoder.identity
    words = type(encoder.tokenizer)(extra_ids=3)
    other = TextEncoder(encoder.encoder, words, MAX_TOKENS).identity
    assert {name for name, value in other.items() if value != encoder.identity[name]} == {"tokenizer"}


def test_loading_says_nothing_and_leaves_transformers_as_it_was(
    encoder: TextEncoder, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    encoder.save_pretrained(tmp_path)
    TextEncoder.from_pretrained(tmp_path, MAX_TOKENS).encode(["a" * 5])
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_missing_encoder_is_named_with_the_way_out(
    encoder: TextEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"no text encoder 'google/flan-t5-tiny': .* or features made"):
        TextEncoder.from_pretrained("google/flan-t5-tiny", MAX_TOKENS)
    with pytest.raises(ValueError, match="holds no text encoder .* give a folder"):
        TextEncoder.from_pretrained(tmp_path, MAX_TOKENS)
    encoder.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text_encoder holds no vocabulary"):
        TextEncoder.from_pretrained(tmp_path / "text_encoder", MAX_TOKENS)
    with pytest.raises(ValueError, match="at least 2, .* got 1"):
        TextEncoder.from_pretrained(tmp_path, 1)


def test_weights_of_another_model_are_no_encoder(encoder: TextEncoder, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    encoder.save_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="holds no T5 encoder, which would have 'encoder.block.0"):
        TextEncoder.from_pretrained(tmp_path, MAX_TOKENS)


def test_a_tokenizer_without_an_end_token_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    encoder.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3}, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "text_tokenizer")
    with pytest.raises(ValueError, match="text_tokenizer holds a tokenizer that puts no end token behind a text"):
        TextEncoder.from_pretrained(tmp_path, MAX_TOKENS)


def test_no_code_of_a_folder_is_run(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path)
    folder = tmp_path / "text_tokenizer"
    config = {"tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["words.Words", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "words.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with pytest.raises(ValueError, match="holds no text encoder"):
        TextEncoder.from_pretrained(tmp_path, MAX_TOKENS)
    assert not (tmp_path / "run").exists()


def test_without_transformers_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"needs the package transformers: pip install 'distilled-decoding\[t2i\]'"):
        TextEncoder.from_pretrained("google/flan-t5-xl", 120)
