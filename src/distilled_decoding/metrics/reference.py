"""What a classifier says of uint8 images, and the statistics of real ones to compare samples with.

Axis letters: B batch, C image channels, H W image, N images.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distilled_decoding.checkpoint import fingerprint
from distilled_decoding.metrics.features import Classifier, Scores
from distilled_decoding.metrics.frechet import Accumulator, Statistics

_MICRO_BATCH = 250


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of a set of images after a classifier has seen them.

    Attributes:
        statistics: of their features.
        accuracy: share of the images that the classifier gives their label.
    """

    statistics: Statistics
    accuracy: float


@torch.no_grad()
def score(classifier: Classifier, image_BCHW: Tensor) -> Scores:
    """Features and class logits of uint8 images, computed in float32 on the classifier's device.

    Raises:
        ValueError: the classifier is in training mode or reads images of other channels.
    """
    if classifier.training:
        raise ValueError("the classifier is in training mode, where features depend on the batch; call .eval() on it")
    channels = classifier.config.image_channels
    if image_BCHW.shape[1] != channels:
        raise ValueError(
            f"the classifier reads {channels} image channels, but the images have {image_BCHW.shape[1]}; "
            "use one trained on such images"
        )
    return classifier(image_BCHW.to(classifier.head.weight.device).float() / 127.5 - 1)


def measure(classifier: Classifier, images: Iterable[Tensor], label_N: Tensor, name: str) -> Measured:
    """Statistics and class accuracy of images that come batch after batch.

    Args:
        classifier: in evaluation mode.
        images: batches of uint8 images [B, C, H, W]; never more than one is held.
        label_N: the label that each image should have, int64.
        name: what the images are, in words.

    Raises:
        ValueError: see `score`; fewer than two images.
    """
    accumulator, hits = Accumulator(fingerprint(classifier), name), 0
    for image_BCHW in images:
        scores, seen = score(classifier, image_BCHW), accumulator.count
        accumulator.update(scores.feature_BD)
        hits += int((scores.logits_BV.argmax(1).cpu() == label_N[seen : accumulator.count]).sum())
    assert accumulator.count == len(label_N)
    return Measured(accumulator.statistics(), hits / len(label_N))


def real_statistics(classifier: Classifier, image_NCHW: Tensor, images: str = "real test images") -> Statistics:
    """Statistics of real uint8 images [N, C, H, W]; `images` says which they are."""
    accumulator = Accumulator(fingerprint(classifier), images)
    for image_BCHW in image_NCHW.split(_MICRO_BATCH):
        accumulator.update(score(classifier, image_BCHW).feature_BD)
    return accumulator.statistics()


def check_reference(reference: Statistics, classifier: Classifier, num_classes: int) -> None:
    """Refuse a reference or a classifier that cannot measure a model of `num_classes` classes.

    Raises:
        ValueError: the classifier knows other classes, or the reference is of another classifier.
    """
    if classifier.config.num_classes != num_classes:
        raise ValueError(
            f"the classifier knows {classifier.config.num_classes} classes, the model {num_classes}; "
            "use one trained on the model's data"
        )
    if reference.extractor != (extractor := fingerprint(classifier)):
        raise ValueError(
            f"{reference.images!r} was measured with extractor {reference.extractor}, not with this "
            f"classifier ({extractor}); measure it again with `real_statistics`"
        )
