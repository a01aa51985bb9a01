"""Checkpoints of a training: whole or not there, checked before they are trusted, good for any number of processes.

A checkpoint is a folder of safetensors files and `state.json`, which says what they are of and what they hash to. It
is written beside its place, brought to the disk, and put there by a rename, and only then is an old one dropped. One
process writes all, or, of a sharded student, each its share (torch.distributed.checkpoint).
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from distilled_decoding.checkpoint import first_difference, load_json, load_tensors, save_json, save_tensors, sha256
from distilled_decoding.parallel import told_by_first
from distilled_decoding.processes import first_acts, is_first, rank, world_size

_NONE: Mapping[str, Any] = {}
_FORMAT = 1
_RECORD = "state.json"
_TENSORS = "state.safetensors"


@dataclass(frozen=True)
class Counts:
    """How far a training is.

    Attributes:
        updates: done, skipped ones included.
        skipped: not done because loss or gradient were not finite.
        skipped_in_row: of them, the latest without another in between.
    """

    updates: int = 0
    skipped: int = 0
    skipped_in_row: int = 0

    def after(self, finite: bool) -> "Counts":
        """The counts one update later."""
        if finite:
            return Counts(self.updates + 1, self.skipped)
        return Counts(self.updates + 1, self.skipped + 1, self.skipped_in_row + 1)


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they lie, `update-000500` and so on.
        identity: what determines the training, as JSON gives it back; a checkpoint of another is not taken.
        save_every: updates between checkpoints.
        keep_last: how many are kept.

    Raises:
        ValueError: a number that is not positive.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any] = _NONE, save_every: int = 500, keep_last: int = 3
    ) -> None:
        if save_every < 1 or keep_last < 1:
            raise ValueError(f"save_every and keep_last must be at least 1, got {save_every} and {keep_last}")
        self.folder = folder
        self.identity = json.loads(json.dumps(dict(identity), default=str))
        self.save_every = save_every
        self.keep_last = keep_last

    def due(self, update: int) -> bool:
        """Whether one is to be written after an update, counted from 1."""
        return update % self.save_every == 0

    def save(self, tensors: Mapping[str, Tensor], counts: Counts, name: str = "update") -> Path:
        """Write a checkpoint; all processes take part.

        Args:
            tensors: everything that changes in training, the same in every process, or sharded.
            counts: after how many updates.
            name: what the folder is called before its number; only `update` is gone on from, or dropped later.

        Returns:
            The checkpoint.

        Raises:
            OSError: the disk is full, or alike; what was there before is left as it was.
        """
        path = self.folder / f"{name}-{counts.updates:06d}"
        part = path.with_name(f"{path.name}.part")

        def begin() -> None:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

        def finish() -> None:
            files = dict(sorted((name, digest) for own in hashes for name, digest in own.items()))
            values = {"format": _FORMAT, "identity": self.identity, "counts": asdict(counts), "files": files}
            save_json(part / _RECORD, {**values, "sha256": _digest(values)})
            if path.exists():
                _remove(path)
            part.rename(path)
            _sync(self.folder)
            self._drop_old()

        first_acts(begin)
        try:
            _write(part, tensors)
            hashes = _hashes(part)
            first_acts(finish)
        except BaseException:
            if is_first():
                shutil.rmtree(part, ignore_errors=True)
            raise
        return path

    def load_newest(self, tensors: Mapping[str, Tensor]) -> Counts:
        """Go on from the newest valid checkpoint, with a warning for each newer one that is damaged or foreign.

        Args:
            tensors: what `save` was given; they are overwritten in place.

        Returns:
            How far it is; zeros when there is no checkpoint.

        Raises:
            ValueError: there are checkpoints, but none is valid.
        """
        path = told_by_first(self._newest)
        return Counts() if path is None else self._read(path, tensors)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> Counts:
        """Go on from the checkpoint that was asked for; see `load_newest`.

        Raises:
            ValueError: it is missing, damaged, or of another training.
        """
        told_by_first(lambda: self._check(path))
        return self._read(path, tensors)

    def _newest(self) -> Path | None:
        """The newest valid checkpoint; what a process that was killed left half done is cleared away."""
        for part in self.folder.glob("*.part"):
            shutil.rmtree(part)
        self._drop_old()
        found = self._numbered()
        problems = []
        for number in sorted(found, reverse=True):
            try:
                self._check(found[number])
            except ValueError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                warnings.warn(f"{problem}; going on from {found[number].name}", stacklevel=2)
            return found[number]
        if problems:
            raise ValueError(f"no checkpoint in {self.folder} is valid: {problems[0]}; delete them to start anew")
        return None

    def _check(self, path: Path) -> None:
        """Make sure that a checkpoint is whole and of this training; says what is wrong with it."""
        if not path.is_dir():
            raise ValueError(f"the checkpoint {path} is missing")
        values = load_json(path / _RECORD)
        if not isinstance(values, dict) or values.pop("sha256", None) != _digest(values):
            raise ValueError(f"the checkpoint {path} is damaged: {_RECORD} is not what was written")
        if values["format"] != _FORMAT:
            raise ValueError(f"the checkpoint {path} has format {values['format']}, this version reads {_FORMAT}")
        if difference := first_difference(values["identity"], self.identity):
            raise ValueError(f"the checkpoint {path} is of another training: its {difference}")
        for name, digest in values["files"].items():
            if not (path / name).is_file():
                raise ValueError(f"the checkpoint {path} is damaged: {name} is missing")
            if sha256(path / name) != digest:
                raise ValueError(f"the checkpoint {path} is damaged: the hash of {name} is not the recorded one")

    def _read(self, path: Path, tensors: Mapping[str, Tensor]) -> Counts:
        record = load_json(path / _RECORD)
        if list(record["files"]) == [_TENSORS] and not _is_sharded(tensors):
            read, _ = load_tensors(path / _TENSORS)
            for name, target in tensors.items():
                target.copy_(read[name])
        else:
            dcp.load(
                dict(tensors), storage_reader=_storage().HuggingFaceStorageReader(str(path)), no_dist=world_size() == 1
            )
        return Counts(**record["counts"])

    def _numbered(self) -> dict[int, Path]:
        found = {path: re.fullmatch(r"update-(\d+)", path.name) for path in self.folder.glob("update-*")}
        return {int(match[1]): path for path, match in found.items() if match}

    def _drop_old(self) -> None:
        """Keep the last ones. One that a stop left between two regular ones goes as soon as there is a newer."""
        found = self._numbered()
        kept = [n for n in sorted(found) if self.due(n) or n == max(found)][-self.keep_last :]
        for number in found.keys() - set(kept):
            _remove(found[number])


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    if _is_sharded(tensors):
        writer = _storage().HuggingFaceStorageWriter(str(folder), save_distributed=True)
        try:
            dcp.save(dict(tensors), storage_writer=writer)
        except dcp.CheckpointException as error:
            reasons = "; ".join(str(reason) for reason, _ in error.failures.values())
            raise OSError(f"{folder} could not be written ({reasons}); nothing that was there has changed") from error
    elif is_first():
        save_tensors(folder / _TENSORS, tensors)


def _hashes(folder: Path) -> list[dict[str, str]]:
    """Hashes of the files that are in a folder when all processes have written, each file's by one of them."""
    first_acts(lambda: _sync(folder))
    own = {path.name: sha256(path) for path in sorted(folder.iterdir())[rank() :: world_size()]}
    hashes: list[Any] = [own]
    if world_size() > 1:
        hashes = [None] * world_size()
        dist.all_gather_object(hashes, own)
    return hashes


def _is_sharded(tensors: Mapping[str, Tensor]) -> bool:
    return any(isinstance(value, DTensor) for value in tensors.values())


def _storage() -> Any:
    """torch's reader and writer of safetensors; its own format would need pickle."""
    try:
        from torch.distributed.checkpoint import hf_storage
    except ImportError as error:
        raise ValueError(f"sharded checkpoints need a newer torch than {torch.__version__}") from error
    return hf_storage


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _sync(folder: Path) -> None:
    """Bring a folder's files and their names to the disk."""
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(folder: Path) -> None:
    """Remove a folder; a crash leaves nothing under its name that looks whole."""
    shutil.rmtree(folder.rename(folder.with_name(f"{folder.name}.old.part")))
