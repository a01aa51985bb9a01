"""The commands on a toy pipeline: outputs, going on, and one sentence for every mistake."""

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distilled_decoding import cli, commands, demo, zoo
from distilled_decoding.condition import Labels
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.records import environment
from tests import tiny
from tests.test_convert import VAR


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trajectories")
    tiny.store(folder, tiny.pipeline())
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    tiny.text_encoder().save_pretrained(folder)
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
    assert record["settings"]["labels"] == [2, 0] and record["settings"]["plan"]["schedule"] == [0]
    assert record["notes"]["model"] == str(model) and "torch" in record["versions"]


def test_a_student_learns_from_tokens_without_trajectories(run, model: Path, made: Path, tmp_path: Path) -> None:
    """From the teacher, or from the student there is; what comes of it draws its tokens."""
    words = ["distill", model, "--num-updates", 20, "--batch-size", 2, "--start-blocks", 0]
    own = ["--method", "tokens", "--tracker-first", 5, "--tracker-updates", 1]
    code, text, _ = run(*words, *own, "--draw-temperature", 0.8, "--out", tmp_path / "a", "--json")
    assert code == 0 and json.loads(text)["student_temperature"] == 0.8
    log = json.loads((tmp_path / "a" / "log.jsonl").read_text())
    assert {"total", "divergence", "entropy", "tracker", "trajectories"} < set(log)
    plans = [json.loads(run(*words, *method, "--plan", "--json")[1]) for method in (own, [])]
    assert plans[0]["trajectories"] == 0 and plans[0]["fixed_gib"] > plans[1]["fixed_gib"]
    pictures = [tmp_path / name for name in ("drawn.png", "likeliest.png")]
    assert run("sample", tmp_path / "a", "--grid", pictures[0])[0] == 0
    assert run("sample", tmp_path / "a", "--grid", pictures[1], "--student-temperature", 0)[0] == 0
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    words = ["distill", tmp_path / "a", "--start", "student", "--num-updates", 1, "--trajectories", made]
    mixed = ["--tracker-first", 0, "--trajectory-weight", 0.5, "--learning-rate", 1e-9]
    code, text, _ = run(*words, *mixed, "--out", tmp_path / "b", "--json")
    assert code == 0 and json.loads(text)["training"]["method"] == "tokens"
    students = [Pipeline.from_pretrained(tmp_path / name).student.state_dict() for name in ("a", "b")]
    for name, value in students[0].items():
        torch.testing.assert_close(value, students[1][name], rtol=0, atol=1e-6)
    code, text, _ = run(*words, "--method", "trajectories", "--out", tmp_path / "c", "--json")
    assert code == 0 and json.loads(text)["student_temperature"] == 0


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_flow_head_learns_from_trajectories_and_then_from_its_own_tokens(run, tmp_path: Path, family: str) -> None:
    tiny.pipeline(family=family).save_pretrained(tmp_path / "model")
    assert run("trajectories", tmp_path / "model", "--num", 8, "--out", tmp_path / "t")[0] == 0
    words = ["--head", "flow", "--num-updates", 3, "--batch-size", 2, "--start-blocks", 0, 2, "--json"]
    first = ["distill", tmp_path / "model", "--trajectories", tmp_path / "t", "--out", tmp_path / "a"]
    code, text, _ = run(*first, *words)
    made = json.loads(text)
    assert code == 0 and made["training"]["head"] == "flow" and made["split_block"] == made["blocks"]
    then = ["distill", tmp_path / "a", "--method", "tokens", "--tracker-first", 1, "--start", "student"]
    assert json.loads(run(*then, *words, "--plan")[1])["teraflop"] > 0
    code, text, _ = run(*then, *words, "--out", tmp_path / "b")
    assert code == 0 and json.loads(text)["student_temperature"] == 0
    another = ["distill", tmp_path / "b", "--method", "scores", "--head", "code", "--start-blocks", 0]
    assert run(*another, "--plan")[0] == 0
    pictures = [tmp_path / name for name in ("student.png", "refined.png", "teacher.png")]
    ways = (["--steps", 2], ["--refine", made["blocks"]], ["--steps", "teacher"])
    for picture, way in zip(pictures, ways, strict=True):
        assert run("sample", tmp_path / "b", *way, "--num", 4, "--grid", picture)[0] == 0
    student, refined, teacher = (picture.read_bytes() for picture in pictures)
    assert student != refined == teacher
    code, _, error = run(*then, "--head", "code", "--out", tmp_path / "c")
    assert code == 2 and "goes on with a flow head, not with --head code" in error
    assert "flow map takes" in (tmp_path / "b" / "README.md").read_text()


def test_new_starts_leave_the_weights_of_the_models_own(run, tmp_path: Path) -> None:
    pipeline = tiny.pipeline()
    training = dataclasses.replace(pipeline.config.training, start_blocks=(0, 4), start_weights=(0.7, 0.3))
    config = dataclasses.replace(pipeline.config, training=training)
    Pipeline(pipeline.teacher, pipeline.student, config).save_pretrained(tmp_path / "model")
    words = ["distill", tmp_path / "model", "--plan"]
    assert run(*words, "--start-blocks", 0)[0] == 0
    assert run(*words, "--start-blocks", 0, "--start-weights", 0.7, 0.3)[0] == 2


@pytest.mark.parametrize("family", ["llamagen", "var"])
@pytest.mark.parametrize("method", ["scores", "token-scores"])
def test_a_student_learns_from_scores_without_trajectories(run, tmp_path: Path, method: str, family: str) -> None:
    """What comes of it takes its codes from the head that learnt, and starts again where it learnt to."""
    tiny.pipeline(family=family).save_pretrained(tmp_path / "model")
    words = ["distill", tmp_path / "model", "--method", method, "--start", "student", "--num-updates", 20]
    words += ["--tracker-first", 10, "--tracker-updates", 1, "--batch-size", 2, "--noised", 1, "--start-blocks", 0, 2]
    plan = json.loads(run(*words, "--plan", "--json")[1])
    assert plan["trajectories"] == 0 < plan["teraflop"]
    code, text, _ = run(*words, "--out", tmp_path / "a", "--json")
    made = json.loads(text)
    split = 0 if method == "scores" else tiny.pipeline(family=family).teacher.order.num_blocks
    found = tuple(made[name] for name in ("split_block", "student_temperature"))
    assert code == 0 and made["training"]["method"] == method and found == (split, 0)
    told = {"scores": "gap", "token-scores": "entropy"}[method]
    assert {"total", "difference", told, "tracker"} < set(json.loads((tmp_path / "a" / "log.jsonl").read_text()))
    assert run("sample", tmp_path / "a", "--steps", 2, "--num", 2, "--grid", tmp_path / "grid.png")[0] == 0


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
    words = ["distill", model, "--trajectories", trajectories, "--out", student, "--num-updates", 25]
    code, text, _ = run(*words, "--batch-size", 4, "--start-blocks", 0, 8, "--json")
    assert code == 0 and json.loads(text)["start_blocks"] == [0, 8]
    assert json.loads((student / "log.jsonl").read_text().splitlines()[0])["update"] == 20
    assert run("sample", student, "--num", 3, "--steps", 2, "--grid", tmp_path / "g.png")[0] == 0
    code, _, error = run("sample", student, "--num", 3, "--steps", 4, "--grid", tmp_path / "g.png")
    assert code == 2 and "got 4" in error
    shard = next(trajectories.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    code, text, _ = run("verify", trajectories, "--json")
    assert code == 1 and shard.name in json.loads(text)["problems"][0]


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_every_command_does_every_family(run, tmp_path: Path, family: str) -> None:
    model, trajectories, student = tmp_path / "model", tmp_path / "t", tmp_path / "student"
    tiny.pipeline(student=False, family=family).save_pretrained(model)
    assert json.loads(run("info", model, "--json")[1])["family"] == family
    make = ["trajectories", model, "--num", 12, "--out", trajectories, "--micro-batch", 4, "--shard-size", 8]
    assert run(*make)[0] == run("verify", trajectories)[0] == 0
    words = ["distill", model, "--trajectories", trajectories, "--out", student, "--num-updates", 2]
    assert run(*words, "--batch-size", 4)[0] == 0
    pictures = set()
    for steps in ("1", "2", "4", "teacher", "teacher-ancestral"):
        picture = tmp_path / f"{steps}.png"
        assert run("sample", student, "--num", 3, "--steps", steps, "--grid", picture)[0] == 0
        pictures.add(picture.read_bytes())
    assert len(pictures) == 5


def test_verify_checks_a_model(run, model: Path, tmp_path: Path) -> None:
    assert json.loads(run("verify", model, "--json")[1]) == {"kind": "pipeline", "problems": []}
    copy = shutil.copytree(model, tmp_path / "copy")
    weights = copy / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    code, text, _ = run("verify", copy)
    assert code == 1 and str(weights) in text


def test_prompts_are_encoded_into_a_folder_that_verify_knows(run, encoder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "prompts.csv", tmp_path / "p"
    file.write_text("name,id\nred apple,1\n,2\na prompt of many words,3\n")
    words = ["encode-prompts", file, "--column", "name", "--encoder", encoder, "--max-tokens", 12, "--out", out]
    code, text, error = run(*words, "--json")
    values = json.loads(text)
    assert code == 0 and (values["prompts"], values["empty"], values["max_tokens"], values["width"]) == (3, 1, 12, 8)
    warned = 'warning: prompt 3 is longer than 12 tokens and is cut after "…a prompt of"'
    assert [line for line in error.splitlines() if "warning" in line] == [warned]
    assert json.loads(run("verify", out, "--json")[1]) == {"kind": "prompts", "problems": []}
    code, _, error = run(*words[:-3], 13, "--out", out)
    assert code == 2 and "another run: its max_tokens is 12, not 13; choose another --out" in error
    (out / "features-00000.safetensors").unlink()
    assert run("verify", out)[0] == 1


def test_an_encoder_that_is_not_there_gets_one_sentence(
    run, model: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "prompts.txt"
    file.write_text("red\n")
    for words, sentence in (
        (["--encoder", "google/t5", "--max-tokens", 120], "no text encoder 'google/t5': no such folder, and"),
        (["--encoder", tmp_path, "--max-tokens", 120], "holds no text encoder"),
        (["--model", model], "this model reads classes, not prompts"),
        (["--model", model, "--max-tokens", 12], "give --model MODEL, or --encoder NAME with --max-tokens N"),
        (["--encoder", encoder], "give --model MODEL, or --encoder NAME with --max-tokens N"),
        (["--encoder", encoder, "--max-tokens", 1], "max_tokens must be at least 2"),
    ):
        code, out, error = run("encode-prompts", file, "--out", tmp_path / "p", *words)
        assert code == 2 and out == "" and sentence in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def mistakes() -> list[tuple[list, str]]:
    return [
        (["sample", "fashion-lamagen", "--grid", "g.png"], "unknown model 'fashion-lamagen'"),
        (["sample", "MODEL", "--labels", 3, "--grid", "g.png"], "label 3 is outside 0..2"),
        (["sample", "MODEL", "--num", 0, "--grid", "g.png"], "--num must be at least 1, got 0"),
        (["sample", "MODEL", "--num", -5, "--grid", "g.png"], "got -5"),
        (["sample", "MODEL", "--num", 2], "nowhere to write"),
        (["sample", "MODEL", "--grid", "g.jpg"], "g.jpg must end in .png, got '.jpg'"),
        (["sample", "MODEL", "--npz", "samples"], "samples must end in .npz"),
        (["sample", "MODEL", "--npz", "file/s.npz"], "file/s.npz.partial: Not a directory"),
        (["sample", "MODEL", "--grid", "file/g.png"], "file"),
        (["sample", "MODEL", "--out", "file/samples"], "file/samples: Not a directory"),
        (["sample", "MODEL", "--out", "file"], "file is a file"),
        (["sample", "MODEL", "--grid", "g.png", "--device", "cuda:99"], "no device 'cuda:99' here"),
        (["sample", "MODEL", "--grid", "g.png", "--device", "gpu"], "--device can be cpu"),
        (["sample", "[red]MODEL[/red]", "--grid", "g.png"], "unknown model '[red]MODEL[/red]'"),
        (["sample", "MODEL", "--steps", "2", "--schedule", 0, 8, "--grid", "g.png"], "not both"),
        (["sample", "MODEL", "--steps", "0", "--grid", "g.png"], "got 0"),
        (["sample", "MODEL", "--steps", "two", "--grid", "g.png"], "got 'two'"),
        (["sample", "MODEL", "--schedule", 0, 8, 4, "--grid", "g.png"], "must strictly ascend"),
        (["sample", "MODEL", "--schedule", 0, 77, "--grid", "g.png"], "past the last"),
        (["sample", "MODEL", "--schedule", 0, 5, "--grid", "g.png"], "cannot start at"),
        (["sample", "MODEL", "--schedule", 0, 8, "--teacher-span", 2, 6, "--grid", "g.png"], "must end at"),
        (["trajectories", "MODEL", "--num", 0, "--out", "t"], "--num must be at least 1, got 0"),
        (["trajectories", "MODEL", "--num", 8, "--out", "t", "--micro-batch", 0], "micro-batch 0"),
        (["distill", "MODEL", "--trajectories", "nowhere", "--out", "d"], "holds no trajectories"),
        (["distill", "MODEL", "--trajectories", "foreign", "--out", "d"], "manifest.json is not"),
        (["distill", "MODEL", "--trajectories", "T", "--out", "d", "--start-blocks", 0, 77], "past the last"),
        (["distill", "MODEL", "--trajectories", "T", "--out", "d", "--split-block", 99], "split_block"),
        (["distill", "MODEL", "--trajectories", "T", "--out", "d", "--perceptual", "lpips"], "give both or neither"),
        (["distill", "MODEL", "--trajectories", "T", "--out", "d", "--perceptual-weight", 1], "give both or neither"),
        (["distill", "MODEL", "--out", "d"], "--trajectories"),
        (["distill", "MODEL", "--method", "tokens", "--out", "d", "--perceptual", "lpips"], "give both or neither"),
        (["distill", "MODEL", "--method", "tokens", "--out", "d", "--split-block", 8], "trains the logits alone"),
        (["distill", "MODEL", "--method", "scores", "--out", "d", "--split-block", 8], "trains the code head alone"),
        (["distill", "MODEL", "--method", "tokens", "--out", "d", "--trajectory-weight", 1], "needs trajectories"),
        (["distill", "MODEL", "--out", "d", "--tracker-rate", 2], "nothing with --method trajectories; leave it out"),
        (["distill", "MODEL", "--out", "d", "--method", "tokens", "--noised", 2], "--noised changes nothing"),
        (["distill", "MODEL", "--out", "d", "--method", "scores", "--downstream", 1], "--downstream changes nothing"),
        (["distill", "MODEL", "--out", "d", "--method", "tokens", "--code-weight", 1], "give a --trajectory-weight"),
        (
            ["distill", "MODEL", "--out", "d", "--head", "flow", "--code-weight", 1],
            "--code-weight changes nothing with --head",
        ),
        (["sample", "MODEL", "--grid", "g.png", "--student-temperature", -1], "must be 0 or more, got -1"),
        (["evaluate", "MODEL", "--out", "e", "--methods", "3x"], "unknown method '3x'"),
        (["evaluate", "MODEL", "--out", "e", "--num", 0], "num must be at least 4"),
        (["evaluate", "MODEL", "--out", "e"], "classes"),
        (["evaluate", "MODEL", "--out", "e", "--methods", "onestep"], "name the method teacher, too"),
        (["evaluate", "MODEL", "--out", "e", "--reference", "nothing"], "nothing"),
        (["evaluate", "MODEL", "--out", "e", "--reference", "foreign"], "foreign"),
        (["evaluate", "MODEL", "--out", "e", "--reference", "short.npz"], "short.npz"),
        (["evaluate", "MODEL", "--out", "e", "--features", "effnet-lite0"], "needs real images: give --reference"),
        (["evaluate", "MODEL", "--out", "e", "--features", "inception"], "--inception-weights"),
        (["report", "nowhere"], "nowhere holds no results of `evaluate`"),
        (
            ["trajectories", "MODEL", "--out", "t", "--prompts", "latin.txt"],
            "not prompts: give labels in 0..2, or leave",
        ),
        (["evaluate", "MODEL", "--out", "e", "--prompts", "latin.txt"], "or leave --prompts out"),
        (["verify", "nowhere"], "nowhere holds neither trajectories"),
        (["verify", "T", "--prompts", "foreign"], "--prompts goes with --repair"),
        (["info", "."], "no model_index.json"),
        (["encode-prompts", "nowhere.txt", "--out", "p"], "nowhere.txt: there is no such file of prompts"),
        (["encode-prompts", "latin.txt", "--out", "p"], "latin.txt is not UTF-8 in line 2"),
        (["encode-prompts", "file", "--out", "p"], "file is no file of prompts"),
    ]


@pytest.mark.parametrize(("words", "sentence"), mistakes(), ids=lambda value: str(value)[:60])
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    run, model: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04 cut off")
    (tmp_path / "latin.txt").write_bytes(b"red\ngr\xfcn\n")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"files": []}')
    code, out, error = run(*[{"MODEL": model, "T": made}.get(word, word) for word in words])
    assert code == 2
    assert sentence in error and "Traceback" not in error and out == ""
    assert len([line for line in error.splitlines() if line.strip().startswith("error")]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "foreign", "latin.txt", "short.npz"]


def test_a_folder_of_another_run_is_refused(run, model: Path, tmp_path: Path) -> None:
    run("sample", model, "--num", 2, "--out", tmp_path / "s")
    code, _, error = run("sample", model, "--num", 2, "--seed", 1, "--out", tmp_path / "s")
    assert code == 2 and "another run: its seed is 0, not 1;" in error
    copy = shutil.copytree(model, tmp_path / "copy")
    assert run("sample", copy, "--num", 2, "--schedule", 0, "--out", tmp_path / "s")[0] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not touch")
    code, _, error = run("sample", model, "--num", 2, "--out", tmp_path / "mine")
    assert code == 2 and "not empty" in error


def test_trajectories_of_another_teacher_are_refused(run, model: Path, tmp_path: Path) -> None:
    make = ["trajectories", model, "--num", 8, "--out", tmp_path / "t", "--micro-batch", 8, "--shard-size", 8]
    run(*make)
    other = tiny.pipeline()
    other.teacher.transformer.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    code, _, error = run("distill", tmp_path / "other", "--trajectories", tmp_path / "t", "--out", tmp_path / "d")
    assert code == 2 and 'another run: its teacher is "' in error


def test_any_whole_number_is_a_seed(run, model: Path, made: Path, tmp_path: Path) -> None:
    for seed in (-5, 2**80):
        assert run("sample", model, "--num", 2, "--seed", seed, "--grid", tmp_path / "g.png")[0] == 0
        words = ["--num-updates", 1, "--batch-size", 2, "--seed", seed, "--out", tmp_path / str(seed)]
        assert run("distill", model, "--trajectories", made, *words)[0] == 0


def test_several_processes_are_refused(run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, error = run("info", model)
    assert code == 2 and "WORLD_SIZE is 2" in error


def stop_after_a_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = Pipeline.images

    def interrupted(*given: object) -> Iterator:
        os.kill(os.getpid(), signal.SIGINT)
        yield from images(*given)

    monkeypatch.setattr(Pipeline, "images", interrupted)


@pytest.mark.parametrize(
    "places",
    [["--out", "s"], ["--npz", "s.npz"], ["--grid", "g.png"], ["--grid", "g.png", "--npz", "s.npz"]],
    ids=" ".join,
)
def test_a_stopped_sample_goes_on_to_the_same_bytes(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: list[str]
) -> None:
    def contents() -> dict[str, bytes]:
        files = [path for path in Path().rglob("*") if path.is_file() and path.name != "run.json"]
        return {str(path): path.read_bytes() for path in files}

    words = ["sample", model, "--num", 20, *places, "--json"]
    for folder in "unbroken", "stopped":
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "unbroken")
    assert json.loads(run(*words)[1])["made"] == 20
    unbroken = contents()
    monkeypatch.chdir(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_after_a_micro_batch(patch)
        code, _, error = run(*words)
    assert code == 130 and error.splitlines()[-1] == "stopped; the same command goes on"
    assert set(contents()).isdisjoint({"s.npz", "g.png"}) and len(list(Path().rglob("*.png"))) == 8
    assert json.loads(run(*words)[1])["made"] == 12
    assert contents() == unbroken
    if "--out" not in places:
        assert set(contents()) == set(places[1::2])


def test_a_file_begun_by_another_run_is_refused(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["sample", model, "--num", 20, "--npz", tmp_path / "s.npz"]
    with monkeypatch.context() as patch:
        stop_after_a_micro_batch(patch)
        run(*words)
    code, _, error = run(*words, "--seed", 1)
    assert code == 2
    assert "s.npz.partial holds another run: its seed is 0, not 1; delete it or write to another file" in error


def test_a_file_that_is_there_is_replaced(run, model: Path, tmp_path: Path) -> None:
    words = ["sample", model, "--num", 3, "--npz", tmp_path / "s.npz", "--seed"]
    written = []
    for seed in (0, 1, 0):
        assert run(*words, seed)[0] == 0
        written.append((tmp_path / "s.npz").read_bytes())
    assert written[0] == written[2] != written[1]


def test_sampling_to_a_file_holds_no_more_than_two_micro_batches(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, read, alive, most = Pipeline.images, commands.read_pngs, [0], [0]

    def counted(batch: torch.Tensor) -> torch.Tensor:
        alive[0] += 1
        most.append(alive[0])
        weakref.finalize(batch, lambda: alive.__setitem__(0, alive[0] - 1))
        return batch

    monkeypatch.setattr(Pipeline, "images", lambda *given: map(counted, images(*given)))
    monkeypatch.setattr(commands, "read_pngs", lambda *given: counted(read(*given)))
    assert run("sample", model, "--num", 80, "--npz", tmp_path / "s.npz")[0] == 0
    assert len(most) == 1 + 2 * 10 and max(most) == 2


def test_too_large_a_batch_is_halved_with_one_readable_line(
    run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("sample", model, "--num", 20, "--npz", tmp_path / "whole.npz")
    codes = Pipeline.codes

    def limited(self: Pipeline, plan: object, condition: Labels, key_B: torch.Tensor, **rest: object) -> torch.Tensor:
        if len(condition) > 4:
            raise torch.OutOfMemoryError
        return codes(self, plan, condition, key_B, **rest)

    monkeypatch.setattr(Pipeline, "codes", limited)
    code, _, error = run("sample", model, "--num", 20, "--npz", tmp_path / "halved.npz")
    assert code == 0 and (tmp_path / "halved.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert [line for line in error.splitlines() if "memory" in line or "warn" in line] == [
        "warning: 8 images do not fit in memory at once; going on with 4, the same images up to rounding"
    ]


def test_damaged_weights_get_one_sentence_and_no_image(run, tmp_path: Path) -> None:
    pipe = tiny.pipeline().with_settings(split_block=0)
    for parameter in pipe.student.parameters():
        parameter.fill_(torch.nan)
    pipe.save_pretrained(tmp_path / "model")
    code, _, error = run("sample", tmp_path / "model", "--out", tmp_path / "s")
    assert code == 2 and "error: the model's output is not finite; its weights are damaged" in error
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["run.json"]


def test_every_field_of_json_is_documented(
    run, model: Path, made: Path, encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.txt").write_text("red\n")
    extractor, reference = tiny.extractor()
    monkeypatch.setattr(zoo, "extractor", lambda *_: extractor)
    monkeypatch.setattr(zoo, "reference", lambda: reference)
    monkeypatch.setattr("distilled_decoding.pipeline.compiled", lambda function, **_: function)
    monkeypatch.setattr(demo, "FAST", demo.DemoSize(trajectories=8, updates=1, samples=6))
    words = {
        "info": [model],
        "sample": [model, "--num", 2, "--out", tmp_path / "s"],
        "trajectories": [model, "--num", 8, "--out", tmp_path / "t"],
        "distill": [model, "--trajectories", made, "--num-updates", 1, "--batch-size", 2, "--out", tmp_path / "d"],
        "evaluate": [model, "--num", 6, "--seeds", 0, 1, "--methods", "teacher", 1, "--out", tmp_path / "e"],
        "demo": ["--model", model, "--fast", "--out", tmp_path / "demo"],
        "bench": [model, "--batches", 1, "--repeats", 1, "--out", tmp_path / "b"],
        "report": [tmp_path / "e", tmp_path / "b", "--out", tmp_path / "r"],
        "convert": [*VAR, "--out", tmp_path / "c"],
        "encode-prompts": [tmp_path / "prompts.txt", "--encoder", encoder, "--max-tokens", 4, "--out", tmp_path / "p"],
        "verify": [made],
        "verify --repair": [model, made],
        "trajectories --plan": [model, "--num", 8],
        "distill --plan": [model, "--num-updates", 2],
    }
    assert {name.split()[0] for name in words} == set(cli.COMMANDS)
    printed = {name: fields(json.loads(run(*name.split(), *rest, "--json")[1])) for name, rest in words.items()}
    documented = documented_fields()
    place = {name for name in documented["run.json"] if name.split(".")[0] in environment()}
    assert fields(json.loads(run("info", "llamagen-b", "--json")[1])) == documented["info"]
    documented["info"] = {name for name in documented["info"] if not name.startswith("published.")}
    documented["distill"] |= documented["info"]
    documented["convert"] |= documented["info"]
    documented["distill --plan"] |= documented["trajectories --plan"] - {"micro_batch"}
    documented["verify --repair"] |= documented["verify"]
    documented["evaluate"] |= place
    documented["demo"] |= place
    documented["bench"] |= place
    for name in words:
        assert printed[name] == documented[name], name
    for folder in "s", "t", "d", "e", "b", "r", "p", "demo":
        record = json.loads((tmp_path / folder / "run.json").read_text())
        assert fields({**record, "settings": 0, "notes": 0}) == documented["run.json"]


def documented_fields() -> dict[str, set[str]]:
    text = (Path(__file__).parent.parent / "docs" / "cli.md").read_text()
    parts = re.split(r"^## `(.*)`$", text, flags=re.MULTILINE)[1:]
    return {
        name: set(re.findall(r"^\| `([^`]+)` \|", part, re.MULTILINE))
        for name, part in zip(parts[::2], parts[1::2], strict=True)
    }


def fields(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        name = prefix + ("METHOD" if prefix == "methods." else key)
        if isinstance(value, dict):
            found |= fields(value, f"{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            found |= fields(value[0], f"{name}[].")
        else:
            found.add(name)
    return found


def test_unknown_flags_and_commands_exit_with_2(run, model: Path) -> None:
    assert run("sampel", model)[0] == 2
    assert run("sample", model, "--nmu", 3)[0] == 2
