"""Fréchet distance between two sets of images: how far apart Gaussians fitted to their features are.

Everything is float64, and statistics are a function of the set: in whatever order images come, no digit changes.

Axis letters: N images, D feature width.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from distilled_decoding.metrics.features import Extractor, canonical


@dataclass(frozen=True, eq=False)
class Statistics:
    """The Gaussian of a set of images.

    Attributes:
        count: number of images; None when it is not known.
        mean_D: mean feature, float64 [D].
        covariance_DD: unbiased covariance of the features, float64 [D, D].
        extractor: fingerprint of the network that made the features; only equal ones can be compared.
        images: what the images are, in words.
        image_shape: channels, height and width of the images; None when they are not known.
    """

    count: int | None
    mean_D: Tensor
    covariance_DD: Tensor
    extractor: str
    images: str
    image_shape: tuple[int, int, int] | None

    @classmethod
    def of(
        cls, feature_ND: Tensor, extractor: str, images: str, image_shape: tuple[int, int, int] | None
    ) -> "Statistics":
        """Statistics of features; for the arguments see the attributes.

        Raises:
            ValueError: fewer than two images.
        """
        if len(feature_ND) < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {len(feature_ND)} of {images}")
        feature_ND = canonical(feature_ND)
        mean_D = feature_ND.mean(0)
        feature_ND -= mean_D
        covariance_DD = feature_ND.T @ feature_ND / (len(feature_ND) - 1)
        return cls(len(feature_ND), mean_D, covariance_DD, extractor, images, image_shape)


def check_comparable(a: Statistics, b: Statistics) -> None:
    """Refuse a comparison that would mean nothing.

    Raises:
        ValueError: other extractors, other widths, images of other shapes, or fewer than two images.
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
    if a.image_shape and b.image_shape and a.image_shape != b.image_shape:
        shapes = [" x ".join(map(str, shape)) for shape in (a.image_shape, b.image_shape)]
        raise ValueError(
            f"{a.images!r} has images of {shapes[0]} (channels, height, width), {b.images!r} of {shapes[1]}; "
            "resize one set before measuring"
        )
    for one in (a, b):
        if one.count is not None and one.count < 2:
            raise ValueError(f"{one.images!r} has {one.count} images; a distance needs at least 2")


def warn_if_few(num: int, extractor: Extractor) -> None:
    """Warn when there are no more images than features, which makes a Fréchet distance hard to read.

    Args:
        num: images of the smaller set.
        extractor: of their features.
    """
    if num <= extractor.width:
        warnings.warn(
            f"{num} images do not fill {extractor.width} features: the covariance is singular and the "
            f"{extractor.distance} too large by a bias that depends on the number of images; "
            "read the kernel distance (KID), which has no such bias",
            stacklevel=2,
        )


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
