"""State dicts as their publishers wrote them: what names and shapes tell, before any module is made."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

IGNORED = {
    "lvl_1L": "VAR: the level of each position, which follows from the sizes",
    "attn_bias_for_masking": "VAR: the attention mask, which follows from the sizes",
    "zero_k_bias": "VAR: the keys' bias, always zero",
    "ema_vocab_hit_SV": "VAR's tokenizer: how often codes were used in training",
    "codebook_used": "LlamaGen's tokenizer: which codes were used in training",
    "freqs_cis": "LlamaGen: the table of rotations, which follows from the sizes",
}
"""Last part of the names of what published files hold and no model of ours reads, and why."""


class Published(Mapping[str, Tensor]):
    """A state dict under its publisher's names.

    Args:
        weights: the tensors.
        source: the file, for errors.
    """

    def __init__(self, weights: Mapping[str, Tensor], source: object) -> None:
        self.weights = weights
        self.source = source

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def holds(self, pattern: str) -> bool:
        """Whether a name begins like this regular expression."""
        return any(re.match(pattern, name) for name in self)

    def count(self, prefix: str) -> int:
        """How many modules are numbered behind a prefix, as in `blocks.0`, `blocks.1` ..."""
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in self)
        return 1 + max((int(number[1]) for number in found if number), default=-1)

    def size(self, name: str, dim: int) -> int:
        """One dimension of a tensor that the file must hold.

        Raises:
            ValueError: it does not, or has fewer dimensions.
        """
        if name not in self:
            raise ValueError(f"{self.source} lacks {name!r}, from which its sizes would be told")
        shape = tuple(self[name].shape)
        if dim >= len(shape):
            raise ValueError(f"{self.source}: {name!r} has shape {shape}, which is too few dimensions")
        return shape[dim]


@dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: a tensor of the file, or one of `parts` equal pieces of it along its first axis."""

    name: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class PublishedNames:
    """How a family's publishers name its parameters.

    Attributes:
        component: which component a state dict is, None when it is nothing of this family.
        sizes: fields of its config, or properties of it, as far as names and shapes tell them.
        origin: where a parameter comes from, by our name for it and its component's config.
    """

    component: Callable[[Published], str | None]
    sizes: Callable[[Published], dict[str, Any]]
    origin: Callable[[str, Any], Origin]


def load_published(module: nn.Module, published: Published, names: PublishedNames) -> None:
    """Give a component the tensors of a published file, strictly; one on the meta device takes them as they are.

    Raises:
        ValueError: names the first missing, extra or mis-shaped key of the file.
    """
    tensors, used = {}, set()
    for name, own in module.state_dict().items():
        origin = names.origin(name, module.config)
        if origin.name not in published:
            raise ValueError(f"{published.source} lacks {origin.name!r}")
        value, expected = published[origin.name], (origin.parts * len(own), *own.shape[1:])
        if tuple(value.shape) != expected:
            raise ValueError(f"{published.source}: {origin.name!r} has shape {tuple(value.shape)}, not {expected}")
        tensors[name] = value.chunk(origin.parts)[origin.part].float()
        used.add(origin.name)
    for name in published:
        if name not in used and name.split(".")[-1] not in IGNORED:
            raise ValueError(f"{published.source} also holds {name!r}, which does not belong there")
    module.load_state_dict(tensors, strict=True, assign=any(p.is_meta for p in module.parameters()))
