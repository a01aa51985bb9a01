"""Models of captions from prompts to images: a tiny teacher behind a tiny T5 of bytes."""

import gc
import json
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from distilled_decoding import commands, describe
from distilled_decoding.condition import Captions
from distilled_decoding.distill import DistillSettings
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, problems
from distilled_decoding.prompts import encode_prompts
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.text import TextEncoder
from distilled_decoding.training_command import distill_student
from tests import tiny

OWN = ("red apple", "", "a face")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tiny.text_pipeline()


def codes(pipe: Pipeline, prompts: list[str], seeds: list[int]) -> torch.Tensor:
    return pipe(prompts=prompts, seeds=seeds, steps=2, output="codes").code_BLC


def test_an_image_follows_from_its_prompt_and_seed(pipe: Pipeline) -> None:
    both_BLC = codes(pipe, ["Red  Apple", "face"], [3, 4])
    assert torch.allclose(both_BLC[:1], codes(pipe, ["red apple"], [3]), atol=1e-5)
    for prompts, seeds in ((["face"], [3]), (["red apple"], [4])):
        assert not torch.allclose(both_BLC[:1], codes(pipe, prompts, seeds), atol=1e-2)


def test_an_empty_prompt_is_the_null_caption(pipe: Pipeline) -> None:
    mask_BT = torch.arange(12)[None] == 11
    null, key_1 = Captions(torch.randn(1, 12, 8), mask_BT, torch.tensor([True])), image_keys("image", 3, [0])
    assert torch.allclose(codes(pipe, [""], [3]), pipe.codes(pipe.plan(2), null, key_1), atol=1e-5)


def test_many_prompts_are_encoded_in_parts(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    features, parts = TextEncoder.features, []
    monkeypatch.setattr("distilled_decoding.prompts._BATCH", 2)
    monkeypatch.setattr(TextEncoder, "features", lambda *given: parts.append(len(given[1])) or features(*given))
    prompts = ["red apple", "face", "", "green apple", "face"]
    together_BLC = codes(pipe, prompts, [0, 1, 2, 3, 4])
    assert parts == [2, 2, 1]
    assert torch.allclose(together_BLC[4:], codes(pipe, ["face"], [4]), atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"labels": [0]}, "this model reads prompts, not labels"),
        ({"labels": [0], "prompts": ["face"]}, "give either labels or prompts"),
        ({}, "give either labels or prompts"),
        ({"prompts": []}, "prompts is empty; give one for each image"),
        ({"prompts": "face"}, "prompts must be several texts, got one string, 'face'"),
        ({"prompts": ["face"], "seeds": [1, 2]}, "2 seeds do not fit 1 images"),
    ],
)
def test_what_a_model_of_captions_does_not_read_is_refused(pipe: Pipeline, asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(**asked)
    with pytest.raises(ValueError, match=message):
        pipe.stream(**asked)


def test_a_model_of_classes_reads_no_prompts(tmp_path: Path) -> None:
    classes = tiny.pipeline()
    for ask in (
        lambda: classes(prompts=["face"]),
        lambda: classes.table(["face"]),
        lambda: classes.table(tmp_path),
        lambda: commands.make_trajectories(
            "x", classes, tmp_path, 8, tiny.trajectory_settings(), prompts=tmp_path / "prompts.txt"
        ),
    ):
        with pytest.raises(ValueError, match=r"not prompts: give labels in 0\.\.2, or leave --prompts out"):
            ask()


def test_without_an_encoder_or_prompts_a_model_says_what_it_needs(tmp_path: Path) -> None:
    bare = tiny.pipeline(family="text")
    with pytest.raises(ValueError, match="this model has no text encoder: name one"):
        bare(prompts=["face"])
    with pytest.raises(ValueError, match="this model ships no prompts of its own"):
        bare.table()
    with pytest.raises(ValueError, match="column 'name' goes with a .csv or .parquet file"):
        bare.table(["face"], column="name")
    with pytest.raises(ValueError, match="is a folder, which has no columns; leave the column 'name' out"):
        bare.table(tmp_path, column="name")


def test_a_text_encoder_is_given_or_named_and_told_of(pipe: Pipeline) -> None:
    bare = tiny.pipeline(family="text")
    named = bare.with_settings(text_encoder="google/flan-t5-xl")
    sources = [describe.info(model)["captions"]["text_encoder"] for model in (pipe, bare, named)]
    assert sources == ["in the folder", None, "google/flan-t5-xl"]
    with pytest.raises(ValueError, match="a text encoder is given and 'google/flan-t5-xl' is named; leave one"):
        Pipeline(pipe.teacher, None, named.config, pipe.text_encoder)


def test_a_folder_keeps_encoder_and_prompts_and_needs_no_transformers_to_be_copied(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "first")
    loaded = Pipeline.from_pretrained(tmp_path / "first", dtype=torch.bfloat16)
    assert loaded.prompts == OWN and loaded.text_encoder.identity == pipe.text_encoder.identity
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        again = Pipeline.from_pretrained(tmp_path / "first").with_student(pipe.student, (0, 8), 16)
        again.save_pretrained(tmp_path / "second")
        with pytest.raises(ValueError, match="text needs the package transformers"):
            again(prompts=["face"])
    copied = Pipeline.from_pretrained(tmp_path / "second")
    assert torch.equal(codes(copied, ["face"], [3]), codes(Pipeline.from_pretrained(tmp_path / "first"), ["face"], [3]))
    assert problems(tmp_path / "second") == []
    named = copied.with_settings(text_encoder=str(tmp_path / "first"))
    named.save_pretrained(tmp_path / "named")
    assert not (tmp_path / "named" / "text_encoder").exists()
    assert Pipeline.from_pretrained(tmp_path / "named").text_encoder.identity == pipe.text_encoder.identity
    path = tmp_path / "second" / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert problems(tmp_path / "second") == [f"{path} is damaged: its hash is not the index's"]


def test_prompts_are_asked_for_by_number(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("face\n\nRed apple\n")
    folder = tmp_path / "encoded"
    encode_prompts(pipe.text_encoder, ["face", "", "red apple"], folder)
    number_B, stored = torch.tensor([2, 1, 0]), pipe.table(folder)
    for table in (pipe.table(tmp_path / "prompts.txt"), pipe.table(["face", "", "red apple"])):
        assert len(table) == 3 and table.identity == stored.identity
        torch.testing.assert_close(table[number_B].feature_BTF, stored[number_B].feature_BTF, rtol=1e-3, atol=1e-3)
    assert [len(pipe.table()), pipe.table().identity == pipe.table(list(OWN)).identity] == [3, True]
    encode_prompts(tiny.text_encoder(max_tokens=13), ["face"], tmp_path / "longer")
    with pytest.raises(ValueError, match=r"captions of \[tokens, channels\] \(13, 8\), but this model reads \(12, 8\)"):
        pipe.table(tmp_path / "longer")


def sampled(
    pipe: Pipeline, out: Path, labels: tuple[int, ...] = (), prompts: tuple[str, ...] = (), num: int = 5
) -> np.ndarray:
    """The numbers that the evaluator's file has for each image."""
    run = commands.SampleRun("toy", labels, prompts, num, 1, None, None, "causal", 0, 0)
    commands.sample_images(run, pipe, out, None, out.with_suffix(".npz"))
    return np.load(out.with_suffix(".npz"))["arr_1"]


def test_sample_takes_prompts_in_turn_or_the_models_own(pipe: Pipeline, tmp_path: Path) -> None:
    assert sampled(pipe, tmp_path / "given", prompts=("face", "red apple")).tolist() == [0, 1, 0, 1, 0]
    assert sampled(pipe, tmp_path / "own").tolist() == [0, 1, 2, 0, 1]
    same, other = ((tmp_path / folder / "000000.png").read_bytes() for folder in ("given", "own"))
    assert same != other
    assert sampled(pipe, tmp_path / "first", num=2).tolist() == [0, 1]
    noted = {
        folder: json.loads((tmp_path / folder / "run.json").read_text())["notes"]["prompts"]
        for folder in ("given", "own", "first")
    }
    assert noted == {"given": ["face", "red apple"], "own": list(OWN), "first": list(OWN[:2])}
    with pytest.raises(ValueError, match="this model reads prompts, not labels"):
        sampled(pipe, tmp_path / "labels", labels=(0,))
    with pytest.raises(ValueError, match="give --labels or --prompt, not both"):
        sampled(pipe, tmp_path / "both", labels=(0,), prompts=("face",))
    with pytest.raises(ValueError, match="holds another run: its prompts is"):
        sampled(pipe, tmp_path / "given", prompts=("face", "green apple"))


def test_trajectories_come_from_a_file_or_from_a_folder_and_training_compares(pipe: Pipeline, tmp_path: Path) -> None:
    file, settings = tmp_path / "names.csv", tiny.trajectory_settings()
    file.write_text("name,kind\nface,a\nred apple,b\n")
    out = tmp_path / "t"
    made = commands.make_trajectories("toy", pipe, out, 16, settings, prompts=file, column="name")
    assert made["made"] == 16 and made["trajectories"] == 16
    assert commands.make_trajectories("toy", pipe, out, 24, settings, prompts=file, column="name")["made"] == 8
    store = TrajectoryStore.open(out)
    assert store[torch.arange(3)].label_N.tolist() == [0, 1, 0]
    bare = Pipeline(pipe.teacher, None, pipe.config)  # as without an encoder
    assert commands.make_trajectories("toy", bare, out, 24, settings, prompts=file, column="name")["made"] == 0
    commands.make_trajectories("toy", bare, tmp_path / "again", 24, settings, prompts=out / "prompts")
    again = TrajectoryStore.open(tmp_path / "again")
    assert again.identity == store.identity and not (tmp_path / "again" / "prompts").exists()
    file.write_text("name,kind\nface,a\ngreen apple,b\n")
    with pytest.raises(ValueError, match="holds another run: its prompts is"):
        commands.make_trajectories("toy", pipe, out, 24, settings, prompts=file, column="name")
    training = DistillSettings(num_updates=1, batch_size=4, bf16=False)
    give = "give the folder of the prompts that they were made with: --prompts FOLDER"
    with pytest.raises(ValueError, match=f"the prompts of .*again are not beneath it; {give}"):
        distill_student("toy", bare, again, tmp_path / "student", training)
    with pytest.raises(ValueError, match=f'its prompts is "\\w+", not "\\w+"; {give}'):
        commands.make_trajectories("toy", pipe, tmp_path / "again", 32, settings)
    encode_prompts(pipe.text_encoder, ["face", "green apple"], tmp_path / "others")
    with pytest.raises(ValueError, match=f'its prompts is "\\w+", not "\\w+"; {give}'):
        distill_student("toy", bare, again, tmp_path / "student", training, prompts=tmp_path / "others")


def test_damaged_features_are_found_and_not_trained_on(pipe: Pipeline, tmp_path: Path) -> None:
    out, settings = tmp_path / "t", tiny.trajectory_settings()
    commands.make_trajectories("toy", pipe, out, 8, settings)
    assert commands.verify(out) == {"kind": "trajectories", "problems": []}
    path = out / "prompts" / "features-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    damaged = f"{path} is damaged: its hash is not the manifest's"
    assert commands.verify(out)["problems"] == [damaged]
    assert commands.verify(out / "prompts") == {"kind": "prompts", "problems": [damaged]}
    training = DistillSettings(num_updates=1, batch_size=4, bf16=False)
    with pytest.raises(ValueError, match=damaged):
        distill_student("toy", pipe, TrajectoryStore.open(out), tmp_path / "student", training)
    with pytest.raises(ValueError, match=damaged):
        commands.make_trajectories("toy", pipe, tmp_path / "other", 8, settings, prompts=out / "prompts")
    (out / "prompts" / "prompts.txt").write_text("face\n")
    assert "prompts.txt has changed since it was encoded" in commands.verify(out)["problems"][0]


def test_the_encoder_goes_when_the_prompts_are_encoded(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    encoder = weakref.ref(loaded.text_encoder)
    commands.make_trajectories("toy", loaded, tmp_path / "t", 8, tiny.trajectory_settings())
    gc.collect()
    assert encoder() is None and loaded.text_encoder is not None


@pytest.mark.slow
def test_from_a_prompt_file_to_a_student(pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distilled_decoding import cli

    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["distilled-decoding", *map(str, words)])
        cli.main()

    pipe.save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("face\n\nred apple\ngreen apple\n")
    shards, out = tmp_path / "shards", tmp_path / "student"
    run("trajectories", tmp_path / "teacher", "--num", 256, "--out", shards, "--prompts", tmp_path / "prompts.txt")
    words = ["--num-updates", 300, "--batch-size", 32, "--learning-rate", 3e-3, "--no-bf16", "--ema-rate", 0.9]
    run("distill", tmp_path / "teacher", "--trajectories", shards, "--out", out, *words, "--watch-every", 150)
    losses = [json.loads(line)["total"] for line in (out / "log.jsonl").read_text().splitlines() if "total" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert (out / "watch" / "000300.png").is_file()
    trained = Pipeline.from_pretrained(out)
    assert trained.prompts == OWN
    shard = TrajectoryStore.open(shards)[torch.arange(64)]
    condition = trained.table(shards / "prompts")[shard.label_N]
    code_BLC = trained.codes(trained.plan(4), condition, shard.key_N)
    right = (torch.cdist(code_BLC, trained.teacher.codebook).argmin(-1) == shard.token_NL).float().mean()
    chance = (torch.cdist(code_BLC, trained.teacher.codebook).argmin(-1) == shard.token_NL.roll(4, 0)).float().mean()
    assert right > chance + 0.1
    run("sample", out, "--prompt", "red apple", "green apple", "--num", 3, "--steps", 2, "--out", tmp_path / "images")
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    (shards / "shard-00000.json").unlink()
    (shards / "prompts" / "features-00000.safetensors").unlink()
    run("verify", shards, "--repair", tmp_path / "teacher")
    assert torch.equal(TrajectoryStore.open(shards)[torch.arange(64)].token_NL, shard.token_NL)
    shutil.move(shards / "prompts", tmp_path / "prompts")
    again = ["distill", tmp_path / "teacher", "--trajectories", shards, "--out", tmp_path / "moved"]
    run(*again, "--prompts", tmp_path / "prompts", "--num-updates", 2, "--batch-size", 4, "--no-bf16")
    assert (tmp_path / "moved" / "student" / "model.safetensors").is_file()
