"""The demo on a toy pipeline: what it leaves, that both sizes live side by side, and that it stops at once."""

import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from distilled_decoding import commands, demo, zoo
from distilled_decoding.demo import DemoSize, run_demo
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.progress import Stopped
from tests import tiny


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    extractor, reference = tiny.extractor()
    monkeypatch.setattr(zoo, "extractor", lambda name: extractor)
    monkeypatch.setattr(zoo, "reference", lambda: reference)
    monkeypatch.setattr(demo, "FAST", DemoSize(trajectories=16, updates=2, samples=12))
    monkeypatch.setattr(demo, "FULL", DemoSize(trajectories=32, updates=3, samples=12))
    tiny.pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_model_of_captions_is_told_which_models_the_demo_is_for(tmp_path: Path) -> None:
    tiny.pipeline(family="text").save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="reads prompts; the demo is for fashion-llamagen and fashion-var"):
        run_demo(str(tmp_path / "text"), tmp_path / "demo", fast=True)


def test_both_sizes_live_in_one_folder_and_learn_the_models_starts(model: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    for fast in (True, False):
        summary = run_demo(model, out, fast)
        assert [row["steps"] for row in summary["rows"]] == [16, 1, 1, 2]
        assert all(row["ms_per_image"] > 0 and row["frechet_distance"] > 0 for row in summary["rows"])
        student = Pipeline.from_pretrained(out / ("fast" if fast else "full") / "student")
        assert student.config.start_blocks == (0, 4, 8, 12)
    assert Image.open(out / "grid.png").size == (4 * 8 * 3, 3 * 8 * 3)
    assert "shipped student, 2 steps" in (out / "table.md").read_text()
    assert json.loads((out / "demo.json").read_text())["trajectories"] == 32
    assert json.loads((out / "run.json").read_text())["notes"] == {"model": model}


def test_it_stops_within_a_micro_batch_while_measuring(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []

    def score_and_interrupt(classifier, images, label_N, name):
        for image_BCHW in images:
            batches.append(len(image_BCHW))
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    with monkeypatch.context() as patch:
        patch.setattr(demo, "measure", score_and_interrupt)
        with pytest.raises(Stopped, match="the same command goes on"):
            run_demo(model, tmp_path / "demo", True)
    assert batches == [8]
    made = commands.make_trajectories

    def nothing_new(*args, **named):
        values = made(*args, **named)
        assert values["made"] == 0
        return values

    monkeypatch.setattr(commands, "make_trajectories", nothing_new)
    assert run_demo(model, tmp_path / "demo", True)["samples"] == 12
