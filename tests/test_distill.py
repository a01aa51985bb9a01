import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distilled_decoding import distill_trajectories
from distilled_decoding.blocks import BlockOrder
from distilled_decoding.checkpoint import load_tensors
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Labels
from distilled_decoding.distill import (
    DistillSettings,
    Update,
    batch_indices,
    distill,
    learning_rate_at,
    start_blocks_of,
)
from distilled_decoding.distill_trajectories import Trajectories, batch_loss
from distilled_decoding.losses import LossWeights, TokenSettings, corrupt, distillation_loss, perceptual_loss
from distilled_decoding.noise import image_keys
from distilled_decoding.parallel import RunSettings, own_parts
from distilled_decoding.sampling import Plan
from distilled_decoding.student import StudentOutput, soft_sequence
from distilled_decoding.training_state import Checkpoints
from tests import tiny

SETTINGS = DistillSettings(
    num_updates=12, batch_size=4, warmup=2, start_blocks=(0, 8), start_weights=(2.0, 1.0), bf16=False, ema_rate=0.9
)


def run(tmp_path: Path, settings: DistillSettings = SETTINGS, stop_after: int | None = None):
    pipe = tiny.pipeline()
    shard = tiny.shard(tmp_path / "trajectories", pipe)
    losses: list[float] = []

    def on_update(update: Update) -> bool:
        losses.append(float(update.losses.total.detach()))
        return update.number != stop_after

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    method = Trajectories(pipe.teacher, shard, tiny.CLASSES, settings, 16)
    student = distill(method, pipe.new_student(0), checkpoints, on_update)
    return student, losses


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_stopped_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    whole, losses = run(tmp_path / "whole")
    stopped, first = run(tmp_path / "parts", stop_after=5)
    assert stopped is None
    resumed, second = run(tmp_path / "parts")
    assert first + second == losses
    assert tiny.same_weights(whole, resumed)
    assert files(tmp_path / "whole/checkpoints") == files(tmp_path / "parts/checkpoints")


def test_eight_pairs_are_learnt_by_heart(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    shard = tiny.shard(tmp_path / "trajectories", pipe)[:8]
    settings = DistillSettings(
        num_updates=250, batch_size=8, learning_rate=5e-3, warmup=10, start_blocks=(0, 8), ema_rate=0.8, bf16=False
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    method = Trajectories(pipe.teacher, shard, tiny.CLASSES, settings, 16)
    student = distill(method, pipe.new_student(0), checkpoints, lambda u: True)
    trained = pipe.with_student(student, settings.start_blocks, split_block=16)
    condition = Labels(shard.label_N, 3)
    expected = lookup(shard.token_NL, pipe.teacher.codebook)
    for schedule in ((0,), (0, 8)):
        assert torch.equal(trained.codes(Plan(schedule), condition, shard.key_N), expected)


def test_golden_losses(tmp_path: Path) -> None:
    """A change of these numbers is a change of the method: it belongs in a commit of its own, with the reason."""
    path = Path(__file__).parent / "goldens" / "distill_losses.json"
    _, losses = run(tmp_path)
    assert losses == pytest.approx(json.loads(path.read_text()), rel=1e-4)


def test_every_epoch_shows_every_trajectory_once() -> None:
    settings = replace(SETTINGS, batch_size=4)
    seen = torch.cat([batch_indices(step, settings, 12) for step in range(6)])
    assert sorted(seen[:12].tolist()) == sorted(seen[12:].tolist()) == list(range(12))
    assert seen[:12].tolist() != seen[12:].tolist()


def test_start_blocks_follow_their_weights_and_the_step_alone() -> None:
    drawn = torch.cat([start_blocks_of(step, SETTINGS) for step in range(1500)])
    assert (drawn == 0).double().mean() == pytest.approx(2 / 3, abs=0.02)
    assert torch.equal(start_blocks_of(7, SETTINGS), start_blocks_of(7, SETTINGS))


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate_at(step, SETTINGS) for step in range(12)]
    assert rates[1] == max(rates) == SETTINGS.learning_rate
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_corrupt_keeps_known_codes_and_the_same_noise() -> None:
    order = BlockOrder((1, 2))
    code, noise = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    state = corrupt(noise, code, order.known_BL(torch.tensor([0, 1])))
    assert state[:, :, 0].tolist() == [[0, 0, 0], [1, 0, 0]]


def test_loss_is_zero_at_the_truth_and_ignores_known_tokens() -> None:
    token_BL = torch.tensor([[1, 2, 0]])
    code_BLC = torch.randn(1, 3, 4)
    known_BL = torch.tensor([[True, False, False]])
    logits_BLV = torch.nn.functional.one_hot(token_BL, 5).float() * 100
    logits_BLV[:, 0], wrong = 0, code_BLC.clone()
    wrong[:, 0] = 7
    losses = distillation_loss(StudentOutput(logits_BLV, wrong), token_BL, code_BLC, known_BL, LossWeights())
    assert losses.total.item() == pytest.approx(0, abs=1e-6) and losses.accuracy.item() == 1


def test_block_weights_choose_what_counts() -> None:
    token_BL, code_BLC = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 1)
    output = StudentOutput(torch.zeros(1, 2, 3), torch.tensor([[[1.0], [2.0]]]))
    known_BL = torch.zeros(1, 2, dtype=torch.bool)
    weight_L = torch.tensor([3.0, 1.0])
    losses = distillation_loss(output, token_BL, code_BLC, known_BL, LossWeights(), weight_L)
    assert losses.code.item() == pytest.approx((3 * 1 + 1 * 4) / 4)


def test_gradient_of_the_perceptual_loss_goes_through_the_decoder() -> None:
    """To the logits before the split and to the codes from it on, as numeric differences say."""
    pipe = tiny.pipeline()
    teacher, order = pipe.teacher.double(), pipe.teacher.order
    torch.manual_seed(0)
    logits_BLV, code_BLC, target_BLC = torch.randn(2, 16, 16), torch.randn(2, 16, 4), torch.randn(2, 16, 4)
    inputs = [x.double().requires_grad_() for x in (logits_BLV, code_BLC)]

    def loss(logits: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        predicted = soft_sequence(StudentOutput(logits, code), teacher.codebook, order.tokens_before(6))
        return perceptual_loss(predicted, target_BLC.double(), teacher.decode, torch.nn.functional.mse_loss)

    gradients = torch.autograd.grad(loss(*inputs), inputs)
    assert gradients[0][:, 6:].abs().max() == 0 and gradients[0][:, :6].abs().max() > 0
    assert gradients[1][:, :6].abs().max() == 0 and gradients[1][:, 6:].abs().max() > 0
    for place, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        moved = [[x + sign * 1e-5 * direction if i == place else x for i, x in enumerate(inputs)] for sign in (1, -1)]
        numeric = (loss(*moved[0]) - loss(*moved[1])) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-4)


def test_perceptual_training_reaches_the_heads_that_are_sampled(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    shard = tiny.shard(tmp_path / "trajectories", pipe)[:4]
    settings = replace(SETTINGS, loss=LossWeights(0, 0, 1))
    student = pipe.new_student(0)
    known_blocks_B = torch.zeros(4, dtype=torch.long)
    distance = torch.nn.functional.mse_loss
    condition = Labels(shard.label_N, 3)
    for split, trained, idle in ((16, "output", "final_layer_conti"), (0, "final_layer_conti", "output")):
        student.zero_grad()
        losses = batch_loss(pipe.teacher, student, shard, condition, known_blocks_B, settings, split, distance)
        losses.total.backward()
        assert any(p.grad.abs().max() > 0 for n, p in student.named_parameters() if n.startswith(trained))
        assert all(
            p.grad is None or p.grad.abs().max() == 0 for n, p in student.named_parameters() if n.startswith(idle)
        )
    with pytest.raises(ValueError, match="needs an image distance"):
        Trajectories(pipe.teacher, shard, tiny.CLASSES, settings, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_updates": 0}, "num_updates must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1"),
        ({"ema_rate": 1.0}, "ema_rate"),
        ({"start_weights": (1.0,)}, "1 start weights do not fit 2"),
        ({"start_weights": (0.0, 0.0)}, "start_weights must not be negative and one must be positive"),
        ({"grad_clip": -1.0}, "grad_clip must be positive, got -1"),
        ({"warmup": -1}, "warmup must not be negative, got -1"),
        ({"head": "both"}, "unknown head 'both'; choose one of code, flow"),
        ({"head": "flow", "method": "scores"}, "the method scores trains a student with a code head, but head is flow"),
        ({"head": "flow", "method": "token-scores"}, "the method token-scores trains a student with a code head"),
        ({"head": "flow", "loss": LossWeights(perceptual_weight=0.5)}, "a perceptual weight of 0.5 needs a code head"),
        ({"head": "flow", "tokens": TokenSettings(draw_temperature=0.7)}, "draws at temperature 1, got .* 0.7"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


def test_settings_are_compared_with_the_teacher() -> None:
    order = BlockOrder.raster(16)
    with pytest.raises(ValueError, match="past the last"):
        replace(SETTINGS, start_blocks=(0, 16)).check(order, 16)
    with pytest.raises(ValueError, match="block weights"):
        replace(SETTINGS, block_weights=(1.0, 2.0)).check(order, 16)
    with pytest.raises(ValueError, match="leave a start at block 8 nothing to learn"):
        replace(SETTINGS, block_weights=(1.0,) * 8 + (0.0,) * 8).check(order, 16)
    with pytest.raises(ValueError, match="split_block must lie in 0..16.*got 17"):
        SETTINGS.check(order, 17)


def test_keys_of_training_are_not_those_of_evaluation() -> None:
    assert not set(image_keys("trajectories", 0, range(500)).tolist()) & set(
        image_keys("evaluation", 0, range(500)).tolist()
    )


def test_the_losses_of_parts_of_a_batch_add_up(tmp_path: Path) -> None:
    """That of decoded images, too."""
    pipe = tiny.pipeline()
    shard = tiny.shard(tmp_path / "trajectories", pipe)[:5]
    settings = replace(SETTINGS, loss=LossWeights(perceptual_weight=0.5), block_weights=tuple(range(16)))
    known_blocks_B, distance = torch.tensor([0, 8, 8, 0, 15]), torch.nn.functional.mse_loss
    condition = Labels(shard.label_N, 3)

    def losses(part: slice) -> torch.Tensor:
        batch, asked = shard[part], condition[part]
        found = batch_loss(pipe.teacher, pipe.student, batch, asked, known_blocks_B, settings, 8, distance, part)
        return torch.stack(list(vars(found).values()))

    whole = batch_loss(pipe.teacher, pipe.student, shard, condition, known_blocks_B, settings, 8, distance)
    torch.testing.assert_close(losses(slice(0, 2)) + losses(slice(2, 5)), torch.stack(list(vars(whole).values())))


def diverging(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """Losses that are not numbers in some updates, counted from 1."""
    calls = []

    def poisoned(*arguments):
        calls.append(1)
        losses = batch_loss(*arguments)
        return replace(losses, total=losses.total * torch.nan) if len(calls) in updates else losses

    monkeypatch.setattr(distill_trajectories, "batch_loss", poisoned)


def test_an_update_that_is_not_finite_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves no trace in student, average or optimizer: the same as with no such update at all."""
    pipe, seen, weights = tiny.pipeline(), [], []
    diverging(monkeypatch, 2, 5, 6)

    def on_update(update: Update) -> bool:
        seen.append((update.finite, update.skipped))
        weights.append([p.clone() for p in update.average.parameters()])
        return True

    shard = tiny.shard(tmp_path / "trajectories", pipe)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    method = Trajectories(pipe.teacher, shard, tiny.CLASSES, SETTINGS, 16)
    student = distill(method, pipe.new_student(0), checkpoints, on_update)
    assert [number for number, (finite, _) in enumerate(seen, 1) if not finite] == [2, 5, 6]
    assert [skipped for _, skipped in seen] == [0, 1, 1, 1, 2] + 7 * [3]
    for before, after, finite in zip(weights[:-1], weights[1:], [finite for finite, _ in seen[1:]], strict=True):
        assert all(map(torch.equal, before, after)) != finite
    assert all(p.isfinite().all() for p in student.parameters())


def distill_tiny(folder: Path, run: RunSettings) -> None:
    pipe = tiny.pipeline()
    shard, checkpoints = tiny.shard(folder / "trajectories", pipe), Checkpoints(folder / "c")
    method = Trajectories(pipe.teacher, shard, tiny.CLASSES, SETTINGS, 16)
    distill(method, pipe.new_student(0), checkpoints, lambda update: True, run)


def test_too_many_in_a_row_end_the_run_and_leave_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverging(monkeypatch, 2, 4, 5, 6)
    with pytest.raises(FloatingPointError, match="3 updates in a row were not finite .*failed-000006.*lower learning"):
        distill_tiny(tmp_path, RunSettings(patience=3))
    tensors, _ = load_tensors(tmp_path / "c" / "failed-000006" / "state.safetensors")
    assert all(value.isfinite().all() for value in tensors.values())


def test_parts_share_the_rows_of_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, batch, micro_batch in ((1, 7, 0), (1, 7, 3), (2, 7, 2), (3, 7, 1), (4, 64, 5), (7, 7, 0)):
        rows, counts = [], set()
        for rank in range(size):
            monkeypatch.setenv("WORLD_SIZE", str(size))
            monkeypatch.setenv("RANK", str(rank))
            parts = own_parts(batch, micro_batch)
            counts.add(len(parts))
            rows += [row for part in parts for row in range(batch)[part]]
            assert all(part.stop > part.start for part in parts)
        assert rows == list(range(batch)) and len(counts) == 1
    with pytest.raises(ValueError, match="batch_size 6 is less than the 7 processes"):
        own_parts(6, 0)


def test_settings_of_a_run_are_checked() -> None:
    with pytest.raises(ValueError, match="micro_batch must not be negative, got -1"):
        RunSettings(micro_batch=-1)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        RunSettings(patience=0)


def test_one_process_has_nobody_to_share_with(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs several processes: start it with torchrun"):
        distill_tiny(tmp_path, RunSettings(sharded=True))
