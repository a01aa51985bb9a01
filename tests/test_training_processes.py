"""Training in real processes: killed, stopped, on a full disk, on other numbers of processes; nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from distilled_decoding import cli
from distilled_decoding.checkpoint import load_tensors
from distilled_decoding.pipeline import Pipeline
from tests import tiny

ROOT = Path(__file__).parent.parent


def runs(scenario: str, out: Path) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training_runs", scenario, str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


def found(folder: Path) -> Any:
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs("compare_worlds", tmp_path_factory.mktemp("worlds"))


def losses(folder: Path, *names: str) -> torch.Tensor:
    """Losses and gradient norms of one run after another, a row an update, filled up with zeros."""
    rows = [row for name in names for row in json.loads((folder / name / "0.json").read_text())["losses"]]
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


def assert_same_training(
    folder: Path, *names: str, alone: str = "one", within: float = 1e-5, weights: float = 1e-3
) -> None:
    torch.testing.assert_close(losses(folder, *names), losses(folder, alone), rtol=within, atol=within)
    a, b = (load_tensors(folder / name / "student.safetensors")[0] for name in (alone, names[-1]))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=0, atol=weights)


def test_two_processes_in_parts_learn_what_one_learns(worlds: Path) -> None:
    assert_same_training(worlds, "two-parts")


def test_the_order_is_the_same_for_any_number_of_processes(worlds: Path) -> None:
    one, *two = (
        json.loads((worlds / name).read_text())["seen"]
        for name in ("one/0.json", "two-parts/0.json", "two-parts/1.json")
    )
    rows = [one[first : first + 7] for first in range(0, len(one), 7)]
    halves = [
        [own[first : first + size] for first in range(0, len(own), size)] for own, size in zip(two, (3, 4), strict=True)
    ]
    assert rows == [a + b for a, b in zip(*halves, strict=True)]


def test_a_stop_that_one_process_hears_stops_all_and_another_number_of_them_goes_on(worlds: Path) -> None:
    for number in range(2):
        stopped = json.loads((worlds / "stopped" / f"{number}.json").read_text())
        assert (len(stopped["losses"]), stopped["finished"]) == (3, False)
    assert_same_training(worlds, "stopped", "grown")


def test_a_sharded_training_is_the_same(worlds: Path) -> None:
    assert_same_training(worlds, "var-sharded-parts", alone="var", within=1e-4)


def test_one_process_goes_on_from_shares_and_the_student_samples(worlds: Path) -> None:
    assert_same_training(worlds, "sharded-begun", "unsharded", within=1e-4)
    pipe = tiny.pipeline()
    pipe.student.load_state_dict(load_tensors(worlds / "unsharded" / "student.safetensors")[0])
    assert pipe([0, 1], seeds=[0, 1], steps=1, output="codes").code_BLC.isfinite().all()


def test_a_loss_that_is_no_number_in_one_process_skips_the_update_in_all(worlds: Path) -> None:
    rows = losses(worlds, "poisoned")
    assert rows[:, 0].isnan().tolist() == [False, False, True, False, False, False]
    assert torch.equal(
        rows.nan_to_num(-1), torch.tensor(json.loads((worlds / "poisoned/1.json").read_text())["losses"]).nan_to_num(-1)
    )


@pytest.mark.slow
def test_processes_learn_from_tokens_what_one_learns(tmp_path: Path) -> None:
    """Rounding may turn a draw, and then a sequence; in so few updates it does not."""
    folder = runs("compare_worlds_of_tokens", tmp_path)
    assert {code for codes in json.loads((folder / "codes.json").read_text()).values() for code in codes} == {0}
    for alone, *others in (("one", "two-parts"), ("mixed", "mixed-two"), ("var", "var-two")):
        assert_same_training(folder, *others, alone=alone, within=1e-4)
    assert_same_training(folder, "sharded-begun", "unsharded", within=1e-4)


@pytest.mark.slow
def test_processes_learn_from_scores_what_one_learns(tmp_path: Path) -> None:
    """Rounding may turn a nearest code, and then what is read; in so few updates it does not."""
    folder = runs("compare_worlds_of_scores", tmp_path)
    assert {code for codes in json.loads((folder / "codes.json").read_text()).values() for code in codes} == {0}
    assert_same_training(folder, "two-parts", within=1e-4)
    assert_same_training(folder, "tokens-two", alone="tokens", within=1e-4)
    assert_same_training(folder, "var-two", alone="var", within=1e-4)
    assert_same_training(folder, "sharded-begun", "unsharded", within=1e-4)


@pytest.mark.slow
def test_more_ways_to_lay_out_the_same_training(tmp_path: Path) -> None:
    folder = runs("compare_more_worlds", tmp_path)
    for name in ("parts", "three", "three-parts", "sharded"):
        assert_same_training(folder, name)
    assert_same_training(folder, "whole-begun", "whole-sharded", within=1e-4)
    assert torch.equal(losses(folder, "sharded-stopped", "sharded-resumed"), losses(folder, "sharded"))


def test_every_world_ended_well(worlds: Path) -> None:
    assert {code for codes in json.loads((worlds / "codes.json").read_text()).values() for code in codes} == {0}


@pytest.mark.parametrize("faults", ["kill_and_go_on", pytest.param("kill_everywhere", marks=pytest.mark.slow)])
def test_killed_anywhere_a_run_goes_on_to_the_same_bits(tmp_path: Path, faults: str) -> None:
    """In training and in every stage of saving, alone and as one of two processes."""
    for case, (killed, seconds, unfinished, codes, same) in found(runs(faults, tmp_path)).items():
        assert -9 in killed and unfinished, case
        assert 0 not in killed and seconds < 60, f"{case}: a process outlives the other"
        assert set(codes) == {0} and same, case


@pytest.mark.slow
def test_killed_at_random_moments_a_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    results = found(runs("kill_at_random_moments", tmp_path))
    assert len(results) == 20 and sum(kills for kills, _ in results) >= 10
    assert all(same for _, same in results)


@pytest.mark.slow
def test_on_a_full_disk_the_last_checkpoint_stays(tmp_path: Path) -> None:
    for stopped, codes, kept, message, afterwards in found(runs("full_disk", tmp_path)).values():
        assert stopped[-1] == -9 and set(codes) == {2} and kept and set(afterwards) == {0}
        assert "could not be written" in message and "File too large" in message and "nothing" in message


def test_memory_does_not_grow_with_the_number_of_trajectories(tmp_path: Path) -> None:
    """A hundred times as many."""
    runs("peak_memory", tmp_path)
    few, many = (int((tmp_path / f"{num}.json").read_text()) for num in (2000, 200_000))
    assert many < 1.05 * few


@pytest.mark.slow
def test_torchrun_shares_a_distillation_and_ends_it_when_a_process_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left goes on with the same words, here in one process."""
    pipe, out = tiny.pipeline(), tmp_path / "student"
    pipe.save_pretrained(tmp_path / "model")
    tiny.store(tmp_path / "t", pipe)
    words = ["distill", tmp_path / "model", "--trajectories", tmp_path / "t", "--out", out, "--num-updates", 400]
    words = [*map(str, words), "--batch-size", "2", "--save-every", "20", "--no-bf16"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / "errors").open("w") as errors:
        process = subprocess.Popen(
            [*command, "-m", "distilled_decoding", *words], env=environment, stdout=errors, stderr=errors
        )
        while not list(out.glob("checkpoints/update-*[0-9]")):
            assert process.poll() is None, (tmp_path / "errors").read_text()
            time.sleep(0.02)
        os.kill(json.loads((out / "checkpoints" / "writer.lock").read_text())["pid"], signal.SIGKILL)
        begin = time.monotonic()
        assert process.wait(timeout=60) != 0 and time.monotonic() - begin < 60
    assert not (out / "model_index.json").exists()
    monkeypatch.setattr(sys, "argv", ["distilled-decoding", *words])
    cli.main()
    assert Pipeline.from_pretrained(out).config.training.num_updates == 400


def test_muon_moves_whole_and_shared_matrices_alike(tmp_path: Path) -> None:
    runs("compare_worlds_of_muon", tmp_path)
    coarse = {"within": 1e-3, "weights": 3e-3}  # it orthogonalises in bfloat16
    assert_same_training(tmp_path, "two", **coarse)
    assert_same_training(tmp_path, "sharded-begun", "unsharded", **coarse)
