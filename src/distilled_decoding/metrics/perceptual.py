"""Perceptual distances for training: plain functions of two image batches in [-1, 1], gradients to the first.

All compare channel-normalised feature maps of a fixed network over several depths, the form of LPIPS.

Axis letters: B batch, C channels, H W feature map or image.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.metrics.features import Classifier, load_effnet_lite0

FeatureMaps = Callable[[Tensor], list[Tensor]]

_EFFNET_BLOCKS = (0, 2, 4, 10)
_EFFNET_SIZE = 128


def feature_map_distance(maps: FeatureMaps, image_BCHW: Tensor, target_BCHW: Tensor) -> Tensor:
    """Mean squared distance of channel-normalised feature maps, summed over depths.

    Returns:
        A scalar; gradients flow to `image_BCHW` alone.
    """
    with torch.no_grad():
        targets = [F.normalize(m, dim=1) for m in maps(target_BCHW)]
    images = [F.normalize(m, dim=1) for m in maps(image_BCHW)]
    return torch.stack([(i - t).square().sum(1).mean() for i, t in zip(images, targets, strict=True)]).sum()


def classifier_distance(classifier: Classifier) -> Callable[[Tensor, Tensor], Tensor]:
    """The distance in the stages of a classifier."""
    classifier.requires_grad_(False)
    return lambda image, target: feature_map_distance(classifier.stages_BCHW, image, target)


def effnet_lite0_distance(device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """The distance in EfficientNet-Lite0 (ImageNet), whose weights come inside a package; small images are enlarged.

    Raises:
        ValueError: the packages are not installed.
    """
    model = load_effnet_lite0(device)
    return lambda image, target: feature_map_distance(lambda x: _effnet_maps(model, x), image, target)


def _effnet_maps(model: Any, image_BCHW: Tensor) -> list[Tensor]:
    """Outputs of some blocks; the network was trained on values that are [-1, 1] to within a hundredth."""
    image_BCHW = image_BCHW.expand(-1, 3, -1, -1)
    if min(image_BCHW.shape[2:]) < _EFFNET_SIZE:
        image_BCHW = F.interpolate(image_BCHW, size=_EFFNET_SIZE, mode="bilinear", antialias=True)
    maps: list[Tensor] = []
    hooks = [model._blocks[i].register_forward_hook(lambda _, __, out: maps.append(out)) for i in _EFFNET_BLOCKS]
    model.extract_features(image_BCHW)
    for hook in hooks:
        hook.remove()
    return maps


def lpips_distance(device: str = "cpu") -> Callable[[Tensor, Tensor], Tensor]:
    """LPIPS (VGG), when the user has the package and its weights.

    Raises:
        ValueError: the package or its weights are not there.
    """
    try:
        import lpips
    except ImportError as error:
        raise ValueError("the distance lpips needs its package and weights: pip install lpips") from error
    # The package fetches weights over the network through torchvision, which may fail in any way.
    try:
        model: nn.Module = lpips.LPIPS(net="vgg").to(device).eval().requires_grad_(False)
    except Exception as error:
        raise ValueError(f"the distance lpips could not load its weights ({error}); use another one") from error
    return lambda image, target: model(image.expand(-1, 3, -1, -1), target.expand(-1, 3, -1, -1)).mean()
