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


def killed_after_its_first_save(out: Path, *words: object) -> None:
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


@pytest.mark.slow
@pytest.mark.skipif(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") < 22e9, reason="needs 24 GB")
@pytest.mark.parametrize(
    ("name", "tokenizer", "transformer", "wrap", "second"),
    [
        ("llamagen-b", "llamagen_vq_ds16_c2i", "llamagen_c2i_B_256", lambda weights: {"model": weights}, 80),
        ("var-d16", "var_vae_ch160v4096z32", "var_d16_256", dict, 5),
    ],
)
def test_from_the_published_file_to_the_student(
    name: str, tokenizer: str, transformer: str, wrap: Any, second: int, tmp_path: Path
) -> None:
    files = [random_file(tokenizer, tmp_path / "vq.pt", wrap), random_file(transformer, tmp_path / "gpt.pt", wrap)]
    model, made, student = (tmp_path / part for part in ("model", "trajectories", "student"))
    values = json.loads(run("convert", *files, "--preset", name, "--out", model, "--json"))
    assert values["start_blocks"] == [0, second] and values["published"]["preset"] == name
    for path in files:
        path.unlink()
    run("trajectories", model, "--num", 2, "--micro-batch", 2, "--shard-size", 2, "--out", made)
    words = ["distill", model, "--trajectories", made, "--num-updates", 2, "--batch-size", 1, "--out", student]
    killed_after_its_first_save(student, *words)
    run(*words)
    assert Pipeline.from_pretrained(student).config.start_blocks == (0, second)
    for steps in (1, 2):
        run("sample", student, "--num", 1, "--steps", steps, "--out", tmp_path / f"samples-{steps}")
        assert (tmp_path / f"samples-{steps}" / "000000.png").exists()
