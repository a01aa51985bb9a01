"""Reference data in tests/goldens: what the public code computed, in float32 with tiny random weights."""

import hashlib
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from distilled_decoding.student import StudentOutput

FOLDER = Path(__file__).parent / "goldens"


@dataclass(frozen=True)
class Case:
    """One run of the reference: configuration, tensors in and out, weights by role, and tolerance."""

    config: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    weights: dict[str, dict[str, Tensor]]
    rtol: float
    atol: float

    def check(self, name: str, actual: Tensor, leading: bool = False) -> None:
        """Compare with an output of the reference, or, if `leading`, with as many of its tokens as there are."""
        expected = self.outputs[name][:, : actual.shape[1]] if leading else self.outputs[name]
        if expected.dtype.is_floating_point:
            torch.testing.assert_close(actual, expected, rtol=self.rtol, atol=self.atol, msg=lambda m: f"{name}: {m}")
        else:
            assert torch.equal(actual, expected), name


def pass_known(output: StudentOutput, code_BLC: Tensor, token_BL: Tensor, known_BL: Tensor) -> StudentOutput:
    """The reference's rule for what is known: it stays as the code, and its nearest token is certain in the logits."""
    other_BLV = torch.arange(output.logits_BLV.shape[-1]) != token_BL[..., None]
    certain_BLV = torch.zeros_like(output.logits_BLV).masked_fill(other_BLV, -math.inf)
    known_BL1 = known_BL[..., None]
    return StudentOutput(
        logits_BLV=torch.where(known_BL1, certain_BLV, output.logits_BLV),
        code_BLC=torch.where(known_BL1, code_BLC, output.code_BLC),
    )


def load_case(name: str) -> Case:
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    entry = manifest["cases"][name]
    tensors = load_file(FOLDER / entry["file"])
    weights = {role: _load_weights(manifest["weights"][of]) for role, of in entry["weights"].items()}
    tolerance = entry["suggested_tolerance"]
    inputs, outputs = _with_prefix(tensors, "in."), _with_prefix(tensors, "out.")
    return Case(entry["config"], inputs, outputs, weights, tolerance["rtol"], tolerance["atol"])


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _load_weights(entry: dict[str, Any]) -> dict[str, Tensor]:
    if not entry.get("generated"):
        return load_file(FOLDER / entry["file"])
    rule = json.loads((FOLDER / entry["file"]).read_text())
    # What is marked as a buffer is as any model builds it.
    tensors = {key: spec for key, spec in rule["tensors"].items() if not spec.get("buffer")}
    return {key: _generate(key, rule["seed"], **spec) for key, spec in tensors.items()}


def _generate(key: str, seed: int, shape: list[int], mean: float, std: float, sha256_16: str) -> Tensor:
    """The rule that `*.genweights.json` states in words, so that large tensors need not be stored."""
    random = np.random.RandomState((seed ^ zlib.crc32(key.encode())) & 0xFFFFFFFF)
    value = (mean + std * random.standard_normal(int(np.prod(shape)))).astype("<f4")
    assert hashlib.sha256(value.tobytes()).hexdigest()[:16] == sha256_16, key
    return torch.from_numpy(value).reshape(shape)
