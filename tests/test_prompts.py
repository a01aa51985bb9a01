"""Prompts from files, and captions from a folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from distilled_decoding import prompts as module
from distilled_decoding.condition import Captions
from distilled_decoding.progress import Stopped
from distilled_decoding.prompts import (
    EncodedPrompts,
    encode_prompts,
    is_encoded,
    prompt_identity,
    prompt_table,
    read_prompts,
)
from distilled_decoding.text import TextEncoder
from tests import tiny

PROMPTS = ["red apple", "", "Blue  car", "ä", "red apple", "a cat", "b"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny.text_encoder()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts in a file, two in a batch."""
    monkeypatch.setattr(module, "_IN_FILE", 3)
    monkeypatch.setattr(module, "_BATCH", 2)


def written(folder: Path, name: str, content: str | bytes) -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("red\nblue\n", ["red", "blue"]),
        ("red\nblue", ["red", "blue"]),
        ("red\r\n\r\nblue\r\n", ["red", "", "blue"]),
        ("\n", [""]),
        ("red\n\n", ["red", ""]),
        ("\ufeffred\u2028apple\n", ["red\u2028apple"]),
    ],
)
def test_text_files_hold_one_prompt_a_line(content: str, expected: list[str], tmp_path: Path) -> None:
    assert read_prompts(written(tmp_path, "p.txt", content)) == expected


def test_csv_files_hold_prompts_in_a_column(tmp_path: Path) -> None:
    path = written(tmp_path, "p.csv", '\ufeffcaption,id\n"red, ripe ""apple""\nbig",1\n,2\nä\n')
    assert read_prompts(path, "caption") == ['red, ripe "apple"\nbig', "", "ä"]
    assert read_prompts(path, "id") == ["1", "2", ""]
    assert read_prompts(written(tmp_path, "one.csv", "caption\nred\n\nblue\n"), "caption") == ["red", "", "blue"]
    assert read_prompts(written(tmp_path, "two.csv", "caption,id\nred,1\n\nblue,2\n"), "caption") == ["red", "blue"]


def test_parquet_files_hold_prompts_in_a_column(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"caption": ["red", None, "ä"], "id": [1, 2, 3]}), tmp_path / "p.parquet")
    assert read_prompts(tmp_path / "p.parquet", "caption") == ["red", "", "ä"]
    with pytest.raises(ValueError, match="the column 'id' holds 1, which is no text"):
        read_prompts(tmp_path / "p.parquet", "id")
    with pytest.raises(ValueError, match="has no column 'text'; its columns are caption, id"):
        read_prompts(tmp_path / "p.parquet", "text")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        read_prompts(written(tmp_path, "q.parquet", "red"), "caption")


def test_parquet_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"p\.parquet needs the package pyarrow: pip install pyarrow"):
        read_prompts(written(tmp_path, "p.parquet", ""), "caption")


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("p.txt", b"red\nblue\xff\n", None, r"p\.txt is not UTF-8 in line 2; "),
        ("p.txt", "red\n".encode("utf-16"), None, r"is not UTF-8 in line 1; "),
        ("p.csv", b"caption\nred\ngr\xfcn\n", "caption", r"is not UTF-8 in line 3; "),
        ("p.txt", "", None, "holds no prompts"),
        ("p.csv", "caption\n", "caption", "holds no prompts"),
        ("p.csv", "caption,id\nred,1\n", "text", "has no column 'text'; its columns are caption, id"),
        ("p.csv", "", "text", "has no column 'text'; its columns are none"),
        ("p.csv", "caption\n" + "x" * 200_000, "caption", r"is not CSV in line 2 \(field larger"),
        ("p.csv", "caption\nred\n", None, r"p\.csv needs the name of a column; its columns are caption$"),
        ("p.txt", "red\n", "caption", "lines, not columns; leave the column 'caption' out"),
        ("p.json", "[]", None, r"give a \.txt \(one a line\), \.csv or \.parquet"),
    ],
)
def test_files_without_prompts_are_refused(
    name: str, content: str | bytes, column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_prompts(written(tmp_path, name, content), column)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in tmp_path / "p.txt", tmp_path:
        with pytest.raises(ValueError, match=f"{path}: there is no such file"):
            read_prompts(path)


def close(one: Captions, other: Captions) -> None:
    """Equal but for what float16 rounds away."""
    assert torch.equal(one.mask_BT, other.mask_BT) and torch.equal(one.null_B, other.null_B)
    torch.testing.assert_close(one.feature_BTF, other.feature_BTF, atol=2e-3, rtol=1e-3)


def test_prompts_come_back_from_a_folder_as_the_encoder_reads_them(
    encoder: TextEncoder, small: None, tmp_path: Path
) -> None:
    encode_prompts(encoder, PROMPTS, tmp_path)
    found, table = EncodedPrompts.open(tmp_path), prompt_table(encoder, PROMPTS)
    assert found.prompts == table.prompts == ["red apple", "", "blue car", "ä", "red apple", "a cat", "b"]
    assert len(found) == len(table) == 7 and found.identity == table.identity
    number_B = torch.tensor([6, 0, 1, 0, 4, 2])
    close(found[number_B], encoder.encode([PROMPTS[i] for i in number_B]))
    close(table[number_B], found[number_B])
    assert found[number_B].feature_BTF.dtype == torch.float32
    assert found[number_B].null_B.tolist() == [False, False, True, False, False, False]


def test_only_positions_with_text_are_stored_in_two_bytes_a_feature(
    encoder: TextEncoder, small: None, tmp_path: Path
) -> None:
    encode_prompts(encoder, PROMPTS, tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir())
    features = [f"features-{i:05d}.safetensors" for i in range(3)]
    assert files == [*features, "manifest.json", "prompts.txt", "run.json"]
    positions = sum(len(prompt.encode()) + 1 for prompt in EncodedPrompts.open(tmp_path).prompts)
    stored = [module.safe_open(tmp_path / name, "pt").get_tensor("feature_PF") for name in features]
    assert sum(len(feature_PF) for feature_PF in stored) == positions
    assert {feature_PF.dtype for feature_PF in stored} == {torch.float16}


def test_features_beyond_float16_are_stored_as_bfloat16(tmp_path: Path) -> None:
    encoder = tiny.text_encoder()
    encoder.encoder.encoder.final_layer_norm.weight.fill_(1e6)
    found = encode_prompts(encoder, ["red"], tmp_path)[torch.tensor([0])].feature_BTF
    torch.testing.assert_close(found, encoder.encode(["red"]).feature_BTF, atol=1, rtol=0.01)
    assert found.abs().max() > 65504


def test_the_identity_tells_texts_encoders_and_lengths_apart(encoder: TextEncoder) -> None:
    identity = prompt_identity(encoder, PROMPTS)
    assert set(identity) == {"prompts", "encoder", "max_tokens", "width"}
    assert (identity["max_tokens"], identity["width"]) == (12, 8)
    assert prompt_identity(encoder, [f" {prompt.upper()}" for prompt in PROMPTS]) == identity
    others = [PROMPTS[::-1], PROMPTS[:-1], ["red apple \n", *PROMPTS[1:3], "ö", *PROMPTS[4:]]]
    assert len({prompt_identity(encoder, other)["prompts"] for other in others} - {identity["prompts"]}) == 3
    assert prompt_identity(tiny.text_encoder(13), PROMPTS) == {**identity, "max_tokens": 13}
    other = tiny.text_encoder()
    other.encoder.shared.weight.mul_(2)
    assert prompt_identity(other, PROMPTS)["encoder"] != identity["encoder"]


class Stopping:
    """Progress that stops after some prompts."""

    def __init__(self, after: int) -> None:
        self.left, self.told = after, 0

    def __call__(self, items: int) -> None:
        self.told += items
        if self.told >= self.left:
            raise Stopped


def test_a_stopped_run_goes_on_to_the_same_bytes(encoder: TextEncoder, small: None, tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}

    encode_prompts(encoder, PROMPTS, tmp_path / "unbroken")
    with pytest.raises(Stopped):
        encode_prompts(encoder, PROMPTS, tmp_path / "stopped", Stopping(5))
    assert set(content(tmp_path / "stopped")) == {"features-00000.safetensors", "prompts.txt"}
    with pytest.raises(ValueError, match="holds no encoded prompts .* make them with `encode-prompts`"):
        EncodedPrompts.open(tmp_path / "stopped")
    told: list[int] = []
    encode_prompts(encoder, PROMPTS, tmp_path / "stopped", told.append)
    assert told == [3, 2, 1, 1] and content(tmp_path / "stopped") == content(tmp_path / "unbroken")


def test_a_damaged_file_is_found_and_made_again(encoder: TextEncoder, small: None, tmp_path: Path) -> None:
    found, path = encode_prompts(encoder, PROMPTS, tmp_path), tmp_path / "features-00001.safetensors"
    assert found.problems() == [] and is_encoded(tmp_path, PROMPTS) and not is_encoded(tmp_path, PROMPTS[:-1])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"\xff")
    assert found.problems() == [f"{path} is damaged: its hash is not the manifest's"]
    path.write_bytes(whole[:9])
    with pytest.raises(ValueError, match=f"{path} cannot be read .* `verify {tmp_path}`"):
        found[torch.tensor([0, 4])]
    path.unlink()
    assert found.problems() == [f"{path} is missing"] and not is_encoded(tmp_path, PROMPTS)
    with pytest.raises(ValueError, match=f"{path} is missing; `encode-prompts .*prompts.txt --out {tmp_path}`"):
        found.check()
    for content in whole[:-1] + b"\xff", None:
        if content:
            path.write_bytes(content)
        encode_prompts(encoder, PROMPTS, tmp_path)
        assert found.problems() == [] and path.read_bytes() == whole


def refused(encoder: TextEncoder, prompts: Sequence[str], folder: Path, message: str) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=message):
        encode_prompts(encoder, prompts, folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_of_something_else_is_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    encode_prompts(encoder, ["red"], tmp_path / "own")
    refused(encoder, ["blue"], tmp_path / "own", "holds another run: its prompts is .* choose another --out")
    refused(tiny.text_encoder(13), ["red"], tmp_path / "own", "its max_tokens is 12, not 13")
    (tmp_path / "other").mkdir()
    written(tmp_path / "other", "a", "b")
    refused(encoder, ["red"], tmp_path / "other", "is not empty")
    with pytest.raises(ValueError, match="no prompts; give one at least"):
        encode_prompts(encoder, [], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_texts_that_were_changed_afterwards_are_refused(encoder: TextEncoder, tmp_path: Path) -> None:
    encode_prompts(encoder, ["red", ""], tmp_path)
    written(tmp_path, "prompts.txt", "red\nblue\n")
    with pytest.raises(ValueError, match=r"prompts\.txt has changed since it was encoded"):
        EncodedPrompts.open(tmp_path)
    assert encode_prompts(encoder, ["red", ""], tmp_path).prompts == ["red", ""]
    written(tmp_path, "manifest.json", "{}")
    with pytest.raises(ValueError, match="is not a manifest of encoded prompts"):
        EncodedPrompts.open(tmp_path)


def test_a_prompt_that_is_too_long_is_counted_in_the_whole_file(
    encoder: TextEncoder, small: None, tmp_path: Path
) -> None:
    prompts = [*PROMPTS, "a very long prompt", "another long prompt"]
    with pytest.warns(UserWarning, match="^2 prompts are too long: prompt 8 is longer") as caught:
        encode_prompts(encoder, prompts, tmp_path)
    assert len(caught) == 1
