"""Published models at full size, in random files of the published formats: from the file to the distilled student."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from distilled_decoding import Pipeline

PUBLISHED = Path(__file__).with_name("published")


def random_file(name: str, path: Path, wrap: Any = dict) -> Path:
    """A file of the published names and shapes; matrices keep the size of what goes through them."""
    listed = json.loads((PUBLISHED / f"{name}.keys.json").read_text())
    generator, weights = torch.Generator().manual_seed(0), {}
    for key, shape in listed["keys"].items():
        if key in listed["buffers"]:
            continue
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 1
        gain = 1.0 if key.endswith(("norm.weight", "norm1.weight", "norm2.weight", "norm_out.weight")) else 0.0
        spread = fan_in**-0.5 if len(shape) > 1 else 0.02
        weights[key] = torch.randn(shape, generator=generator).mul_(spread).add_(gain)
    torch.save(wrap(weights), path)
    return path


def run(*words: object) -> str:
    command = [sys.executable, "-m", "distilled_decoding", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def stopped_at_its_first_update(out: Path, *words: object) -> None:
    """Start a distillation, stop it as Ctrl-C does once it trains, and see that it saved."""
    command = [sys.executable, "-m", "distilled_decoding", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (out / "log.jsonl").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=1200)
    assert process.returncode == 130 and error.splitlines()[-1] == "stopped; the same command goes on"
    assert (out / "checkpoints" / "state.safetensors").exists() and not (out / "model_index.json").exists()


MODELS = {
    "llamagen-b": {
        "llamagen_vq_ds16_c2i": lambda weights: {"model": weights},
        "llamagen_c2i_B_256": lambda weights: {"model": weights},
        "dd_llamagen_B_256": lambda weights: {"ema": weights},
    },
    "var-d16": {
        "var_vae_ch160v4096z32": dict,
        "var_d16_256": dict,
        "dd_var_d16_256": lambda weights: {"epoch": 1, "trainer": {"ema_parameters": weights}},
    },
}
"""The files of each model, in the wrapping in which they are published."""


def sampled(model: Path, out: Path) -> None:
    """One image in one step and in two."""
    for steps in (1, 2):
        run("sample", model, "--num", 1, "--steps", steps, "--out", out / str(steps))
        assert (out / str(steps) / "000000.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 22e9, reason="needs 24 GB")
@pytest.mark.parametrize(("name", "second"), [("llamagen-b", 80), ("var-d16", 5)])
def test_from_the_published_files_to_a_student_of_ones_own(name: str, second: int, tmp_path: Path) -> None:
    files = [random_file(key, tmp_path / f"{key}.pt", wrap) for key, wrap in MODELS[name].items()]
    model, made, student = (tmp_path / part for part in ("model", "trajectories", "student"))
    values = json.loads(run("convert", *files, "--out", model, "--json"))
    assert values["start_blocks"] == [0, second] and values["published"]["preset"] == name
    for path in files:
        path.unlink()
    sampled(model, tmp_path / "published")
    run("trajectories", model, "--num", 2, "--micro-batch", 2, "--out", made)
    words = ["distill", model, "--trajectories", made, "--num-updates", 2, "--batch-size", 1, "--out", student]
    stopped_at_its_first_update(student, *words)
    run(*words)
    assert Pipeline.from_pretrained(student).config.start_blocks == (0, second)
    sampled(student, tmp_path / "own")
