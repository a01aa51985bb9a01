import json
import shutil
import subprocess
from pathlib import Path

import pytest

from distilled_decoding import records
from distilled_decoding.checkpoint import first_difference
from distilled_decoding.records import claim, environment, identity, record
from tests import tiny

SETTINGS = {"seed": 0, "settings": {"rate": 0.1, "blocks": (0, 4)}, "where": Path("a")}


def test_the_same_run_goes_on_whatever_its_notes(tmp_path: Path) -> None:
    claim(tmp_path / "out", "sample", SETTINGS, {"model": "here"})
    before = (tmp_path / "out" / "run.json").read_text()
    (tmp_path / "out" / "000000.png").touch()
    claim(tmp_path / "out", "sample", SETTINGS, {"model": "there"})
    assert (tmp_path / "out" / "run.json").read_text() == before
    values = json.loads(before)
    assert values["settings"]["settings"]["blocks"] == [0, 4] and values["notes"] == {"model": "here"}
    assert {"versions", "commit", "dirty", "machine"} <= set(values)


def test_another_run_is_refused_and_only_the_difference_named(tmp_path: Path) -> None:
    claim(tmp_path, "distill", SETTINGS)
    other = {**SETTINGS, "settings": {"rate": 0.2, "blocks": (0, 4)}}
    with pytest.raises(ValueError, match=r"another run: its settings\.rate is 0\.1, not 0\.2; choose another --out$"):
        claim(tmp_path, "distill", other)
    with pytest.raises(ValueError, match="holds a run of 'distill'"):
        claim(tmp_path, "sample", SETTINGS)
    with pytest.raises(ValueError, match="holds a run of 'distill'"):
        record(tmp_path, "evaluate", SETTINGS)


@pytest.mark.parametrize("text", ["[]", "{}", '{"command": "sample"}', '{"settings": {}}', "no json"])
def test_a_foreign_run_json_gets_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json (was not written|is not valid JSON)"):
        claim(tmp_path, "sample", SETTINGS)


def test_files_of_others_and_files_in_place_of_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty and holds no run.json"):
        claim(tmp_path / "mine", "sample", SETTINGS)
    with pytest.raises(ValueError, match="is a file"):
        record(tmp_path / "mine" / "notes.txt", "demo", SETTINGS)


def test_a_record_is_written_once(tmp_path: Path) -> None:
    record(tmp_path, "trajectories", {"num": 1})
    record(tmp_path, "trajectories", {"num": 2})
    assert json.loads((tmp_path / "run.json").read_text())["settings"] == {"num": 1}


def test_differences_are_found_at_any_depth_and_absence_is_one() -> None:
    assert first_difference({"a": {"b": 1}}, {"a": {"b": 1}}) is None
    assert first_difference({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}) == "a.c is 2, not 3"
    assert first_difference({"a": None}, {}) == "a is null, not absent"
    assert first_difference({"plan": {"teacher_span": None}}, {"plan": {"teacher_span": [0, 4]}}) == (
        "plan.teacher_span is null, not [0, 4]"
    )


def test_identity_holds_what_determines_the_images_and_nothing_else() -> None:
    pipeline, other = tiny.pipeline(), tiny.pipeline()
    other.student.n_d_embed.weight.data += 1
    one_step, teacher = pipeline.plan(1), pipeline.plan("teacher")
    difference = first_difference(identity(pipeline, one_step), identity(other, one_step))
    assert difference is not None and difference.startswith("student is ")
    assert identity(pipeline, teacher) == identity(other, teacher)
    assert identity(pipeline, pipeline.plan(schedule=(0, 8))) == identity(pipeline, pipeline.plan(2))


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "distilled_decoding"
    package.mkdir(parents=True)
    monkeypatch.setattr(records, "__file__", str(package / "records.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert environment()["commit"] is None
    project = Path(__file__).parent.parent / "pyproject.toml"
    shutil.copy(project, tmp_path)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    values = environment()
    assert len(values["commit"]) == 40 and values["dirty"] is False
    (tmp_path / "pyproject.toml").write_text(project.read_text() + "\n")
    assert environment()["dirty"] is True
