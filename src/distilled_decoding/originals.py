"""Files written by `torch.save`, as researchers publish them: read without running what they hold, and unwrapped."""

import argparse
import pickle
import re
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.serialization import safe_globals

Weights = Literal["ema", "raw"]
"""Averaged weights, or those that the optimizer moved."""

_WRAPPERS: dict[Weights, tuple[str, ...]] = {
    "ema": ("trainer.ema_parameters", "ema"),
    "raw": ("trainer.var_wo_ddp", "model", "module", "state_dict", ""),
}
"""Where a file keeps its state dict; "" is the file itself."""


def read_original(path: Path, allow_namespace: bool = False) -> dict[Weights, dict[str, Tensor]]:
    """The state dicts of a published file, averaged, raw or both, mapped into memory rather than copied.

    Args:
        path: the file.
        allow_namespace: also accept `argparse.Namespace`, which training checkpoints keep their flags in; no other
            type is ever made of a file, and no code in it is run.

    Raises:
        ValueError: no such file, one that would make other objects than tensors, or one without a state dict.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the published files themselves")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    values = _load(path, allow_namespace)
    found = {kind: _first(values, wrappers) for kind, wrappers in _WRAPPERS.items()}
    state_dicts = {kind: state_dict for kind, state_dict in found.items() if state_dict is not None}
    if not state_dicts:
        held = f"the entries {', '.join(map(str, list(values)[:8]))}" if isinstance(values, Mapping) else type(values)
        known = ", ".join(name or "the file itself" for names in _WRAPPERS.values() for name in names)
        raise ValueError(f"{path} holds {held}, but no state dict, which would lie in one of: {known}")
    return state_dicts


def _load(path: Path, allow_namespace: bool) -> Any:
    allowed = safe_globals([argparse.Namespace]) if allow_namespace else nullcontext()
    try:
        with allowed:
            # The older format of torch.save is no archive and cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted is None:
            raise ValueError(f"{path} is damaged, or was not written by torch.save; fetch it again") from error
        if wanted[1] == "argparse.Namespace":
            raise ValueError(
                f"{path} is a training checkpoint, which also holds an argparse.Namespace, the flags of its run; "
                "--allow-namespace accepts that one type, which runs no code"
            ) from error
        raise ValueError(
            f"{path} is refused: it would make a {wanted[1]}, and a file that makes more than tensors can run any "
            "code; ask its publisher for the tensors alone"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # what torch raises on bytes that mean nothing depends on the bytes
        if "TorchScript" in str(error):
            raise ValueError(f"{path} is a TorchScript archive, which is a program; give the state dict") from error
        raise ValueError(f"{path} is damaged, or was not written by torch.save; fetch it again") from error


def _first(values: Any, wrappers: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The first of the places that holds a state dict: names and tensors, nothing else."""
    for wrapper in wrappers:
        inner = values
        for key in filter(None, wrapper.split(".")):
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
            return {str(name): value.detach() for name, value in inner.items()}
    return None
