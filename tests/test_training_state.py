import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from distilled_decoding.training_state import Checkpoints, Counts


def tensors(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3, 2), value), "step": torch.tensor(value)}


def checkpoints(folder: Path, seed: int = 0, **changes: int) -> Checkpoints:
    return Checkpoints(folder, {"settings": {"seed": seed}}, **{"save_every": 2, "keep_last": 3, **changes})


def saved(folder: Path, *updates: int) -> Checkpoints:
    made = checkpoints(folder)
    for update in updates:
        made.save(tensors(update), Counts(update, 1))
    return made


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4)
    found = tensors()
    assert checkpoints(tmp_path).load_newest(found) == Counts(4, 1)
    assert found["weight"].eq(4).all() and found["step"] == 4
    assert checkpoints(tmp_path).load(tmp_path / "update-000002", found) == Counts(2, 1)
    assert found["weight"].eq(2).all()


def test_without_a_checkpoint_training_begins(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "nothing").load_newest(tensors(7.0)) == Counts()


def test_the_last_ones_are_kept_and_one_in_between_goes_with_the_next(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 5)
    assert names(tmp_path) == ["update-000002", "update-000004", "update-000005"]
    saved(tmp_path, 6, 8)
    assert names(tmp_path) == ["update-000004", "update-000006", "update-000008"]


def truncated(path: Path) -> None:
    file = path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def flipped(path: Path) -> None:
    file = path / "state.safetensors"
    values = bytearray(file.read_bytes())
    values[-1] ^= 1
    file.write_bytes(values)


def recounted(path: Path) -> None:
    values = json.loads((path / "state.json").read_text())
    values["counts"]["updates"] += 1
    (path / "state.json").write_text(json.dumps(values))


def foreign(path: Path) -> None:
    shutil.rmtree(path)
    other = checkpoints(path.parent, seed=1)
    other.save(tensors(9), Counts(4))


FAULTS = [
    (truncated, "hash of state.safetensors is not the recorded one"),
    (flipped, "hash of state.safetensors is not the recorded one"),
    (recounted, "state.json is not what was written"),
    (lambda path: (path / "state.safetensors").unlink(), "state.safetensors is missing"),
    (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    (lambda path: (path / "state.json").write_text("{"), "state.json is not valid JSON"),
    (foreign, "of another training: its settings.seed is 1, not 0"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_a_spoilt_checkpoint_is_named_and_the_one_before_it_taken(
    tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    saved(tmp_path, 2, 4)
    spoil(tmp_path / "update-000004")
    found = tensors()
    with pytest.warns(UserWarning, match=f"update-000004.*{message}.*; going on from update-000002"):
        assert checkpoints(tmp_path).load_newest(found) == Counts(2, 1)
    assert found["weight"].eq(2).all()
    with pytest.raises(ValueError, match=f"update-000004.*{message}"):
        checkpoints(tmp_path).load(tmp_path / "update-000004", found)


def test_nothing_is_begun_anew_over_checkpoints_that_are_all_spoilt(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    flipped(tmp_path / "update-000002")
    with pytest.raises(ValueError, match="no checkpoint in .* is valid: .*update-000002 is damaged"):
        checkpoints(tmp_path).load_newest(tensors())


def test_a_missing_checkpoint_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    with pytest.raises(ValueError, match="the checkpoint .*update-000099 is missing"):
        checkpoints(tmp_path).load(tmp_path / "update-000099", tensors())


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    (tmp_path / "update-000004.part").mkdir()
    checkpoints(tmp_path).load_newest(tensors())
    assert names(tmp_path) == ["update-000002"]


def test_a_dump_is_neither_gone_on_from_nor_dropped(tmp_path: Path) -> None:
    dump = saved(tmp_path, 2).save(tensors(3), Counts(3, 3, 3), "failed")
    saved(tmp_path, 4, 6, 8)
    assert names(tmp_path) == ["failed-000003", "update-000004", "update-000006", "update-000008"]
    assert checkpoints(tmp_path).load_newest(tensors()) == Counts(8, 1)
    assert checkpoints(tmp_path).load(dump, tensors()) == Counts(3, 3, 3)


def test_settings_are_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_every and keep_last must be at least 1, got 2 and 0"):
        checkpoints(tmp_path, keep_last=0)
