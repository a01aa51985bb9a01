"""Prompts: read from files, and encoded once into a folder, from which captions are read as they are asked for.

Axis letters: B batch, N prompts, T caption positions, F caption feature channels, P positions with text, one after
the other.
"""

import csv
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distilled_decoding.checkpoint import MANIFEST, PROMPTS, load_json, save_json, save_tensors, save_text, sha256
from distilled_decoding.condition import Captions
from distilled_decoding.processes import only_writer
from distilled_decoding.records import claim
from distilled_decoding.text import TextEncoder, clean

_IN_FILE = 1024
_BATCH = 32
_IDENTITY = ("prompts", "encoder", "max_tokens", "width")


def read_prompts(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file.

    Args:
        path: .txt with one prompt a line, where an empty line is an empty prompt; or .csv or .parquet.
        column: of the prompts, in a .csv or .parquet file.

    Raises:
        ValueError: there is no such file, or it is of another kind, or not UTF-8, or has no such column, or no prompts.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of prompts")
    kind = path.suffix.lower()
    if kind not in (".txt", ".csv", ".parquet"):
        raise ValueError(f"{path} is no file of prompts; give a .txt (one a line), .csv or .parquet file")
    if kind == ".txt":
        prompts = _lines_of(path, column)
    else:
        prompts = _csv_column(path, column) if kind == ".csv" else _parquet_column(path, column)
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


@dataclass(frozen=True)
class CaptionTable:
    """Captions in memory, asked for by number.

    Attributes:
        captions: all of them.
        prompts: their texts, as the encoder read them.
        identity: what determines them.
    """

    captions: Captions
    prompts: list[str]
    identity: dict[str, Any]

    def check(self) -> None:
        """Nothing lies on disk."""

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number_B: Tensor) -> Captions:
        return self.captions[number_B]


def prompt_table(encoder: TextEncoder, prompts: Sequence[str]) -> CaptionTable:
    """A few prompts, encoded and kept in memory, on the CPU; many go to a folder, see `encode_prompts`.

    Raises:
        ValueError: there are none.
    """
    captions = Captions.cat([batch.to("cpu") for batch in _encoded(encoder, encoder.tokens(prompts))])
    return CaptionTable(captions, [clean(prompt) for prompt in prompts], prompt_identity(encoder, prompts))


def prompt_identity(encoder: TextEncoder, prompts: Sequence[str]) -> dict[str, Any]:
    """What determines the captions of some prompts; nothing is encoded for it."""
    texts = hashlib.sha256(_joined(prompts).encode()).hexdigest()
    values = (texts, encoder.identity, encoder.max_tokens, encoder.width)
    return dict(zip(_IDENTITY, values, strict=True))


def is_encoded(folder: Path, prompts: Sequence[str]) -> bool:
    """Whether a folder holds these prompts encoded, all of them and undamaged."""
    try:
        found = EncodedPrompts.open(folder)
    except ValueError:
        return False
    return found.prompts == [clean(prompt) for prompt in prompts] and not found.problems()


class EncodedPrompts:
    """A folder of captions, read from disk as they are asked for: `len(prompts)`, `prompts[number_B]`.

    `manifest.json` says what made them, `prompts.txt` holds their texts, and each `features-*.safetensors` the features
    of 1,024 prompts at the positions with text, one after the other.

    Attributes:
        folder: where it is.
        prompts: the texts, as the encoder read them.
        manifest: what determines them, and the hash of each file.
    """

    def __init__(self, folder: Path, prompts: list[str], manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.prompts = prompts
        self.manifest = manifest

    @staticmethod
    def made(manifest: Any) -> bool:
        """Whether a manifest is that of such a folder."""
        return isinstance(manifest, dict) and {*_IDENTITY, "sha256"} <= set(manifest)

    @classmethod
    def open(cls, folder: Path) -> "EncodedPrompts":
        """Open a folder that `encode_prompts` has finished.

        Raises:
            ValueError: it is no such folder, or unfinished, or its texts have changed.
        """
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no encoded prompts (no {MANIFEST}); make them with `encode-prompts`")
        manifest = load_json(folder / MANIFEST)
        if not cls.made(manifest):
            raise ValueError(f"{folder / MANIFEST} is not a manifest of encoded prompts")
        prompts = read_prompts(folder / PROMPTS)
        if sha256(folder / PROMPTS) != manifest["prompts"]:
            way_out = "encode it into another folder, or what it was into this one"
            raise ValueError(f"{folder / PROMPTS} has changed since it was encoded; {way_out}")
        return cls(folder, prompts, manifest)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the captions."""
        return {name: self.manifest[name] for name in _IDENTITY}

    def problems(self) -> list[str]:
        """What is wrong with the files of features, a sentence each; empty when every hash agrees."""
        found = []
        for name, expected in self.manifest["sha256"].items():
            path = self.folder / name
            if not path.is_file():
                found.append(f"{path} is missing")
            elif sha256(path) != expected:
                found.append(f"{path} is damaged: its hash is not the manifest's")
        return found

    def check(self) -> None:
        """Read every file of features once.

        Raises:
            ValueError: something is wrong; says what, and how to mend it.
        """
        if found := self.problems():
            again = f"`encode-prompts {self.folder / PROMPTS} --out {self.folder}` and its encoder make it again"
            raise ValueError(f"{found[0]}; {again}")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, number_B: Tensor) -> Captions:
        """Captions in float32; nothing but these is held in memory.

        Raises:
            ValueError: a file that they are in is missing or cannot be read.
        """
        file_B, texts = number_B // _IN_FILE, [torch.empty(0)] * len(number_B)
        for file in file_B.unique().tolist():
            index_N = (file_B == file).nonzero()[:, 0]
            rows = (number_B[index_N] % _IN_FILE).tolist()
            for index, text_PF in zip(index_N.tolist(), self._read(file, rows), strict=True):
                texts[index] = text_PF
        length_B1 = torch.tensor([[len(text_PF)] for text_PF in texts])
        num_positions = self.manifest["max_tokens"]
        mask_BT = torch.arange(num_positions) >= num_positions - length_B1
        feature_BTF = torch.zeros(*mask_BT.shape, self.manifest["width"])
        feature_BTF[mask_BT] = torch.cat(texts).float()
        return Captions(feature_BTF, mask_BT, length_B1[:, 0] == 1)

    def _read(self, number: int, rows: Sequence[int]) -> list[Tensor]:
        """The features of some prompts of one file, each [P, F]."""
        path = _features(self.folder, number)
        try:
            # Mapped into memory, and anew each time, so that no page stays, however many files there are.
            with safe_open(path, "pt") as file:
                feature_PF, length_N = file.get_slice("feature_PF"), file.get_tensor("length_N").long()
                end_N = length_N.cumsum(0)
                return [feature_PF[int(end_N[row] - length_N[row]) : int(end_N[row])] for row in rows]
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}); `verify {self.folder}` says what is wrong") from error


def encode_prompts(
    encoder: TextEncoder, prompts: Sequence[str], folder: Path, progress: Callable[[int], None] = lambda items: None
) -> EncodedPrompts:
    """Encode prompts into a folder; a stopped run goes on with the file that it was at.

    Args:
        encoder: the text encoder.
        prompts: at least one; empty ones become null captions.
        folder: new or empty, or of the same prompts and encoder.
        progress: told of the number of prompts that are finished, as they become so.

    Raises:
        ValueError: no prompts, or the folder holds something else or is being written.
    """
    tokens, identity = encoder.tokens(prompts), prompt_identity(encoder, prompts)
    with only_writer(folder):
        claim(folder, "encode-prompts", identity)
        done = load_json(folder / MANIFEST).get("sha256", {}) if (folder / MANIFEST).is_file() else {}
        save_text(folder / PROMPTS, _joined(prompts))
        hashes = {}
        for number, first in enumerate(range(0, len(tokens), _IN_FILE)):
            path, part = _features(folder, number), tokens[first : first + _IN_FILE]
            # Files take their place whole; what has been damaged since the folder was finished is made again.
            if path.is_file() and done.get(path.name) in (None, sha256(path)):
                progress(len(part))
            else:
                _write(path, encoder, part, progress)
            hashes[path.name] = sha256(path)
        save_json(folder / MANIFEST, {**identity, "sha256": hashes})
    return EncodedPrompts.open(folder)


def _write(path: Path, encoder: TextEncoder, tokens: Sequence[list[int]], progress: Callable[[int], None]) -> None:
    parts = []
    for captions in _encoded(encoder, tokens):
        parts.append(captions.feature_BTF[captions.mask_BT].cpu())
        progress(len(captions))
    feature_PF = torch.cat(parts)
    half = feature_PF.half()
    # float16 is the finer of the two, but its range is small.
    stored = half if half.isfinite().all() else feature_PF.bfloat16()
    length_N = torch.tensor([len(prompt_ids) for prompt_ids in tokens], dtype=torch.int32)
    save_tensors(path, {"feature_PF": stored, "length_N": length_N})


@torch.no_grad()
def _encoded(encoder: TextEncoder, tokens: Sequence[list[int]]) -> Iterator[Captions]:
    for first in range(0, len(tokens), _BATCH):
        yield encoder.features(tokens[first : first + _BATCH])


def _features(folder: Path, number: int) -> Path:
    return folder / f"features-{number:05d}.safetensors"


def _joined(prompts: Sequence[str]) -> str:
    """Prompts as the encoder reads them, one a line."""
    return "".join(f"{clean(prompt)}\n" for prompt in prompts)


def _text(path: Path) -> str:
    """A UTF-8 file's text, its line ends as they are."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 in line {line}; convert it, or take the right file") from error


def _lines_of(path: Path, column: str | None) -> list[str]:
    if column is not None:
        raise ValueError(f"{path} has lines, not columns; leave the column {column!r} out")
    text = _text(path)
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def _csv_column(path: Path, column: str | None) -> list[str]:
    reader = csv.reader(StringIO(_text(path), newline=""))
    try:
        names = next(reader, [])
        index = names.index(_checked(path, column, names))
        # A row without cells is a blank line, or, where one cell is all that there is, an empty one.
        return ["".join(row[index : index + 1]) for row in reader if row or len(names) == 1]
    except csv.Error as error:
        raise ValueError(f"{path} is not CSV in line {reader.line_num} ({error})") from error


def _parquet_column(path: Path, column: str | None) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"{path} needs the package pyarrow: pip install pyarrow") from error
    try:
        file = parquet.ParquetFile(path)
        name = _checked(path, column, file.schema_arrow.names)
        values = file.read([name])[name].to_pylist()
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path} cannot be read as Parquet ({error})") from error
    wrong = [value for value in values if not isinstance(value, str | None)]
    if wrong:
        raise ValueError(f"{path}: the column {name!r} holds {wrong[0]!r}, which is no text")
    return [value or "" for value in values]


def _checked(path: Path, column: str | None, names: Sequence[str]) -> str:
    """The name of a column that a file has."""
    if column is None or column not in names:
        asked = "needs the name of a column" if column is None else f"has no column {column!r}"
        raise ValueError(f"{path} {asked}; its columns are {', '.join(names) or 'none'}")
    return column
