import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distilled_decoding.checkpoint import save_component
from distilled_decoding.families.llamagen.student import LlamaGenStudent
from distilled_decoding.images import grid, to_uint8
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, problems
from distilled_decoding.zoo import resolve, shipped
from tests import tiny

PIPE = tiny.pipeline()
OUTPUTS = ("pil", "array", "tensor", "codes")
MORE_THAN_A_BATCH = {"labels": [2, 0, 1, 1] * 3, "seeds": range(5, 17)}


def all_images(pipe: Pipeline, num: int, steps: int | str = 1) -> torch.Tensor:
    key_B = image_keys("sampling", 0, range(num))
    return torch.cat(list(pipe.images(pipe.plan(steps), tiny.labels(num), key_B)))


def test_saved_and_loaded_gives_the_same_images(tmp_path: Path) -> None:
    PIPE.save_pretrained(str(tmp_path / "pipe"))
    loaded = Pipeline.from_pretrained(tmp_path / "pipe")
    assert loaded.config == PIPE.config and loaded.fingerprint == PIPE.fingerprint
    for steps in (1, 2, "teacher"):
        assert torch.equal(all_images(loaded, 10, steps), all_images(PIPE, 10, steps))


def test_the_folder_has_diffusers_shape(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path, torch.float16)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for component in ("tokenizer", "transformer", "student"):
        assert index[component][0] == "distilled_decoding"
        assert (tmp_path / component / "config.json").is_file()
        weights = load_file(tmp_path / component / "model.safetensors")
        assert all(w.dtype == torch.float16 for w in weights.values())


def test_without_a_student_only_the_teacher_samples(tmp_path: Path) -> None:
    tiny.pipeline(student=False).save_pretrained(tmp_path)
    pipe = Pipeline.from_pretrained(tmp_path)
    assert all_images(pipe, 3, "teacher").shape == (3, 1, 8, 8)
    with pytest.raises(ValueError, match="no student yet"):
        pipe.plan(1)


@pytest.mark.parametrize("steps", [1, 4, "teacher", "teacher-ancestral"])
def test_image_i_depends_on_its_key_and_label_alone(steps: int | str) -> None:
    few, many = all_images(PIPE, 3, steps), all_images(PIPE, 13, steps)
    assert torch.equal(few, many[:3])
    condition, key_B = tiny.labels(13), image_keys("sampling", 0, range(13))
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    shuffled = torch.cat(list(PIPE.images(PIPE.plan(steps), condition[order], key_B[order])))
    assert torch.equal(shuffled, many[order])


def test_call_takes_labels_and_seeds() -> None:
    both = PIPE([2, 0], seeds=[5, 6])
    alone = PIPE([0], seeds=[6])
    assert both.images[1].tobytes() == alone.images[0].tobytes()
    assert both.images[0].size == (8, 8)
    assert PIPE([2], seeds=[5], steps=2).images[0].tobytes() != PIPE([2], seeds=[6], steps=2).images[0].tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": [3]}, "label 3 is outside 0..2"),
        ({"labels": [-1]}, "label -1"),
        ({"labels": [0], "seeds": [1, 2]}, "2 seeds do not fit 1 images"),
        ({"labels": [0], "output": "jpeg"}, "unknown output 'jpeg'; choose one of pil, array, tensor, codes"),
        ({"labels": [0], "steps": 0}, "got 0"),
        ({"labels": [0], "steps": 5}, "got 5"),
        ({"labels": [0], "steps": "techer"}, "techer"),
        ({"labels": [0], "schedule": [0, 8, 8]}, "ascend"),
        ({"labels": [0], "schedule": [0, 99]}, "99"),
        ({"labels": [0], "steps": "teacher", "teacher_span": (0, 4)}, "student steps"),
        ({"labels": []}, "labels is empty"),
        ({"labels": [0], "schedule": []}, "begin with block 0"),
        ({"labels": [0], "steps": 1, "schedule": [0]}, "not both"),
        ({"labels": [0], "schedule": [0, 8, 12], "teacher_span": (4, 12)}, "overwrite the student's step at block 8"),
        ({"labels": [0], "schedule": [0, 4, 8], "teacher_span": (4, 8)}, "overwrite the student's step at block 4"),
    ],
)
def test_bad_calls_are_refused(arguments: dict, message: str) -> None:
    for generate in (PIPE, PIPE.stream):
        with pytest.raises(ValueError, match=message):
            generate(**arguments)


def colourful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three channels, the last beyond the range of an image."""
    decode, factor_C11 = PIPE.teacher.decode, torch.tensor([1.0, -1.0, 50.0])[:, None, None]
    monkeypatch.setattr(PIPE.teacher, "decode", lambda code_BLC: decode(code_BLC) * factor_C11)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_output_is_the_same_images(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if channels == 3:
        colourful(monkeypatch)
    pil, array, tensor, codes = (PIPE(**MORE_THAN_A_BATCH, output=output) for output in OUTPUTS)
    assert array.images.dtype == np.uint8 and array.images.shape == (12, 8, 8, channels)
    assert np.array_equal(np.stack([np.atleast_3d(image) for image in pil.images]), array.images)
    assert tensor.images.dtype == torch.float32 and tensor.images.shape == (12, channels, 8, 8)
    assert tensor.images.abs().max() <= 1 and (channels == 1 or tensor.images.max() == 1)
    assert np.array_equal(to_uint8(tensor.images).permute(0, 2, 3, 1).numpy(), array.images)
    assert codes.images is None
    assert all(torch.equal(made.code_BLC, codes.code_BLC) for made in (pil, array, tensor))
    assert torch.equal(PIPE.teacher.decode(codes.code_BLC[:8]).clamp(-1, 1), tensor.images[:8])


def test_codes_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(PIPE.teacher), "decode")
    assert PIPE([0], output="codes").code_BLC.shape == (1, 16, 4)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_stream_is_the_call_one_by_one(output: str) -> None:
    made = PIPE(**MORE_THAN_A_BATCH, steps=2, output=output)
    streamed = list(PIPE.stream(**MORE_THAN_A_BATCH, steps=2, output=output))
    expected = made.code_BLC if output == "codes" else made.images
    assert len(streamed) == 12
    assert all(np.array_equal(one, other) for one, other in zip(streamed, expected, strict=True))


def test_a_stream_makes_a_micro_batch_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = PIPE.teacher.decode, []
    monkeypatch.setattr(PIPE.teacher, "decode", lambda code_BLC: (sizes.append(len(code_BLC)), decode(code_BLC))[1])
    images = PIPE.stream(np.zeros(50_000, dtype=np.int32), range(50_000), output="array")
    assert sizes == []
    for expected in [8] * 8 + [16]:
        next(images)
        assert sum(sizes) == expected


def test_a_callback_hears_of_every_step_of_every_micro_batch() -> None:
    steps = []
    PIPE(**MORE_THAN_A_BATCH, steps=2, callback=lambda step: steps.append((step.block, len(step.code_BLC))))
    assert steps == [(0, 8), (8, 8), (0, 4), (8, 4)]


def out_of_memory_on_a_cpu() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def out_of_memory_on_a_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def limit(monkeypatch: pytest.MonkeyPatch, module: object, name: str, size: int, fail: Callable) -> None:
    """Let a method fail above a batch size."""
    call = getattr(module, name)

    def limited(batch: torch.Tensor, *rest: object) -> object:
        if len(batch) > size:
            fail()
        return call(batch, *rest)

    monkeypatch.setattr(module, name, limited)


@pytest.mark.parametrize("fail", [out_of_memory_on_a_cpu, out_of_memory_on_a_gpu])
@pytest.mark.parametrize(("module", "name"), [(PIPE.student, "forward"), (PIPE.teacher, "decode")])
def test_a_batch_that_does_not_fit_in_memory_is_halved(
    module: object, name: str, fail: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, filled = PIPE(**MORE_THAN_A_BATCH, output="array").images, all_images(PIPE, 11)
    limit(monkeypatch, module, name, 3, fail)
    for images, expected in (
        (lambda: PIPE(**MORE_THAN_A_BATCH, output="array").images, called),
        (lambda: all_images(PIPE, 11), filled),
    ):
        with pytest.warns(UserWarning) as warned:
            assert np.array_equal(images(), expected)
        assert [str(warning.message) for warning in warned] == [
            f"{old} images do not fit in memory at once; going on with {new}, the same images up to rounding"
            for old, new in ((8, 4), (4, 2))
        ]


def test_what_is_halved_is_the_batch_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, PIPE.student, "forward", 2, out_of_memory_on_a_gpu)
    with pytest.warns(UserWarning, match="5 images .* going on with 2"):
        PIPE([0] * 5)


def test_an_image_that_does_not_fit_in_memory_and_other_errors_go_through(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, PIPE.student, "forward", 0, out_of_memory_on_a_cpu)
    with pytest.warns(UserWarning) as warned, pytest.raises(RuntimeError, match="can't allocate memory"):
        PIPE([0] * 8)
    assert len(warned) == 3
    limit(monkeypatch, PIPE.student, "forward", 0, lambda: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        PIPE([0] * 8)


@pytest.mark.parametrize("output", ["pil", "codes"])
def test_what_is_not_finite_is_refused(output: str) -> None:
    pipe = tiny.pipeline().with_settings(split_block=0)
    for parameter in pipe.student.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match="output is not finite; its weights are damaged, or .*: use float32"):
        pipe([0], output=output)


def test_a_decoder_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIPE.teacher, "decode", lambda code_BLC: torch.full((len(code_BLC), 1, 8, 8), torch.inf))
    with pytest.raises(ValueError, match="output is not finite"):
        next(PIPE.images(PIPE.plan(), tiny.labels(2), image_keys("sampling", 0, range(2))))


def test_damage_is_named(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "model.safetensors"
    tensors = load_file(path)
    renamed = {k.replace("norm.weight", "nrom.weight") if k == "norm.weight" else k: v for k, v in tensors.items()}
    save_file(renamed, path)
    with pytest.raises(ValueError, match="lacks 'norm.weight'"):
        Pipeline.from_pretrained(tmp_path)
    save_file(tensors | {"extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="has 'extra'"):
        Pipeline.from_pretrained(tmp_path)
    save_file(tensors | {"norm.weight": torch.zeros(5)}, path)
    with pytest.raises(ValueError, match=r"'norm.weight' has shape \(5,\)"):
        Pipeline.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        Pipeline.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        Pipeline.from_pretrained(tmp_path)


def test_hashes_find_a_changed_file(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    assert problems(tmp_path) == []
    path = tmp_path / "student" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (tmp_path / "tokenizer" / "model.safetensors").unlink()
    assert [("missing" in p, "damaged" in p) for p in problems(tmp_path)] == [(True, False), (False, True)]


def test_an_index_with_a_wrong_field_is_refused(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    path = tmp_path / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in index.items() if k != "split_block"}))
    with pytest.raises(ValueError, match="split_block"):
        Pipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(index | {"split_block": 17}))
    with pytest.raises(ValueError, match="split_block 17 leaves the sequence"):
        Pipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(index | {"micro_batch": 0}))
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        Pipeline.from_pretrained(tmp_path)
    path.write_text(json.dumps(index | {"family": "dalle"}))
    with pytest.raises(ValueError, match="unknown family 'dalle'"):
        Pipeline.from_pretrained(tmp_path)


def written(folder: Path, **fields: object) -> Path:
    """A folder of the toy model whose index has other fields; None takes one out."""
    PIPE.save_pretrained(folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | fields
    gone = {key for key, value in fields.items() if value is None}
    path.write_text(json.dumps({key: value for key, value in index.items() if key not in gone}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tokenizer": ["distilled_decoding", "FooTokenizer"]},
            r"names \['distilled_decoding', 'FooTokenizer'\] as tokenizer, where a llamagen model has a VQTokenizer",
        ),
        ({"transformer": ["distilled_decoding", "VQTokenizer"]}, "as transformer, where .* has a Transformer$"),
        ({"transformer": ["diffusers", "Transformer"]}, "'diffusers'.* as transformer"),
        ({"transformer": None}, "model_index.json names nothing as transformer"),
        (
            {"student": ["distilled_decoding", "VARStudent"]},
            "as student, where a llamagen model has a LlamaGenStudent$",
        ),
        ({"family": "var"}, r"'VQTokenizer'\] as tokenizer, where a var model has a MultiScaleTokenizer$"),
    ],
)
def test_an_index_that_names_other_classes_is_refused(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(written(tmp_path, **fields))


def test_the_name_of_a_published_model_asks_for_its_files() -> None:
    with pytest.raises(ValueError, match="var-d16 is a published model: convert its files first"):
        Pipeline.from_pretrained("var-d16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "unmaskd"}, "unknown prefix 'unmaskd'; choose one of causal, unmasked"),
        ({"steps": "teacher", "prefix": "unmasked"}, "an unmasked prefix goes with a teacher span"),
        ({"schedule": (0, 8), "teacher_span": (4, 8), "prefix": "unmasked"}, "of a teacher that masks its prefix"),
    ],
)
def test_a_prefix_is_read_as_the_teacher_can(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PIPE.plan(**options)


def test_a_component_in_the_place_of_another_is_named(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    (tmp_path / "tokenizer" / "config.json").write_bytes((tmp_path / "transformer" / "config.json").read_bytes())
    with pytest.raises(
        ValueError, match="tokenizer/config.json lacks ch, .* and has the unknown .* dim, .*TokenizerConfig"
    ):
        Pipeline.from_pretrained(tmp_path)
    PIPE.save_pretrained(tmp_path)
    weights = tmp_path / "tokenizer" / "model.safetensors"
    weights.write_bytes((tmp_path / "transformer" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="lacks 'encoder.conv_in.weight': it does not hold a VQTokenizer"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 33}, "student/config.json: dim must be a multiple"),
        ({"num_tokens": "16"}, "student/config.json: "),
        ({"vocab_size": 12}, r"student/model.safetensors: .* shape \(16, 32\), but the config asks for \(12, 32\)"),
    ],
)
def test_a_config_that_does_not_fit_is_named(fields: dict, message: str, tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    path = tmp_path / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer/config.json", "transformer/model.safetensors", "transformer", "student"])
def test_what_is_missing_is_named(name: str, tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    path = tmp_path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=f"{name}.* is missing; is the folder complete"):
        Pipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_tokens": 9}, r"student has 9 blocks \(9 tokens\), its teacher 16 \(16\); take a student that was"),
        ({"vocab_size": 12}, "student has 12 codes of 4 channels, its teacher 16 of 4; take a student that was"),
        ({"code_dim": 5}, "student has 16 codes of 5 channels, its teacher 16 of 4"),
    ],
)
def test_a_student_of_another_teacher_is_refused(sizes: dict, message: str, tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    other = LlamaGenStudent(replace(PIPE.student.config, **sizes))
    save_component(tmp_path / "student", other, other.config, torch.float32)
    with pytest.raises(ValueError, match=message):
        Pipeline.from_pretrained(tmp_path)


def test_models_are_found_by_name_and_folder(tmp_path: Path) -> None:
    for name, folder in shipped().items():
        assert resolve(name) == folder
    with pytest.raises(ValueError, match="unknown model 'fashion-lamagen'.*shipped models"):
        resolve("fashion-lamagen")
    with pytest.raises(ValueError, match="no model_index.json"):
        resolve(tmp_path)


def test_to_uint8_clamps_and_rounds() -> None:
    image = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert to_uint8(image).flatten().tolist() == [0, 0, 128, 255, 255]


def test_grid_lays_images_out_row_by_row() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    picture = grid(images, columns=3, scale=1)
    assert picture.size == (6, 4)
    assert [picture.getpixel((x, 0)) for x in (0, 2, 4)] == [0, 1, 2]
    assert [picture.getpixel((x, 2)) for x in (0, 2, 4)] == [3, 4, 0]
