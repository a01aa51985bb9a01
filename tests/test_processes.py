"""Real processes: Ctrl-C in the middle and going on equals a run that was never stopped; work can be split."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distilled_decoding import cli
from distilled_decoding.condition import Labels
from distilled_decoding.noise import image_keys
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


def start(*words: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def interrupt(words: list, begun: Callable[[], bool]) -> None:
    process = start("-m", "distilled_decoding", *words)
    while not begun():
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopping after the current step" in error
    assert error.splitlines()[-1] == "stopped; the same command goes on"


def run(words: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distilled-decoding", *map(str, words)])
    cli.main()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record, which names machine and time."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_stopped_trajectories_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["trajectories", model, "--num", 400, "--micro-batch", 8, "--shard-size", 64, "--out"]
    interrupt([*words, tmp_path / "a"], lambda: any((tmp_path / "a").glob("shard-*")))
    stopped = contents(tmp_path / "a")
    run([*words, tmp_path / "a"], monkeypatch)
    run([*words, tmp_path / "b"], monkeypatch)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != stopped


def test_a_stopped_distillation_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.store(tmp_path / "t", tiny.pipeline())
    words = ["distill", model, "--trajectories", tmp_path / "t", "--num-updates", 120, "--batch-size", 4, "--out"]
    # One name in two places: the card names its folder.
    stopped, whole = tmp_path / "a" / "student", tmp_path / "b" / "student"
    log = stopped / "log.jsonl"
    interrupt([*words, stopped], lambda: log.is_file() and log.stat().st_size > 0)
    assert not (stopped / "model_index.json").exists()
    run([*words, stopped], monkeypatch)
    run([*words, whole], monkeypatch)
    assert contents(stopped) == contents(whole)


HALF = """
import sys
import numpy as np, torch
from distilled_decoding.condition import Labels
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline
model, out, first, end = sys.argv[1:]
pipeline, part = Pipeline.from_pretrained(model), slice(int(first), int(end))
condition, key_N = Labels.balanced(16, 3)[part], image_keys("sampling", 0, range(16))[part]
np.save(out, torch.cat(list(pipeline.images(pipeline.plan(2), condition, key_N))).numpy())
"""


def test_two_processes_make_the_images_of_one(model: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "0.npy", tmp_path / "1.npy"]
    processes = [start("-c", HALF, model, part, 8 * i, 8 * i + 8) for i, part in enumerate(parts)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    pipeline = tiny.pipeline()
    condition, key_N = Labels.balanced(16, 3), image_keys("sampling", 0, range(16))
    whole = torch.cat(list(pipeline.images(pipeline.plan(2), condition, key_N))).numpy()
    assert np.array_equal(np.concatenate([np.load(part) for part in parts]), whole)
