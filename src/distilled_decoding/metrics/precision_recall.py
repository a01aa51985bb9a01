"""Improved precision and recall (Kynkäänniemi et al. 2019): what share of samples looks real, and of reals is covered.

Axis letters: N M images, B chunk, D feature width.
"""

import torch
from torch import Tensor

from distilled_decoding.metrics.features import canonical

_CHUNK = 250


def precision_recall(real_ND: Tensor, fake_MD: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fakes in a ball around a real image, and of reals in a ball around a fake one.

    A ball reaches to the k-th nearest neighbour in the image's own set. Both numbers depend on how many images
    there are, so only values of equal numbers can be compared.

    Args:
        real_ND: features of real images.
        fake_MD: features of samples.
        k: neighbours.

    Returns:
        Precision and recall.

    Raises:
        ValueError: other widths, or a set of no more than k images.
    """
    if real_ND.shape[1] != fake_MD.shape[1] or min(len(real_ND), len(fake_MD)) <= k:
        raise ValueError(
            f"precision and recall with {k} neighbours need two sets of more than {k} images in the same features, "
            f"got {tuple(real_ND.shape)} and {tuple(fake_MD.shape)}"
        )
    real_ND, fake_MD = canonical(real_ND), canonical(fake_MD)
    real_radius_N, fake_radius_M = _radius(real_ND, k), _radius(fake_MD, k)
    precise, recalled_N = 0, torch.zeros(len(real_ND), dtype=torch.bool)
    for fake_BD, fake_radius_B in zip(fake_MD.split(_CHUNK), fake_radius_M.split(_CHUNK), strict=True):
        distance_BN = torch.cdist(fake_BD, real_ND)
        precise += int((distance_BN <= real_radius_N).any(1).sum())
        recalled_N |= (distance_BN <= fake_radius_B[:, None]).any(0)
    return precise / len(fake_MD), recalled_N.double().mean().item()


def _radius(feature_ND: Tensor, k: int) -> Tensor:
    """Distance of each image to its k-th nearest other; at distance 0 it finds itself first."""
    chunks = feature_ND.split(_CHUNK)
    return torch.cat(
        [torch.cdist(chunk_BD, feature_ND).topk(k + 1, largest=False).values.amax(1) for chunk_BD in chunks]
    )
