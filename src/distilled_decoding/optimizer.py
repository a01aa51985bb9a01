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

    Raises:
        ValueError: torch is too old for Muon.
    """

    def __init__(self, network: nn.Module, weight_decay: float, muon_rate: float) -> None:
        self._learnt = {name: p for name, p in network.named_parameters() if p.requires_grad}
        matrices = {p for layer in layers_of(network) for p in layer.parameters() if p.ndim == 2}
        hidden = [p for p in self._learnt.values() if muon_rate > 0 and p in matrices]
        others = [p for p in self._learnt.values() if muon_rate == 0 or p not in matrices]
        groups = [
            {"params": [p for p in others if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        for p in others:
            adamw.state[p] = {"step": torch.tensor(0.0), "exp_avg": _zeros(p), "exp_avg_sq": _zeros(p)}
        self._rates: dict[torch.optim.Optimizer, float] = {adamw: 1.0}
        if hidden:
            if not hasattr(torch.optim, "Muon"):
                raise ValueError(f"a muon_rate of {muon_rate} needs torch 2.9, this is {torch.__version__}; give 0")
            muon = torch.optim.Muon(hidden, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
            for p in hidden:
                muon.state[p] = {"momentum_buffer": _zeros(p)}
            self._rates[muon] = muon_rate

    def step(self, learning_rate: float) -> None:
        """Follow the gradients."""
        for optimizer, rate in self._rates.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * learning_rate
            optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything that changes, by name; the tensors themselves."""
        states = {p: state for optimizer in self._rates for p, state in optimizer.state.items()}
        return {f"{name}/{field}": value for name, p in self._learnt.items() for field, value in states[p].items()}


def _zeros(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter, requires_grad=False)
