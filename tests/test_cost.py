import json
import math
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distilled_decoding import commands, describe, training_command
from distilled_decoding.cost import Cost, distillation_cost, flops_per_second, trajectory_cost
from distilled_decoding.distill import DistillSettings, MethodName, distill
from distilled_decoding.distill_trajectories import Trajectories
from distilled_decoding.flow import FlowSettings
from distilled_decoding.losses import LossWeights, OnPolicySettings
from distilled_decoding.on_policy import OnPolicy
from distilled_decoding.parallel import RunSettings
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.teacher import TeacherSampling
from distilled_decoding.training_command import ON_POLICY
from distilled_decoding.training_state import Checkpoints
from distilled_decoding.trajectories import TrajectorySettings, generate
from examples import pixel_teacher
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SETTINGS = DistillSettings(num_updates=3, batch_size=16, start_blocks=(0,), bf16=False)
FAMILIES = pytest.mark.parametrize("family", ["llamagen", "var"])


def counted_flops(work: Callable[[], object]) -> int:
    # torch counts the operations of plain attention, but not those of the CPU's fused kernel.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def allocated_bytes(work: Callable[[], object], folder: Path) -> int:
    """The most that torch's allocator gave out at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def weights(*modules: torch.nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


def data_bytes(folder: Path) -> int:
    """Bytes of the tensors in all safetensors files: the files without their headers."""
    files = list(folder.rglob("*.safetensors"))
    assert files
    return sum(f.stat().st_size - 8 - int.from_bytes(f.read_bytes()[:8], "little") for f in files)


def make(folder: Path, teacher: torch.nn.Module, settings: TrajectorySettings, num: int) -> TrajectoryStore:
    table = tiny.table(teacher)
    store = TrajectoryStore.create(folder, settings.manifest(teacher, "hash", table.identity), num)
    generate(teacher, table, store, settings, lambda items: None)
    return store


@pytest.mark.parametrize(
    ("family", "sampling"),
    [
        *product(["llamagen", "var"], [tiny.SAMPLING, TeacherSampling(top_k=2), TeacherSampling()]),
        ("text", tiny.SAMPLING),
    ],
)
def test_operations_of_trajectories_are_exact(tmp_path: Path, family: str, sampling: TeacherSampling) -> None:
    """Also where only the ends of a run of equal blocks are looked at, and where codes are gathered."""
    teacher, settings = tiny.pipeline(family=family).teacher, replace(tiny.trajectory_settings(), sampling=sampling)
    real = counted_flops(lambda: make(tmp_path, teacher, settings, 12))
    cost = trajectory_cost(teacher, settings, 12, 1e10)
    assert cost.flops == real
    assert cost.disk_bytes == data_bytes(tmp_path)
    assert trajectory_cost(teacher, settings, 12, 2e10).seconds == cost.seconds / 2


def test_a_teacher_without_a_cache_costs_no_more_than_said(tmp_path: Path) -> None:
    teacher = pixel_teacher.PixelTeacher(pixel_teacher.Network(pixel_teacher.Config()))
    real = counted_flops(lambda: make(tmp_path, teacher, tiny.trajectory_settings(), 8))
    assert real <= trajectory_cost(teacher, tiny.trajectory_settings(), 8, 1e10).flops < 1.2 * real


@FAMILIES
def test_memory_of_trajectories_is_what_torch_allocates(tmp_path: Path, family: str) -> None:
    teacher = tiny.pipeline(family=family).teacher
    real = allocated_bytes(lambda: make(tmp_path / "out", teacher, tiny.trajectory_settings(), 8), tmp_path)
    cost = trajectory_cost(teacher, tiny.trajectory_settings(), 8, 1e10)
    assert cost.fixed_bytes == weights(teacher)
    assert cost.memory_bytes - cost.fixed_bytes == pytest.approx(real, rel=0.1)


@FAMILIES
@pytest.mark.parametrize("run", [RunSettings(), RunSettings(micro_batch=4, recompute=True)], ids=["whole", "parts"])
def test_cost_of_a_distillation_is_what_it_takes(tmp_path: Path, family: str, run: RunSettings) -> None:
    pipe = tiny.pipeline(family=family)
    students, shard = [pipe.new_student(0) for _ in range(3)], tiny.shard(tmp_path / "trajectories", pipe)
    checkpoints = Checkpoints(tmp_path / "model" / "checkpoints")

    def work() -> None:
        new, table = students.pop(), tiny.CLASSES
        method = Trajectories(pipe.teacher, shard, table, SETTINGS, 1)
        trained = distill(method, new, checkpoints, lambda update: True, run)
        pipe.with_student(trained, (0,), 1).save_pretrained(tmp_path / "model")

    real = allocated_bytes(work, tmp_path)
    shutil.rmtree(checkpoints.folder)
    cost, student = distillation_cost(pipe.teacher, students[0], SETTINGS, 1e10, CPU, run), students[0]
    assert cost.flops == counted_flops(work)
    assert cost.fixed_bytes == weights(pipe.teacher) + 5 * weights(student)
    assert cost.memory_bytes == pytest.approx(real + weights(pipe.teacher, student), rel=0.02)
    assert cost.disk_bytes == data_bytes(tmp_path / "model")


@pytest.mark.slow
@FAMILIES
@pytest.mark.parametrize("run", [RunSettings(), RunSettings(micro_batch=4, recompute=True)], ids=["whole", "parts"])
@pytest.mark.parametrize("name", ["tokens", "token-scores", "scores"])
def test_cost_of_learning_from_ones_own_is_what_it_takes(
    tmp_path: Path, name: MethodName, family: str, run: RunSettings
) -> None:
    pipe, kind = tiny.pipeline(family=family), ON_POLICY[name]
    students, settings = (
        [pipe.new_student(0) for _ in range(3)],
        replace(
            SETTINGS,
            method=name,
            num_updates=3,
            batch_size=8,
            on_policy=OnPolicySettings(tracker_first=1),
        ),
    )
    checkpoints = Checkpoints(tmp_path / "model" / "checkpoints")

    def begin() -> OnPolicy:
        method = kind(pipe.teacher, pipe.new_tracker, tiny.CLASSES, tiny.SAMPLING, settings)
        assert method.networks
        return method

    def work() -> None:
        trained = distill(begin(), students.pop(), checkpoints, lambda update: True, run)
        pipe.with_student(trained, (0,), pipe.teacher.order.num_blocks).save_pretrained(tmp_path / "model")

    real = allocated_bytes(work, tmp_path)
    shutil.rmtree(checkpoints.folder)
    student, tracker = students[0], pipe.new_tracker()
    beside = begin().networks["tracker-0"][0]
    cost = distillation_cost(pipe.teacher, student, settings, 1e10, CPU, run, kind, tracker, tiny.SAMPLING)
    assert cost.flops == counted_flops(work) - counted_flops(begin)  # a look at which parameters are read
    learnt = sum(p.nbytes for p in beside.parameters() if p.requires_grad)
    assert cost.fixed_bytes == weights(pipe.teacher, beside) + 5 * weights(student) + 3 * learnt
    assert cost.memory_bytes == pytest.approx(real + weights(pipe.teacher, student), rel=0.05)
    assert cost.disk_bytes == data_bytes(tmp_path / "model")


def test_bf16_a_gpu_and_small_batches_save_memory() -> None:
    pipe = tiny.pipeline(family="var")

    def cost(device: torch.device = CPU, run: RunSettings = RunSettings(), **changes: object) -> Cost:  # noqa: B008
        return distillation_cost(pipe.teacher, pipe.student, replace(SETTINGS, **changes), 1e10, device, run)

    plain, small = cost(), cost(batch_size=8)
    assert cost(bf16=True).memory_bytes < plain.memory_bytes
    assert cost(GPU).memory_bytes < plain.memory_bytes
    assert (small.fixed_bytes, small.flops) == (plain.fixed_bytes, pytest.approx(plain.flops / 2, rel=0.02))
    parts, again = cost(run=RunSettings(micro_batch=4)), cost(run=RunSettings(recompute=True))
    assert parts.memory_bytes < plain.memory_bytes and parts.flops == pytest.approx(plain.flops, rel=0.02)
    assert again.memory_bytes < plain.memory_bytes and 1.2 < again.flops / plain.flops < 1.4
    perceptual = cost(loss=LossWeights(perceptual_weight=1.0))
    assert perceptual.flops > plain.flops and perceptual.memory_bytes > plain.memory_bytes


def test_planning_leaves_the_models_alone() -> None:
    pipe = tiny.pipeline()
    distillation_cost(pipe.teacher, pipe.student, SETTINGS, 1e10, GPU)
    trajectory_cost(pipe.teacher, tiny.trajectory_settings(), 8, 1e10)
    assert not pipe.student.training
    for parameter in [*pipe.teacher.parameters(), *pipe.student.parameters()]:
        assert parameter.grad is None and not parameter.requires_grad
        assert type(parameter) is torch.nn.Parameter and parameter.device == CPU


@pytest.mark.parametrize(
    ("name", "teacher_size", "student_size"),
    [
        ("llamagen-b", 110_888_448 + 71_883_403, 98_321_672),
        ("var-d16", 310_283_520 + 108_948_355, 328_165_664),
    ],
)
def test_published_models_are_planned_without_their_weights(name: str, teacher_size: int, student_size: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skeleton = describe.skeleton(name)
    teacher, student = skeleton.teacher, skeleton.student
    settings = TrajectorySettings(TeacherSampling(guidance_scale=2.0), FlowSettings(), micro_batch=64)
    made = trajectory_cost(teacher, settings, 64, 1e14)
    trained = distillation_cost(teacher, student, DistillSettings(num_updates=1), 1e14, GPU)
    assert made.fixed_bytes == 4 * teacher_size
    assert trained.fixed_bytes == 4 * (teacher_size + 5 * student_size)
    # Two operations for each weight that a token meets and for its conditional and unconditional pass, six to train.
    tokens = 64 * teacher.order.length
    assert 0.6 < made.flops / (2 * 2 * tokens * sum(p.numel() for p in teacher.transformer.parameters())) < 1.2
    assert 0.6 < trained.flops / (6 * tokens * student_size) < 1.2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024, "KiB: weights were allocated"


def test_products_take_time() -> None:
    for bf16 in (False, True):
        assert 1e6 < flops_per_second(CPU, bf16) < math.inf


def test_readable_units() -> None:
    cost = Cost(flops=2 * 10**12, seconds=1800, memory_bytes=3 * 2**30, fixed_bytes=2**30, disk_bytes=2**29)
    values = {"memory_gib": 3.0, "fixed_gib": 1.0, "disk_gib": 0.5, "hours": 0.5, "teraflop": 2.0}
    assert cost.readable() == values


@pytest.mark.slow
def test_the_published_model_of_captions_is_planned_at_its_full_size() -> None:
    text = describe.skeleton("llamagen-t2i-stage1")
    made = commands.plan_trajectories(text, None, commands.trajectory_settings(text, 0, None, None), "cpu")
    assert made["trajectories"] == text.config.num_trajectories
    # Transformer, tokenizer and the embedding of no caption.
    assert made["fixed_gib"] == pytest.approx(4 * (777_678_080 + 71_883_403 + 120 * 2048) / 2**30, rel=0.01)
    trained = training_command.plan_distillation(text, None, text.config.training, None, "none", "cpu")
    assert trained["fixed_gib"] == pytest.approx(made["fixed_gib"] + 5 * 4 * 756.7e6 / 2**30, rel=0.01)
