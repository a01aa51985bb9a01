"""Kernel distance (KID) between two sets of images: unbiased for any number of them, whatever the feature width.

Axis letters: N M images, B chunk, D feature width.
"""

from torch import Tensor

from distilled_decoding.metrics.features import canonical

_CHUNK = 250


def kernel_distance(a_ND: Tensor, b_MD: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3 (Bińkowski et al. 2018).

    All pairs count, in float64, instead of the mean over random subsets that is often given. The expectation for
    two sets of one distribution is 0, so the value can be slightly negative.

    Args:
        a_ND: features of one set.
        b_MD: features of the other.

    Raises:
        ValueError: other widths, or fewer than two images.
    """
    if a_ND.shape[1] != b_MD.shape[1] or min(len(a_ND), len(b_MD)) < 2:
        raise ValueError(
            f"a kernel distance needs two sets of at least 2 images in the same features, "
            f"got {tuple(a_ND.shape)} and {tuple(b_MD.shape)}"
        )
    a_ND, b_MD = canonical(a_ND), canonical(b_MD)
    cross = sum(_kernel(chunk_BD, b_MD).sum().item() for chunk_BD in a_ND.split(_CHUNK))
    return _within(a_ND) + _within(b_MD) - 2 * cross / (len(a_ND) * len(b_MD))


def _kernel(x_BD: Tensor, y_ND: Tensor) -> Tensor:
    return (x_BD @ y_ND.T / x_BD.shape[1] + 1).pow(3)


def _within(x_ND: Tensor) -> float:
    """Mean over pairs of different images."""
    own = (x_ND.square().sum(1) / x_ND.shape[1] + 1).pow(3).sum().item()
    pairs = sum(_kernel(chunk_BD, x_ND).sum().item() for chunk_BD in x_ND.split(_CHUNK))
    return (pairs - own) / (len(x_ND) * (len(x_ND) - 1))
