"""Every published file, by the key lists in tests/published: built, counted and recognised without a single weight."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distilled_decoding.families import family
from distilled_decoding.families.published import IGNORED, Published, load_published
from distilled_decoding.index import match_student
from distilled_decoding.presets import FILES, PRESETS, preset

LISTS = {path.name.removesuffix(".keys.json"): path for path in Path(__file__).with_name("published").glob("*.json")}
TWINS = {
    "llamagen_c2i_B_256": "c2i_B_384.pt",
    "llamagen_c2i_B_384": "c2i_B_256.pt",
    "llamagen_c2i_L_256": "c2i_L_384.pt",
    "llamagen_c2i_L_384": "c2i_L_256.pt",
    "llamagen_t2i_XL_stage1_256": "t2i_XL_stage2_512.pt",
    "llamagen_t2i_XL_stage2_512": "t2i_XL_stage1_256.pt",
    "llamagen_vq_ds16_c2i": "vq_ds16_t2i.pt",
    "llamagen_vq_ds16_t2i": "vq_ds16_c2i.pt",
}
"""The files whose names and shapes are another's too."""


def listed(name: str) -> dict[str, Any]:
    return json.loads(LISTS[name].read_text())


def published(name: str) -> Published:
    keys = listed(name)["keys"]
    return Published({key: torch.empty(shape, device="meta") for key, shape in keys.items()}, name)


def test_there_is_a_list_for_every_file() -> None:
    assert {listed(name)["file"] for name in LISTS} == {file.name for file in FILES}


@pytest.mark.parametrize("name", LISTS)
def test_a_published_file_fits_its_config_to_the_last_key(name: str) -> None:
    expected = listed(name)
    for file in (file for file in FILES if file.name == expected["file"]):
        own = family(file.family)
        kind, config = own.kinds(file.component)
        assert type(file.config) is config
        with torch.device("meta"):
            module = kind(file.config)
        load_published(module, published(name), own.published)
        values = sum(value.numel() for key, value in module.state_dict().items() if key not in expected["buffers"])
        assert values == expected["parameter_count"]


@pytest.mark.parametrize("name", LISTS)
def test_a_published_file_is_recognised_by_names_and_shapes(name: str) -> None:
    expected = listed(name)["file"]
    fitting = set()
    for own in (family("llamagen"), family("var")):
        component = own.published.component(published(name))
        if component is not None:
            sizes = own.published.sizes(published(name))
            same_kind = (file for file in FILES if (file.family, file.component) == (own.name, component))
            fitting |= {file.name for file in same_kind if not file.difference(sizes)}
    assert fitting == ({expected, TWINS[name]} if name in TWINS else {expected})


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_pipeline_that_its_teacher_allows(name: str) -> None:
    own = preset(name)
    maker = family(own.config.family)
    with torch.device("meta"):
        modules = {file.component: maker.kinds(file.component)[0](file.config) for file in own.files}
        student = maker.kinds("student")[0](own.student)
    modules.pop("student", None)
    teacher = maker.teacher(**modules)
    match_student(student, teacher, name)
    replace(own.config.training, start_blocks=own.config.start_blocks).check(teacher.order, own.config.split_block)
    assert len(own.config.class_names) == teacher.num_classes
    assert own.config.preset == name
    assert {"sampling"} <= set(own.published) <= {"sampling", "start_blocks", "split_block"}


def test_only_what_is_published_distilled_has_a_student_and_results_of_one() -> None:
    distilled = {name for name, own in PRESETS.items() if own.file("student")}
    assert distilled == {"var-d16", "var-d20", "var-d24", "llamagen-b", "llamagen-l"}
    for name, own in PRESETS.items():
        methods = Counter(result.method for result in own.results)
        assert (methods["--steps 1"], methods["--steps 2"]) == ((1, 1) if name in distilled else (0, 0))


def test_an_unknown_preset_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="unknown preset 'var-d17'; choose one of var-d16, "):
        preset("var-d17")


def test_what_may_be_ignored_is_a_buffer_of_some_file() -> None:
    buffers = {key.split(".")[-1] for name in LISTS for key in listed(name)["buffers"]}
    # LlamaGen's null caption is a buffer, too, but is read.
    assert buffers - {"uncond_embedding"} == set(IGNORED) - {"freqs_cis"}
