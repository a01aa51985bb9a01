"""Published files, as their publishers wrote them, become pipelines that compute what the reference computes."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distilled_decoding import Pipeline, cli, commands, describe
from distilled_decoding.condition import Labels
from distilled_decoding.convert import identify, read_parts
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig
from distilled_decoding.families.published import IGNORED
from distilled_decoding.originals import Weights
from distilled_decoding.teacher import TeacherSampling
from tests import tiny
from tests.golden import FOLDER, load_case

FILES = FOLDER / "checkpoints"
VAR = [FILES / name for name in ("vae_tiny.pth", "var_tiny.pth", "dd_var_tiny.pth")]
LLAMAGEN = [FILES / name for name in ("vq_tiny.pt", "gpt_model_tiny.pt", "dd_llamagen_tiny.pt")]
SIZES = {"num_heads": 2, "num_tokens": 16}
"""What LlamaGen's files do not tell, of these tiny ones."""


def llamagen(transformer: str = "gpt_model_tiny.pt", **options: object) -> Pipeline:
    return Pipeline.from_original([LLAMAGEN[0], FILES / transformer, LLAMAGEN[2]], **SIZES, **options)


@torch.no_grad()
def test_vars_tokenizer() -> None:
    case = load_case("ckpt_vae")
    tokenizer = Pipeline.from_original(VAR).teacher.tokenizer
    token_BL = tokenizer.encode(case.inputs["image"])
    case.check("ids", token_BL)
    case.check("rec", tokenizer.decode(tokenizer.codebook_VC[token_BL]).clamp(-1, 1))
    case.check("fhat_img", tokenizer.decode_features(case.inputs["fhat"]).clamp(-1, 1))


@torch.no_grad()
def test_vars_transformer() -> None:
    case = load_case("ckpt_var")
    transformer = Pipeline.from_original(VAR).teacher.transformer
    case.check("logits", transformer(case.inputs["x_BLCv_wo_first_l"], Labels(case.inputs["label"], 5)))


@torch.no_grad()
@pytest.mark.parametrize("weights", ["ema", "raw", None])
def test_vars_student(weights: Weights | None) -> None:
    case = load_case("ckpt_dd_var")
    student = Pipeline.from_original(VAR, weights=weights).student
    output = student(case.inputs["x"], Labels(case.inputs["label"], 5), torch.full((2,), 2))
    case.check(f"x_BLCv_{weights or 'ema'}", output.code_BLC)
    case.check(f"logits_{weights or 'ema'}", output.logits_BLV)


@torch.no_grad()
def test_llamagens_tokenizer() -> None:
    case = load_case("ckpt_llamagen_vq")
    tokenizer = llamagen().teacher.tokenizer
    token_BL = tokenizer.encode(case.inputs["image"])
    case.check("ids", token_BL)
    case.check("rec", tokenizer.decode(tokenizer.codebook_VC[token_BL]))


@torch.no_grad()
@pytest.mark.parametrize("wrapper", ["model", "train", "fsdp", "deepspeed"])
def test_llamagens_transformer(wrapper: str) -> None:
    case = load_case(f"ckpt_llamagen_gpt_{wrapper}")
    teacher = llamagen(f"gpt_{wrapper}_tiny.pt", allow_namespace=wrapper == "train").teacher
    case.check("logits", teacher.transformer(case.inputs["idx"], Labels(case.inputs["label"], 5)))


@torch.no_grad()
@pytest.mark.parametrize(("weights", "entry"), [("ema", "ema"), ("raw", "model"), (None, "ema")])
def test_llamagens_student(weights: Weights | None, entry: str) -> None:
    case = load_case("ckpt_dd_llamagen")
    student = llamagen(weights=weights).student
    output = student(case.inputs["x"], Labels(case.inputs["label"], 5), torch.full((2,), 6))
    case.check(f"tokens_{entry}", output.code_BLC)
    case.check(f"logits_{entry}", output.logits_BLV)


@pytest.mark.parametrize("make", [lambda: Pipeline.from_original(VAR), llamagen])
def test_what_was_converted_is_saved_loaded_and_sampled_as_any_pipeline(make: Callable, tmp_path: Path) -> None:
    found = make()
    found.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert loaded.config == found.config and loaded.fingerprint == found.fingerprint
    for steps in (1, "teacher", "teacher-ancestral"):
        code_BLC, expected_BLC = (pipe([0, 4], steps=steps).code_BLC for pipe in (loaded, found))
        assert torch.equal(code_BLC, expected_BLC)


def test_sizes_may_come_as_a_list() -> None:
    assert Pipeline.from_original(VAR, patch_nums=[1, 2, 3, 4]).teacher.order.num_blocks == 4


def test_the_order_of_the_files_does_not_matter() -> None:
    assert Pipeline.from_original(VAR[::-1]).fingerprint == Pipeline.from_original(VAR).fingerprint


def test_a_teacher_alone_is_a_pipeline_without_a_student() -> None:
    pipe = Pipeline.from_original(VAR[:2])
    assert pipe.student is None and pipe.config.preset is None and len(pipe.config.class_names) == 5


def changed(path: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a bare state dict, changed."""
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, out)
    return out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop("head.bias"), r"var.pth \(by its names a var transformer\) lacks 'head.bias'"),
        (lambda w: w.pop("word_embed.weight"), r"a var transformer\) lacks 'word_embed.weight', from which its sizes"),
        (lambda w: w.update(more=torch.ones(1)), "also holds 'more', which does not belong there"),
        (lambda w: w.update({"head.bias": torch.ones(3)}), "'head.bias' has shape \\(3,\\), not \\(16,\\)"),
    ],
)
def test_an_extra_missing_or_misshaped_key_is_named(change: Callable, sentence: str, tmp_path: Path) -> None:
    path = changed(VAR[1], tmp_path / "var.pth", change)
    with pytest.raises(ValueError, match=sentence):
        Pipeline.from_original([VAR[0], path])


def test_keys_of_the_tokenizer_are_named_as_in_its_file(tmp_path: Path) -> None:
    name = "decoder.up.0.attn.1.qkv.weight"
    path = changed(VAR[0], tmp_path / "vae.pth", lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=f"by its names a var tokenizer.* lacks '{name}'"):
        Pipeline.from_original([path, VAR[1]])


@pytest.mark.parametrize(
    ("files", "options", "sentence"),
    [
        (VAR[:1], {}, "no transformer among these files"),
        (VAR[2:], {}, "no tokenizer and no transformer among these files"),
        (VAR[:2] + VAR[:1], {}, "two of these files hold a tokenizer"),
        ([VAR[0], LLAMAGEN[1]], {}, "of several families: llamagen, var"),
        (LLAMAGEN, {}, "tells its num_heads, num_tokens; give --num-heads, --num-tokens"),
        (LLAMAGEN, {"num_heads": 2, "num_tokens": 15}, "square number"),
        (LLAMAGEN, SIZES | {"patch_nums": (1, 2)}, "a llamagen model has no patch_nums"),
        (VAR, {"num_heads": 2}, "has num_heads 1, not 2"),
        (VAR, {"preset": "var-d16"}, "are not var-d16: of the tokenizer ch is 32, not 160"),
        (LLAMAGEN, {"preset": "var-d16"}, "are not var-d16: it has no llamagen tokenizer"),
        (VAR, {"preset": "var"}, "unknown preset 'var'"),
        (VAR, {"weights": "averaged"}, "unknown weights 'averaged'; choose one of ema, raw"),
        (str(VAR[0]), {}, "paths must be several files"),
        ([FILES, VAR[0]], {}, "is a folder; give the published files themselves"),
    ],
)
def test_files_that_make_no_model_are_one_sentence(files: list[Path], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Pipeline.from_original(files, **options)


def test_any_other_file_is_no_published_model(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no published model of llamagen, var: its tensors are layer.weight"):
        identify(tmp_path / "other.pt")


def full_size(name: str, folder: Path) -> Path:
    """A published file at full size, its parameters zeros of which only one is stored."""
    listed = json.loads((Path(__file__).with_name("published") / f"{name}.keys.json").read_text())
    path = folder / listed["file"].replace("/", "-")
    parameters = {key: shape for key, shape in listed["keys"].items() if key.split(".")[-1] not in IGNORED}
    torch.save({key: torch.zeros(()).expand(shape) for key, shape in parameters.items()}, path)
    return path


def test_twins_must_be_told_apart_by_name(tmp_path: Path) -> None:
    files = [full_size(name, tmp_path) for name in ("llamagen_vq_ds16_c2i", "llamagen_c2i_B_256")]
    with pytest.raises(ValueError, match="fit llamagen-b or llamagen-b-384, .* say which with --preset"):
        read_parts(files)
    assert read_parts(files, "llamagen-b").config.preset == "llamagen-b"
    with pytest.raises(ValueError, match="c2i_B_256.pt has the name of another published file than llamagen-b-384's"):
        read_parts(files, "llamagen-b-384")
    # Either of these tells, too.
    assert read_parts(files, num_tokens=256).config.preset == "llamagen-b"
    assert read_parts([*files, full_size("dd_llamagen_B_256", tmp_path)]).config.preset == "llamagen-b"


def test_a_file_under_the_name_of_its_twin_is_refused(tmp_path: Path) -> None:
    files = [full_size(name, tmp_path) for name in ("llamagen_vq_ds16_t2i", "llamagen_c2i_XL_384")]
    with pytest.raises(
        ValueError, match="vq_ds16_t2i.pt has the name of another .*llamagen-xl-384's tokenizer, vq_ds16_c2i"
    ):
        read_parts(files)
    assert read_parts([files[0].rename(tmp_path / "mine.pt"), files[1]]).config.preset == "llamagen-xl-384"


def test_files_of_several_published_models_are_told_by_name(tmp_path: Path) -> None:
    files = [full_size(name, tmp_path) for name in ("var_vae_ch160v4096z32", "var_d16_256", "dd_var_d20_256")]
    with pytest.raises(
        ValueError, match="several published models.* transformer is var_d16.pth, .* VAR-DD/var-d20.pth"
    ):
        read_parts(files)


def test_a_student_of_ones_own_is_not_the_published_one(tmp_path: Path) -> None:
    published = full_size_pipeline(tmp_path)
    assert describe.info(published)["published"]["settings_published"] == ["sampling", "start_blocks", "split_block"]
    changed = published.with_settings(split_block=2)
    assert describe.info(changed)["published"]["settings_published"] == ["sampling", "start_blocks"]
    own = published.with_student(published.student, (0, 5), 5)
    assert own.config.preset is None and "published" not in describe.info(own)


def full_size_pipeline(folder: Path) -> Pipeline:
    names = ("llamagen_vq_ds16_c2i", "llamagen_c2i_B_256", "dd_llamagen_B_256")
    parts = read_parts([full_size(name, folder) for name in names])
    return Pipeline(parts.teacher.to("meta"), parts.student.to("meta"), parts.config)


def test_a_published_model_comes_with_its_settings(tmp_path: Path) -> None:
    files = [full_size(name, tmp_path) for name in ("var_vae_ch160v4096z32", "var_d16_256", "dd_var_d16_256")]
    config = read_parts(files).config
    assert config.preset == "var-d16" and config.start_blocks == (0, 5) and config.split_block == 5
    assert config.sampling == TeacherSampling(3.0, "linear", top_k=900, top_p=0.95)


def test_the_command_writes_a_folder_that_says_where_it_stands(tmp_path: Path, monkeypatch, capsys) -> None:
    words = [*map(str, VAR), "--out", str(tmp_path / "model"), "--start-blocks", "0", "2", "--split-block", "3"]
    words += ["--top-k", "7", "--json"]
    monkeypatch.setattr(sys, "argv", ["distilled-decoding", "convert", *words])
    cli.main()
    values = json.loads(capsys.readouterr().out)
    assert values["start_blocks"] == [0, 2] and values["split_block"] == 3 and values["sampling"]["top_k"] == 7
    assert Pipeline.from_pretrained(tmp_path / "model").config.start_blocks == (0, 2)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "holds a model already; choose another --out" in capsys.readouterr().err


@pytest.fixture
def text_files(tmp_path: Path) -> list[Path]:
    """A tokenizer, and a transformer of captions of 12 positions and 8 channels as a training checkpoint holds it."""
    sizes = {"dim": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 16, "num_tokens": 16}
    transformer = Transformer(TransformerConfig(**sizes, num_classes=0, caption_tokens=12, caption_dim=8))
    torch.save({"model": transformer.state_dict()}, tmp_path / "t2i_tiny.pt")
    return [LLAMAGEN[0], tmp_path / "t2i_tiny.pt"]


def test_a_text_model_reads_with_the_encoder_that_it_names(text_files: list[Path], tmp_path: Path) -> None:
    tiny.text_encoder().save_pretrained(tmp_path / "encoder")
    pipe = commands.with_text_encoder(Pipeline.from_original(text_files, **SIZES), str(tmp_path / "encoder"))
    assert pipe.config.text_encoder == str(tmp_path / "encoder")
    pipe.save_pretrained(tmp_path / "model")
    loaded = Pipeline.from_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "text_encoder").exists()
    assert loaded.require_text_encoder().identity == tiny.text_encoder().identity
    with pytest.raises(ValueError, match="no folder './typo'; --text-encoder takes a folder or a hub id owner/name"):
        commands.with_text_encoder(pipe, "./typo")
    asked = {"prompts": ["red", ""], "steps": "teacher-ancestral"}
    assert torch.equal(loaded(**asked).code_BLC, pipe(**asked).code_BLC)


def test_the_command_names_the_text_encoder_of_a_text_model_alone(
    text_files: list[Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    words = ["--num-heads", "2", "--num-tokens", "16", "--text-encoder", "google/flan-t5-xl", "--out"]
    monkeypatch.setattr(
        sys, "argv", ["distilled-decoding", "convert", *map(str, text_files), *words, str(tmp_path / "t")]
    )
    cli.main()
    assert Pipeline.from_pretrained(tmp_path / "t").config.text_encoder == "google/flan-t5-xl"
    monkeypatch.setattr(
        sys, "argv", ["distilled-decoding", "convert", *map(str, LLAMAGEN), *words, str(tmp_path / "c")]
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "a model of classes, which has no text encoder" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


PEAK = """
import sys, threading, time
from pathlib import Path
from distilled_decoding.pipeline import Pipeline

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

Pipeline.from_original(sys.argv[1:4], num_heads=2, num_tokens=16).save_pretrained(sys.argv[4] + "/small")
begin, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch)
thread.start()
Pipeline.from_original(sys.argv[5:], num_heads=2, num_tokens=16).save_pretrained(sys.argv[4] + "/large")
done = True
thread.join()
print(peak - begin)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_converting_holds_at_most_one_copy_of_the_weights(tmp_path: Path) -> None:
    config = TransformerConfig(dim=1024, num_layers=4, num_heads=2, vocab_size=16, num_tokens=16, num_classes=5)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Transformer(config).state_dict().items()}
    path = tmp_path / "large.pt"
    torch.save({name: torch.ones(shape) for name, shape in shapes.items()}, path)
    words = [sys.executable, "-c", PEAK, *LLAMAGEN, tmp_path, LLAMAGEN[0], path]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    assert path.stat().st_size > 150e6
    assert int(done.stdout) < 1.05 * path.stat().st_size
