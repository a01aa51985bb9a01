import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from distilled_decoding import flow
from distilled_decoding.flow import SOLVERS, FlowSettings, flow_map, integrate, posterior_mean, velocity


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def truncated(logits, width):
    """Log p with all but the likeliest `width` codes dropped."""
    smallest = logits.topk(width).values[..., -1:]
    return logits.masked_fill(logits < smallest, -math.inf).log_softmax(-1)


def problem(num_rows, vocab_size, channels, width=None, temperature=1.0):
    """Noise [1, N, C], log p [1, N, V] of different rows, and a codebook."""
    logits_BNV = torch.randn(1, num_rows, vocab_size) / temperature
    codebook_VC = F.normalize(torch.randn(vocab_size, channels), dim=-1)
    return torch.randn(1, num_rows, channels), truncated(logits_BNV, width or vocab_size), codebook_VC


def chi_square_pvalue(token_N, log_p_V):
    """How likely counts this far from p are, codes of p = 0 left out (none may occur)."""
    count_V = token_N.bincount(minlength=len(log_p_V)).double()
    alive_V = log_p_V > -math.inf
    assert count_V[~alive_V].sum() == 0
    expected_V = log_p_V[alive_V].double().softmax(0) * len(token_N)
    return stats.chisquare(count_V[alive_V].numpy(), expected_V.numpy()).pvalue


@pytest.mark.parametrize(
    ("vocab_size", "channels", "width", "settings"),
    [
        (16, 4, None, FlowSettings()),
        (64, 4, 24, FlowSettings("heun", 60)),
        (256, 8, None, FlowSettings()),
        (512, 8, 40, FlowSettings()),
    ],
)
def test_tokens_are_as_frequent_as_p(vocab_size, channels, width, settings):
    _, log_p_11V, codebook_VC = problem(1, vocab_size, channels, width)
    num = 40_000
    noise_BKC = torch.randn(1, num, channels)
    token_BK = flow_map(noise_BKC, log_p_11V.expand(1, num, -1), codebook_VC, settings)
    assert chi_square_pvalue(token_BK[0], log_p_11V[0, 0]) > 1e-3


@pytest.mark.parametrize("solver", SOLVERS)
def test_in_one_dimension_tokens_are_the_quantiles_of_p(solver):
    p_V = torch.tensor([0.3, 0.1, 0.4, 0.2])
    codebook_VC = torch.tensor([[-1.0], [-0.4], [0.3], [0.8]])
    noise_BKC = torch.randn(1, 2000, 1)
    token_BK = flow_map(noise_BKC, p_V.log().expand(1, 2000, -1), codebook_VC, FlowSettings(solver, 200))
    exact_BK = torch.searchsorted(p_V.cumsum(0), torch.special.ndtr(noise_BKC[..., 0]))
    assert (token_BK == exact_BK).float().mean() > 0.985


def quantile(x_N, time, p_V, code_V):
    """Probability of ending up below x on the path, in one dimension: constant along the exact flow."""
    z_NV = (x_N[:, None].double() - time * code_V) / (1 - time)
    return torch.special.ndtr(z_NV) @ p_V


@pytest.mark.parametrize("time", [0.4, 0.8])
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("multistep", 2)])
def test_solvers_converge_to_the_exact_map_at_their_order(solver, order, time):
    p_V = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    code_V = torch.tensor([-1.0, 0.2, 1.5], dtype=torch.float64)
    noise_N = torch.linspace(-2, 2, 201)
    log_p_NV = p_V.log().float().expand(201, -1)
    errors = []
    for num_steps in (16, 32, 64):
        times = torch.linspace(0, time, num_steps + 1, dtype=torch.float64)
        x_NC = integrate(noise_N[:, None], log_p_NV, code_V.float()[:, None], times, solver)
        error_N = quantile(x_NC[:, 0], time, p_V, code_V) - torch.special.ndtr(noise_N.double())
        errors.append(error_N.abs().mean().item())
    measured = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(abs(each - order) < 0.35 for each in measured), measured
    assert errors[-1] < 0.01


def test_converged_solvers_agree():
    arguments = problem(400, 128, 4)
    tokens = [flow_map(*arguments, FlowSettings(solver, 200)) for solver in SOLVERS]
    for token_BK in tokens[1:]:
        assert (token_BK == tokens[0]).float().mean() > 0.985


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_one_code_gets_everything(solver, num_steps):
    noise_BKC, _, codebook_VC = problem(30, 8, 3)
    log_p_BKV = torch.full((1, 30, 8), -math.inf)
    log_p_BKV[..., 5] = 0
    token_BK = flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings(solver, num_steps))
    assert (token_BK == 5).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_dropped_codes_never_come_out_however_rough_the_solution(solver):
    noise_BKC, log_p_BKV, codebook_VC = problem(2000, 64, 4, width=20)
    token_BK = flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings(solver, 2))
    assert log_p_BKV.gather(-1, token_BK[..., None]).isfinite().all()


@pytest.mark.parametrize("time", [0.0, 0.3, 0.7, 0.9])
@pytest.mark.parametrize("per_row", [False, True])
def test_fused_posterior_mean_is_the_plain_formula(time, per_row):
    noise_BKC, log_p_BKV, codebook_VC = problem(50, 200, 8, width=90)
    x_NC, log_p_NV = noise_BKC[0], log_p_BKV[0]
    codebook = codebook_VC * torch.rand(*([50] if per_row else []), 200, 1)  # norms differ, and matter
    distance_NV = (x_NC[:, None].double() - time * codebook.double()).square().sum(-1)
    weight_NV = (log_p_NV.double() - distance_NV / (2 * (1 - time) ** 2)).softmax(-1)
    expected_NC = (weight_NV[..., None] * codebook.double()).sum(1)
    mean_NC = posterior_mean(x_NC, time, log_p_NV, codebook)
    torch.testing.assert_close(mean_NC.double(), expected_NC, atol=1e-5, rtol=1e-5)


def test_velocity_leads_straight_to_the_expected_code():
    x_NC, mean_NC = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(x_NC + (1 - 0.3) * velocity(x_NC, 0.3, mean_NC), mean_NC)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_step_lands_on_a_code(solver):
    noise_BKC, log_p_BKV, codebook_VC = problem(200, 32, 4)
    x_NC = integrate(noise_BKC[0], log_p_BKV[0], codebook_VC, torch.linspace(0, 1, 41), solver)
    assert torch.cdist(x_NC, codebook_VC).amin(-1).median() < 1e-4


@pytest.mark.parametrize("width", [1, 20, 64])
def test_gathering_the_survivors_changes_nothing(monkeypatch, width):
    arguments = problem(500, 512, 8, width)
    monkeypatch.setattr(flow, "_GATHER_SHARE", 0)
    masked_BK = flow_map(*arguments, FlowSettings())
    monkeypatch.setattr(flow, "_GATHER_SHARE", 1)
    assert (flow_map(*arguments, FlowSettings()) == masked_BK).float().mean() >= 0.998


def test_rows_of_different_widths_gather_to_the_widest():
    noise_BKC, log_p_BKV, codebook_VC = problem(100, 512, 8, width=30)
    log_p_BKV[:, ::2] = truncated(log_p_BKV[:, ::2], 3)
    together_BK = flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings())
    apart_BK = flow_map(noise_BKC[:, ::2], log_p_BKV[:, ::2], codebook_VC, FlowSettings())
    assert torch.equal(together_BK[:, ::2], apart_BK)
    assert log_p_BKV.gather(-1, together_BK[..., None]).isfinite().all()


@pytest.mark.parametrize("width", [20, 512])
def test_chunks_and_batch_shape_change_nothing(monkeypatch, width):
    noise_BKC, log_p_BKV, codebook_VC = problem(600, 512, 8, width)
    whole_BK = flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings())
    blocks_BK = flow_map(noise_BKC.view(20, 30, 8), log_p_BKV.view(20, 30, 512), codebook_VC, FlowSettings())
    assert torch.equal(blocks_BK.view(1, 600), whole_BK)
    for numbers in (1, 512 * 37):
        monkeypatch.setitem(flow._CHUNK_NUMBERS, "cpu", numbers)
        chunked_BK = flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings())
        assert (chunked_BK == whole_BK).float().mean() >= 0.998


def test_unnormalised_log_p_and_autocast_change_nothing():
    noise_BKC, log_p_BKV, codebook_VC = problem(300, 128, 8)
    plain_BK = flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings())
    shifted_BK = flow_map(noise_BKC, log_p_BKV + 5, codebook_VC, FlowSettings())
    assert (shifted_BK == plain_BK).float().mean() >= 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings()), plain_BK)


def test_posterior_mean_carries_gradients():
    x_NC = torch.randn(3, 2, requires_grad=True)
    posterior_mean(x_NC, 0.5, torch.zeros(3, 4), torch.randn(4, 2)).sum().backward()
    assert x_NC.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"solver": "rk4"}, "unknown solver 'rk4'"), ({"num_steps": 0}, "num_steps=0")],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        FlowSettings(**settings)


def test_shapes_that_disagree_are_refused():
    noise_BKC, log_p_BKV, codebook_VC = problem(4, 8, 3)
    for bad in [
        (noise_BKC[..., :2], log_p_BKV, codebook_VC),
        (noise_BKC[:, :3], log_p_BKV, codebook_VC),
        (noise_BKC, log_p_BKV[..., :7], codebook_VC),
    ]:
        with pytest.raises(ValueError, match="of noise, log p, codebook must be"):
            flow_map(*bad, FlowSettings())


@pytest.mark.parametrize("values", [[-math.inf] * 4, [0, math.nan, 0, 0], [0, math.inf, 0, 0]])
def test_rows_that_are_no_distribution_are_refused(values):
    noise_BKC, log_p_BKV, codebook_VC = problem(3, 4, 2)
    log_p_BKV[0, 1] = torch.tensor(values)
    with pytest.raises(ValueError, match="log p has a row"):
        flow_map(noise_BKC, log_p_BKV, codebook_VC, FlowSettings())


@pytest.mark.parametrize("times", [[0.0], [0.1, 1.0], [0.0, 0.5, 0.5], [0.0, 1.2]])
def test_bad_times_are_refused(times):
    noise_BKC, log_p_BKV, codebook_VC = problem(3, 4, 2)
    with pytest.raises(ValueError, match="must ascend from 0 to at most 1"):
        integrate(noise_BKC[0], log_p_BKV[0], codebook_VC, torch.tensor(times))
    with pytest.raises(ValueError, match="unknown solver"):
        integrate(noise_BKC[0], log_p_BKV[0], codebook_VC, torch.tensor([0.0, 1.0]), "rk4")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [None, 300])
def test_cpu_and_gpu_agree(width):
    arguments = problem(500, 4096, 32, width)
    on_gpu = flow_map(*(each.cuda() for each in arguments), FlowSettings()).cpu()
    assert (flow_map(*arguments, FlowSettings()) == on_gpu).float().mean() >= 0.995
