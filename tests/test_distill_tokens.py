from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Classes, Condition
from distilled_decoding.distill import STUDENT, DistillSettings, MethodName, Update, distill, usual_settings
from distilled_decoding.distill_tokens import ALL, Tokens, Tracker
from distilled_decoding.distill_trajectories import batch_loss
from distilled_decoding.losses import (
    LossWeights,
    OnPolicySettings,
    TokenLosses,
    TokenSettings,
    downstream_loss,
    log_ratio,
    token_loss,
)
from distilled_decoding.sampling import Plan
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Guidance, TeacherSampling
from distilled_decoding.training_state import Checkpoints
from tests import tiny

SETTINGS = DistillSettings(
    method="tokens",
    num_updates=6,
    batch_size=4,
    warmup=2,
    start_blocks=(0, 2),
    bf16=False,
    ema_rate=0.9,
    on_policy=OnPolicySettings(tracker_first=2, tracker_updates=2),
)
TOY = DistillSettings(
    method="tokens",
    batch_size=512,
    start_blocks=(0,),
    bf16=False,
    on_policy=OnPolicySettings(tracker_first=0, tracker_updates=1),
    tokens=TokenSettings(ratio_clamp=50.0, forward_share=0),
)


class Pairs(nn.Module):
    """A teacher of two tokens out of three: any joint distribution [V, V]."""

    order, codebook, num_classes = BlockOrder.raster(2), torch.tensor([[-1.0], [0.0], [1.0]]), 1

    def __init__(self, joint_VV: Tensor) -> None:
        super().__init__()
        self.first_V = nn.Parameter(joint_VV.sum(1).log())
        self.second_VV = nn.Parameter((joint_VV / joint_VV.sum(1, keepdim=True)).log())

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        return torch.stack([self.first_V.expand(len(token_BL), -1), self.second_VV[token_BL[:, 0]]], 1)


class Faces(nn.Module):
    """A student that sees of its noise nothing but a sign; what it says of the two tokens is free [2, L, V]."""

    order = Pairs.order

    def __init__(self, logits_ZLV: Tensor) -> None:
        super().__init__()
        self.logits_ZLV = nn.Parameter(logits_ZLV.clone())

    def forward(self, code_BLC: Tensor, *_: object) -> StudentOutput:
        return StudentOutput(self.logits_ZLV[(code_BLC[:, 0, 0] > 0).long()], torch.zeros(len(code_BLC), 2, 1))


def random_logits(faces: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(faces, 2, 3, generator=torch.Generator().manual_seed(seed))


def joint_of(logits_ZLV: Tensor) -> Tensor:
    """How likely each pair of tokens is when all kinds of noise are alike, [V, V]."""
    pi_ZLV = logits_ZLV.softmax(-1)
    return torch.einsum("za,zb->ab", pi_ZLV[:, 0], pi_ZLV[:, 1]) / len(logits_ZLV)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def gradient_of_the_formula(logits_ZLV: Tensor, target_VV: Tensor, forward_share: float = 0.0) -> Tensor:
    """Eq. 11 with an exact tracker, summed over every noise and every first token with its probability."""
    logits_ZLV = logits_ZLV.clone().requires_grad_()
    face_B, first_B = torch.cartesian_prod(torch.arange(len(logits_ZLV)), torch.arange(3)).T
    token_BL = torch.stack([first_B, torch.zeros_like(first_B)], 1)
    log_pi_BLV = logits_ZLV.log_softmax(-1)[face_B]
    chance_B = log_pi_BLV[torch.arange(len(face_B)), 0, first_B].exp().detach() / len(logits_ZLV)
    log_psi_BLV, log_p_BLV = (
        Pairs(joint.detach()).forced_logits(token_BL, None, None) for joint in (joint_of(logits_ZLV), target_VV)
    )
    weight_BL = chance_B[:, None].expand(-1, 2)
    settings = TokenSettings(ratio_clamp=100, forward_share=forward_share)
    losses = token_loss(log_pi_BLV, log_psi_BLV, log_p_BLV, token_BL, weight_BL, Pairs.order, settings)
    return torch.autograd.grad(losses.total, logits_ZLV)[0]


def downstream_formula(logits_ZLV: Tensor, target_VV: Tensor, rows: int = 1) -> Tensor:
    """Eq. 11 and 14 with an exact tracker and discount 1, summed over every batch of rows with its probability."""
    logits_ZLV = logits_ZLV.clone().requires_grad_()
    face_O, *tokens = torch.cartesian_prod(torch.arange(len(logits_ZLV)), torch.arange(3), torch.arange(3)).T
    token_OL = torch.stack(tokens, 1)
    log_pi_OLV = logits_ZLV.log_softmax(-1)[face_O]
    chance_O = log_pi_OLV.gather(-1, token_OL[..., None]).sum((1, 2)).exp().detach() / len(logits_ZLV)
    batch_NB = torch.cartesian_prod(*[torch.arange(len(face_O))] * rows).view(-1, rows)
    log_psi_OLV, log_p_OLV = (
        Pairs(joint.detach()).forced_logits(token_OL, None, None) for joint in (joint_of(logits_ZLV), target_VV)
    )
    weight_BL, settings = (
        torch.full((rows, 2), 1 / rows),
        TokenSettings(ratio_clamp=100, forward_share=0, downstream=1.0),
    )

    def loss(log_pi_BLV: Tensor, log_psi_BLV: Tensor, log_p_BLV: Tensor, token_BL: Tensor) -> Tensor:
        return token_loss(log_pi_BLV, log_psi_BLV, log_p_BLV, token_BL, weight_BL, Pairs.order, settings).total

    all_O = (log_pi_OLV, log_psi_OLV, log_p_OLV, token_OL)
    loss_N = torch.vmap(loss)(*(each[batch_NB] for each in all_O))
    return torch.autograd.grad((loss_N * chance_O[batch_NB].prod(1)).sum(), logits_ZLV)[0]


def held_gradient(logits_ZLV: Tensor, target_VV: Tensor, forward_share: float = 0.0) -> Tensor:
    """Of the divergences of both conditionals (Eq. 13), by enumeration: prefix and noise's posterior are constants."""

    def between(own: Tensor, teachers: Tensor) -> Tensor:
        return (1 - forward_share) * divergence(own, teachers) + forward_share * divergence(teachers, own)

    logits_ZLV = logits_ZLV.clone().requires_grad_()
    pi_ZLV = logits_ZLV.softmax(-1)
    held_ZV = pi_ZLV[:, 0].detach()
    posterior_ZA = held_ZV / held_ZV.sum(0)
    loss = between(pi_ZLV[:, 0].mean(0), target_VV.sum(1))
    for first in range(3):
        second_V = (posterior_ZA[:, first, None] * pi_ZLV[:, 1]).sum(0)
        loss = loss + held_ZV.mean(0)[first] * between(second_V, target_VV[first] / target_VV[first].sum())
    return torch.autograd.grad(loss, logits_ZLV)[0]


def joint_gradient(logits_ZLV: Tensor, target_VV: Tensor) -> Tensor:
    logits_ZLV = logits_ZLV.clone().requires_grad_()
    return torch.autograd.grad(divergence(joint_of(logits_ZLV), target_VV), logits_ZLV)[0]


def downstream_gradient(logits_ZLV: Tensor, target_VV: Tensor) -> Tensor:
    """Of the first token alone, by the log-ratio of the second that it leads to."""
    logits_ZLV = logits_ZLV.clone().requires_grad_()
    pi_ZLV, joint_VV = logits_ZLV.softmax(-1), joint_of(logits_ZLV).detach()
    ratio_VV = (joint_VV / joint_VV.sum(1, keepdim=True)).log() - (target_VV / target_VV.sum(1, keepdim=True)).log()
    loss = torch.einsum("za,zb,ab->", pi_ZLV[:, 0], pi_ZLV[:, 1].detach(), ratio_VV) / len(logits_ZLV)
    return torch.autograd.grad(loss, logits_ZLV)[0]


def test_the_gradient_is_that_of_the_conditionals_and_lacks_what_lies_downstream() -> None:
    """Brute force over five kinds of noise, two positions and three codes."""
    logits_ZLV, target_VV = random_logits(5).double(), joint_of(random_logits(4, seed=1)).double()
    own = gradient_of_the_formula(logits_ZLV, target_VV)
    torch.testing.assert_close(own, held_gradient(logits_ZLV, target_VV))
    joint = joint_gradient(logits_ZLV, target_VV)
    torch.testing.assert_close(joint, own + downstream_gradient(logits_ZLV, target_VV))
    torch.testing.assert_close(joint[:, 1], own[:, 1])
    assert float((joint - own).norm() / joint.norm()) == pytest.approx(0.51, rel=0.02)


@pytest.mark.parametrize("forward_share", [0.3, 1.0])
def test_forward_it_is_the_gradient_of_the_teachers_divergences_from_the_student(forward_share: float) -> None:
    logits_ZLV, target_VV = random_logits(5).double(), joint_of(random_logits(4, seed=1)).double()
    expected = held_gradient(logits_ZLV, target_VV, forward_share)
    torch.testing.assert_close(gradient_of_the_formula(logits_ZLV, target_VV, forward_share), expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_with_what_lies_downstream_it_is_the_gradient_of_the_joint_divergence(rows: int) -> None:
    """In a batch other rows are the baseline, which is right on average over batches."""
    logits_ZLV, target_VV = random_logits(2).double(), joint_of(random_logits(4, seed=1)).double()
    expected = joint_gradient(logits_ZLV, target_VV)
    torch.testing.assert_close(downstream_formula(logits_ZLV, target_VV, rows), expected)


def test_judging_later_tokens_by_all_codes_varies_less_than_by_those_drawn() -> None:
    """Brute force over every noise and every pair of tokens: one mean, and a third of the variance."""
    logits_ZLV, target_VV = random_logits(2).double(), joint_of(random_logits(4, seed=1)).double()
    face_O, *tokens = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).T
    token_OL = torch.stack(tokens, 1)
    log_pi_OLV = logits_ZLV.log_softmax(-1)[face_O]
    chance_O = log_pi_OLV.gather(-1, token_OL[..., None]).sum((1, 2)).exp() / 2
    log_psi_OLV, log_p_OLV = (
        Pairs(joint).forced_logits(token_OL, None, None).detach() for joint in (joint_of(logits_ZLV), target_VV)
    )
    ratio_OLV = log_psi_OLV - log_p_OLV

    def loss(logits_ZLV: Tensor, face: Tensor, token_L: Tensor, divergence_L: Tensor) -> Tensor:
        log_pi_1LV = logits_ZLV.log_softmax(-1)[face[None]]
        return downstream_loss(log_pi_1LV, divergence_L[None], token_L[None], torch.ones(1, 2), Pairs.order, 1.0)

    def moments(divergence_OL: Tensor) -> tuple[Tensor, Tensor]:
        each = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(logits_ZLV, face_O, token_OL, divergence_OL)
        mean = torch.einsum("o,ozlv->zlv", chance_O, each)
        return mean, torch.einsum("o,ozlv->", chance_O, (each - mean).square())

    mean, variance = moments((log_pi_OLV.exp() * ratio_OLV).sum(-1))
    drawn_mean, drawn_variance = moments(ratio_OLV.gather(-1, token_OL[..., None])[..., 0])
    torch.testing.assert_close(mean, drawn_mean)
    assert float(variance / drawn_variance) == pytest.approx(0.334, abs=0.001)


def test_downstream_are_later_blocks_by_their_weight_and_discount() -> None:
    """Of four blocks the first is known and the third has two tokens."""
    order, chance = BlockOrder((1, 1, 2, 1)), torch.Generator().manual_seed(0)
    log_pi_BLV, log_psi_BLV, log_p_BLV = torch.randn(3, 2, 5, 3, generator=chance).log_softmax(-1)
    token_BL = torch.randint(3, (2, 5), generator=chance)
    weight_BL = torch.tensor([0.0, 0.1, 0.2, 0.2, 0.3]).expand(2, -1)
    log_pi_BLV.requires_grad_()

    def gradient(downstream: float) -> Tensor:
        settings = TokenSettings(forward_share=0, downstream=downstream)
        losses = token_loss(log_pi_BLV, log_psi_BLV, log_p_BLV, token_BL, weight_BL, order, settings)
        return torch.autograd.grad(losses.total, log_pi_BLV)[0].gather(-1, token_BL[..., None])[..., 0]

    own_BL = (log_pi_BLV.detach().exp() * log_ratio(log_psi_BLV, log_p_BLV, 5.0)).sum(-1) * weight_BL
    third_B, fourth_B = own_BL[:, 2] + own_BL[:, 3], own_BL[:, 4]
    second_B, third_B, zero_B = 0.5 * third_B + 0.25 * fourth_B, 0.5 * fourth_B, torch.zeros(2)
    behind_BL = torch.stack([zero_B, second_B, third_B, third_B, zero_B], 1)
    torch.testing.assert_close(gradient(0.5) - gradient(0.0), behind_BL - behind_BL.flip(0))


def toy(target_VV: Tensor, settings: DistillSettings = TOY) -> Tokens:
    teacher = Pairs(target_VV).requires_grad_(False)
    return Tokens(teacher, lambda: Pairs(torch.full((3, 3), 1 / 9)), Classes(1), TeacherSampling(), settings)


def drawn_gradient(student: Faces, target_VV: Tensor, num: int) -> Tensor:
    """What a student's step finds with an exact tracker."""
    method = toy(target_VV, replace(TOY, batch_size=num))
    *_, (name, losses_of) = method.steps(0)
    exact = Tracker(Pairs(joint_of(student.logits_ZLV).detach()))
    losses_of({STUDENT: student, "tracker-0": exact}, ALL).total.backward()
    assert name == STUDENT and student.logits_ZLV.grad is not None
    return student.logits_ZLV.grad


def test_on_average_a_step_follows_the_formula() -> None:
    student, target_VV = Faces(random_logits(2)), joint_of(random_logits(4, seed=1))
    expected = gradient_of_the_formula(student.logits_ZLV.detach(), target_VV) / 2  # the loss is a mean over positions
    torch.testing.assert_close(drawn_gradient(student, target_VV, 40_000), expected, atol=0.01, rtol=0)


def test_at_the_optimum_the_gradient_vanishes() -> None:
    student = Faces(random_logits(2))
    assert drawn_gradient(student, joint_of(student.logits_ZLV).detach(), 1000).abs().max() < 1e-6


def test_a_tracker_recovers_the_conditionals_of_known_samples() -> None:
    student = Faces(random_logits(2))
    method = toy(joint_of(random_logits(4, seed=1)))
    tracker = method.networks["tracker-0"][0]
    optimizer = torch.optim.Adam(tracker.parameters(), lr=0.1)
    for update in range(60):
        name, losses_of = next(method.steps(update))
        assert name == "tracker-0"
        optimizer.zero_grad()
        losses_of({STUDENT: student, name: tracker}, ALL).total.backward()
        optimizer.step()
    assert student.logits_ZLV.grad is None
    first_V, second_VV = (table.detach().softmax(-1) for table in tracker.parameters())
    known_VV = joint_of(student.logits_ZLV).detach()
    torch.testing.assert_close(first_V, known_VV.sum(1), atol=0.03, rtol=0)
    torch.testing.assert_close(second_VV, known_VV / known_VV.sum(1, keepdim=True), atol=0.1, rtol=0)


def followed(gradient: Callable[[Tensor, Tensor], Tensor], seed: int, target_VV: Tensor) -> Tensor:
    """Where a gradient leads in 400 steps: the logits."""
    logits_ZLV = random_logits(5, seed).requires_grad_()
    optimizer = torch.optim.Adam([logits_ZLV], lr=0.05)
    for _ in range(400):
        logits_ZLV.grad = gradient(logits_ZLV.detach(), target_VV)
        optimizer.step()
    return logits_ZLV.detach()


def test_the_formula_leads_to_the_teachers_joint_distribution_from_some_starts() -> None:
    """From others it comes to rest beside it, where the gradient of the joint divergence would go on."""
    reached, missed = joint_of(random_logits(4, seed=3)), joint_of(random_logits(4, seed=1))
    torch.testing.assert_close(joint_of(followed(gradient_of_the_formula, 2, reached)), reached, atol=1e-4, rtol=0)
    torch.testing.assert_close(joint_of(followed(joint_gradient, 0, missed)), missed, atol=1e-4, rtol=0)
    resting = followed(gradient_of_the_formula, 0, missed)
    assert 0.005 < (joint_of(resting) - missed).abs().max() < 0.02
    assert joint_gradient(resting, missed).norm() > 10 * gradient_of_the_formula(resting, missed).norm()


def test_with_what_lies_downstream_every_start_ends_there() -> None:
    """The seven of docs/method.md, of which the first and the sixth come to rest 0.013 and 0.015 beside it without."""
    for seed in range(7):
        target_VV = joint_of(random_logits(4, seed=seed + 1))
        reached = joint_of(followed(downstream_formula, seed, target_VV))
        torch.testing.assert_close(reached, target_VV, atol=5e-4, rtol=0)


def test_what_the_teacher_never_samples_has_the_largest_ratio() -> None:
    log_psi, log_p = torch.tensor([-1.0, -9.0, -2.0]), torch.tensor([-torch.inf, -1.0, -1.5])
    assert log_ratio(log_psi, log_p, 3.0).tolist() == [3.0, -3.0, -0.5]


def method_of(pipe, settings: DistillSettings = SETTINGS, trajectories=None) -> Tokens:
    table = tiny.table(pipe.teacher)
    return Tokens(pipe.teacher, pipe.new_tracker, table, tiny.SAMPLING, settings, trajectories)


@pytest.mark.parametrize("family", ["llamagen", "var", "text"])
def test_a_student_trains_on_what_it_samples(family: str) -> None:
    """In one step and in two: the same tokens from the same keys."""
    pipe = tiny.pipeline(family=family).with_settings(student_temperature=0.7)
    settings = replace(SETTINGS, tokens=TokenSettings(draw_temperature=0.7))
    method = method_of(pipe, settings)
    for known_blocks, schedule in ((0, (0,)), (2, (0, 2))):
        pipe = pipe.with_settings(start_blocks=(0, 2))
        begun = method.batch(3)
        drawn = method.drawn(begun, known_blocks, pipe.student)
        codes_BLC = pipe.codes(Plan(schedule), drawn.condition, begun.key_N)
        assert torch.equal(codes_BLC, lookup(drawn.token_BL, pipe.teacher.codebook))


@pytest.mark.parametrize("family", ["llamagen", "var", "text"])
def test_with_a_flow_head_it_trains_on_what_the_flow_map_makes(family: str) -> None:
    pipe = tiny.pipeline(family=family).with_settings(start_blocks=(0, 2), student_temperature=0.0)
    pipe = pipe.with_student(pipe.new_student(0, "flow").eval(), (0, 2), pipe.teacher.order.num_blocks)
    table, settings = tiny.table(pipe.teacher), replace(SETTINGS, head="flow")
    method = Tokens(pipe.teacher, pipe.new_tracker, table, tiny.SAMPLING, settings, flow=tiny.FLOW)
    begun = method.batch(3)
    for known_blocks, schedule in ((0, (0,)), (2, (0, 2))):
        drawn = method.drawn(begun, known_blocks, pipe.student)
        codes_BLC = pipe.codes(Plan(schedule), drawn.condition, begun.key_N)
        assert torch.equal(codes_BLC, lookup(drawn.token_BL, pipe.teacher.codebook))
    networks = {name: network for name, (network, _) in method.networks.items()}
    student = pipe.student.requires_grad_(True)
    method.student_losses(begun, 0, {STUDENT: student, **networks}).total.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.parameters() if p.shape != (2, 32))


@pytest.mark.parametrize("family", ["llamagen", "var"])
def test_a_tracker_is_a_copy_of_the_teacher_without_its_tokenizer(family: str) -> None:
    pipe = tiny.pipeline(family=family)
    method = method_of(pipe)
    assert list(method.networks) == ["tracker-0", "tracker-2"]
    tracker, _ = method.networks["tracker-2"]
    drawn = method.drawn(method.batch(0), 0, pipe.student)
    log_psi_BLV = tracker(drawn.token_BL, drawn.condition)
    expected = pipe.teacher.forced_logits(drawn.token_BL, drawn.condition, Guidance()).log_softmax(-1)
    torch.testing.assert_close(log_psi_BLV, expected)
    log_psi_BLV.square().sum().backward()
    assert all((p.grad is None) == name.startswith("teacher.tokenizer.") for name, p in tracker.named_parameters())
    assert not any(p.requires_grad for p in pipe.teacher.parameters())


@pytest.mark.parametrize("known_blocks", [0, 2])
def test_with_trajectories_noise_and_known_blocks_are_theirs_and_their_loss_is_mixed_in(
    tmp_path: Path, known_blocks: int
) -> None:
    pipe = tiny.pipeline()
    shard = tiny.shard(tmp_path, pipe, 8)
    settings = replace(SETTINGS, loss=LossWeights(1.0, 0.5))
    mixed = replace(settings, on_policy=OnPolicySettings(tracker_first=2, trajectory_weight=0.25))
    batch = method_of(pipe, mixed, shard).batch(2)
    drawn = method_of(pipe, mixed, shard).drawn(batch, known_blocks, pipe.student)
    assert torch.equal(drawn.token_BL[:, :known_blocks], batch.token_NL[:, :known_blocks])
    assert set(batch.key_N.tolist()) <= set(shard.key_N.tolist())

    def losses(chosen: DistillSettings) -> TokenLosses:
        method = method_of(pipe, chosen, shard)
        networks = {name: network for name, (network, _) in method.networks.items()}
        return method.student_losses(batch, known_blocks, {STUDENT: pipe.student, **networks})

    alone, both = losses(settings), losses(mixed)
    known_blocks_B = torch.full((4,), known_blocks)
    condition = tiny.CLASSES[batch.label_N]
    expected = batch_loss(pipe.teacher, pipe.student, batch, condition, known_blocks_B, settings, 16).total
    torch.testing.assert_close(both.trajectories, expected)
    torch.testing.assert_close(both.total, alone.total + 0.25 * expected)


def test_the_losses_of_parts_of_a_batch_add_up() -> None:
    pipe = tiny.pipeline()
    method = method_of(pipe, replace(SETTINGS, start_blocks=(0,), block_weights=tuple(range(16))))
    networks = {name: network for name, (network, _) in method.networks.items()}
    for _, losses_of in method.steps(2):
        found = [
            torch.stack(
                [value.detach() for value in vars(losses_of({STUDENT: pipe.student, **networks}, part)).values()]
            )
            for part in (slice(0, 1), slice(1, 4), ALL)
        ]
        torch.testing.assert_close(found[0] + found[1], found[2])


def run(folder: Path, stop_after: int | None = None):
    pipe = tiny.pipeline()
    losses: list[float] = []

    def on_update(update: Update) -> bool:
        losses.append(float(update.losses.total))
        return update.number != stop_after

    return distill(method_of(pipe), pipe.new_student(0), Checkpoints(folder), on_update), losses


def test_stopped_and_resumed_equals_unbroken(tmp_path: Path) -> None:
    """Trackers and their optimizers included; before the student begins, and after."""
    whole, losses = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop_after=1)[0] is None
    assert run(tmp_path / "parts", stop_after=4)[0] is None
    resumed, last = run(tmp_path / "parts")
    assert last == losses[4:] and tiny.same_weights(whole, resumed)
    names = ("whole", "parts")
    one, other = ((tmp_path / name / "update-000006" / "state.safetensors").read_bytes() for name in names)
    assert one == other


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (TokenSettings, {"draw_temperature": 0.0}, "draw_temperature must be positive, got 0"),
        (TokenSettings, {"ratio_clamp": -1.0}, "ratio_clamp must be positive, got -1"),
        (TokenSettings, {"forward_share": 1.5}, "forward_share must lie in 0..1, got 1.5"),
        (TokenSettings, {"entropy_weight": torch.inf}, "entropy_weight must be finite, got inf"),
        (TokenSettings, {"downstream": 1.5}, "downstream must lie in 0..1, got 1.5"),
        (OnPolicySettings, {"tracker_first": -1}, "tracker_first must be at least 0, got -1"),
        (OnPolicySettings, {"tracker_updates": 0}, "tracker_updates must be positive, got 0"),
        (OnPolicySettings, {"trajectory_weight": -1.0}, "trajectory_weight must not be negative, got -1"),
    ],
)
def test_bad_settings_are_refused(kind: type, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**change)


def test_at_first_the_trackers_alone_learn() -> None:
    """From the student's tokens as always; how long differs between methods, and nobody waits without a tracker."""
    method = method_of(tiny.pipeline(), replace(SETTINGS, start_blocks=(0,)))
    names = [[name for name, _ in method.steps(update)] for update in (1, 2)]
    assert names == [["tracker-0"] * 2, ["tracker-0"] * 2 + [STUDENT]]
    assert method.lessons(1)[0] == method.lessons(2)[0] == method.tracker_losses
    names = get_args(MethodName)
    assert names == ("trajectories", "tokens", "token-scores", "scores")
    assert [usual_settings(name, DistillSettings(), "code").first_update for name in names] == [0, 120, 40, 500]
    assert [replace(SETTINGS, method=name).first_update for name in names] == [0, 2, 2, 2]
    noised = [
        usual_settings(name, usual_settings("token-scores", SETTINGS, "code"), "code").scores.noised for name in names
    ]
    assert noised == [8, 8, 8, 4]


def test_what_needs_trajectories_says_so() -> None:
    mixed = replace(SETTINGS, on_policy=OnPolicySettings(tracker_first=2, trajectory_weight=1.0))
    with pytest.raises(ValueError, match="trajectory weight of 1.0 needs trajectories"):
        method_of(tiny.pipeline(), mixed)
    with pytest.raises(ValueError, match="unknown method 'token'; choose one of trajectories, tokens"):
        replace(SETTINGS, method="token")
