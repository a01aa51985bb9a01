"""Trajectories on disk: a manifest and shards of fixed-width records, two bytes a token.

Axis letters: N trajectories, L tokens in a sequence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilled_decoding.checkpoint import load_json, load_tensors, save_json, save_tensors, sha256

_MANIFEST = "manifest.json"


@dataclass(frozen=True, eq=False)
class Shard:
    """Some trajectories: tokens int64 [N, L], labels int64 [N], keys of their noise int64 [N]."""

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


class TrajectoryStore:
    """A folder of shards whose manifest says what made them."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest

    @classmethod
    def create(cls, folder: Path, settings: Mapping[str, Any]) -> "TrajectoryStore":
        """Open a folder for writing; one that exists must have been made from the same settings.

        Raises:
            ValueError: the folder holds something else.
        """
        path = folder / _MANIFEST
        if path.is_file():
            store = cls.open(folder)
            for key, value in _plain(settings).items():
                if store.manifest.get(key) != value:
                    raise ValueError(
                        f"{folder} holds another run: its {key} is {store.manifest.get(key)!r}, not {value!r}; "
                        "choose another --out"
                    )
            return store
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"{folder} is not empty and holds no trajectories; choose another --out")
        store = cls(folder, {**_plain(settings), "shards": {}})
        save_json(path, store.manifest)
        return store

    @classmethod
    def open(cls, folder: Path) -> "TrajectoryStore":
        """Open a folder for reading.

        Raises:
            ValueError: there is no manifest, or it is not one of trajectories.
        """
        if not (folder / _MANIFEST).is_file():
            raise ValueError(f"{folder} holds no trajectories (no {_MANIFEST}); make them with `trajectories`")
        manifest = load_json(folder / _MANIFEST)
        if not isinstance(manifest, dict) or not {"teacher", "shards"} <= set(manifest):
            raise ValueError(f"{folder / _MANIFEST} is not a manifest of trajectories")
        return cls(folder, manifest)

    @property
    def num_trajectories(self) -> int:
        """Trajectories in finished shards."""
        return sum(entry["num"] for entry in self.manifest["shards"].values())

    def num_in_shard(self, number: int) -> int:
        """Trajectories that a shard holds; 0 when it is not there."""
        return int(self._entry(number).get("num", 0))

    def read(self, number: int) -> Shard:
        """One shard.

        Raises:
            ValueError: it is missing or damaged.
        """
        entry = self._entry(number)
        path = self.folder / entry["file"]
        tensors, _ = load_tensors(path)
        if sha256(path) != entry["sha256"]:
            raise ValueError(f"{path} is damaged: its hash is not the manifest's; make the trajectories again")
        return Shard(tensors["token_NL"].long(), tensors["label_N"].long(), tensors["key_N"])

    def write(self, number: int, shard: Shard) -> None:
        """Write a shard, new or grown, under a new name and then enter it in the manifest.

        A crash between the two leaves the old one in place.
        """
        assert int(shard.token_NL.max()) < 2**16, "tokens are stored as uint16"
        path = self.folder / f"shard-{number:05d}-{len(shard):06d}.safetensors"
        tensors = {
            "token_NL": shard.token_NL.to(torch.uint16),
            "label_N": shard.label_N.to(torch.int32),
            "key_N": shard.key_N,
        }
        save_tensors(path, tensors)
        old = self._entry(number).get("file")
        self.manifest["shards"][f"{number:05d}"] = {"file": path.name, "num": len(shard), "sha256": sha256(path)}
        save_json(self.folder / _MANIFEST, self.manifest)
        if old not in (None, path.name):
            (self.folder / old).unlink()

    def load(self) -> Shard:
        """All trajectories in memory, in order.

        Raises:
            ValueError: a shard is missing or damaged, or there is none.
        """
        if not self.manifest["shards"]:
            raise ValueError(f"{self.folder} holds no finished shard; run `trajectories` again")
        return Shard.cat([self.read(number) for number in sorted(map(int, self.manifest["shards"]))])

    def problems(self) -> list[str]:
        """What is wrong with the shards, a sentence each; empty when every hash agrees."""
        found = []
        for entry in self.manifest["shards"].values():
            path = self.folder / entry["file"]
            if not path.is_file():
                found.append(f"{path} is missing")
            elif sha256(path) != entry["sha256"]:
                found.append(f"{path} is damaged: its hash is not the manifest's")
        return found

    def _entry(self, number: int) -> dict[str, Any]:
        return self.manifest["shards"].get(f"{number:05d}", {})


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back (tuples become lists)."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
