"""Does a picture show what it was asked for by name: a small network that retrieves names, and the share it finds.

Axis letters: B batch, C image channels, H W image, D embedding, V names, K candidates.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.checkpoint import load_component, load_config
from distilled_decoding.metrics.features import Stage

CANDIDATES = 100
"""A picture's right name competes with this many less one."""


@dataclass(frozen=True)
class RetrieverConfig:
    """Sizes of the network, and what it knows by name.

    Attributes:
        names: lower case, each once.
        image_channels: of the pictures.
        widths: channels of each stage; every stage halves the picture.
        embedding: dimensions in which pictures and names are compared.

    Raises:
        ValueError: too few names, or one twice.
    """

    names: tuple[str, ...]
    image_channels: int = 3
    widths: tuple[int, ...] = (32, 64, 96)
    embedding: int = 128

    def __post_init__(self) -> None:
        if len(self.names) < CANDIDATES or len(set(self.names)) < len(self.names):
            raise ValueError(f"a retriever needs {CANDIDATES} names or more, each once, got {len(self.names)}")


class Retriever(nn.Module):
    """A small residual network that puts pictures where their names are, on the unit sphere."""

    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        self.config = config
        first, *_ = config.widths
        self.stem = nn.Conv2d(config.image_channels, first, 3, padding=1)
        widths = zip((first, *config.widths), config.widths, strict=False)
        self.stages = nn.Sequential(*(Stage(before, after, 2) for before, after in widths))
        self.head = nn.Linear(config.widths[-1], config.embedding)
        self.names = nn.Parameter(F.normalize(torch.randn(len(config.names), config.embedding), dim=1))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    @property
    def name_VD(self) -> Tensor:
        """The unit vector of every name."""
        return F.normalize(self.names, dim=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """The unit vectors [B, D] of pictures in [-1, 1]."""
        return F.normalize(self.head(self.stages(self.stem(image_BCHW)).mean((2, 3))), dim=1)

    def logits_BV(self, image_BCHW: Tensor) -> Tensor:
        """The cosine of every picture and name over a learned temperature: what cross-entropy trains."""
        return self.log_scale.exp() * self(image_BCHW) @ self.name_VD.T

    def numbers(self, prompts: Sequence[str]) -> Tensor:
        """The number of each prompt's name, int64, -1 for none; behind a name and a comma more may come, as a style."""
        number = {name: i for i, name in enumerate(self.config.names)}

        def of(prompt: str) -> int:
            while prompt and prompt not in number:
                prompt = prompt.rpartition(",")[0]
            return number.get(prompt, -1)

        return torch.tensor([of(prompt) for prompt in prompts], dtype=torch.int64)


def load_retriever(folder: Path) -> Retriever:
    """A retriever from `config.json` and `model.safetensors`, ready for evaluation.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the config.
    """
    model = Retriever(load_config(RetrieverConfig, folder / "config.json"))
    load_component(folder, model)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Judge:
    """Says which pictures show what their prompts name.

    Attributes:
        retriever: in evaluation mode, on any device.
        name_N: number of each prompt's name, -1 where the retriever knows none.
        real: the share of real pictures of these prompts of which it says so.
    """

    retriever: Retriever
    name_N: Tensor
    real: float | None

    def aligned(self, image_BCHW: Tensor, number_B: Tensor) -> Tensor:
        """See the function `aligned`, of pictures of the prompts of these numbers."""
        return aligned(self.retriever, image_BCHW, self.name_N[number_B])


def aligned(retriever: Retriever, image_BCHW: Tensor, name_B: Tensor) -> Tensor:
    """Which pictures' right names score best among 100: themselves and 99 others, always the same ones.

    Args:
        retriever: in evaluation mode, on any device.
        image_BCHW: uint8 images.
        name_B: number of the name that each should show; -1 where there is none.

    Returns:
        bool [M] on the CPU, of the M pictures that have a name.
    """
    num_names, device = len(retriever.config.names), retriever.names.device
    image_MCHW, name_M = image_BCHW.cpu()[name_B >= 0].to(device), name_B[name_B >= 0].to(device)
    # Every name meets those at the same random distances from it in the list: its own others, and each equally often.
    distances = sorted(range(1, num_names), key=lambda distance: sha256(f"{distance}".encode()).digest())
    distance_K = torch.tensor(distances[: CANDIDATES - 1], device=device)
    with torch.no_grad():
        cosine_MV = retriever(image_MCHW.float() / 127.5 - 1) @ retriever.name_VD.T
    other_MK = cosine_MV.gather(1, (name_M[:, None] + distance_K) % num_names)
    return (cosine_MV.gather(1, name_M[:, None]) > other_MK).all(1).cpu()


def alignment(retriever: Retriever, images: Iterable[Tensor], name_N: Tensor) -> float | None:
    """The share of pictures whose right name scores best among 100, see `aligned`.

    Args:
        retriever: in evaluation mode.
        images: batches of uint8 images; never more than one is held.
        name_N: number of each picture's name, -1 where it has none: such pictures are left out.

    Returns:
        the share, None when no picture has a name.
    """
    first, found = 0, []
    for image_BCHW in images:
        found.append(aligned(retriever, image_BCHW, name_N[first : first + len(image_BCHW)]))
        first += len(image_BCHW)
    return share(found)


def share(found: Sequence[Tensor]) -> float | None:
    """The share of true values in batches [M]; None when there are none at all."""
    return torch.cat(list(found)).double().mean().item() if sum(map(len, found)) else None
