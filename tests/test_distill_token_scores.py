from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Classes, Condition
from distilled_decoding.distill import STUDENT, DistillSettings, distill
from distilled_decoding.distill_scores import noised_codes
from distilled_decoding.distill_token_scores import TokenScores, density_ratios
from distilled_decoding.losses import OnPolicySettings, ScoreSettings, TokenScoreLosses, token_score_loss
from distilled_decoding.on_policy import ALL
from distilled_decoding.sampling import Plan
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Guidance, TeacherSampling
from distilled_decoding.training_state import Checkpoints
from tests import tiny
from tests.test_distill_scores import CODEBOOK
from tests.test_distill_tokens import Faces, Pairs, joint_of, random_logits

SETTINGS = DistillSettings(
    method="token-scores",
    num_updates=6,
    batch_size=4,
    warmup=2,
    start_blocks=(0, 2),
    bf16=False,
    on_policy=OnPolicySettings(tracker_first=2, tracker_updates=2),
    scores=ScoreSettings(noised=2),
)


def test_a_token_is_told_by_how_far_its_code_lies_along_the_step() -> None:
    """The gradient of the logits, by hand: as if each code had the value code . step."""
    chance = torch.Generator().manual_seed(0)
    logits_BLV, step_BLC = (
        torch.randn(2, 3, 4, generator=chance).requires_grad_(),
        torch.randn(2, 3, 2, generator=chance),
    )
    token_BL, weight_BL = logits_BLV.argmax(-1), torch.rand(2, 3, generator=chance)
    log_psi_BLV = torch.randn(2, 3, 4, generator=chance).log_softmax(-1)
    losses = token_score_loss(logits_BLV.log_softmax(-1), log_psi_BLV, step_BLC, token_BL, CODEBOOK, weight_BL)
    (found_BLV,) = torch.autograd.grad(losses.total, logits_BLV)
    told_BLV, pi_BLV = step_BLC @ CODEBOOK.T / 2, logits_BLV.detach().softmax(-1)
    expected_BLV = weight_BL[..., None] * pi_BLV * (told_BLV - (pi_BLV * told_BLV).sum(-1, keepdim=True))
    torch.testing.assert_close(found_BLV, expected_BLV)
    read_BL = log_psi_BLV.gather(-1, token_BL[..., None])[..., 0]
    torch.testing.assert_close(losses.tracker, -(weight_BL * read_BL).sum())


def exact_losses(student: Faces, own_VV: Tensor, teacher_VV: Tensor) -> TokenScoreLosses:
    settings = replace(SETTINGS, batch_size=512, start_blocks=(0,))
    teacher, own = (Pairs(joint_VV).requires_grad_(False) for joint_VV in (teacher_VV, own_VV))
    method = TokenScores(teacher, nn.Module, Classes(1), TeacherSampling(), settings)

    def tracker(token_BL: Tensor, condition: Condition) -> Tensor:
        return own.forced_logits(token_BL, condition, Guidance()).log_softmax(-1)

    return method.student_losses(method.batch(0), 0, {STUDENT: student, "tracker-0": tracker})


def test_at_the_optimum_the_gradient_vanishes() -> None:
    student = Faces(random_logits(2))
    own_VV, other_VV = joint_of(random_logits(2)), joint_of(random_logits(4, seed=1))
    exact_losses(student, own_VV, own_VV).total.backward()
    assert student.logits_ZLV.grad.abs().max() < 1e-6
    exact_losses(student, own_VV, other_VV).total.backward()
    assert student.logits_ZLV.grad.abs().max() > 1e-3


def test_what_the_teacher_makes_more_often_weighs_more() -> None:
    """By the ratio of the densities of two mixtures, written out in float64."""
    chance = torch.Generator().manual_seed(0)
    code_BLC = CODEBOOK[torch.randint(4, (2, 3), generator=chance)]
    noised = noised_codes(code_BLC, torch.arange(2), 5)
    log_p_BLV, log_psi_BLV = (3 * torch.randn(2, 2, 3, 4, generator=chance)).log_softmax(-1)
    log_p_BLV[..., 3] = -torch.inf
    found_BLR1 = density_ratios(noised, log_p_BLV, log_psi_BLV, CODEBOOK)
    time_BLR1 = noised.time_BLR1.double()
    away = noised.x_BLRC.double()[..., None, :] - (1 - time_BLR1)[..., None] * CODEBOOK.double()
    gauss_BLRV = -away.square().sum(-1) / (2 * time_BLR1.square())
    dense = [(gauss_BLRV + each.double().unsqueeze(2)).logsumexp(-1) for each in (log_p_BLV, log_psi_BLV)]
    expected_BLR = (dense[0] - dense[1]).exp()
    assert expected_BLR.max() > 5 > expected_BLR.median() > 0.05
    torch.testing.assert_close(found_BLR1[..., 0].double(), expected_BLR.clamp(max=5), rtol=1e-3, atol=1e-3)


class OneOfTwo(nn.Module):
    """A teacher, or the tracker, of one token of two."""

    order, num_classes = BlockOrder.raster(1), 1

    def __init__(self, share: float) -> None:
        super().__init__()
        self.register_buffer("codebook", torch.tensor([[-0.5], [1.0]]))
        self.logits_V = nn.Parameter(torch.tensor([1 - share, share]).log())

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        return self.logits_V.expand(*token_BL.shape, -1)


class Threshold(nn.Module):
    """A student that takes the second token where the noise is large enough, not surely; how large is to be learnt."""

    order = OneOfTwo.order

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(1.0))

    def forward(self, code_BLC: Tensor, *_: object) -> StudentOutput:
        more_BL1 = 2 * (code_BLC - self.threshold)
        return StudentOutput(torch.cat([-more_BL1, more_BL1], -1), code_BLC)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_the_likeliest_tokens_learn_the_teachers_distribution(tmp_path: Path, share: float) -> None:
    """Nothing is drawn: the noise alone makes them as frequent as they should be."""
    settings = DistillSettings(
        method="token-scores",
        num_updates=300,
        batch_size=256,
        learning_rate=2e-2,
        warmup=10,
        ema_rate=0.95,
        start_blocks=(0,),
        bf16=False,
        on_policy=OnPolicySettings(tracker_first=40),
    )
    teacher = OneOfTwo(share).requires_grad_(False)
    method = TokenScores(teacher, lambda: OneOfTwo(0.5), Classes(1), TeacherSampling(), settings)
    average = distill(method, Threshold(), Checkpoints(tmp_path), lambda update: True)
    found = 1 - torch.special.ndtr(average.threshold)
    assert abs(float(found) - share) < 0.03


def method_of(pipe, settings: DistillSettings = SETTINGS) -> TokenScores:
    return TokenScores(pipe.teacher, pipe.new_tracker, tiny.table(pipe.teacher), tiny.SAMPLING, settings)


@pytest.mark.parametrize("family", ["llamagen", "var", "text"])
def test_a_student_trains_on_what_it_samples(family: str) -> None:
    """In one step and in two: the likeliest tokens of the same noise."""
    pipe = tiny.pipeline(family=family)
    pipe = pipe.with_settings(split_block=pipe.teacher.order.num_blocks, start_blocks=(0, 2), student_temperature=0.0)
    method = method_of(pipe)
    for known_blocks, schedule in ((0, (0,)), (2, (0, 2))):
        begun = method.batch(3)
        drawn = method.drawn(begun, known_blocks, pipe.student)
        codes_BLC = pipe.codes(Plan(schedule), drawn.condition, begun.key_N)
        assert torch.equal(codes_BLC, lookup(drawn.token_BL, pipe.teacher.codebook))


def test_the_losses_of_parts_of_a_batch_add_up() -> None:
    pipe = tiny.pipeline()
    method = method_of(pipe, replace(SETTINGS, start_blocks=(0,), block_weights=tuple(range(16))))
    networks = {STUDENT: pipe.student, **{name: network for name, (network, _) in method.networks.items()}}
    for _, losses_of in method.steps(2):
        found = [
            torch.stack([value.detach() for value in vars(losses_of(networks, part)).values()])
            for part in (slice(0, 1), slice(1, 4), ALL)
        ]
        torch.testing.assert_close(found[0] + found[1], found[2])
