"""What the README says is typed is typed here, at small size, on the shipped model."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from distilled_decoding import cli, demo
from distilled_decoding.report import markdown_table
from tests.test_convert import VAR

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = [shlex.split(line) for line in re.findall(r"^\| `distilled-decoding ([^`]*)`", README, re.MULTILINE)]
SMALL = {
    "trajectories": {"--num": 16, "--micro-batch": 16, "--shard-size": 16},
    "distill": {"--num-updates": 2, "--batch-size": 4},
    "evaluate": {"--num": 20, "--seeds": 0},
    "bench": {"--batches": 1, "--repeats": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "captions.txt").write_text("red apple\nrocket, 3d\n")
    return folder


def small(words: list[str]) -> list[str]:
    words = ["fashion-llamagen" if word == "MODEL" else word for word in words]
    if "FILES" in words:
        words[words.index("FILES") : words.index("FILES") + 1] = map(str, VAR)
    for flag, value in SMALL.get(words[0], {}).items():
        if flag in words:
            words[words.index(flag) + 1] = str(value)
        else:
            words += [flag, str(value)]
    return words


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_commands(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    words = [*words, "--fast"] if words[0] == "demo" else small(words)
    if words[0] == "demo":
        monkeypatch.setattr(demo, "FAST", demo.DemoSize(trajectories=16, updates=2, samples=20))
    monkeypatch.setattr("distilled_decoding.pipeline.compiled", lambda function, **_: function)
    monkeypatch.setattr(sys, "argv", ["distilled-decoding", *words])
    cli.main()


def test_the_demo_leaves_a_picture_and_a_table(folder: Path) -> None:
    assert (folder / "demo" / "grid.png").is_file()
    assert "shipped student, 2 steps" in (folder / "demo" / "table.md").read_text()


@pytest.mark.parametrize("model", ["fashion-llamagen", "fashion-var", "emoji-t2i"])
def test_tables_of_quality_are_what_report_makes_of_the_measurements(model: str) -> None:
    root = Path(__file__).parent.parent
    (measured,) = root.glob(f"benchmarks/*/{model}-evaluation/summary.json")
    text = markdown_table(json.loads(measured.read_text()))
    assert text.split("\n\n")[0] in README
    assert text in (root / "src" / "distilled_decoding" / "zoo" / model / "README.md").read_text()


def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        values: dict = {}
        exec(block, values)
        assert [image.size for image in values["images"]] == [(32, 32)] * 2
