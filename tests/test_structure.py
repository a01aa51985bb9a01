"""Imports run one way, and importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "distilled_decoding"
METHOD = ["blocks", "condition", "noise", "codebook", "flow", "teacher", "trajectories", "store"]
METHOD += [
    "student",
    "losses",
    "optimizer",
    "distill",
    "distill_trajectories",
    "on_policy",
    "distill_tokens",
    "distill_scores",
    "distill_token_scores",
    "sampling",
    "cost",
    "processes",
    "parallel",
    "training_state",
]
FOR_FAMILIES = {"blocks", "condition", "codebook", "teacher", "student", "checkpoint", "families"}


def imported(path: Path) -> set[str]:
    """First-level modules of this package that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("distilled_decoding"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("module", METHOD)
def test_method_knows_no_family_and_nothing_around_it(module: str) -> None:
    assert imported(SOURCE / f"{module}.py") <= {*METHOD, "checkpoint", "processes"}


def test_families_import_only_what_they_build_on() -> None:
    for path in (SOURCE / "families").rglob("*.py"):
        assert imported(path) <= FOR_FAMILIES, path


def test_measuring_builds_on_nothing_that_shows_its_results() -> None:
    for path in (SOURCE / "metrics").glob("*.py"):
        assert imported(path) <= {"checkpoint", "metrics"}, path
    for module in ("baselines", "methods", "evaluate"):
        assert not imported(SOURCE / f"{module}.py") & {
            "report",
            "neighbours",
            "commands",
            "training_command",
            "cli",
        }, module


def test_no_family_is_named_outside_families() -> None:
    for module in METHOD:
        nodes = ast.walk(ast.parse((SOURCE / f"{module}.py").read_text()))
        names = {node.id for node in nodes if isinstance(node, ast.Name)}
        assert not any("llamagen" in name.lower() or name.startswith("VAR") for name in names)


def test_import_changes_no_global_state(tmp_path: Path) -> None:
    code = """
import sys
import torch
before = (torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
import distilled_decoding.cli
after = (torch.initial_seed(), torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
assert before == after
assert not {"transformers", "matplotlib"} & set(sys.modules)  # they take seconds, and few commands need them
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert not list(tmp_path.iterdir())
