import pytest
import torch
from torch import Tensor, nn

from distilled_decoding.optimizer import Optimizer


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 24)])
    return nn.ModuleDict({"layers": layers, "head": nn.Linear(24, 5)})


def moved(muon_rate: float, learning_rate: float = 1e-2, steps: int = 1) -> dict[str, Tensor]:
    model = network()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, weight_decay=0.0, muon_rate=muon_rate)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(learning_rate)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def test_muon_moves_matrices_of_layers_equally_in_all_directions_and_adamw_all_else_by_sign() -> None:
    change = moved(muon_rate=3.0)
    for name, rows in (("layers.0.weight", 12), ("layers.1.weight", 24)):
        usual = 3.0 * 1e-2 * 0.2 * rows**0.5
        singular_D = torch.linalg.svdvals(change[name]) / usual
        assert singular_D.min() > 0.5 and singular_D.max() < 1.5, singular_D
    for name in ("layers.0.bias", "head.weight", "head.bias"):
        torch.testing.assert_close(change[name].abs(), torch.full_like(change[name], 1e-2), rtol=1e-4, atol=0)


def test_the_rate_is_a_multiple_of_the_others() -> None:
    once, thrice = moved(muon_rate=1.0), moved(muon_rate=3.0)
    torch.testing.assert_close(3 * once["layers.0.weight"], thrice["layers.0.weight"], rtol=1e-4, atol=1e-7)
    assert torch.equal(once["head.weight"], thrice["head.weight"])


def test_without_muon_all_is_adamws() -> None:
    model = network()
    plain = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        plain.step()
    for name, change in moved(muon_rate=0.0, steps=3).items():
        torch.testing.assert_close(change, dict(model.named_parameters())[name].detach() - before[name])


@pytest.mark.parametrize("muon_rate", [0.0, 2.0])
def test_all_that_changes_is_in_the_state(muon_rate: float) -> None:
    model = network()
    optimizer = Optimizer(model, weight_decay=0.1, muon_rate=muon_rate)
    names = {name: value.clone() for name, value in optimizer.state().items()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-2)
    assert {name for name, value in optimizer.state().items() if not torch.equal(value, names[name])} == set(names)
    muon = {name.split("/")[0] for name in names if name.endswith("momentum_buffer")}
    assert muon == ({"layers.0.weight", "layers.1.weight"} if muon_rate else set())


def test_a_torch_without_muon_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="a muon_rate of 3.0 needs torch 2.9"):
        Optimizer(network(), weight_decay=0.0, muon_rate=3.0)
    Optimizer(network(), weight_decay=0.0, muon_rate=0.0)
