"""Does a model memorise? The training images nearest to its samples, against those nearest to real test images.

Axis letters: B batch, N samples, M test images, K neighbours, D feature width, C image channels, H W image.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilled_decoding import zoo
from distilled_decoding.evaluate import kept_features, kept_images
from distilled_decoding.metrics.reference import Reference, read_images

# Training images compared at once: with 10,000 samples, their distances take 20 MB.
_MICRO_BATCH = 250
_PICTURED = 16


@dataclass(frozen=True, eq=False)
class Neighbours:
    """What is near in the training images.

    Attributes:
        image_NCHW: the pictured samples, uint8.
        nearest_NKCHW: of each of them, the nearest training images, nearest first, uint8.
        sample_N: distance of every sample to the nearest training image.
        test_M: the same of real images that were not trained on; None when their features are not known.
        count: number of training images.
    """

    image_NCHW: Tensor
    nearest_NKCHW: Tensor
    sample_N: Tensor
    test_M: Tensor | None
    count: int

    @property
    def suspicious(self) -> float | None:
        """Share of samples that are nearer to a training image than one in a hundred test images is.

        A model that has learnt the distribution and copied nothing has about 1%. None without test images, also when
        those that were given turn out to be training images, as many published references are.
        """
        if self.test_M is None or (near := self.test_M.quantile(0.01)) == 0:
            return None
        return float((self.sample_N < near).double().mean())


def nearest_training_images(
    folder: Path,
    summary: Mapping[str, Any],
    method: str,
    training: Path,
    inception_weights: Path | None = None,
    device: str = "cpu",
) -> Neighbours:
    """Compare a method's samples of the first seed with the images that the model was trained on.

    Args:
        folder: that `evaluate` wrote.
        summary: its summary.
        method: whose samples; a student's or a teacher's.
        training: an .npz with `arr_0`, or a folder of images.
        inception_weights: file of the network's weights, needed where its features measured.
        device: where features are computed.

    Raises:
        ValueError: see `neighbours`; or the extractor here is not the one that measured.
    """
    seed, features = summary["seeds"][0], summary["features"]
    extractor = zoo.extractor(features["name"], device, inception_weights)
    if extractor.fingerprint != features["extractor"]:
        raise ValueError(
            f"{folder} was measured with {features['name']} {features['extractor'][:12]}, but here it is "
            f"{extractor.fingerprint[:12]}; evaluate again, or give the same weights"
        )
    return neighbours(
        lambda image_BCHW: extractor.scores(image_BCHW).feature_BD,
        read_images(training),
        kept_features(folder, method, seed),
        kept_images(folder, method, seed)[:_PICTURED],
        Reference.load(folder / "reference.safetensors").feature_ND,
    )


def neighbours(
    features: Callable[[Tensor], Tensor],
    training: Iterable[Tensor],
    sample_ND: Tensor,
    image_NCHW: Tensor,
    test_MD: Tensor | None,
    num_nearest: int = 5,
) -> Neighbours:
    """Compare samples with training images, which are read once and never held.

    Args:
        features: of uint8 images [B, C, H, W]: float32 [B, D].
        training: batches of uint8 images [B, C, H, W].
        sample_ND: features of all samples.
        image_NCHW: the first samples as images, whose neighbours are kept.
        test_MD: features of real test images.
        num_nearest: neighbours to keep.

    Raises:
        ValueError: the training images have another shape than the samples, or there are too few.
    """
    pictured = len(image_NCHW)
    sample_N = torch.full((len(sample_ND),), torch.inf, dtype=torch.float64)
    test_M = None if test_MD is None else torch.full((len(test_MD),), torch.inf, dtype=torch.float64)
    best_NK = torch.full((pictured, num_nearest), torch.inf, dtype=torch.float64)
    nearest_NKCHW = image_NCHW.new_zeros(pictured, num_nearest, *image_NCHW.shape[1:])
    count = 0
    for image_BCHW in _micro_batches(training):
        if image_BCHW.shape[1:] != image_NCHW.shape[1:]:
            shapes = [" x ".join(map(str, images.shape[1:])) for images in (image_BCHW, image_NCHW)]
            raise ValueError(
                f"the training images are {shapes[0]}, the samples {shapes[1]}; give them as the model saw them"
            )
        feature_BD = features(image_BCHW)
        distance_NB = _distances(sample_ND, feature_BD)
        sample_N = torch.minimum(sample_N, distance_NB.amin(1))
        if test_M is not None and test_MD is not None:
            test_M = torch.minimum(test_M, _distances(test_MD, feature_BD).amin(1))
        best_NK, place_NK = torch.cat([best_NK, distance_NB[:pictured]], 1).topk(num_nearest, largest=False)
        for own_KCHW, places in zip(nearest_NKCHW, place_NK.tolist(), strict=True):
            chosen = [own_KCHW[p] if p < num_nearest else image_BCHW[p - num_nearest] for p in places]
            own_KCHW.copy_(torch.stack(chosen))
        count += len(image_BCHW)
    if count < num_nearest:
        raise ValueError(f"{count} training images are too few to show the {num_nearest} nearest")
    return Neighbours(image_NCHW, nearest_NKCHW, sample_N, test_M, count)


def _micro_batches(training: Iterable[Tensor]) -> Iterator[Tensor]:
    for image_BCHW in training:
        yield from image_BCHW.split(_MICRO_BATCH)


def _distances(a_ND: Tensor, b_BD: Tensor) -> Tensor:
    """Euclidean distances [N, B] in float64: in float32 those of near copies are lost in rounding."""
    return torch.cdist(a_ND.double(), b_BD.double())
