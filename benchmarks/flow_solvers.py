"""How many evaluations of the posterior mean each solver of the flow map needs: two Markdown tables.

Agreement: the share of tokens equal to those of a converged solution, in %. Frequencies: the total variation
between the frequencies of the map's tokens and p, divided by that of as many draws from p itself (1 is
perfect).
Takes about five minutes on one CPU core: `python benchmarks/flow_solvers.py`.

Axis letters: B batch, K rows of one batch, V codebook entries, C code channels.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from distilled_decoding.flow import SOLVERS, FlowSettings, flow_map

EVALUATIONS = (10, 20, 40, 80)
CONVERGED = FlowSettings("heun", 400)
SPREADS = {"flat": 0.1, "peaked": 3.0}


@dataclass(frozen=True)
class Case:
    """A codebook's shape, and how much of it is affordable.

    Attributes:
        vocab_size: codes, V.
        channels: code channels, C.
        rows: rows of different p whose tokens are compared with the converged solution.
        draws: tokens drawn from one p.
        drawn_by: solvers and evaluations with which they are drawn.
    """

    vocab_size: int
    channels: int
    rows: int
    draws: int
    drawn_by: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """The shape, such as 512/8."""
        return f"{self.vocab_size}/{self.channels}"

    def codebook(self) -> Tensor:
        """Return unit codes of 8 channels (LlamaGen), or Gaussian ones (VAR), [V, C]."""
        codebook_VC = torch.randn(self.vocab_size, self.channels)
        return F.normalize(codebook_VC, dim=-1) if self.channels == 8 else codebook_VC


ALL = tuple(product(SOLVERS, EVALUATIONS))
FEW = tuple(("multistep", evaluations) for evaluations in EVALUATIONS[:3])
CASES = (
    Case(256, 8, 3000, 100_000, ALL),
    Case(512, 8, 2000, 100_000, ALL),
    Case(4096, 32, 300, 20_000, FEW),
    Case(16384, 8, 120, 20_000, FEW),
)


def settings_of(solver: str, evaluations: int) -> FlowSettings:
    """Return the settings that spend so many evaluations (Heun: two a step, one in its last)."""
    return FlowSettings(solver, evaluations // 2 if solver == "heun" else evaluations)


def agreements(case: Case, spread: float, top_k: int) -> list[str]:
    """Return the agreement of every solver and count with the converged solution."""
    logits_BKV = torch.randn(1, case.rows, case.vocab_size) * spread
    smallest_BK1 = logits_BKV.topk(top_k).values[..., -1:]
    log_p_BKV = logits_BKV.masked_fill(logits_BKV < smallest_BK1, -math.inf).log_softmax(-1)
    problem = torch.randn(1, case.rows, case.channels), log_p_BKV, case.codebook()
    converged_BK = flow_map(*problem, CONVERGED)
    same = [flow_map(*problem, settings_of(*each)) == converged_BK for each in ALL]
    return [f"{100 * each.float().mean():.1f}" for each in same]


def draw(log_p_V: Tensor, codebook_VC: Tensor, num: int, settings: FlowSettings) -> Tensor:
    """Return tokens of the map for fresh noise, [num]."""
    tokens = []
    for noise_KC in torch.randn(num, codebook_VC.shape[1]).split(2**24 // len(codebook_VC)):
        log_p_BKV = log_p_V.expand(1, len(noise_KC), -1)
        tokens.append(flow_map(noise_KC[None], log_p_BKV, codebook_VC, settings)[0])
    return torch.cat(tokens)


def total_variation(token_N: Tensor, p_V: Tensor) -> float:
    """Return half the absolute difference between frequencies and p."""
    return (token_N.bincount(minlength=len(p_V)) / len(token_N) - p_V).abs().sum().item() / 2


def variation_ratios(case: Case) -> list[str]:
    """Return total variation relative to true draws for every solver and count; empty where not drawn."""
    codebook_VC = case.codebook()
    log_p_V = torch.randn(case.vocab_size).log_softmax(-1)
    p_V = log_p_V.exp()
    true = [total_variation(p_V.multinomial(case.draws, replacement=True), p_V) for _ in range(20)]
    floor = sum(true) / len(true)
    ratios = []
    for each in ALL:
        if each in case.drawn_by:
            token_N = draw(log_p_V, codebook_VC, case.draws, settings_of(*each))
            ratios.append(f"{total_variation(token_N, p_V) / floor:.2f}")
        else:
            ratios.append("")
    return ratios


def print_row(cells: list[str]) -> None:
    """Print one row of a Markdown table."""
    print("| " + " | ".join(cells) + " |", flush=True)


def print_head(first: str) -> None:
    """Print a table's head: one column for every solver and count."""
    print_row([first, *(f"{solver} {evaluations}" for solver, evaluations in ALL)])
    print_row(["---"] * (len(ALL) + 1))


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print_head("agreement, %")
    for case, (name, spread), share in product(CASES, SPREADS.items(), (1, 4)):
        top_k = case.vocab_size // share
        label = f"{case.name} {name}" + (f", top-k {top_k}" if share > 1 else "")
        print_row([label, *agreements(case, spread, top_k)])
    print()
    print_head("total variation ratio")
    for case in CASES:
        print_row([f"{case.name}, {case.draws:,} draws", *variation_ratios(case)])


if __name__ == "__main__":
    main()
