"""What a classifier says of uint8 images, and the statistics of real ones to compare samples with.

Axis letters: B batch, C image channels, H W image, N images.
"""

import torch
from torch import Tensor

from distilled_decoding.metrics.features import Classifier, Scores
from distilled_decoding.metrics.frechet import Accumulator, Statistics
from distilled_decoding.pipeline import fingerprint

_MICRO_BATCH = 250


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
