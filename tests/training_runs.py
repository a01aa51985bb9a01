"""Trainings in processes of their own, forked from one that has imported everything: `python -m tests.training_runs`.

A fault is a function that is patched to kill its process, or to fail, at its n-th call.
"""

import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distilled_decoding import checkpoint, distill_trajectories, training_state
from distilled_decoding import distill as distill_module
from distilled_decoding import pipeline as pipeline_module
from distilled_decoding.distill import DistillSettings, Update, distill
from distilled_decoding.distill_trajectories import Trajectories
from distilled_decoding.losses import OnPolicySettings, ScoreSettings
from distilled_decoding.noise import image_keys
from distilled_decoding.parallel import RunSettings
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.processes import group, is_first, rank
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.training_command import ON_POLICY, Upkeep, distill_student
from distilled_decoding.training_log import TrainingLog
from distilled_decoding.training_state import Checkpoints
from tests import tiny

SETTINGS = DistillSettings(
    num_updates=6, batch_size=7, warmup=2, start_blocks=(0, 2), bf16=False, ema_rate=0.9, grad_clip=0.5
)


def fork(act: Callable[[], Any], world: int = 1) -> list[int]:
    """Run a function in new processes that form a group; their exit codes, negative for a signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for number in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
            act()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    codes = {}
    for _ in children:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
    return [codes[child] for child in children]


class Watched:
    """Trajectories that remember which of them were asked for."""

    def __init__(self, store: TrajectoryStore) -> None:
        self.store, self.seen = store, []

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index_N: torch.Tensor) -> Any:
        self.seen += index_N.tolist()
        return self.store[index_N]


def train(
    out: Path,
    name: str,
    family: str = "llamagen",
    stop_after: int | None = None,
    keep: str | None = None,
    settings: DistillSettings = SETTINGS,
    **run: Any,
) -> None:
    """Train, and write losses, the order of the trajectories and the averaged weights; `keep` names the checkpoints."""
    pipe = tiny.pipeline(family=family)
    store = Watched(TrajectoryStore.open(out / f"{family}-trajectories"))
    losses: list[list[float]] = []

    def on_update(update: Update) -> bool:
        losses.append([float(value) for value in vars(update.losses).values()] + [update.gradient_norm])
        # One process alone is told to stop, and all do.
        return not (update.number == stop_after and rank() == int(os.environ["WORLD_SIZE"]) - 1)

    with group():
        checkpoints = Checkpoints(out / (keep or name) / "checkpoints", save_every=2)
        new, table, way = pipe.new_student(0), tiny.CLASSES, RunSettings(**run)
        method: Any = Trajectories(pipe.teacher, store, table, settings, 2)
        if kind := ON_POLICY.get(settings.method):
            mixed = store if settings.on_policy.trajectory_weight else None
            method = kind(pipe.teacher, pipe.new_tracker, table, tiny.SAMPLING, settings, mixed)
        student = distill(method, new, checkpoints, on_update, way)
    result = {"losses": losses, "seen": store.seen, "finished": student is not None}
    checkpoint.save_json(out / name / f"{rank()}.json", result)
    if student is not None and is_first():
        checkpoint.save_tensors(out / name / "student.safetensors", student.state_dict())


def poisoned_on_one_process(out: Path) -> None:
    """In the third update, the losses of the last process alone are not numbers."""
    original, calls = distill_trajectories.batch_loss, []

    def batch_loss(*arguments: Any) -> Any:
        calls.append(1)
        losses = original(*arguments)
        if rank() == 1 and len(calls) == 3:
            return replace(losses, total=losses.total * torch.nan)
        return losses

    distill_trajectories.batch_loss = batch_loss
    train(out, "poisoned")


def compare_worlds(out: Path, more: bool = False) -> None:
    """One training again and again, on one, two and three processes, in parts, recomputed, sharded."""
    for family in ("llamagen", "var"):
        tiny.store(out / f"{family}-trajectories", tiny.pipeline(family=family))
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {}),
        "two-parts": (2, {"micro_batch": 2, "recompute": True}),
        "stopped": (2, {"stop_after": 3, "keep": "grown"}),
        "grown": (1, {}),
        "var": (1, {"family": "var"}),
        "var-sharded-parts": (2, {"family": "var", "sharded": True, "micro_batch": 2, "recompute": True}),
        "sharded-begun": (2, {"sharded": True, "stop_after": 3, "keep": "unsharded"}),
        "unsharded": (1, {}),
    }
    if more:
        ways = {
            "one": (1, {}),
            "parts": (1, {"micro_batch": 1}),
            "three": (3, {}),
            "three-parts": (3, {"micro_batch": 1}),
            "sharded": (2, {"sharded": True}),
            "sharded-stopped": (2, {"sharded": True, "stop_after": 3, "keep": "sharded-resumed"}),
            "sharded-resumed": (2, {"sharded": True}),
            "whole-begun": (1, {"stop_after": 3, "keep": "whole-sharded"}),
            "whole-sharded": (2, {"sharded": True}),
        }
    codes = {name: fork(partial(train, out, name, **how), world) for name, (world, how) in ways.items()}
    if not more:
        codes["poisoned"] = fork(partial(poisoned_on_one_process, out), 2)
    checkpoint.save_json(out / "codes.json", codes)


def compare_more_worlds(out: Path) -> None:
    """The same in more ways."""
    compare_worlds(out, more=True)


def compare_worlds_of_tokens(out: Path) -> None:
    """Token matching on one and two processes, in parts, mixed with trajectories, sharded."""
    own = replace(SETTINGS, method="tokens", on_policy=OnPolicySettings(tracker_first=2))
    mixed = replace(own, on_policy=replace(own.on_policy, trajectory_weight=0.5))
    for family in ("llamagen", "var"):
        tiny.store(out / f"{family}-trajectories", tiny.pipeline(family=family))
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {"settings": own}),
        "two-parts": (2, {"settings": own, "micro_batch": 2, "recompute": True}),
        "mixed": (1, {"settings": mixed}),
        "mixed-two": (2, {"settings": mixed}),
        "var": (1, {"settings": own, "family": "var"}),
        "var-two": (2, {"settings": own, "family": "var"}),
        "sharded-begun": (2, {"settings": own, "sharded": True, "stop_after": 3, "keep": "unsharded"}),
        "unsharded": (1, {"settings": own}),
    }
    codes = {name: fork(partial(train, out, name, **how), world) for name, (world, how) in ways.items()}
    checkpoint.save_json(out / "codes.json", codes)


def compare_worlds_of_muon(out: Path) -> None:
    """With Muon, on one and two processes, sharded."""
    own = replace(SETTINGS, muon_rate=2.0)
    tiny.store(out / "llamagen-trajectories", tiny.pipeline())
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {"settings": own}),
        "two": (2, {"settings": own}),
        "sharded-begun": (2, {"settings": own, "sharded": True, "stop_after": 3, "keep": "unsharded"}),
        "unsharded": (1, {"settings": own}),
    }
    codes = {name: fork(partial(train, out, name, **how), world) for name, (world, how) in ways.items()}
    checkpoint.save_json(out / "codes.json", codes)


def compare_worlds_of_scores(out: Path) -> None:
    """Score distillation on one and two processes, in parts, mixed with trajectories, sharded."""
    own = replace(
        SETTINGS,
        method="scores",
        on_policy=OnPolicySettings(tracker_first=2),
        scores=ScoreSettings(noised=2, head_layers=1),
    )
    mixed = replace(own, on_policy=replace(own.on_policy, trajectory_weight=0.5))
    tiny.store(out / "llamagen-trajectories", tiny.pipeline())
    tiny.store(out / "var-trajectories", tiny.pipeline(family="var"))
    tokens = replace(own, method="token-scores")
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "one": (1, {"settings": own}),
        "two-parts": (2, {"settings": own, "micro_batch": 2, "recompute": True}),
        "tokens": (1, {"settings": tokens}),
        "tokens-two": (2, {"settings": tokens}),
        "var": (1, {"settings": mixed, "family": "var"}),
        "var-two": (2, {"settings": mixed, "family": "var"}),
        "sharded-begun": (2, {"settings": own, "sharded": True, "stop_after": 3, "keep": "unsharded"}),
        "unsharded": (1, {"settings": own}),
    }
    codes = {name: fork(partial(train, out, name, **how), world) for name, (world, how) in ways.items()}
    checkpoint.save_json(out / "codes.json", codes)


def student_run(out: Path, **changes: Any) -> None:
    """What the command does, with a checkpoint every six updates and a line in the log at the twentieth."""
    pipe = tiny.pipeline()
    settings = replace(SETTINGS, num_updates=22, batch_size=2)
    store = TrajectoryStore.open(out.parent.parent / "trajectories")
    distill_student("tiny", pipe, store, out, settings, upkeep=Upkeep(save_every=6, keep_last=2), **changes)


def broken_off(out: Path, place: Any, name: str, call: int, world: int) -> None:
    """The same run, in which the last process is killed when it calls a function for the n-th time."""
    original, calls = getattr(place, name), []

    def patched(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    if rank() == world - 1 or place is not distill_module:
        setattr(place, name, patched)
    student_run(out)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record, which names machine and time, and the lock of a run that was killed; no times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("run.json", "writer.lock")]
    return {str(path.relative_to(folder)): tiny.timeless(path) for path in files}


# What is called where, and at which call the process dies: in training, in each stage of saving, at the very end.
FAULTS: list[tuple[Any, str, int]] = [
    (distill_module, "update_ema", 5),
    (distill_module, "update_ema", 22),
    (training_state, "save_tensors", 1),
    (training_state, "save_tensors", 3),
    (training_state, "_hashes", 2),
    (training_state, "_sync", 4),
    (Path, "rename", 2),
    (training_state.Checkpoints, "_drop_old", 4),
    (training_state.shutil, "rmtree", 1),
    (TrainingLog, "_forget", 1),
    (Pipeline, "save_pretrained", 1),
    (pipeline_module, "save_json", 1),
]


def kill_everywhere(out: Path) -> None:
    """Kill at every fault point, on one process and on two."""
    kill_and_go_on(out, FAULTS, FAULTS)


def kill_and_go_on(out: Path, alone: Sequence[Any] = FAULTS[::3], together: Sequence[Any] = FAULTS[3:4]) -> None:
    """Kill at some fault points, go on, and compare with an unbroken run."""
    tiny.store(out / "trajectories", tiny.pipeline())
    found = {}
    for world, faults in ((1, alone), (2, together)):
        whole = out / f"whole-{world}" / "student"  # one name in many places: the card names its folder
        assert fork(partial(student_run, whole), world) == [0] * world
        for place, name, call in faults:
            case = f"{world} {getattr(place, '__name__', place)}.{name} {call}"
            folder = out / case / "student"
            begin = time.monotonic()
            killed = fork(partial(broken_off, folder, place, name, call, world), world)
            seconds = time.monotonic() - begin
            unfinished = not (folder / "model_index.json").exists()
            codes = fork(partial(student_run, folder), world)
            same = contents(folder) == contents(whole)
            found[case] = [killed, seconds, unfinished, codes, same]
    checkpoint.save_json(out / "found.json", found)


def kill_at_random_moments(out: Path) -> None:
    """Twenty runs are killed from outside, each as often as it takes to finish."""
    tiny.store(out / "trajectories", tiny.pipeline())
    whole, found = out / "whole" / "student", []
    begin = time.monotonic()
    fork(partial(student_run, whole))
    seconds, chance = time.monotonic() - begin, random.Random(0)
    for number in range(20):
        folder, kills = out / str(number) / "student", 0
        while True:
            moment = chance.uniform(0.2, 1.2) * seconds

            def killed(folder: Path = folder, moment: float = moment) -> None:
                signal.setitimer(signal.ITIMER_REAL, moment)  # its signal ends the process
                student_run(folder)

            codes = fork(killed)
            if codes == [0]:
                break
            assert codes == [-signal.SIGALRM], codes
            kills += 1
        found.append([kills, contents(folder) == contents(whole)])
    checkpoint.save_json(out / "found.json", found)


def full_disk(out: Path) -> None:
    """No file may grow beyond a limit: the checkpoint fails, and what was there stays."""
    tiny.store(out / "trajectories", tiny.pipeline())
    found = {}

    def limited(folder: Path, log: Path, **changes: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            student_run(folder, **changes)
        except OSError as error:
            log.write_text(str(error))
            raise SystemExit(2) from None

    for name, world, changes in (("whole", 1, {}), ("sharded", 2, {"run": RunSettings(sharded=True)})):
        folder = out / name / "student"
        stopped = fork(partial(broken_off, folder, distill_module, "update_ema", 8, world), world)
        before = contents(folder / "checkpoints")
        codes = fork(partial(limited, folder, out / f"{name}.txt", **changes), world)
        kept = contents(folder / "checkpoints") == before
        found[name] = [stopped, codes, kept, (out / f"{name}.txt").read_text(), fork(partial(student_run, folder))]
    checkpoint.save_json(out / "found.json", found)


def peak_memory(out: Path) -> None:
    """Most that a training holds, over few and over many trajectories."""

    def work(num: int) -> None:
        folder = out / str(num)
        pipe, chance = tiny.pipeline(), torch.Generator().manual_seed(0)
        settings = replace(tiny.trajectory_settings(), shard_size=4096)
        manifest = settings.manifest(pipe.teacher, pipe.fingerprint, tiny.CLASSES.identity)
        store = TrajectoryStore.create(folder / "trajectories", manifest, num)
        for number in range(store.num_shards):
            span = store.span(number)
            token_NL = torch.randint(16, (len(span), 16), generator=chance)
            store.write(number, Shard(token_NL, torch.tensor(span) % 3, image_keys("trajectories", 0, span)))
        distill_student("tiny", pipe, store, folder / "student", SETTINGS)
        status = Path("/proc/self/status").read_text().splitlines()
        peak = int(next(line.split()[1] for line in status if line.startswith("VmHWM")))
        checkpoint.save_json(out / f"{num}.json", peak)

    codes = [fork(partial(work, num)) for num in (2000, 200_000)]
    assert codes == [[0], [0]], codes


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*map(Path, sys.argv[2:]))
