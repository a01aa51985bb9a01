"""Inception Score (Salimans et al. 2016): how sure a classifier is of each image, and how varied its answers are.

Axis letters: N images, V classes.
"""

from torch import Tensor

from distilled_decoding.metrics.features import canonical


def inception_score(logits_NV: Tensor) -> float:
    """Exponential of the mean divergence of an image's class probabilities from those of all images.

    One split, in float64: 1 when all images are judged alike, at most the number of classes.

    Args:
        logits_NV: class logits of all images.
    """
    log_NV = canonical(logits_NV).log_softmax(1)
    marginal_V = log_NV.exp().mean(0)
    # A class that never occurs adds 0 instead of nan.
    divergence_NV = log_NV.exp() * (log_NV - marginal_V.clamp(min=1e-300).log())
    return divergence_NV.sum(1).mean().exp().item()
