"""Weights on disk: strict safetensors folders, hashed and written atomically.

A component is a folder with `config.json` and `model.safetensors`. A training state is one safetensors file that
holds modules, optimizers and the step, so that stopping and continuing changes nothing.
"""

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

Config = TypeVar("Config")

MANIFEST, PROMPTS = "manifest.json", "prompts.txt"
"""Files that more than one kind of folder holds: what made it, and prompts, one a line."""


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(module: nn.Module) -> str:
    """The sha256 of a module's parameter names and float32 values."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def replace_atomically(temporary: Path, path: Path) -> None:
    """Put a finished file in place so that a crash leaves either the old one or the new one."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.chmod(0o644)
    temporary.replace(path)


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Where to write a file that takes its place when the block ends well, and that vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        replace_atomically(temporary, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} could not be written ({error}); nothing that was there has changed") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 wherever it is.

    Raises:
        OSError: it could not be written, such as on a full disk; no part of it stays.
    """
    with _atomic(path) as temporary:
        temporary.write_bytes(text.encode())


def save_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    save_text(path, json.dumps(value, indent=2) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically (safetensors alone neither syncs nor gives others the right to read).

    Raises:
        OSError: it could not be written, such as on a full disk; no part of it stays.
    """
    with _atomic(path) as temporary:
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, temporary, dict(metadata or {}))


def load_tensors(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors and metadata.

    Raises:
        ValueError: the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; is the folder complete?")
    try:
        with safe_open(path, "pt", device=device) as file:
            return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"{path} is damaged ({error}); fetch or make it again.") from error


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Give tensors to a module; every key and shape must match.

    They are copied, or, when the module is on the meta device, become its parameters themselves.

    Raises:
        ValueError: names the first extra, missing or mis-shaped key.
    """
    own = module.state_dict()
    for key in [*own, *tensors]:
        if key not in tensors:
            raise ValueError(f"{source} lacks {key!r}: it does not hold a {type(module).__name__} of this config.")
        if key not in own:
            raise ValueError(f"{source} has {key!r}, which a {type(module).__name__} of this config does not have.")
        if own[key].shape != tensors[key].shape:
            found, expected = tuple(tensors[key].shape), tuple(own[key].shape)
            raise ValueError(f"{source}: {key!r} has shape {found}, but the config asks for {expected}.")
    module.load_state_dict(dict(tensors), strict=True, assign=any(p.is_meta for p in module.parameters()))


def save_component(folder: Path, module: nn.Module, config: Any, dtype: torch.dtype) -> None:
    """Write `config.json` (a dataclass) and `model.safetensors`, floats as `dtype`."""
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_tensors(folder / "model.safetensors", tensors)
    save_json(folder / "config.json", dataclasses.asdict(config))


def load_component(folder: Path, module: nn.Module) -> None:
    """Give a module, built from the folder's config, the folder's weights as float32."""
    path = folder / "model.safetensors"
    tensors, _ = load_tensors(path)
    load_strict(module, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, path)


def load_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is missing or is not JSON.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; is the folder complete?")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}).") from error


def load_config(kind: type[Config], path: Path) -> Config:
    """Read a dataclass from a JSON file of its own, strictly.

    Raises:
        ValueError: a field is missing, unknown or outside its range; says which, and in which file.
    """
    return from_json(kind, load_json(path), path)


def from_json(kind: type[Config], values: Any, source: object) -> Config:
    """A dataclass from its JSON values, strictly; `source` is for the error.

    A field with a default may be missing: it is younger than the file.

    Raises:
        ValueError: another field is missing, or one is unknown or outside its range; says which.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{source} holds no fields, but a {type(values).__name__}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    needed = {name for name, f in fields.items() if f.default is dataclasses.MISSING is f.default_factory}
    wrong = {"lacks": needed - set(values), "has the unknown": set(values) - set(fields)}
    found = " and ".join(f"{verb} {', '.join(sorted(names))}" for verb, names in wrong.items() if names)
    if found:
        raise ValueError(f"{source} {found}: it is no {kind.__name__}.")
    hints = typing.get_type_hints(kind)
    parsed = {name: _parse(hints[name], value, f"{source}: {name}") for name, value in values.items()}
    try:
        return kind(**parsed)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def _parse(hint: Any, value: Any, source: str) -> Any:
    """Undo what JSON does to nested dataclasses and tuples."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, source)  # type: ignore[arg-type]
    return tuple(value) if typing.get_origin(hint) is tuple else value


def first_difference(found: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """The first value in which two nested records differ, such as `settings.seed is 0, not 1`; None when none does."""
    flat_found, flat_asked = _flat(found), _flat(asked)
    for key in {**flat_found, **flat_asked}:
        a, b = (json.dumps(flat[key]) if key in flat else "absent" for flat in (flat_found, flat_asked))
        if a != b:
            return f"{key} is {a}, not {b}"
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat


def save_training(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer], step: int) -> None:
    """Write everything a training loop needs to go on after `step` updates."""
    tensors = {f"{name}/{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{index}/{k}": v for k, v in state.items()}
    save_tensors(path, tensors, {"step": str(step)})


def load_training(path: Path, modules: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> int:
    """Restore what `save_training` wrote and return its step.

    Raises:
        ValueError: the file does not fit the modules.
    """
    tensors, metadata = load_tensors(path)
    for name, module in modules.items():
        load_strict(module, {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith(name + "/")}, path)
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(name + "/"):
                _, index, field = key.split("/")
                state.setdefault(int(index), {})[field] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])
