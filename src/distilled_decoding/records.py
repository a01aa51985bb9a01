"""`run.json`: what made a folder, so that a result can be traced and a stopped run can go on."""

import dataclasses
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distilled_decoding.checkpoint import load_json, save_json

_RECORD = "run.json"


def claim(out: Path, command: str, settings: Any) -> None:  # noqa: ANN401
    """Take a folder for a run, or go on with the same run.

    Args:
        out: a new or empty folder, or one that the same words have made.
        command: the command's name.
        settings: a dataclass; two runs are the same when their settings are.

    Raises:
        ValueError: the folder holds another run, or files of another kind, or is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose a folder for --out")
    asked = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    if (out / _RECORD).is_file():
        record = load_json(out / _RECORD)
        found = record["settings"]
        if record["command"] != command:
            raise ValueError(f"{out} holds a run of {record['command']!r}; choose another --out")
        for key in sorted({*asked, *found}):
            if asked.get(key) != found.get(key):
                raise ValueError(
                    f"{out} holds another run: its {key} is {found.get(key)!r}, not {asked.get(key)!r}; "
                    "choose another --out"
                )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no {_RECORD}; choose another --out")
    save_json(out / _RECORD, {"command": command, "settings": asked, **environment()})


def environment() -> dict[str, Any]:
    """Versions, commit and machine."""
    return {
        "versions": {
            "distilled_decoding": version("distilled-decoding"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "commit": _commit(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
