"""`run.json`: what made a folder, so that a result can be traced and a stopped run can go on."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distilled_decoding.checkpoint import first_difference, load_json, save_json
from distilled_decoding.processes import holds_files

if TYPE_CHECKING:
    from distilled_decoding.pipeline import Pipeline
    from distilled_decoding.sampling import Plan

_RECORD = "run.json"
_NONE: Mapping[str, Any] = {}


def claim(
    out: Path,
    command: str,
    settings: Mapping[str, Any],
    notes: Mapping[str, Any] = _NONE,
    way_out: str = "choose another --out",
) -> None:
    """Take a folder for a run, or go on with the same run.

    Args:
        out: a new or empty folder, or one that the same run has made.
        command: the command's name.
        settings: everything that determines the result, by content; two runs are the same when these are.
        notes: what a reader may want to know besides, such as names and paths; not compared.
        way_out: what to advise when the folder is taken.

    Raises:
        ValueError: the folder holds another run, or files of another kind, or is a file.
    """
    record = recorded(out, command)
    if record is not None:
        difference = first_difference(record["settings"], _plain(settings))
        if difference:
            raise ValueError(f"{out} holds another run: its {difference}; {way_out}")
    elif holds_files(out):
        raise ValueError(f"{out} is not empty and holds no {_RECORD}; {way_out}")
    else:
        _write(out, command, settings, notes)


def record(out: Path, command: str, settings: Mapping[str, Any], notes: Mapping[str, Any] = _NONE) -> None:
    """Leave a `run.json` in a folder that has none; what the folder holds is checked by other means.

    Raises:
        ValueError: the folder holds a run of another command, or is a file.
    """
    if recorded(out, command) is None:
        _write(out, command, settings, notes)


def record_anew(out: Path, command: str, settings: Mapping[str, Any], notes: Mapping[str, Any] = _NONE) -> None:
    """Leave a `run.json`, in place of that of an earlier run of the same command.

    Raises:
        ValueError: the folder holds a run of another command, or is a file.
    """
    recorded(out, command)
    _write(out, command, settings, notes)


def identity(pipeline: "Pipeline", plan: "Plan") -> dict[str, Any]:
    """Everything of a pipeline that determines the images of a plan, as JSON gives it back."""
    config = pipeline.config
    values = {
        "teacher": pipeline.fingerprint,
        "plan": asdict(plan),
        "sampling": asdict(config.sampling),
        "flow": asdict(config.flow),
        "micro_batch": config.micro_batch,
        "dtype": str(pipeline.dtype).removeprefix("torch."),
        "compiled": pipeline.is_compiled,
    }
    if plan.schedule:
        values |= {"student": pipeline.student_fingerprint, "split_block": config.split_block}
        if config.student_temperature > 0:
            values |= {"student_temperature": config.student_temperature}
    return _plain(values)


def environment() -> dict[str, Any]:
    """Versions, commit (with whether files differ from it) and machine."""
    commit, dirty = _commit()
    return {
        "versions": {
            "distilled_decoding": version("distilled-decoding"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
        "dirty": dirty,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def recorded(out: Path, command: str) -> dict[str, Any] | None:
    """The folder's record, None where it has none.

    Raises:
        ValueError: the folder holds a run of another command, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for --out")
    path = out / _RECORD
    if not path.is_file():
        return None
    values = load_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("settings"), dict) or "command" not in values:
        raise ValueError(f"{path} was not written by this program; choose another --out")
    if values["command"] != command:
        raise ValueError(f"{out} holds a run of {values['command']!r}; choose another --out")
    return values


def _write(out: Path, command: str, settings: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    values = {"command": command, "settings": _plain(settings), "notes": _plain(notes)}
    save_json(out / _RECORD, {**values, **environment()})


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON gives them back: tuples become lists, paths strings."""
    return json.loads(json.dumps(dict(values), default=str))


def _commit() -> tuple[str | None, bool | None]:
    """The commit of this package's own checkout, never of a repository that an installed copy happens to lie in."""
    root = Path(__file__).parents[2]
    project = root / "pyproject.toml"
    if not project.is_file() or 'name = "distilled-decoding"' not in project.read_text():
        return None, None
    try:
        return _git(root, "rev-parse", "HEAD"), bool(_git(root, "status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(root: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
