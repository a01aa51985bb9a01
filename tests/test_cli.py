"""The commands on a toy pipeline: outputs, going on, and one sentence for every mistake."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distilled_decoding import cli
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    tiny.pipeline().save_pretrained(folder, torch.float32)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run a command in this process: its exit code, standard output and standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["distilled-decoding", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "500")
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_info(run, model: Path) -> None:
    code, out, _ = run("info", model, "--json")
    assert code == 0
    values = json.loads(out)
    assert (values["family"], values["blocks"], values["codebook"]) == ("llamagen", 16, [16, 4])
    assert run("info", model)[0] == 0


def test_sample_writes_numbered_pngs_a_grid_and_the_evaluators_file(run, model: Path, tmp_path: Path) -> None:
    out, picture, npz = tmp_path / "samples", tmp_path / "grid.png", tmp_path / "s.npz"
    words = ["sample", model, "--labels", 2, 0, "--num", 11, "--out", out, "--grid", picture, "--npz", npz]
    code, text, _ = run(*words, "--json")
    assert code == 0 and json.loads(text)["made"] == 11
    assert sorted(p.name for p in out.glob("*.png")) == [f"{i:06d}.png" for i in range(11)]
    arrays = np.load(npz)
    assert arrays["arr_0"].shape == (11, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [2, 0] * 5 + [2] and arrays["arr_1"].dtype == np.int64
    assert np.array_equal(np.asarray(Image.open(out / "000007.png")), arrays["arr_0"][7, :, :, 0])
    assert Image.open(picture).size == (10 * 8 * 2, 2 * 8 * 2)
    record = json.loads((out / "run.json").read_text())
    assert record["settings"]["labels"] == [2, 0] and "torch" in record["versions"]


def test_sample_goes_on_where_it_stopped(run, model: Path, tmp_path: Path) -> None:
    words = ["sample", model, "--num", 20, "--out", tmp_path / "s", "--json"]
    run(*words)
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").glob("*.png")}
    (tmp_path / "s" / "000009.png").unlink()
    code, text, _ = run(*words)
    assert code == 0 and json.loads(text)["made"] == 8
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "s").glob("*.png")}


@pytest.mark.parametrize("steps", ["1", "2", "4", "teacher", "teacher-ancestral"])
def test_sample_every_way(run, model: Path, tmp_path: Path, steps: str) -> None:
    assert run("sample", model, "--num", 3, "--steps", steps, "--grid", tmp_path / "g.png")[0] == 0


def test_sample_with_the_teacher_in_between(run, model: Path, tmp_path: Path) -> None:
    words = ["--schedule", 0, 8, "--teacher-span", 4, 8]
    assert run("sample", model, "--num", 3, *words, "--grid", tmp_path / "g.png")[0] == 0


def test_trajectories_distil_and_sample(run, model: Path, tmp_path: Path) -> None:
    trajectories, student = tmp_path / "t", tmp_path / "student"
    make = ["trajectories", model, "--num", 24, "--out", trajectories, "--micro-batch", 8, "--shard-size", 16]
    code, text, _ = run(*make, "--json")
    assert code == 0 and json.loads(text)["made"] == 24
    assert json.loads(run(*make, "--json")[1])["made"] == 0
    assert run("verify", trajectories)[0] == 0
    words = ["distill", model, "--trajectories", trajectories, "--out", student, "--num-steps", 25]
    code, text, _ = run(*words, "--batch-size", 4, "--start-blocks", 0, 8, "--json")
    assert code == 0 and json.loads(text)["start_blocks"] == [0, 8]
    assert json.loads((student / "log.jsonl").read_text().splitlines()[0])["step"] == 20
    assert run("sample", student, "--num", 3, "--steps", 2, "--grid", tmp_path / "g.png")[0] == 0
    code, _, error = run("sample", student, "--num", 3, "--steps", 4, "--grid", tmp_path / "g.png")
    assert code == 2 and "got 4" in error
    shard = next(trajectories.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    code, text, _ = run("verify", trajectories)
    assert code == 1 and shard.name in text


def mistakes() -> list[tuple[list, str]]:
    return [
        (["sample", "fashion-lamagen", "--grid", "g.png"], "unknown model 'fashion-lamagen'"),
        (["sample", "MODEL", "--labels", 3, "--grid", "g.png"], "label 3 is outside 0..2"),
        (["sample", "MODEL", "--num", 0, "--grid", "g.png"], "--num must be at least 1, got 0"),
        (["sample", "MODEL", "--num", -5, "--grid", "g.png"], "got -5"),
        (["sample", "MODEL", "--num", 2], "nowhere to write"),
        (["sample", "MODEL", "--steps", "0", "--grid", "g.png"], "got 0"),
        (["sample", "MODEL", "--steps", "two", "--grid", "g.png"], "got 'two'"),
        (["sample", "MODEL", "--schedule", 0, 8, 4, "--grid", "g.png"], "must strictly ascend"),
        (["sample", "MODEL", "--schedule", 0, 77, "--grid", "g.png"], "past the last"),
        (["sample", "MODEL", "--schedule", 0, 5, "--grid", "g.png"], "cannot start at"),
        (["sample", "MODEL", "--schedule", 0, 8, "--teacher-span", 2, 6, "--grid", "g.png"], "must end at"),
        (["trajectories", "MODEL", "--num", 0, "--out", "t"], "--num must be at least 1, got 0"),
        (["trajectories", "MODEL", "--num", 8, "--out", "t", "--micro-batch", 0], "micro-batch 0"),
        (["distill", "MODEL", "--trajectories", "nowhere", "--out", "d"], "holds no trajectories"),
        (["evaluate", "MODEL", "--out", "e", "--methods", "3x"], "unknown method '3x'"),
        (["evaluate", "MODEL", "--out", "e", "--num", 0], "num must be at least 2"),
        (["verify", "nowhere"], "holds no trajectories"),
        (["info", "."], "no model_index.json"),
    ]


@pytest.mark.parametrize(("words", "sentence"), mistakes(), ids=lambda value: str(value)[:60])
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, error = run(*[model if word == "MODEL" else word for word in words])
    assert code == 2
    assert sentence in error and "Traceback" not in error and out == ""
    assert len([line for line in error.splitlines() if line.strip().startswith("error")]) == 1


def test_a_folder_of_another_run_is_refused(run, model: Path, tmp_path: Path) -> None:
    run("sample", model, "--num", 2, "--out", tmp_path / "s")
    code, _, error = run("sample", model, "--num", 2, "--seed", 1, "--out", tmp_path / "s")
    assert code == 2 and "another run: its seed is 0, not 1" in error
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not touch")
    code, _, error = run("sample", model, "--num", 2, "--out", tmp_path / "mine")
    assert code == 2 and "not empty" in error


def test_trajectories_of_another_teacher_are_refused(run, model: Path, tmp_path: Path) -> None:
    make = ["trajectories", model, "--num", 8, "--out", tmp_path / "t", "--micro-batch", 8, "--shard-size", 8]
    run(*make)
    other = tiny.pipeline()
    other.teacher.transformer.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other", torch.float32)
    code, _, error = run("distill", tmp_path / "other", "--trajectories", tmp_path / "t", "--out", tmp_path / "d")
    assert code == 2 and "another teacher" in error


def test_unknown_flags_and_commands_exit_with_2(run, model: Path) -> None:
    assert run("sampel", model)[0] == 2
    assert run("sample", model, "--nmu", 3)[0] == 2
