import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distilled_decoding import trajectories
from distilled_decoding.flow import FlowSettings
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.teacher import TeacherSampling
from tests import children, tiny

SETTINGS = {"teacher": "abc", "length": 3, "shard_size": 4}


def shard(first: int, num: int, length: int = 3) -> Shard:
    index_N = torch.arange(first, first + num)
    return Shard((index_N[:, None] * 7 + torch.arange(length)) % 65536, index_N % 10, index_N * 2**40 - 5)


def filled(folder: Path, num: int, settings: dict = SETTINGS) -> TrajectoryStore:
    store = TrajectoryStore.create(folder, settings, num)
    for number in range(store.num_shards):
        span = store.span(number)
        store.write(number, shard(span.start, len(span)))
    return store


def same(a: Shard, b: Shard) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("token_NL", "label_N", "key_N"))


def test_what_is_written_is_read_in_any_order(tmp_path: Path) -> None:
    filled(tmp_path / "t", 18)
    store = TrajectoryStore.open(tmp_path / "t")
    assert len(store) == 18 and store.num_shards == 5 and store.num_begun(4) == 2
    assert same(store[torch.arange(18)], shard(0, 18))
    index_N = torch.tensor([17, 3, 4, 3, 16, 0])
    assert same(store[index_N], shard(0, 18)[index_N])


def test_a_million_trajectories_of_var_take_less_than_two_gigabytes(tmp_path: Path) -> None:
    store = TrajectoryStore.create(tmp_path / "t", {"teacher": "abc", "shard_size": 4096}, 4096)
    store.write(0, shard(0, 4096, length=680))
    size = sum(path.stat().st_size for path in (tmp_path / "t").iterdir())
    assert size < 4096 * (2 * 680 + 4 + 8) + 2000
    assert size / 4096 * 1_200_000 < 2e9


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def exchange(path: Path, other: Path) -> None:
    """Put another shard in the place of one, with its JSON."""
    for suffix in (".safetensors", ".json"):
        shutil.copy(other.with_suffix(suffix), path.with_suffix(suffix))


DAMAGES: list[tuple[Callable[[Path, Path], object], str]] = [
    (lambda path, _: path.unlink(), r"is missing"),
    (lambda path, _: path.with_suffix(".json").unlink(), r"shard-00001.json is missing"),
    (lambda path, _: path.with_suffix(".json").write_text("{"), r"shard-00001.json is not valid JSON"),
    (lambda path, _: path.write_bytes(path.read_bytes()[:-9]), r"is truncated: it has \d+ of \d+ bytes"),
    (lambda path, _: path.write_bytes(b""), r"is truncated: it has 0 of \d+ bytes"),
    (lambda path, _: flip_a_bit(path), r"is damaged: its hash is \w{12}, not \w{12}"),
    (lambda path, other: exchange(path, other), r"is foreign: it is shard 1 of run \w{12}, not shard 1 of run"),
    (lambda path, _: exchange(path, path.with_name("shard-00002")), r"is foreign: it is shard 2 of run"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES, ids=[sentence for _, sentence in DAMAGES])
def test_damage_is_named(tmp_path: Path, damage: Callable, sentence: str) -> None:
    store = filled(tmp_path / "t", 12)
    filled(tmp_path / "other", 12, SETTINGS | {"teacher": "xyz"})
    assert store.problems() == []
    store.check()
    damage(tmp_path / "t" / "shard-00001.safetensors", tmp_path / "other" / "shard-00001.safetensors")
    (problem,) = store.problems()
    assert "shard-00001" in problem
    with pytest.raises(ValueError, match=sentence + ".*verify .*t --repair MODEL"):
        store.check()
    assert store.num_begun(1) == 0 and store.num_begun(2) == 4


def test_what_is_unfinished_or_too_many_is_named(tmp_path: Path) -> None:
    store = filled(tmp_path / "t", 10)
    store = TrajectoryStore.create(tmp_path / "t", SETTINGS, 20)
    assert store.num_begun(2) == 2
    unfinished, *missing = store.problems()
    assert "shard-00002.safetensors is unfinished: it has 2 of 4 trajectories" in unfinished
    assert len(missing) == 2 and all("is missing" in problem for problem in missing)
    store = filled(tmp_path / "u", 10)
    (tmp_path / "u" / "shard-00007.safetensors").write_text("")
    (problem,) = store.problems()
    assert "shard-00007.safetensors is foreign: this run has 3 shards" in problem


def test_a_shard_grows(tmp_path: Path) -> None:
    filled(tmp_path / "t", 2)
    filled(tmp_path / "t", 3)
    filled(tmp_path / "whole", 3)
    assert {p.name: p.read_bytes() for p in (tmp_path / "t").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert len(TrajectoryStore.create(tmp_path / "t", SETTINGS, 1)) == 3


def test_reading_what_is_not_there_is_refused(tmp_path: Path) -> None:
    store = filled(tmp_path / "t", 8)
    (tmp_path / "t" / "shard-00001.safetensors").write_bytes(b"short")
    assert same(store[torch.arange(4)], shard(0, 4))
    with pytest.raises(ValueError, match="shard-00001.safetensors cannot be read"):
        store[torch.tensor([1, 6])]


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    identity = filled(tmp_path / "a", 8).identity
    assert filled(tmp_path / "b", 8).identity == identity
    assert filled(tmp_path / "c", 7).identity != identity
    assert filled(tmp_path / "d", 8, SETTINGS | {"teacher": "xyz"}).identity != identity
    other = filled(tmp_path / "e", 8)
    other.write(1, shard(0, 4))
    assert other.identity != identity


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    TrajectoryStore.create(tmp_path / "t", SETTINGS, 4)
    with pytest.raises(ValueError, match='another run: its teacher is "abc", not "xyz"'):
        TrajectoryStore.create(tmp_path / "t", SETTINGS | {"teacher": "xyz"}, 4)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="not empty"):
        TrajectoryStore.create(tmp_path / "u", SETTINGS, 4)
    with pytest.raises(ValueError, match="no trajectories"):
        TrajectoryStore.open(tmp_path / "nowhere")
    (tmp_path / "u" / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="not a manifest of trajectories"):
        TrajectoryStore.open(tmp_path / "u")


def make_and_read(folder: Path, num: int, peak: Path) -> None:
    """Shards of half a megabyte from a teacher that costs nothing; then say how much memory that took at most."""
    trajectories._tokens = lambda teacher, table, settings, span: shard(span.start, len(span), length=4096)
    teacher: Any = SimpleNamespace(codebook=torch.zeros(1, 1))
    settings = trajectories.TrajectorySettings(TeacherSampling(), FlowSettings(), micro_batch=64, shard_size=64)
    store = TrajectoryStore.create(folder, {"teacher": "abc", "shard_size": 64}, num)
    for _ in range(2):
        trajectories.generate(teacher, tiny.CLASSES, store, settings, lambda items: None)
        (folder / "shard-00000.json").unlink()
    store.write(0, store[torch.arange(64)])
    store.check()
    for _ in range(10):
        store[torch.randint(num, (64,))]
    status = Path("/proc/self/status").read_text().splitlines()
    peak.write_text(next(line.split()[1] for line in status if line.startswith("VmHWM")))


def test_memory_does_not_grow_with_the_number_of_trajectories(tmp_path: Path) -> None:
    """All in memory, the larger store would take 50 MB as it is on disk, and 200 MB as it is read."""
    peaks = [tmp_path / "few", tmp_path / "many"]
    for peak, num in zip(peaks, (64, 6400), strict=True):
        assert children.exit_code(children.start(make_and_read, tmp_path / str(num), num, peak)) == 0
    few, many = (int(peak.read_text()) for peak in peaks)
    assert many < 1.05 * few
