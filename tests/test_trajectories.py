import random
from pathlib import Path

import pytest
import torch

from distilled_decoding import trajectories
from distilled_decoding.commands import make_trajectories
from distilled_decoding.distill import DistillSettings
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import TeacherSampling, by_flow, rollout
from distilled_decoding.training_command import distill_student
from distilled_decoding.trajectories import TrajectorySettings, generate
from tests import tiny

PIPE = tiny.pipeline()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def opened(folder: Path, num: int) -> TrajectoryStore:
    manifest = tiny.trajectory_settings().manifest(PIPE.teacher, PIPE.fingerprint, tiny.CLASSES.identity)
    return TrajectoryStore.create(folder, manifest, num)


def test_a_trajectory_is_the_flow_map_of_its_own_noise(tmp_path: Path) -> None:
    shard = tiny.shard(tmp_path, PIPE, num=8)
    noise_BLC = gaussian_noise(image_keys("trajectories", 0, range(8)), 16, 4)
    choose = by_flow(PIPE.teacher.order, noise_BLC, PIPE.teacher.codebook, tiny.SAMPLING, tiny.FLOW)
    token_BL = rollout(PIPE.teacher, tiny.labels(8), tiny.SAMPLING.guidance, choose)
    assert torch.equal(shard.token_NL, token_BL)
    assert shard.label_N.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


class StopError(Exception):
    pass


def test_interrupted_and_resumed_is_byte_identical(tmp_path: Path) -> None:
    tiny.store(tmp_path / "whole", PIPE, num=40)
    for stop_after in (8, 24):
        done = []

        def progress(items: int, done: list[int] = done, limit: int = stop_after) -> None:
            done.append(items)
            if sum(done) >= limit:
                raise StopError

        with pytest.raises(StopError):
            generate(PIPE.teacher, tiny.CLASSES, opened(tmp_path / "parts", 40), tiny.trajectory_settings(), progress)
    assert 0 < opened(tmp_path / "parts", 40).num_begun(1) < 16
    tiny.store(tmp_path / "parts", PIPE, num=40)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_shards_in_any_order_by_anyone_are_byte_identical(tmp_path: Path) -> None:
    tiny.store(tmp_path / "whole", PIPE, num=72)
    order = random.Random(0).sample(range(5), 5)
    for numbers in (order[:2], order[2:], []):
        generate(
            PIPE.teacher,
            tiny.CLASSES,
            opened(tmp_path / "parts", 72),
            tiny.trajectory_settings(),
            lambda items: None,
            numbers,
        )
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_more_later_equals_all_at_once(tmp_path: Path) -> None:
    tiny.store(tmp_path / "whole", PIPE, num=40)
    tiny.store(tmp_path / "parts", PIPE, num=20)
    tiny.store(tmp_path / "parts", PIPE, num=40)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_what_is_damaged_is_made_again_and_nothing_else(tmp_path: Path) -> None:
    tiny.store(tmp_path, PIPE, num=60)
    whole = files(tmp_path)
    (tmp_path / "shard-00000.json").unlink()
    (tmp_path / "shard-00001.safetensors").write_bytes(b"rotten")
    sound = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-0000[23]*")}
    done: list[int] = []
    made = generate(PIPE.teacher, tiny.CLASSES, opened(tmp_path, 60), tiny.trajectory_settings(), done.append)
    assert made == 32 and sum(done) == 60
    assert files(tmp_path) == whole
    assert {path: path.stat().st_mtime_ns for path in sound} == sound


def test_half_a_shard_that_is_damaged_is_not_gone_on_with(tmp_path: Path) -> None:
    tiny.store(tmp_path / "whole", PIPE, num=16)
    tiny.store(tmp_path / "parts", PIPE, num=8)
    path = tmp_path / "parts" / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    tiny.store(tmp_path / "parts", PIPE, num=16)
    assert files(tmp_path / "whole") == files(tmp_path / "parts")


def test_trajectory_i_does_not_depend_on_how_many_are_made(tmp_path: Path) -> None:
    few, many = tiny.shard(tmp_path / "few", PIPE, num=5), tiny.shard(tmp_path / "many", PIPE, num=20)
    assert torch.equal(few.token_NL, many.token_NL[:5])
    assert torch.equal(few.key_N, many.key_N[:5])


@pytest.mark.parametrize("what", ["tokenizer", "teacher", "sampling.top_k", "flow.num_steps", "noise.sample"])
def test_trajectories_of_something_else_are_refused_with_both_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    store, other = tiny.store(tmp_path / "t", PIPE), tiny.pipeline()
    if what == "tokenizer":
        other.teacher.tokenizer.quantize.embedding.weight.data += 1
    elif what == "teacher":
        other.teacher.transformer.norm.weight.data += 1
    elif what == "sampling.top_k":
        other = other.with_settings(sampling=TeacherSampling(guidance_scale=2.0, top_k=5))
    elif what == "flow.num_steps":
        other = other.with_settings(flow=tiny.FLOW.__class__(num_steps=9))
    else:
        monkeypatch.setattr(trajectories, "sample_checksum", lambda: "another")
    two_values = rf'holds another run: its {what} is "?\w+"?, not "?\w+"?; '
    with pytest.raises(ValueError, match=two_values + "make trajectories of toy in another folder"):
        distill_student("toy", other, store, tmp_path / "out", DistillSettings(num_updates=1))
    settings = TrajectorySettings(other.config.sampling, other.config.flow, micro_batch=8, shard_size=16)
    with pytest.raises(ValueError, match=two_values + "choose another --out"):
        make_trajectories("toy", other, tmp_path / "t", 8, settings)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="shard size 20"):
        TrajectorySettings(tiny.SAMPLING, tiny.FLOW, micro_batch=8, shard_size=20)
