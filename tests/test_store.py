from pathlib import Path

import pytest
import torch

from distilled_decoding.store import Shard, TrajectoryStore

SETTINGS = {"teacher": "abc", "length": 3}


def shard(first: int, num: int) -> Shard:
    index_N = torch.arange(first, first + num)
    return Shard((index_N[:, None] * 7 + torch.arange(3)) % 65536, index_N % 10, index_N * 2**40 - 5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "t", SETTINGS)
    store.write(0, shard(9360, 4))
    store.write(1, shard(4, 2))
    loaded, expected = TrajectoryStore.open(tmp_path / "t").load(), Shard.cat([shard(9360, 4), shard(4, 2)])
    for name in ("token_NL", "label_N", "key_N"):
        assert torch.equal(getattr(loaded, name), getattr(expected, name))
    assert store.num_trajectories == 6 and store.num_in_shard(1) == 2 and store.num_in_shard(2) == 0


def test_a_record_is_two_bytes_a_token_and_little_more(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "t", SETTINGS)
    store.write(0, shard(0, 10_000))
    size = sum(path.stat().st_size for path in (tmp_path / "t").iterdir())
    assert size < 10_000 * (2 * 3 + 4 + 8) + 2000


def test_damage_is_found(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "t", SETTINGS)
    for number in range(3):
        store.write(number, shard(number, 4))
    assert store.problems() == []
    path = tmp_path / "t" / "shard-00001-000004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (tmp_path / "t" / "shard-00002-000004.safetensors").unlink()
    damaged, missing = store.problems()
    assert "shard-00001" in damaged and "damaged" in damaged
    assert "shard-00002" in missing and "missing" in missing


def test_a_shard_grows_without_losing_the_old_one(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "t", SETTINGS)
    store.write(0, shard(0, 2))
    store.write(0, shard(0, 5))
    assert [path.name for path in (tmp_path / "t").glob("shard-*")] == ["shard-00000-000005.safetensors"]
    assert len(TrajectoryStore.open(tmp_path / "t").load()) == 5


def test_loading_damage_is_refused(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "t", SETTINGS)
    store.write(0, shard(0, 4))
    path = tmp_path / "t" / "shard-00000-000004.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match="damaged"):
        store.load()


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    TrajectoryStore.create(tmp_path / "t", SETTINGS)
    with pytest.raises(ValueError, match="another run: its teacher is 'abc', not 'xyz'"):
        TrajectoryStore.create(tmp_path / "t", SETTINGS | {"teacher": "xyz"})
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        TrajectoryStore.create(tmp_path / "u", SETTINGS)
    with pytest.raises(ValueError, match="no trajectories"):
        TrajectoryStore.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no finished shard"):
        TrajectoryStore.open(tmp_path / "t").load()
    (tmp_path / "u" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="not a manifest of trajectories"):
        TrajectoryStore.open(tmp_path / "u")
