"""What moves the weights: AdamW, and Muon on the matrices of layers where it is asked for."""

import torch
from torch import Tensor, nn

from distilled_decoding.parallel import layers_of


class Optimizer:
    """AdamW (Loshchilov & Hutter 2019), and on the matrices of layers Muon (Jordan et al. 2024): all moments at zero.

    Muon moves a matrix by its orthogonalised momentum, scaled so that one learning rate suits both.

    Args:
        network: its parameters that require a gradient are learnt; layers are what lies in a `ModuleList`.
        weight_decay: on matrices only; it spares vectors (norms, biases).
        muon_rate: learning rate of Muon, in units of AdamW's; 0 leaves the layers to AdamW.
    """

    def __init__(self, network: nn.Module, weight_decay: float, muon_rate: float) -> None:
        self._learnt = {name: p for name, p in network.named_parameters() if p.requires_grad}
        in_layers = {p for layer in layers_of(network) for p in layer.parameters() if p.ndim == 2}
        by_muon = [p for p in self._learnt.values() if muon_rate > 0 and p in in_layers]
        others = [p for p in self._learnt.values() if muon_rate == 0 or p not in in_layers]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self._rates: dict[torch.optim.Optimizer, float] = {torch.optim.AdamW(groups, betas=(0.9, 0.95)): 1.0}
        if by_muon:
            muon = torch.optim.Muon(by_muon, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            self._rates[muon] = muon_rate
        self._states: dict[nn.Parameter, dict[str, Tensor]] = {}
        for optimizer in self._rates:
            for p in [p for group in optimizer.param_groups for p in group["params"]]:
                kept = ("momentum_buffer",) if isinstance(optimizer, torch.optim.Muon) else ("exp_avg", "exp_avg_sq")
                optimizer.state[p] = {name: torch.zeros_like(p, requires_grad=False) for name in kept}
                if isinstance(optimizer, torch.optim.AdamW):
                    optimizer.state[p]["step"] = torch.tensor(0.0)
                self._states[p] = optimizer.state[p]

    def step(self, learning_rate: float) -> None:
        """Follow the gradients."""
        for optimizer, rate in self._rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, by name; the tensors themselves."""
        return {
            f"{name}/{field}": value for name, p in self._learnt.items() for field, value in self._states[p].items()
        }
