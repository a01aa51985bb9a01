from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Classes, Condition
from distilled_decoding.distill import STUDENT, DistillSettings, Update, distill, learning_rate_at
from distilled_decoding.distill_scores import Scores, ScoreTracker, expected_codes, noised_codes
from distilled_decoding.distill_trajectories import batch_loss
from distilled_decoding.flow import posterior_mean, posterior_means
from distilled_decoding.losses import (
    LossWeights,
    Noised,
    OnPolicySettings,
    ScoreLosses,
    ScoreSettings,
    score_loss,
    score_tracker_loss,
    unit_error,
)
from distilled_decoding.on_policy import ALL
from distilled_decoding.sampling import Plan
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Guidance, TeacherSampling, draw
from distilled_decoding.training_state import Checkpoints
from tests import tiny
from tests.test_distill_tokens import Pairs, joint_of, random_logits

SETTINGS = DistillSettings(
    method="scores",
    num_updates=6,
    batch_size=4,
    warmup=2,
    start_blocks=(0, 2),
    bf16=False,
    ema_rate=0.9,
    on_policy=OnPolicySettings(tracker_first=2, tracker_updates=2),
    scores=ScoreSettings(noised=2, head_width=8, head_layers=1),
)
CODEBOOK = torch.tensor([[-1.0, 0.2], [0.3, 1.0], [0.9, -0.4], [0.8, 0.9]])
LOG_P = torch.tensor([0.25, 0.25, 0.5, 0.0]).log()


def test_the_teachers_score_is_that_of_the_noised_mixture_of_codes() -> None:
    """Against autograd of its log density."""
    chance = torch.Generator().manual_seed(0)
    x_NRC = torch.randn(7, 3, 2, generator=chance, dtype=torch.float64).requires_grad_()
    time_NR = 0.05 + 0.9 * torch.rand(7, 3, generator=chance, dtype=torch.float64)
    log_p_NV = torch.randn(7, 4, generator=chance).log_softmax(-1)
    log_p_NV[:3] = LOG_P
    away = x_NRC[:, :, None] - (1 - time_NR)[..., None, None] * CODEBOOK
    log_density_NR = (log_p_NV[:, None] - away.square().sum(-1) / (2 * time_NR[..., None].square())).logsumexp(-1)
    (score_NRC,) = torch.autograd.grad(log_density_NR.sum(), x_NRC)
    time_NR1, x_NRC = time_NR[..., None], x_NRC.detach()
    mean_NRC = posterior_means(x_NRC.float(), 1 - time_NR.float(), log_p_NV, CODEBOOK)
    found_NRC = -(x_NRC - (1 - time_NR1) * mean_NRC) / time_NR1.square()
    torch.testing.assert_close(found_NRC, score_NRC, rtol=1e-3, atol=1e-3)


def test_many_points_at_times_of_their_own_are_each_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of rows, too."""
    monkeypatch.setattr("distilled_decoding.flow._rows_per_chunk", lambda *_: 3)
    chance = torch.Generator().manual_seed(0)
    x_NRC, time_NR = torch.randn(7, 2, 2, generator=chance), torch.rand(7, 2, generator=chance)
    log_p_NV = torch.randn(7, 4, generator=chance)
    mean_NRC = posterior_means(x_NRC, time_NR, log_p_NV, CODEBOOK)
    for n in range(7):
        for r in range(2):
            alone = posterior_mean(x_NRC[n : n + 1, r], float(time_NR[n, r]), log_p_NV[n : n + 1], CODEBOOK)
            torch.testing.assert_close(mean_NRC[n, r], alone[0])


def test_learning_from_the_teachers_scores_has_the_minimum_of_learning_from_its_samples() -> None:
    """For any head both losses have one gradient: summed over all codes, and over noise on a fine grid."""
    code_1V, log_p_1V = torch.tensor([[-1.0, 0.2, 0.7]]), torch.tensor([[0.2, 0.5, 0.3]]).log()
    noise_E = torch.linspace(-6, 6, 401)
    chance_VE = log_p_1V.T.exp() * (noise_E.square() / -2).softmax(0)
    chance_1N = chance_VE.flatten()[None]
    code_VEC = code_1V.T[..., None].expand(-1, len(noise_E), 1)
    gradients = []
    for time in (0.1, 0.5, 0.9):
        time_111 = torch.tensor(time).view(1, 1, 1, 1)
        q_1NC, noise_1NRC = code_VEC.flatten(0, 1)[None], noise_E.repeat(3)[None, :, None, None]
        noised = Noised.of(q_1NC, noise_1NRC, time_111.expand(1, len(q_1NC[0]), 1, 1))
        x_NRC, time_NR = noised.x_BLRC[0], noised.time_BLR1[0, :, :, 0]
        mean_NRC = posterior_means(x_NRC, 1 - time_NR, log_p_1V.expand(len(x_NRC), -1), code_1V.T)
        unit_BLR1 = unit_error(noised.time_BLR1, torch.tensor(0.7))
        weight_4 = torch.randn(4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for target_BLRC in (q_1NC[:, :, None], mean_NRC[None]):
            head_BLRC = torch.cat([noised.x_BLRC**power for power in range(4)], -1) @ weight_4[:, None]
            loss = score_tracker_loss(head_BLRC, target_BLRC, unit_BLR1, chance_1N)
            gradients.append(torch.autograd.grad(loss, weight_4)[0])
    for own, teachers in zip(gradients[::2], gradients[1::2], strict=True):
        torch.testing.assert_close(own, teachers, rtol=1e-3, atol=1e-4)


def test_the_step_is_the_difference_of_what_both_expect() -> None:
    """By the size of what the teacher would change, or a tenth of the unit."""
    chance = torch.Generator().manual_seed(0)
    code_BLC = torch.randn(2, 1, 4, generator=chance).requires_grad_()
    student_BLRC, teacher_BLRC = torch.randn(2, 2, 1, 1, 4, generator=chance)
    teacher_BLRC = torch.stack([teacher_BLRC[0], code_BLC.detach()[1:]])
    ones = torch.ones(2, 1, 1, 1)
    losses = score_loss(code_BLC, student_BLRC, teacher_BLRC, torch.zeros(2, 1, 4), ones, torch.tensor([[2.0], [3.0]]))
    size_B = torch.stack([(code_BLC - teacher_BLRC[:, 0])[0].abs().mean(), torch.tensor(0.1)])
    step_BLC = (student_BLRC - teacher_BLRC)[:, 0] / size_B[:, None, None]
    (found_BLC,) = torch.autograd.grad(losses.total, code_BLC)
    torch.testing.assert_close(found_BLC, step_BLC / 4 * torch.tensor([2.0, 3.0])[:, None, None])
    torch.testing.assert_close(losses.gap, 2 * code_BLC[0].square().sum() + 3 * code_BLC[1].square().sum())


class Exact(nn.Module):
    """What a student makes pairs of codes by: their joint distribution, and of it what a tracker would expect."""

    def __init__(self, joint_VV: Tensor) -> None:
        super().__init__()
        self.pairs = Pairs(joint_VV).requires_grad_(False)
        self.shift_LC = nn.Parameter(torch.zeros(2, 1))

    def made(self, noise_BLC: Tensor, *_: object) -> StudentOutput:
        """Codes that depend on the noise alone; what is added to them is to be learnt."""
        uniform_BL = torch.special.ndtr(noise_BLC[..., 0].double())
        token_BL = torch.zeros(uniform_BL.shape, dtype=torch.int64)
        for place in range(2):
            log_p_BLV = self.pairs.forced_logits(token_BL, None, None).log_softmax(-1)
            token_BL[:, place] = draw(log_p_BLV, uniform_BL)[:, place]
        return StudentOutput(torch.zeros(len(token_BL), 0, 3), lookup(token_BL, Pairs.codebook) + self.shift_LC)

    def expected(self, token_BL: Tensor, condition: Condition, x_BLRC: Tensor, time_BLR1: Tensor) -> Tensor:
        log_p_NV = self.pairs.forced_logits(token_BL, condition, None).log_softmax(-1).flatten(0, 1)
        time_NR = 1 - time_BLR1.flatten(0, 1).squeeze(-1)
        return posterior_means(x_BLRC.flatten(0, 1), time_NR, log_p_NV, Pairs.codebook).view(x_BLRC.shape)


def exact_losses(student: Exact, teacher_VV: Tensor) -> ScoreLosses:
    settings = replace(SETTINGS, batch_size=4000, start_blocks=(0,))
    teacher = Pairs(teacher_VV).requires_grad_(False)
    method = Scores(teacher, nn.Module, Classes(1), TeacherSampling(), settings)
    return method.student_losses(method.batch(0), 0, {STUDENT: student.made, "tracker-0": student.expected})


def test_at_the_optimum_the_gradient_vanishes() -> None:
    own_VV, other_VV = joint_of(random_logits(2)), joint_of(random_logits(4, seed=1))
    student = Exact(own_VV)
    exact_losses(student, own_VV).total.backward()
    assert student.shift_LC.grad.abs().max() < 1e-6
    exact_losses(student, other_VV).total.backward()
    assert student.shift_LC.grad.abs().min() > 1e-3


def test_an_exact_tracker_errs_no_more_than_it_must() -> None:
    """A little more or less of a wrong one beside it does not help."""
    student, wrong = Exact(joint_of(random_logits(2))), Exact(joint_of(random_logits(4, seed=1)))
    method = Scores(
        student.pairs, nn.Module, Classes(1), TeacherSampling(), replace(SETTINGS, batch_size=20_000, start_blocks=(0,))
    )
    share = torch.zeros((), requires_grad=True)

    def tracker(*inputs: Tensor) -> Tensor:
        exact_BLRC = student.expected(*inputs)
        return exact_BLRC + share * (wrong.expected(*inputs) - exact_BLRC)

    loss = method.tracker_losses(method.batch(0), 0, {STUDENT: student.made, "tracker-0": tracker}).total
    (slope,) = torch.autograd.grad(loss, share, create_graph=False)
    assert abs(float(slope)) < 0.01


class OneToken(nn.Module):
    """A teacher of one token of four, each a point of the plane."""

    order, num_classes = BlockOrder.raster(1), 1

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codebook", CODEBOOK)
        self.feature_D = nn.Parameter(torch.ones(32))

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        return LOG_P.expand(*token_BL.shape, -1)

    def forced_features(self, token_BL: Tensor, condition: Condition) -> Tensor:
        return self.feature_D.expand(*token_BL.shape, -1)


class OneVector(nn.Module):
    """A student that tells sixteen regions of noise apart, not sharply, and has a point for each."""

    order = OneToken.order

    def __init__(self) -> None:
        super().__init__()
        self.regions, self.points = nn.Linear(2, 16), nn.Linear(16, 2, bias=False)
        nn.init.normal_(self.points.weight)

    def forward(self, code_BLC: Tensor, *_: object) -> StudentOutput:
        region_BLZ = (8 * self.regions(code_BLC)).softmax(-1)
        return StudentOutput(code_BLC.new_zeros(len(code_BLC), 0, 4), self.points(region_BLZ))


def test_a_student_of_one_vector_learns_the_teachers_distribution(tmp_path: Path) -> None:
    settings = DistillSettings(
        method="scores",
        num_updates=150,
        batch_size=64,
        learning_rate=1e-2,
        warmup=10,
        grad_clip=10.0,
        ema_rate=0.95,
        start_blocks=(0,),
        bf16=False,
        on_policy=OnPolicySettings(tracker_first=40),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student, teacher = OneVector(), OneToken()
    method = Scores(teacher.requires_grad_(False), OneToken, Classes(1), TeacherSampling(), settings)
    losses: list[float] = []

    def on_update(update: Update) -> bool:
        losses.append(float(update.losses.total))
        return True

    average = distill(method, student, Checkpoints(tmp_path), on_update)
    made_BLC = average(torch.randn(4000, 1, 2, generator=torch.Generator().manual_seed(1))).code_BLC
    token_BL = nearest(made_BLC, CODEBOOK)
    found_V = token_BL.flatten().bincount(minlength=4) / len(token_BL)
    assert (found_V - LOG_P.exp()).abs().sum() / 2 < 0.12
    # What lies between two regions of noise lies between two codes.
    assert (made_BLC - lookup(token_BL, CODEBOOK)).square().sum(-1).mean() < 0.15
    assert sum(losses[-20:]) < 0.5 * sum(losses[40:60])


def method_of(pipe, settings: DistillSettings = SETTINGS, trajectories=None) -> Scores:
    table = tiny.table(pipe.teacher)
    return Scores(pipe.teacher, pipe.new_tracker, table, tiny.SAMPLING, settings, trajectories)


def loosened(pipe):
    """Its student's code head is not silent any more."""
    with torch.no_grad():
        for parameter in pipe.student.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return pipe


def forwards_of(method: Scores, student: nn.Module) -> dict[str, nn.Module]:
    return {STUDENT: student, **{name: network for name, (network, _) in method.networks.items()}}


@pytest.mark.parametrize("family", ["llamagen", "var", "text"])
def test_a_student_trains_on_what_it_samples(family: str) -> None:
    """In one step and in two: the same vectors from the same keys."""
    pipe = loosened(tiny.pipeline(family=family)).with_settings(split_block=0, start_blocks=(0, 2))
    method = method_of(pipe)
    for known_blocks, schedule in ((0, (0,)), (2, (0, 2))):
        begun = method.batch(3)
        made = method.made(begun, known_blocks, pipe.student)
        torch.testing.assert_close(pipe.codes(Plan(schedule), made.condition, begun.key_N), made.code_BLC)
        assert torch.equal(made.token_BL, nearest(made.code_BLC, pipe.teacher.codebook))
        assert made.code_BLC.std() > 0.1


@pytest.mark.parametrize("family", ["llamagen", "var", "text"])
def test_a_tracker_trains_what_its_features_are_made_of(family: str) -> None:
    """It begins with the best guess that knows no code, and the teacher's logits are read from its features."""
    pipe = loosened(tiny.pipeline(family=family))
    method = method_of(pipe)
    assert list(method.networks) == ["tracker-0", "tracker-2"]
    tracker, made = method.networks["tracker-2"][0], method.made(method.batch(0), 2, pipe.student)
    noised = noised_codes(made.code_BLC.detach(), made.key_B, 2)
    mean_BLRC = tracker(made.token_BL, made.condition, noised.x_BLRC, noised.time_BLR1)
    time_BLR1, power = noised.time_BLR1, pipe.teacher.codebook.square().mean()
    guess = (1 - time_BLR1) * power / ((1 - time_BLR1) ** 2 * power + time_BLR1**2)
    torch.testing.assert_close(mean_BLRC, guess * noised.x_BLRC)
    mean_BLRC.square().sum().backward()
    silent = {name for name, p in tracker.named_parameters() if p.grad is None}
    assert silent == {name for name, p in tracker.named_parameters() if not p.requires_grad}
    logits_head = {"var": ["head.bias", "head.weight"]}.get(family, ["output.weight"])
    left_out = {name for name in silent if not name.startswith("teacher.tokenizer.")}
    assert left_out == {f"teacher.transformer.{name}" for name in logits_head}
    read_BLV = getattr(pipe.teacher.transformer, logits_head[0].split(".")[0])(
        pipe.teacher.forced_features(made.token_BL, made.condition)
    )
    torch.testing.assert_close(read_BLV, pipe.teacher.forced_logits(made.token_BL, made.condition, Guidance()))


def test_a_teacher_without_features_is_refused() -> None:
    with pytest.raises(ValueError, match="needs features, which Pairs does not offer: give it forced_features"):
        ScoreTracker(Pairs(torch.full((3, 3), 1 / 9)), ScoreSettings(), 0)


def test_at_first_the_trackers_alone_learn_from_the_teachers_own_draws() -> None:
    """At points of the teacher's draws an exact tracker has nothing to learn, whatever the student makes."""
    pipe = loosened(tiny.pipeline())
    method = method_of(pipe, replace(SETTINGS, start_blocks=(0,)))
    names = [[name for name, _ in method.steps(update)] for update in (1, 2)]
    assert names == [["tracker-0"] * 2, ["tracker-0"] * 2 + [STUDENT]]

    def tracker(token_BL: Tensor, condition: Condition, *noised: Tensor) -> Tensor:
        return expected_codes(Noised(*noised), method.judged(token_BL, condition), pipe.teacher.codebook)

    networks = {STUDENT: pipe.student, "tracker-0": tracker}
    name, losses_of = next(method.steps(1))
    assert float(losses_of(networks, ALL).total) < 1e-9
    *_, (name, losses_of) = method.steps(2)
    losses = losses_of(networks, ALL)
    assert isinstance(losses, ScoreLosses) and float(losses.difference) < 1e-5 < float(losses.tracker)


def test_the_student_warms_up_when_it_begins() -> None:
    settings = replace(SETTINGS, num_updates=20, learning_rate=1.0, warmup=4)
    rates = [learning_rate_at(update, settings, first_update=8) for update in range(20)]
    alone = [learning_rate_at(update, replace(settings, num_updates=12)) for update in range(12)]
    assert rates == [0.0] * 8 + alone


@pytest.mark.parametrize("known_blocks", [0, 2])
def test_with_trajectories_noise_and_known_blocks_are_theirs_and_their_loss_is_mixed_in(
    tmp_path: Path, known_blocks: int
) -> None:
    pipe = loosened(tiny.pipeline())
    shard = tiny.shard(tmp_path, pipe, 8)
    settings = replace(SETTINGS, loss=LossWeights(0.5, 1.0))
    mixed = replace(settings, on_policy=OnPolicySettings(tracker_first=2, trajectory_weight=0.25))
    batch = method_of(pipe, mixed, shard).batch(2)
    made = method_of(pipe, mixed, shard).made(batch, known_blocks, pipe.student)
    assert torch.equal(made.token_BL[:, :known_blocks], batch.token_NL[:, :known_blocks])

    def losses(chosen: DistillSettings) -> ScoreLosses:
        method = method_of(pipe, chosen, shard)
        return method.student_losses(batch, known_blocks, forwards_of(method, pipe.student))

    alone, both = losses(settings), losses(mixed)
    known_blocks_B, condition = torch.full((4,), known_blocks), tiny.CLASSES[batch.label_N]
    expected = batch_loss(pipe.teacher, pipe.student, batch, condition, known_blocks_B, settings, 0).total
    torch.testing.assert_close(both.trajectories, expected)
    torch.testing.assert_close(both.total, alone.total + 0.25 * expected)


def test_the_losses_of_parts_of_a_batch_add_up() -> None:
    pipe = loosened(tiny.pipeline())
    method = method_of(pipe, replace(SETTINGS, start_blocks=(0,), block_weights=tuple(range(16))))
    networks = forwards_of(method, pipe.student)
    for update in (0, 2):
        for _, losses_of in method.steps(update):
            found = [
                torch.stack([value.detach() for value in vars(losses_of(networks, part)).values()])
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
    """Before the student begins, and after."""
    whole, losses = run(tmp_path / "whole")
    assert run(tmp_path / "parts", stop_after=1)[0] is None
    assert run(tmp_path / "parts", stop_after=4)[0] is None
    resumed, last = run(tmp_path / "parts")
    assert last == losses[4:] and tiny.same_weights(whole, resumed)
    names = ("whole", "parts")
    one, other = ((tmp_path / name / "update-000006" / "state.safetensors").read_bytes() for name in names)
    assert one == other


def test_bad_settings_are_refused() -> None:
    for change, message in (
        ({"noised": 0}, "noised must be at least 1, got 0"),
        ({"head_width": -1}, "head_width must be at least 0, got -1"),
        ({"head_layers": 0}, "head_layers must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ScoreSettings(**change)
    with pytest.raises(ValueError, match="of 6 updates the first 120 are the trackers' alone"):
        replace(SETTINGS, on_policy=OnPolicySettings())
