"""docs/published-models.md says of every published model what the presets say, and its commands do it."""

import re
import sys
from pathlib import Path

import pytest

from distilled_decoding import Pipeline, cli, commands, describe
from distilled_decoding.convert import read_parts
from distilled_decoding.presets import DD1, LLAMAGEN_README, PRESETS, VAR_README, VQ_8_C2I
from tests.test_convert import full_size
from tests.test_presets import LISTS, listed

PAGE = (Path(__file__).parents[1] / "docs" / "published-models.md").read_text()
COMMANDS = dict(re.findall(r"^\| `(\S+)` \|.*\| `distilled-decoding convert (.*)` \|$", PAGE, re.MULTILINE))
PROTOCOLS = {"DD": DD1, "VAR": VAR_README, "LlamaGen": LLAMAGEN_README}


def test_every_preset_and_every_file_is_on_the_page() -> None:
    assert list(COMMANDS) == list(PRESETS)
    for name, own in PRESETS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` | `v"))
        assert re.findall(r"`([^`]*)`", row)[1:-1] == [file.name for file in own.files]
    assert VQ_8_C2I.name in PAGE


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_of_a_model_makes_that_model(name: str, tmp_path: Path) -> None:
    words, lists = COMMANDS[name].split(), {listed(key)["file"]: key for key in LISTS}
    files = [full_size(lists[word], tmp_path) for word in words if word in lists]
    preset = words[words.index("--preset") + 1] if "--preset" in words else None
    assert words[-2:] == ["--out", name]
    assert read_parts(files, preset).config.preset == name


def planned(run: commands.SampleRun, pipeline: Pipeline, *places: object) -> dict:
    """In place of sampling: the plan alone, which says whether it can be done."""
    pipeline.plan(run.steps, run.schedule, run.teacher_span, run.prefix)
    return {}


@pytest.mark.parametrize("name", [name for name, own in PRESETS.items() if own.results])
def test_every_published_result_is_on_the_page_and_can_be_sampled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        line.split(" | ") for line in PAGE.splitlines() if line.startswith(f"| `{name}` | ") and "convert" not in line
    ]
    monkeypatch.setattr(cli, "_load", lambda model, *others: describe.skeleton(model))
    monkeypatch.setattr(commands, "sample_images", planned)
    for row, result in zip(rows, PRESETS[name].results, strict=True):
        _, protocol, words, fid, *rest = (cell.strip(" |`") for cell in row)
        assert (PROTOCOLS[protocol], words, float(fid)) == (result.protocol, result.method, result.fid)
        stated = (result.inception_score, result.precision, result.recall)
        assert rest == ["" if value is None else f"{value:g}" for value in stated]
        monkeypatch.setattr(sys, "argv", ["distilled-decoding", "sample", name, *words.split()])
        cli.main()
