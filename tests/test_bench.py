import json
from pathlib import Path

import pytest
import torch

from distilled_decoding import bench as bench_module
from distilled_decoding import cli, pipeline
from distilled_decoding.bench import FORWARD, PLAIN, TEACHER, BenchSettings, bench, bench_table, count_passes
from distilled_decoding.describe import random_weights
from distilled_decoding.pipeline import Pipeline
from tests import tiny

QUICK = BenchSettings(batches=(1, 3), repeats=2)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling has tests of its own and takes long; turns need not."""
    monkeypatch.setattr(pipeline, "compiled", lambda function, **_: function)
    monkeypatch.setattr(bench_module, "_TURN", 0.0)


@pytest.mark.parametrize("family", ["llamagen", pytest.param("var", marks=pytest.mark.slow)])
def test_every_way_is_measured_at_every_batch(family: str, tmp_path: Path) -> None:
    model = tiny.pipeline(family=family)
    if family == "var":
        model = model.with_settings(sampling=tiny.SAMPLING.__class__(guidance_scale=2.0, guidance_ramp="linear"))
    summary = bench(model, "tiny", tmp_path, QUICK)
    rows = {row["name"]: row for row in summary["ways"]}
    blocks = model.teacher.order.num_blocks
    passes = {name: row["passes"] for name, row in rows.items()}
    assert passes == {
        PLAIN: blocks,
        "teacher": blocks,
        TEACHER: blocks,
        "1 step": 1,
        "1 step, compiled": 1,
        "2 steps": 2,
        "2 steps, compiled": 2,
        "teacher, flow map, compiled": blocks,
        FORWARD: blocks,
    }
    for name, row in rows.items():
        assert [(run["batch"], len(run["codes"])) for run in row["runs"]] == [(1, 2), (3, 2)]
        assert (row["images_ms"] is None) == (name == FORWARD)
        assert all(
            image > codes for run in row["runs"] for codes, image in zip(run["codes"], run["images"], strict=False)
        )
    assert rows[PLAIN]["speed_up"]["plain_loop"] == {"codes": 1.0, "images": 1.0}
    assert json.loads((tmp_path / "bench.json").read_text()) == json.loads(json.dumps(summary))
    assert (tmp_path / "bench.md").read_text() == bench_table(summary)
    assert (tmp_path / "bench.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_model_of_captions_is_compiled_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(bench_module, "_TURN", 0.0)
    summary = bench(tiny.pipeline(family="text"), "tiny", tmp_path, BenchSettings(batches=(2,), repeats=1))
    assert {"1 step, compiled", "2 steps, compiled", TEACHER} <= {row["name"] for row in summary["ways"]}
    assert all(run["codes"] for row in summary["ways"] for run in row["runs"])


def test_ratios_are_of_medians() -> None:
    def timing(codes: list[float], images: list[float], batch: int = 1) -> bench_module.Timing:
        return bench_module.Timing(batch, codes, images, None)

    ways = [bench_module.Way(name, 1, lambda *_: torch.empty(0), None) for name in (PLAIN, "1 step")]
    timings = {
        PLAIN: [timing([8.0, 9.0, 100.0], [10.0, 11.0, 200.0])],
        "1 step": [timing([1.0, 3.0, 2.0], [2.2, 2.0, 9.0]), timing([2.0], [4.0], batch=8)],
    }
    row = bench_module._rows(ways, timings)[1]
    assert row["speed_up"] == {"plain_loop": {"codes": 4.5, "images": 5.0}, "compiled_teacher": None}
    assert (row["codes_ms"], row["images_ms"]) == (2000, 2200)
    assert (row["best_batch"], row["images_per_second"]) == (8, 2.0)


@pytest.mark.slow
def test_a_way_that_is_too_slow_or_too_large_is_left_out_of_larger_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.pipeline()
    codes = Pipeline.codes

    def small_memory(self, plan, condition, key_B, *others):
        if plan.schedule == (0,) and len(condition) > 1:
            raise torch.OutOfMemoryError("no more")
        return codes(self, plan, condition, key_B, *others)

    monkeypatch.setattr(Pipeline, "codes", small_memory)
    rows = {row["name"]: row for row in bench(model, "tiny", tmp_path, QUICK)["ways"]}
    assert len(rows["1 step"]["runs"]) == 1 and len(rows["2 steps"]["runs"]) == 2
    rows = bench(model, "tiny", tmp_path, BenchSettings(batches=(1, 3), repeats=1, seconds=0.0))["ways"]
    assert {len(row["runs"]) for row in rows} == {1}


def test_what_the_published_loop_cannot_do_is_said(tmp_path: Path) -> None:
    model = tiny.pipeline().with_settings(sampling=tiny.SAMPLING.__class__(guidance_scale=0.5))
    summary = bench(model, "tiny", tmp_path, BenchSettings(batches=(1,), repeats=1))
    assert PLAIN not in {row["name"] for row in summary["ways"]}
    assert "leave the plain loop out" in summary["left_out"]
    assert "No plain loop" in bench_table(summary)


def test_passes_are_counted_not_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.pipeline()
    assert [count_passes(model, steps) for steps in (1, 2, 4, "teacher-ancestral")] == [1, 2, 4, 16]


def test_random_weights_make_finite_images_of_the_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distilled_decoding.describe.preset", lambda name: None)
    monkeypatch.setattr("distilled_decoding.describe._without_weights", lambda own: tiny.pipeline())
    model = random_weights("tiny", "cpu", torch.bfloat16)
    assert model.teacher.transformer.output.weight.dtype == torch.bfloat16
    assert model.teacher.codebook.dtype == torch.float32
    assert torch.equal(model.teacher.transformer.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    output = model([0, 1], output="tensor")
    assert output.images.shape == (2, 1, 8, 8)
    again = random_weights("tiny", "cpu", torch.bfloat16)
    assert torch.equal(again([0, 1]).code_BLC, output.code_BLC)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a MODEL, or --preset"),
        (["fashion-var", "--preset", "var-d16"], "give a MODEL, or --preset"),
        (["--preset", "var-d16"], "give a MODEL, or --preset"),
        (["fashion-var", "--random-weights"], "give a MODEL, or --preset"),
        (["--preset", "var-d17", "--random-weights"], "var-d17"),
        (["fashion-var", "--batches", "8", "1"], r"batches must ascend from 1 or more, got \(8, 1\)"),
        (["fashion-var", "--repeats", "0"], "repeats must be at least 1, got 0"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["distilled-decoding", "bench", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert __import__("re").search(message, " ".join(capsys.readouterr().err.split()))
