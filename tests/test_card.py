import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from distilled_decoding import cli, describe
from distilled_decoding.card import model_card
from distilled_decoding.distill import DistillSettings
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.training_command import distill_student
from tests import tiny

PIPE = tiny.pipeline()


def test_the_hub_reads_its_head() -> None:
    head = ModelCard(model_card(PIPE, "toy/model")).data
    assert (head.library_name, head.pipeline_tag) == ("distilled-decoding", "unconditional-image-generation")
    assert head.tags[0] == "llamagen"


def test_it_says_what_the_model_is() -> None:
    card = model_card(PIPE, "toy/model")
    for line in (
        "# toy/model",
        "| classes | 3: a, b, c |",
        "| tokens of an image | 16 |",
        "| blocks, each a forward pass of the teacher | 16 |",
        "| codebook | 16 codes of 4 channels |",
        "| guidance_scale | 2.0 |",
        "| top_k | 12 |",
        "| starting blocks, so up to 4 steps | 0, 4, 8, 12 |",
    ):
        assert line in card.splitlines()
    assert "the multistep flow in 8 steps" in card and "blocks before 16 come from the logits head" in card
    assert "Nothing yet. Only what `distilled-decoding evaluate` prints belongs here" in card


def test_without_a_student_it_speaks_of_none() -> None:
    card = model_card(tiny.pipeline(student=False), "toy/model")
    assert "None yet: `distilled-decoding distill` makes one." in card
    assert "logits head" not in card and "starting blocks" not in card


def test_a_thousand_classes_are_not_listed() -> None:
    config = replace(PIPE.config, class_names=tuple(f"class{i}" for i in range(1000)))
    assert "| classes | 1000: class0 to class999 |" in model_card(Pipeline(PIPE.teacher, None, config), "x")


def test_of_text_it_does_not_speak_of_classes() -> None:
    card = model_card(describe.skeleton("llamagen-t2i-stage1"), "x")
    assert ModelCard(card).data.pipeline_tag == "text-to-image"
    assert "A text-conditional autoregressive" in card
    assert "| captions | 120 tokens of 2048 channels, of `google/flan-t5-xl` |" in card.splitlines()
    assert "labels" not in card and "classes" not in card


@pytest.mark.parametrize(
    "make", [tiny.pipeline, partial(tiny.pipeline, student=False), tiny.text_pipeline], ids=["student", "bare", "text"]
)
def test_what_it_tells_to_type_works(
    make: Callable[[], Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("toy")
    card = Path("toy/README.md").read_text()
    values: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], values)
    assert [image.size for image in values["images"]] == [(8, 8)] * 2
    monkeypatch.setattr(sys, "argv", shlex.split(re.search(r"```\n(distilled-decoding .*)\n```", card)[1]))
    cli.main()
    assert len(list(Path("samples").glob("*.png"))) == 8


def test_a_card_written_by_hand_survives(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("by hand")
    PIPE.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "by hand"


def test_distill_writes_a_card_and_its_folder_goes_on(tmp_path: Path) -> None:
    store = tiny.store(tmp_path / "store", PIPE)
    out, settings = tmp_path / "out", DistillSettings(num_updates=2, batch_size=4)
    first = distill_student("toy", PIPE, store, out, settings)
    assert "\n# out\n" in (out / "README.md").read_text()
    (out / "README.md").write_text("by hand")
    again = distill_student("toy", PIPE, store, out, settings)
    assert (out / "README.md").read_text() == "by hand"
    loaded = Pipeline.from_pretrained(out)
    assert tiny.same_weights(first.student, again.student) and tiny.same_weights(again.student, loaded.student)
