from pathlib import Path

import pytest
import torch

from distilled_decoding.condition import Labels
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import by_flow, rollout
from distilled_decoding.trajectories import TrajectorySettings, generate
from tests import tiny

PIPE = tiny.pipeline()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_trajectory_is_the_flow_map_of_its_own_noise(tmp_path: Path) -> None:
    shard = tiny.store(tmp_path, PIPE, num=8).load()
    noise_BLC = gaussian_noise(image_keys("trajectories", 0, range(8)), 16, 4)
    choose = by_flow(PIPE.teacher.order, noise_BLC, PIPE.teacher.codebook, tiny.SAMPLING, tiny.FLOW)
    token_BL = rollout(PIPE.teacher, Labels.balanced(8, 3), tiny.SAMPLING.guidance, choose)
    assert torch.equal(shard.token_NL, token_BL)
    assert shard.label_N.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


class StopError(Exception):
    pass


def test_interrupted_and_resumed_is_byte_identical(tmp_path: Path) -> None:
    tiny.store(tmp_path / "whole", PIPE, num=40)
    settings = tiny.trajectory_settings()
    for stop_after in (8, 24):
        store = TrajectoryStore.create(tmp_path / "parts", settings.manifest(PIPE.teacher, PIPE.fingerprint))
        done = []

        def progress(items: int, done: list[int] = done, limit: int = stop_after) -> None:
            done.append(items)
            if sum(done) >= limit:
                raise StopError

        with pytest.raises(StopError):
            generate(PIPE.teacher, store, settings, 40, progress)
    tiny.store(tmp_path / "parts", PIPE, num=40)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_more_later_equals_all_at_once(tmp_path: Path) -> None:
    tiny.store(tmp_path / "whole", PIPE, num=40)
    tiny.store(tmp_path / "parts", PIPE, num=20)
    tiny.store(tmp_path / "parts", PIPE, num=40)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_trajectory_i_does_not_depend_on_how_many_are_made(tmp_path: Path) -> None:
    few = tiny.store(tmp_path / "few", PIPE, num=5).load()
    many = tiny.store(tmp_path / "many", PIPE, num=20).load()
    assert torch.equal(few.token_NL, many.token_NL[:5])
    assert torch.equal(few.key_N, many.key_N[:5])


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shard size 20"):
        TrajectorySettings(tiny.SAMPLING, tiny.FLOW, micro_batch=8, shard_size=20)
