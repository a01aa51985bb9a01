"""docs/extending.md quotes the example to the letter, and the example does what it says."""

import re
from pathlib import Path

import pytest
import tyro

from distilled_decoding.pipeline import Pipeline
from examples import pixel_teacher

ROOT = Path(__file__).parent.parent
QUOTES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
SMALL = ["--teacher-updates", "150", "--trajectories", "1024", "--updates", "150"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixels")


@pytest.fixture(scope="module")
def rows(folder: Path) -> dict[str, pixel_teacher.Row]:
    return {row.name: row for row in tyro.cli(pixel_teacher.main, args=["--out", str(folder), *SMALL])}


def test_every_quote_is_in_the_example() -> None:
    example = (ROOT / "examples" / "pixel_teacher.py").read_text()
    assert len(QUOTES) > 10
    for quote in QUOTES:
        assert f"\n{quote}" in example, quote


def test_the_training_images_follow_their_rule() -> None:
    label_B = pixel_teacher.torch.arange(300) % 3
    generator = pixel_teacher.torch.Generator().manual_seed(0)
    token_BL = pixel_teacher.draw_sparks(label_B, generator)
    assert pixel_teacher.is_right(token_BL, label_B).all()
    assert not pixel_teacher.is_right(token_BL, (label_B + 1) % 3).any()


def test_a_short_training_already_imitates_the_teacher(rows: dict[str, pixel_teacher.Row]) -> None:
    """It learns from noise alone which pixels flare up, as an untrained student does not."""
    assert rows["teacher"].pixels_as_the_teachers == 1
    untrained = rows["untrained"].pixels_as_the_teachers
    assert rows["1 step"].pixels_as_the_teachers > untrained + 0.1
    assert rows["2 steps"].pixels_as_the_teachers > rows["1 step"].pixels_as_the_teachers


def test_the_model_is_a_pipeline_folder(folder: Path, rows: dict[str, pixel_teacher.Row]) -> None:
    pipe = Pipeline.from_pretrained(folder / "model")
    assert [image.size for image in pipe([0, 1], seeds=[0, 1], steps=1).images] == [(8, 8)] * 2
    assert (folder / "grid.png").is_file()
