"""Files of torch.save: read without running what they hold."""

import argparse
import pickle
from pathlib import Path

import pytest
import torch

from distilled_decoding.originals import read_original
from tests.golden import FOLDER

WEIGHTS = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}


def saved(path: Path, values: object, **options: object) -> Path:
    torch.save(values, path, **options)
    return path


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        (WEIGHTS, ["raw"]),
        ({"model": WEIGHTS}, ["raw"]),
        ({"module": WEIGHTS}, ["raw"]),
        ({"state_dict": WEIGHTS}, ["raw"]),
        ({"ema": WEIGHTS}, ["ema"]),
        ({"ema": WEIGHTS, "model": {"c": torch.ones(1)}, "steps": 3}, ["ema", "raw"]),
        ({"epoch": 1, "trainer": {"ema_parameters": WEIGHTS, "config": {"x": 1}}}, ["ema"]),
        ({"epoch": 1, "trainer": {"var_wo_ddp": WEIGHTS, "var_opt": {"state": {}}}}, ["raw"]),
    ],
)
def test_every_wrapper_is_taken_off(values: object, kinds: list[str], tmp_path: Path) -> None:
    found = read_original(saved(tmp_path / "file.pt", values))
    assert list(found) == kinds
    first = found[kinds[0]]
    assert list(first) == ["a", "b"] and all(torch.equal(first[name], WEIGHTS[name]) for name in WEIGHTS)


def test_the_format_before_archives_is_read_too(tmp_path: Path) -> None:
    path = saved(tmp_path / "old.pt", {"model": WEIGHTS}, _use_new_zipfile_serialization=False)
    assert torch.equal(read_original(path)["raw"]["b"], WEIGHTS["b"])


def test_writing_to_what_was_read_leaves_the_file_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.pt", WEIGHTS)
    before = path.read_bytes()
    read_original(path)["raw"]["a"].fill_(7)
    assert path.read_bytes() == before


def test_of_a_training_checkpoint_only_its_flags_may_be_allowed(tmp_path: Path) -> None:
    path = FOLDER / "checkpoints" / "gpt_train_tiny.pt"
    with pytest.raises(ValueError, match="training checkpoint.*argparse.Namespace.*--allow-namespace"):
        read_original(path)
    assert list(read_original(path, allow_namespace=True)) == ["ema", "raw"]


class Payload:
    """What a malicious file would do when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("allow_namespace", [False, True])
@pytest.mark.parametrize("archive", [True, False])
def test_a_malicious_file_is_refused_and_its_payload_does_not_run(
    allow_namespace: bool, archive: bool, tmp_path: Path
) -> None:
    trace = tmp_path / "it-ran"
    values = {"model": WEIGHTS, "args": argparse.Namespace(x=Payload(trace))}
    path = saved(tmp_path / "evil.pt", values, _use_new_zipfile_serialization=archive)
    assert not trace.exists()
    with pytest.raises(ValueError, match="refused|argparse.Namespace"):
        read_original(path, allow_namespace)
    assert not trace.exists()
    # The payload is a real one.
    torch.load(path, weights_only=False)
    assert trace.exists()


def test_what_is_no_published_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "junk.pt").write_bytes(b"hello world" * 100)
    (tmp_path / "list.pt").write_bytes(pickle.dumps([1, 2], protocol=2))
    whole = saved(tmp_path / "whole.pt", WEIGHTS).read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("junk.pt", "list.pt", "half.pt"):
        with pytest.raises(ValueError, match=f"{name} is damaged, or was not written by torch.save; fetch it again$"):
            read_original(tmp_path / name)
    with pytest.raises(ValueError, match="there is no such file$"):
        read_original(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="holds the entries epoch, log, but no state dict, which would lie in one of"):
        read_original(saved(tmp_path / "log.pt", {"epoch": 3, "log": {"loss": 1.0}}))
