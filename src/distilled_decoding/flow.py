"""The flow map: Gaussian noise to a token, deterministic and exact in distribution (docs/method.md 1).

A straight path x_s = (1 - s) e + s c runs from noise e at time s = 0 to a code c at s = 1. Its probability
flow sends N(0, I) onto the teacher's distribution over codes, so each noise vector determines one token, and
the tokens are distributed as the teacher samples them.

The posterior mean is attention over the codebook: |x|^2 cancels in Eq. 1, which leaves the query x s/(1-s)^2,
the codes as keys and values, and the mask log p. |c|^2 rides along as one more key channel.

Axis letters: B batch, K tokens in a block, N rows (B x K), V codebook entries, C code channels,
E key channels, R points of a row, W codes that survive truncation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

SOLVERS = ("euler", "heun", "multistep")

# The expected code [N, C] at points x [N, C] and a time.
Mean = Callable[[Tensor, float], Tensor]

# Attention kernels for float32 on the GPU want a multiple of this many channels.
_KEY_ALIGNMENT = 4
# Numbers held by one chunk of rows (its mask, or its gathered keys): a CPU's cache, a GPU's launch costs.
_CHUNK_NUMBERS = {"cpu": 2**21, "cuda": 2**26}
# CUDA attention takes at most 65535 sequences, and a gathered row is a sequence.
_CHUNK_ROWS = 2**15
# A shared code is read once for many rows, a gathered one for its row alone, so gathering pays only below
# this share of V (measured: break-even between 1/8 and 1/4 on a CPU).
_GATHER_SHARE = 1 / 8


@dataclass(frozen=True)
class FlowSettings:
    """How the flow is solved. All trajectories of one student must use the same settings.

    Attributes:
        solver: `multistep` (second order, one evaluation a step), `heun` (second order, two) or `euler`.
        num_steps: uniform steps of time from 0 to 1.

    Raises:
        ValueError: when the solver is unknown or there is no step.
    """

    solver: str = "multistep"
    num_steps: int = 40

    def __post_init__(self) -> None:
        _check_solver(self.solver)
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} solves nothing; use at least 1")


@torch.no_grad()
def flow_map(noise_BKC: Tensor, log_p_BKV: Tensor, codebook_VC: Tensor, settings: FlowSettings) -> Tensor:
    """Map noise to tokens distributed as p (Eq. 4).

    Codes with p = 0 never come out. Where truncation leaves few codes they are gathered first, and the map
    costs what survives, not V. Rows are mapped in chunks, so that memory stays bounded. Two codes nearer to
    each other than about 4 / num_steps are not told apart: only the sum of their frequencies is right.

    Args:
        noise_BKC: standard normal, [B, K, C].
        log_p_BKV: log probabilities, normalised or not, [B, K, V]; -inf drops a code.
        codebook_VC: the codes, [V, C].
        settings: the solver and its steps.

    Returns:
        token_BK, int64 [B, K].

    Raises:
        ValueError: when the shapes disagree, or a row holds nan, +inf or only -inf.
    """
    vocab_size, channels = codebook_VC.shape
    if noise_BKC.shape[2:] != (channels,) or log_p_BKV.shape != (*noise_BKC.shape[:2], vocab_size):
        shapes = ", ".join(str(tuple(each.shape)) for each in (noise_BKC, log_p_BKV, codebook_VC))
        raise ValueError(f"shapes {shapes} of noise, log p, codebook must be [B, K, C], [B, K, V], [V, C]")
    if not log_p_BKV.amax(-1).isfinite().all():
        raise ValueError("log p has a row that holds nan or +inf or only -inf; leave a code in every row")
    width = int((log_p_BKV > -math.inf).sum(-1).max())
    if width > _GATHER_SHARE * vocab_size:
        return full_flow_map(noise_BKC, log_p_BKV, codebook_VC, settings)
    map_rows = partial(_map_gathered, codebook_VC=codebook_VC, settings=settings, width=width)
    return _in_chunks(map_rows, noise_BKC, log_p_BKV, width * (channels + 1))


@torch.no_grad()
def full_flow_map(noise_BKC: Tensor, log_p_BKV: Tensor, codebook_VC: Tensor, settings: FlowSettings) -> Tensor:
    """`flow_map` among all codes and unchecked: shapes alone say what is computed, so that it can be compiled."""
    map_rows = partial(_map_rows, codebook=codebook_VC, settings=settings)
    return _in_chunks(map_rows, noise_BKC, log_p_BKV, len(codebook_VC))


def integrate(
    noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor, times: Tensor, solver: str = "multistep"
) -> Tensor:
    """Solve the flow from noise (Eq. 4).

    Args:
        noise_NC: where to begin, [N, C].
        log_p_NV: log probabilities, [N, V]; no row may be -inf throughout.
        codebook_VC: the codes, [V, C], or those of each row, [N, V, C].
        times: [steps + 1], ascending from 0 to at most 1.
        solver: one of `SOLVERS`. A step that ends at time 1 is first order and lands on the expected code.

    Returns:
        x_NC at the last time, float32.

    Raises:
        ValueError: when the solver is unknown or the times do not ascend from 0 within [0, 1].
    """
    _check_solver(solver)
    time_list = times.tolist()
    if len(time_list) < 2 or time_list[0] != 0 or time_list[-1] > 1 or (times.diff() <= 0).any():
        raise ValueError(f"times {time_list} must ascend from 0 to at most 1")
    return _SOLVE[solver](_Posterior(log_p_NV, codebook_VC).mean, noise_NC.float(), time_list)


def posterior_mean(x_NC: Tensor, time: float, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """Return the code to expect at the end of the path through x (Eq. 1, 2).

    Args:
        x_NC: points on the path, [N, C].
        time: flow time, in [0, 1).
        log_p_NV: log probabilities, [N, V]; no row may be -inf throughout.
        codebook_VC: the codes, [V, C], or those of each row, [N, V, C].

    Returns:
        mean_NC, float32 [N, C].
    """
    return _Posterior(log_p_NV, codebook_VC).mean(x_NC.float(), time)


def posterior_means(x_NRC: Tensor, time_NR: Tensor, log_p_NV: Tensor, codebook_VC: Tensor) -> Tensor:
    """Return the expected code at several points of each row, each at a time of its own (Eq. 1, 2).

    Rows are taken in chunks, so that memory stays bounded.

    Args:
        x_NRC: R points for each row, [N, R, C].
        time_NR: flow times, in [0, 1).
        log_p_NV: see `posterior_mean`.
        codebook_VC: the codes, [V, C].

    Returns:
        mean_NRC, float32 [N, R, C].
    """
    num_rows = _rows_per_chunk(len(codebook_VC), x_NRC.device)
    means = []
    for x_KRC, time_KR, log_p_KV in zip(*(each.split(num_rows) for each in (x_NRC, time_NR, log_p_NV)), strict=True):
        posterior = _Posterior(log_p_KV, codebook_VC)
        points = zip(x_KRC.float().unbind(1), time_KR.split(1, 1), strict=True)
        means.append(torch.stack([posterior.mean(x_KC, time_K1) for x_KC, time_K1 in points], 1))
    return torch.cat(means)


def log_density_ratios(
    x_NRC: Tensor, time_NR: Tensor, log_p_NV: Tensor, log_q_NV: Tensor, codebook_VC: Tensor
) -> Tensor:
    """Return how much denser the path of p is than that of q at several points of each row, as logarithms (Eq. 1).

    For the arguments see `posterior_means`; `log_q_NV` is as `log_p_NV`.

    Returns:
        float32 [N, R].
    """
    num_rows = _rows_per_chunk(len(codebook_VC), x_NRC.device)
    ratios = []
    rows = (each.split(num_rows) for each in (x_NRC, time_NR, log_p_NV, log_q_NV))
    for x_KRC, time_KR, *log_KV in zip(*rows, strict=True):
        one, other = (_Posterior(each, codebook_VC) for each in log_KV)
        points = zip(x_KRC.float().unbind(1), time_KR.split(1, 1), strict=True)
        ratios.append(torch.stack([one.log_mass(*point) - other.log_mass(*point) for point in points], 1))
    return torch.cat(ratios)


def velocity(x_NC: Tensor, time: float, mean_NC: Tensor) -> Tensor:
    """Return the velocity of the flow at x, given the expected code there (Eq. 3), [N, C]."""
    return (mean_NC - x_NC) / (1 - time)


class _Posterior:
    """The posterior over codes for fixed p: keys and mask are built once and serve every time."""

    def __init__(self, log_p_NV: Tensor, codebook: Tensor) -> None:
        """Take log p [N, V] and a codebook [V, C], or one for each row [N, V, C]."""
        self.channels = codebook.shape[-1]
        code = codebook.float()
        key = torch.cat([code, code.square().sum(-1, keepdim=True)], dim=-1)
        key = F.pad(key, (0, -key.shape[-1] % _KEY_ALIGNMENT))
        # A shared codebook is one sequence of N queries; gathered codes are N sequences of one query.
        self.shared = codebook.dim() == 2
        self.key = key[None, None] if self.shared else key[:, None]
        self.mask = self._spread(log_p_NV.float())

    def mean(self, x_NC: Tensor, time: float | Tensor) -> Tensor:
        """Return the expected code [N, C] at one time, or at each row's own, [N, 1] (Eq. 1, 2)."""
        query = self._query_at(x_NC, time)
        # Autocast would round the operands to 16 bits, which changes tokens.
        with torch.autocast(query.device.type, enabled=False):
            mean = F.scaled_dot_product_attention(query, self.key, self.key, attn_mask=self.mask, scale=1.0)
        return mean.view(len(x_NC), -1)[:, : self.channels]

    def log_mass(self, x_NC: Tensor, time: Tensor) -> Tensor:
        """Return the log density at x [N], but for a summand that depends on x and time alone."""
        with torch.autocast(x_NC.device.type, enabled=False):
            return (self._query_at(x_NC, time) @ self.key.mT + self.mask).logsumexp(-1).view(-1)

    def nearest(self, x_NC: Tensor) -> Tensor:
        """Return the nearest code with p > 0, int64 [N]."""
        with torch.autocast(x_NC.device.type, enabled=False):
            score = self._query(x_NC, -0.5) @ self.key.mT
        return score.masked_fill(self.mask == -math.inf, -math.inf).argmax(-1).view(-1)

    def _query_at(self, x_NC: Tensor, time: float | Tensor) -> Tensor:
        """Return queries whose products with keys are the log densities of the codes' Gaussians, but for a summand."""
        scale = time / (1 - time) ** 2
        return self._query(x_NC * scale, -scale * time / 2)

    def _query(self, x_NC: Tensor, norm_weight: float | Tensor) -> Tensor:
        """Return queries that weigh the |c|^2 channel by `norm_weight`, one or [N, 1], and the padding by 0."""
        weight_N1 = norm_weight if isinstance(norm_weight, Tensor) else x_NC.new_full((len(x_NC), 1), norm_weight)
        query_NE = F.pad(torch.cat([x_NC, weight_N1], 1), (0, self.key.shape[-1] - self.channels - 1))
        return self._spread(query_NE)

    def _spread(self, rows: Tensor) -> Tensor:
        """Return rows [N, ...] in attention's layout of batch, head, query, channel."""
        return rows[None, None] if self.shared else rows[:, None, None]


def _rows_per_chunk(numbers_per_row: int, device: torch.device) -> int:
    """Return how many rows to map at once."""
    numbers = _CHUNK_NUMBERS["cpu" if device.type == "cpu" else "cuda"]
    return min(max(1, numbers // numbers_per_row), _CHUNK_ROWS)


def _in_chunks(
    map_rows: Callable[[Tensor, Tensor], Tensor], noise_BKC: Tensor, log_p_BKV: Tensor, numbers_per_row: int
) -> Tensor:
    """Return token_BK, some rows at a time."""
    num_rows = _rows_per_chunk(numbers_per_row, noise_BKC.device)
    chunks = zip(noise_BKC.flatten(0, 1).split(num_rows), log_p_BKV.flatten(0, 1).split(num_rows), strict=True)
    return torch.cat([map_rows(*chunk) for chunk in chunks]).view(noise_BKC.shape[:2])


def _map_rows(noise_NC: Tensor, log_p_NV: Tensor, codebook: Tensor, settings: FlowSettings) -> Tensor:
    """Return the token of each row, int64 [N], among a codebook [V, C] or the row's own [N, V, C]."""
    times = [number / settings.num_steps for number in range(settings.num_steps + 1)]
    posterior = _Posterior(log_p_NV, codebook)
    return posterior.nearest(_SOLVE[settings.solver](posterior.mean, noise_NC.float(), times))


def _map_gathered(
    noise_NC: Tensor, log_p_NV: Tensor, codebook_VC: Tensor, settings: FlowSettings, width: int
) -> Tensor:
    """Return the token of each row, int64 [N], among the row's own `width` likeliest codes."""
    log_p_NW, token_NW = log_p_NV.topk(width, sorted=False)
    choice_N = _map_rows(noise_NC, log_p_NW, codebook_VC[token_NW], settings)
    return token_NW.gather(1, choice_N[:, None])[:, 0]


def _step(x_NC: Tensor, mean_NC: Tensor, time: float, next_time: float) -> Tensor:
    """Return x after a first-order step, exact while the expected code stays the same."""
    return mean_NC.lerp(x_NC, (1 - next_time) / (1 - time))


def _euler(mean: Mean, x_NC: Tensor, times: list[float]) -> Tensor:
    for time, next_time in pairwise(times):
        x_NC = _step(x_NC, mean(x_NC, time), time, next_time)
    return x_NC


def _heun(mean: Mean, x_NC: Tensor, times: list[float]) -> Tensor:
    for time, next_time in pairwise(times):
        mean_NC = mean(x_NC, time)
        next_NC = _step(x_NC, mean_NC, time, next_time)
        if next_time < 1:
            before_NC = velocity(x_NC, time, mean_NC)
            after_NC = velocity(next_NC, next_time, mean(next_NC, next_time))
            next_NC = x_NC + (before_NC + after_NC) * ((next_time - time) / 2)
        x_NC = next_NC
    return x_NC


def _multistep(mean: Mean, x_NC: Tensor, times: list[float]) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, in u = -log(1 - s): the expected code is extrapolated half a step."""
    last_NC, last_width = None, 0.0
    for time, next_time in pairwise(times):
        mean_NC = mean(x_NC, time)
        target_NC = mean_NC
        if next_time < 1:
            width = math.log((1 - time) / (1 - next_time))
            if last_NC is not None:
                target_NC = mean_NC + (mean_NC - last_NC) * (width / (2 * last_width))
            last_NC, last_width = mean_NC, width
        x_NC = _step(x_NC, target_NC, time, next_time)
    return x_NC


_SOLVE: dict[str, Callable[[Mean, Tensor, list[float]], Tensor]] = {
    "euler": _euler,
    "heun": _heun,
    "multistep": _multistep,
}


def _check_solver(solver: str) -> None:
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; use one of {', '.join(SOLVERS)}")
