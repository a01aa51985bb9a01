import stat
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from distilled_decoding.checkpoint import (
    load_config,
    load_json,
    load_tensors,
    load_training,
    save_json,
    save_tensors,
    save_text,
    save_training,
)


@dataclass(frozen=True)
class Sizes:
    width: int
    levels: tuple[int, ...]


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    train(model, optimizer, steps)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()


def test_training_goes_on_from_disk_as_if_never_stopped(tmp_path: Path) -> None:
    whole, _ = trained(6)
    first, optimizer = trained(4)
    save_training(tmp_path / "state.safetensors", {"model": first}, {"optimizer": optimizer}, 4)
    second, fresh = trained(0)
    assert load_training(tmp_path / "state.safetensors", {"model": second}, {"optimizer": fresh}) == 4
    train(second, fresh, 2)
    assert torch.equal(whole.weight, second.weight)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save_training(tmp_path / "s", {"model": model}, {"optimizer": optimizer}, 1)
    with pytest.raises(ValueError, match=r"shape \(2, 3\), but the config asks for \(2, 4\)"):
        load_training(tmp_path / "s", {"model": nn.Linear(4, 2)}, {})


def test_text_is_utf_8_with_line_ends_as_they_are(tmp_path: Path) -> None:
    save_text(tmp_path / "a", "ä\n\r\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa4\n\r\n"
    (tmp_path / "latin.json").write_bytes(b'"\xe4"')
    with pytest.raises(ValueError, match=r"latin\.json is not valid JSON"):
        load_json(tmp_path / "latin.json")


def test_files_are_whole_readable_by_all_and_leave_no_parts(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a" / "x.safetensors", {"x": torch.arange(3).view(1, 3).mT}, {"step": "7"})
    tensors, metadata = load_tensors(tmp_path / "a" / "x.safetensors")
    assert tensors["x"].tolist() == [[0], [1], [2]] and metadata == {"step": "7"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["x.safetensors"]
    assert stat.S_IMODE((tmp_path / "a" / "x.safetensors").stat().st_mode) == 0o644


def test_configs_are_strict(tmp_path: Path) -> None:
    save_json(tmp_path / "c.json", {"width": 3, "levels": [1, 2]})
    assert load_config(Sizes, tmp_path / "c.json") == Sizes(3, (1, 2))
    save_json(tmp_path / "c.json", {"width": 3, "levels": [1], "colour": "red"})
    with pytest.raises(ValueError, match="colour"):
        load_config(Sizes, tmp_path / "c.json")
    save_json(tmp_path / "c.json", {"width": 3})
    with pytest.raises(ValueError, match="levels"):
        load_config(Sizes, tmp_path / "c.json")


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="broken.json is not valid JSON"):
        load_json(tmp_path / "broken.json")
    for load in (load_json, load_tensors):
        with pytest.raises(ValueError, match="nowhere is missing"):
            load(tmp_path / "nowhere")
