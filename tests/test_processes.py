"""Real processes: stopped, killed, out of disk or many, they make the bytes of one that was never disturbed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from distilled_decoding import cli, processes
from distilled_decoding.noise import image_keys
from tests import tiny
from tests.children import Fault, command, exit_code, ranks
from tests.children import start as start_child


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


def start(*words: object) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def interrupt(words: list, begun: Callable[[], bool]) -> None:
    process = start("-m", "distilled_decoding", *words)
    wait_for(lambda: process.poll() is not None or begun())
    assert process.poll() is None, process.stderr
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopping after the current step" in error
    assert error.splitlines()[-1] == "stopped; the same command goes on"


def run(words: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["distilled-decoding", *map(str, words)])
    cli.main()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record, which names machine and time; the log without times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): tiny.timeless(path) for path in files}


def test_stopped_trajectories_go_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["trajectories", model, "--num", 400, "--micro-batch", 8, "--shard-size", 64, "--out"]
    interrupt([*words, tmp_path / "a"], lambda: any((tmp_path / "a").glob("shard-*")))
    stopped = contents(tmp_path / "a")
    run([*words, tmp_path / "a"], monkeypatch)
    run([*words, tmp_path / "b"], monkeypatch)
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != stopped


def test_a_stopped_distillation_goes_on(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.store(tmp_path / "t", tiny.pipeline())
    words = ["distill", model, "--trajectories", tmp_path / "t", "--num-updates", 120, "--batch-size", 4, "--out"]
    # One name in two places: the card names its folder.
    stopped, whole = tmp_path / "a" / "student", tmp_path / "b" / "student"
    log = stopped / "log.jsonl"
    interrupt([*words, stopped], lambda: log.is_file() and log.stat().st_size > 0)
    assert not (stopped / "model_index.json").exists()
    run([*words, stopped], monkeypatch)
    run([*words, whole], monkeypatch)
    assert contents(stopped) == contents(whole)


TRAJECTORIES = ["--num", 90, "--micro-batch", 8, "--shard-size", 32]


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trajectories whose making nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "t"
    assert exit_code(command(["trajectories", model, *TRAJECTORIES, "--out", out], out.with_name("error"))) == 0
    return out


FAULTS = {
    "between micro-batches": Fault("trajectories", "_tokens", 6),
    "before a shard": Fault("store", "save_tensors", 2),
    "in the middle of a shard's file": Fault("checkpoint", "save_file", 2, half=True),
    "before a shard's file gets its name": Fault("checkpoint", "replace_atomically", 5),
    "between a shard and its JSON": Fault("store", "save_json", 3),
    "between the manifest and the record": Fault("commands", "record", 1),
    "before the manifest gets its name": Fault("checkpoint", "replace_atomically", 1),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_trajectories_killed_anywhere_go_on(model: Path, whole: Path, tmp_path: Path, fault: Fault) -> None:
    out, error = tmp_path / "t", tmp_path / "error"
    words = ["trajectories", model, *TRAJECTORIES, "--out", out]
    assert exit_code(command(words, error, fault)) == -signal.SIGKILL
    assert "writer.lock" in contents(out) and not error.read_text().startswith("error")
    assert exit_code(command(words, error)) == 0
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_trajectories_killed_at_any_time_go_on(model: Path, whole: Path, tmp_path: Path) -> None:
    moments, begin = random.Random(0), time.monotonic()
    words, error = ["trajectories", model, *TRAJECTORIES, "--out"], tmp_path / "error"
    assert exit_code(command([*words, tmp_path / "unbroken"], error)) == 0
    seconds = time.monotonic() - begin
    for moment in (moments.uniform(0, seconds) for _ in range(20)):
        out = tmp_path / f"{moment}"
        process = command([*words, out], error)
        process.join(moment)
        process.kill()
        assert exit_code(process) in (0, -signal.SIGKILL)
        assert exit_code(command([*words, out], error)) == 0
        assert contents(out) == contents(whole)


def test_a_full_disk_is_named_and_leaves_what_was_there(model: Path, whole: Path, tmp_path: Path) -> None:
    out, error = tmp_path / "t", tmp_path / "error"
    words = ["trajectories", model, "--micro-batch", 8, "--shard-size", 32, "--out", out]
    assert exit_code(command([*words, "--num", 32], error)) == 0
    before = contents(out)
    assert exit_code(command([*words, "--num", 90], error, file_bytes=1400)) == 2
    (message,) = [line for line in error.read_text().splitlines() if line.startswith("error")]
    assert "shard-00001.safetensors could not be written (" in message and "File too large" in message
    after = contents(out)
    assert after.keys() == before.keys() and {name for name in before if before[name] != after[name]} == {
        "manifest.json"  # it says how many there shall be
    }
    assert exit_code(command([*words, "--num", 90], error)) == 0
    assert contents(out) == contents(whole)


def hold(folder: Path) -> None:
    with processes.only_writer(folder):
        time.sleep(120)


def test_a_second_writer_stops_and_a_dead_one_is_no_writer(model: Path, tmp_path: Path) -> None:
    out, error = tmp_path / "t", tmp_path / "error"
    words = ["trajectories", model, "--num", 8, "--out", out]
    first = start_child(hold, out)
    wait_for(lambda: (out / "writer.lock").is_file() and (out / "writer.lock").read_text().endswith("}"))
    assert exit_code(command(words, error)) == 2
    assert f"{out} is being written by process {first.pid} on {socket.gethostname()}; wait" in error.read_text()
    assert list(contents(out)) == ["writer.lock"]
    first.kill()
    assert exit_code(first) == -signal.SIGKILL
    assert exit_code(command(words, error)) == 0
    assert "writer.lock" not in contents(out)


def test_repair_makes_again_what_is_wrong_bit_for_bit(
    model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = shutil.copytree(whole, tmp_path / "t")
    (out / "shard-00000.safetensors").write_bytes(b"rotten")
    (out / "shard-00002.json").unlink()
    shutil.copy(out / "shard-00001.json", out / "shard-00007.json")
    with pytest.raises(SystemExit, match="1"):
        run(["verify", out], monkeypatch)
    capsys.readouterr()
    run(["verify", out, "--repair", model, "--json"], monkeypatch)
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [] and [name in text for name, text in zip("027", found["repaired"], strict=True)]
    assert contents(out) == contents(whole)
    other = tiny.pipeline()
    other.teacher.transformer.norm.weight.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match="2"):
        run(["verify", out, "--repair", tmp_path / "other"], monkeypatch)
    assert "another run: its teacher is" in capsys.readouterr().err


DYING = """
import os
from distilled_decoding import cli
from tests.children import Fault, inject
if os.environ["RANK"] == "1":
    inject(Fault("trajectories", "_tokens", 2))
cli.main()
"""


def torchrun(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, timeout=120)


def test_a_rank_that_dies_takes_the_other_down_and_both_go_on(model: Path, whole: Path, tmp_path: Path) -> None:
    words = ["trajectories", model, *TRAJECTORIES, "--out", tmp_path / "t"]
    (tmp_path / "script.py").write_text(DYING)
    died = torchrun("--", tmp_path / "script.py", *words)
    assert died.returncode != 0 and time.time() - (tmp_path / "t" / "manifest.json").stat().st_mtime < 60
    assert "Signal 9 (SIGKILL) received" in died.stderr
    assert contents(tmp_path / "t") != contents(whole)
    errors = [tmp_path / "error0", tmp_path / "error1"]
    assert [exit_code(rank) for rank in ranks(words, errors)] == [0, 0]
    assert contents(tmp_path / "t") == contents(whole)
    assert "90/90" in errors[0].read_text() and errors[1].read_text() == ""


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_several_ranks_make_the_trajectories_of_one(model: Path, whole: Path, tmp_path: Path, num_ranks: int) -> None:
    words = ["trajectories", model, *TRAJECTORIES, "--out", tmp_path / "t"]
    errors = [tmp_path / f"error{rank}" for rank in range(num_ranks)]
    assert [exit_code(rank) for rank in ranks(words, errors)] == [0] * num_ranks
    assert contents(tmp_path / "t") == contents(whole)


@pytest.mark.slow
def test_one_of_several_ranks_encodes_the_prompts(tmp_path: Path) -> None:
    model, file, errors = tmp_path / "model", tmp_path / "names.txt", [tmp_path / "error0", tmp_path / "error1"]
    tiny.text_pipeline().save_pretrained(model)
    file.write_text("red apple\n\ngreen apple\n")
    words = ["trajectories", model, *TRAJECTORIES, "--prompts", file, "--out"]
    assert exit_code(command([*words, tmp_path / "one"], errors[0])) == 0
    assert [exit_code(rank) for rank in ranks([*words, tmp_path / "two"], errors)] == [0, 0]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_torchrun_makes_trajectories_and_says_once_what_is_wrong(model: Path, whole: Path, tmp_path: Path) -> None:
    words = ["-m", "--", "distilled_decoding", "trajectories", model, *TRAJECTORIES, "--out", tmp_path / "t", "--json"]
    made = torchrun(*words)
    assert made.returncode == 0, made.stderr
    assert contents(tmp_path / "t") == contents(whole)
    (printed,) = made.stdout.splitlines()
    assert json.loads(printed)["trajectories"] == json.loads(printed)["made"] == 90
    refused = torchrun(*words, "--seed", 1)
    (message,) = [line for line in refused.stderr.splitlines() if line.startswith("error")]
    assert refused.returncode != 0 and "run_seed is 0, not 1" in message


HALF = """
import sys
import numpy as np, torch
from distilled_decoding.condition import Asked
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline
model, out, first, end = sys.argv[1:]
pipeline, part = Pipeline.from_pretrained(model), slice(int(first), int(end))
condition, key_N = Asked.in_turn(pipeline.table(), 16)[part], image_keys("sampling", 0, range(16))[part]
np.save(out, torch.cat(list(pipeline.images(pipeline.plan(2), condition, key_N))).numpy())
"""


def test_two_processes_make_the_images_of_one(model: Path, tmp_path: Path) -> None:
    parts = [tmp_path / "0.npy", tmp_path / "1.npy"]
    processes = [start("-c", HALF, model, part, 8 * i, 8 * i + 8) for i, part in enumerate(parts)]
    for process in processes:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
    pipeline = tiny.pipeline()
    condition, key_N = tiny.labels(16), image_keys("sampling", 0, range(16))
    whole = torch.cat(list(pipeline.images(pipeline.plan(2), condition, key_N))).numpy()
    assert np.array_equal(np.concatenate([np.load(part) for part in parts]), whole)
