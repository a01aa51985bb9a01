"""Fréchet distance between two sets of images: how far apart Gaussians fitted to their features are.

Everything is float64 and features arrive batch after batch, so the statistics do not depend on how the images
were batched, and no more than one batch is in memory.

Axis letters: B batch, D feature width.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distilled_decoding.checkpoint import load_tensors, save_tensors


@dataclass(frozen=True, eq=False)
class Statistics:
    """The Gaussian of a set of images.

    Attributes:
        count: number of images.
        mean_D: mean feature, float64 [D].
        covariance_DD: unbiased covariance of the features, float64 [D, D].
        extractor: fingerprint of the network that made the features; only equal ones can be compared.
        images: what the images are, in words.
    """

    count: int
    mean_D: Tensor
    covariance_DD: Tensor
    extractor: str
    images: str

    def save(self, path: Path) -> None:
        """Write a safetensors file that names the extractor and the images in its metadata."""
        metadata = {"count": str(self.count), "extractor": self.extractor, "images": self.images}
        save_tensors(path, {"mean_D": self.mean_D, "covariance_DD": self.covariance_DD}, metadata)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, damaged, or holds something else.
        """
        tensors, metadata = load_tensors(path)
        if set(tensors) != {"mean_D", "covariance_DD"} or not {"count", "extractor", "images"} <= set(metadata):
            raise ValueError(f"{path} holds no feature statistics (found {', '.join(sorted(tensors))})")
        return cls(int(metadata["count"]), **tensors, extractor=metadata["extractor"], images=metadata["images"])


class Accumulator:
    """Gathers the statistics of a set of images from batches of their features.

    Batches are merged by mean and centred scatter (Chan, Golub and LeVeque 1979), which loses no digits when
    the mean is large against the spread.
    """

    def __init__(self, extractor: str, images: str) -> None:
        self.extractor = extractor
        self.images = images
        self.count = 0
        self._mean_D = torch.zeros(())
        self._scatter_DD = torch.zeros(())

    def update(self, feature_BD: Tensor) -> None:
        """Add a batch of features, [B, D] of any float type and device."""
        feature_BD = feature_BD.detach().cpu().double()
        num, total = len(feature_BD), self.count + len(feature_BD)
        mean_D = feature_BD.mean(0)
        centred_BD = feature_BD - mean_D
        shift_D = mean_D - self._mean_D
        between_DD = torch.outer(shift_D, shift_D) * (self.count * num / total)
        self._scatter_DD = self._scatter_DD + centred_BD.T @ centred_BD + between_DD
        self._mean_D = self._mean_D + shift_D * (num / total)
        self.count = total

    def statistics(self) -> Statistics:
        """The statistics of all images so far.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count} of {self.images}")
        covariance_DD = self._scatter_DD / (self.count - 1)
        return Statistics(self.count, self._mean_D, covariance_DD, self.extractor, self.images)


def check_comparable(a: Statistics, b: Statistics) -> None:
    """Refuse a comparison that would mean nothing.

    Raises:
        ValueError: other extractors, other widths, or fewer than two images.
    """
    if a.extractor != b.extractor:
        raise ValueError(
            f"{a.images!r} was measured with extractor {a.extractor}, {b.images!r} with {b.extractor}; "
            "measure both with the same one"
        )
    if a.mean_D.shape != b.mean_D.shape:
        raise ValueError(
            f"{a.images!r} has {len(a.mean_D)} features, {b.images!r} has {len(b.mean_D)}; "
            "measure both with the same extractor"
        )
    for one in (a, b):
        if one.count < 2:
            raise ValueError(f"{one.images!r} has {one.count} images; a distance needs at least 2")


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mean_a - mean_b|^2 + trace(S_a + S_b - 2 (S_a S_b)^(1/2)), squared feature units, never negative.

    The trace of the root is the sum of the roots of the eigenvalues of S_a^(1/2) S_b S_a^(1/2), which is
    symmetric: two eigendecompositions, no matrix root that may turn complex.

    Raises:
        ValueError: the two cannot be compared, see `check_comparable`.
    """
    check_comparable(a, b)
    value_D, vector_DD = torch.linalg.eigh(a.covariance_DD)
    root_DD = (vector_DD * value_D.clamp(min=0).sqrt()) @ vector_DD.T
    product_DD = root_DD @ b.covariance_DD @ root_DD
    eigenvalue_D = torch.linalg.eigvalsh((product_DD + product_DD.T) / 2).clamp(min=0)
    mean = (a.mean_D - b.mean_D).square().sum()
    traces = a.covariance_DD.trace() + b.covariance_DD.trace()
    # Rounding alone can push the distance of equal sets below zero.
    return max(0.0, (mean + traces - 2 * eigenvalue_D.sqrt().sum()).item())
