"""Trajectories on disk: a manifest and shards of fixed-width records, two bytes a token.

`manifest.json` holds what determines the trajectories, and how many there shall be. Each shard is two files, the
tensors and a small JSON that says what they are, so that processes which make different shards share no file.

Axis letters: N trajectories, L tokens in a sequence.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from distilled_decoding.checkpoint import (
    MANIFEST,
    first_difference,
    from_json,
    load_json,
    save_json,
    save_tensors,
    sha256,
)
from distilled_decoding.processes import holds_files


@dataclass(frozen=True, eq=False)
class Shard:
    """Some trajectories: tokens int64 [N, L], labels int64 [N], keys of their noise int64 [N].

    A label is what the image was asked for: a class, or the number of a prompt.
    """

    token_NL: Tensor
    label_N: Tensor
    key_N: Tensor

    @classmethod
    def cat(cls, shards: "Sequence[Shard]") -> "Shard":
        """Several shards as one."""
        return cls(
            torch.cat([s.token_NL for s in shards]),
            torch.cat([s.label_N for s in shards]),
            torch.cat([s.key_N for s in shards]),
        )

    def __len__(self) -> int:
        return len(self.key_N)

    def __getitem__(self, index: slice | Tensor) -> "Shard":
        return Shard(self.token_NL[index], self.label_N[index], self.key_N[index])


@dataclass(frozen=True)
class _Record:
    """What a shard's JSON says: the run it is of, its number, and the size and hash of its tensors' file."""

    run: str
    number: int
    num: int
    bytes: int
    sha256: str


class TrajectoryStore:
    """A folder of trajectories, read from disk as they are asked for: `len(store)`, `store[index_N]`.

    Attributes:
        folder: where it is.
        manifest: what made it, and `num`, how many trajectories there shall be.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._run = _digest({k: v for k, v in manifest.items() if k != "num"})

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any], num: int) -> "TrajectoryStore":
        """Open a folder for writing; one that exists must have been made from the same settings.

        Args:
            folder: new or empty, or of the same run.
            settings: what determines the trajectories.
            num: how many there shall be at least.

        Raises:
            ValueError: the folder holds something else.
        """
        if (folder / MANIFEST).is_file():
            store = cls.open(folder)
            store.refuse_other(settings, "choose another --out")
        elif holds_files(folder):
            raise ValueError(f"{folder} is not empty and holds no trajectories; choose another --out")
        else:
            store = cls(folder, json.loads(json.dumps({**settings, "num": 0})))
        if len(store) < num:
            store.manifest["num"] = num
            save_json(folder / MANIFEST, store.manifest)
        return store

    @classmethod
    def open(cls, folder: Path) -> "TrajectoryStore":
        """Open a folder for reading.

        Raises:
            ValueError: there is no manifest, or it is not one of trajectories.
        """
        if not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} holds no trajectories (no {MANIFEST}); make them with `trajectories`")
        manifest = load_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or not {"teacher", "shard_size", "num"} <= set(manifest):
            raise ValueError(f"{folder / MANIFEST} is not a manifest of trajectories")
        return cls(folder, manifest)

    def refuse_other(self, settings: Mapping[str, Any], way_out: str) -> None:
        """Compare the manifest with settings that it must agree with.

        Args:
            settings: some fields of the manifest or all.
            way_out: what to advise when they differ.

        Raises:
            ValueError: they differ; says in what, with the two values.
        """
        found = {key: self.manifest.get(key) for key in settings}
        if difference := first_difference(found, json.loads(json.dumps(settings))):
            raise ValueError(f"{self.folder} holds another run: its {difference}; {way_out}")

    @property
    def num_shards(self) -> int:
        """How many shards there shall be."""
        return -(-len(self) // self.manifest["shard_size"])

    @property
    def identity(self) -> str:
        """One hash of everything in the store.

        Raises:
            ValueError: a shard is missing.
        """
        records = [asdict(self._record(number)) for number in range(self.num_shards)]
        return _digest({"manifest": self.manifest, "shards": records})

    def span(self, number: int) -> range:
        """The trajectories that a shard shall hold."""
        size = self.manifest["shard_size"]
        return range(number * size, min((number + 1) * size, len(self)))

    def num_begun(self, number: int) -> int:
        """How many of them it holds, counted from the first; 0 when it is missing or not what it should be."""
        return 0 if self._fault(number) else self._record(number).num

    def __len__(self) -> int:
        return int(self.manifest["num"])

    def __getitem__(self, index_N: Tensor) -> Shard:
        """Some trajectories; nothing but these is held in memory.

        Raises:
            ValueError: a file that they are in is missing or cannot be read.
        """
        size = self.manifest["shard_size"]
        number_N, order_N = (index_N // size).sort(stable=True)
        row_N = index_N[order_N] % size
        parts = [self._rows(n, row_N[number_N == n]) for n in number_N.unique().tolist()]
        return Shard.cat(parts)[order_N.argsort()]

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard, or a longer one in its place.

        A crash in between leaves a shard that does not agree with its JSON, and is made again.
        """
        assert int(shard.token_NL.max()) < 2**16, "tokens are stored as uint16"
        path = self._path(number)
        tensors = {
            "token_NL": shard.token_NL.to(torch.uint16),
            "label_N": shard.label_N.to(torch.int32),
            "key_N": shard.key_N,
        }
        save_tensors(path, tensors)
        record = _Record(self._run, number, len(shard), path.stat().st_size, sha256(path))
        save_json(path.with_suffix(".json"), asdict(record))

    def problems(self) -> list[str]:
        """What is wrong, a sentence for each shard and each file too many; empty when every hash agrees."""
        found = [self._fault(number) or self._shortness(number) for number in range(self.num_shards)]
        strays = [f"{path} is foreign: this run has {self.num_shards} shards" for path in self.strays()]
        return [problem for problem in found if problem] + strays

    def check(self) -> None:
        """Read everything once.

        Raises:
            ValueError: something is wrong; says what, and how to mend it.
        """
        if found := self.problems():
            raise ValueError(f"{found[0]}; `verify {self.folder} --repair MODEL` makes again what is missing")

    def strays(self) -> list[Path]:
        """Files of shards that this run does not have."""
        wanted = {self._path(number).stem for number in range(self.num_shards)}
        return sorted(path for path in self.folder.glob("shard-*") if path.stem not in wanted)

    def _path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _record(self, number: int) -> _Record:
        path = self._path(number).with_suffix(".json")
        return from_json(_Record, load_json(path), path)

    def _fault(self, number: int) -> str | None:
        """What is wrong with what is there of a shard."""
        path = self._path(number)
        if not path.is_file():
            return f"{path} is missing"
        try:
            record = self._record(number)
        except ValueError as error:
            return str(error)
        if (record.run, record.number) != (self._run, number):
            other = f"shard {record.number} of run {record.run[:12]}"
            return f"{path} is foreign: it is {other}, not shard {number} of run {self._run[:12]}"
        size = path.stat().st_size
        if size != record.bytes:
            return f"{path} is truncated: it has {size} of {record.bytes} bytes"
        if (found := sha256(path)) != record.sha256:
            return f"{path} is damaged: its hash is {found[:12]}, not {record.sha256[:12]}"
        return None

    def _shortness(self, number: int) -> str | None:
        found, wanted = self._record(number).num, len(self.span(number))
        return (
            f"{self._path(number)} is unfinished: it has {found} of {wanted} trajectories" if found < wanted else None
        )

    def _rows(self, number: int, row_N: Tensor) -> Shard:
        path = self._path(number)
        try:
            # Mapped into memory, and anew each time, so that no page stays, however many shards there are.
            with safe_open(path, "pt") as file:
                token_NL, label_N, key_N = (file.get_tensor(name)[row_N] for name in ("token_NL", "label_N", "key_N"))
        except Exception as error:
            raise ValueError(f"{path} cannot be read ({error}); `verify {self.folder}` says what is wrong") from error
        return Shard(token_NL.long(), label_N.long(), key_N)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
