"""Feature extractors: the shipped Fashion-MNIST classifier.

Axis letters: B batch, D feature width, H W image.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from distilled_decoding.checkpoint import load_component, load_config


@dataclass(frozen=True)
class ClassifierConfig:
    """Sizes of the classifier."""

    image_channels: int
    width: int
    num_classes: int


class Scores(NamedTuple):
    """What the classifier says of images: `feature_BD` (after global pooling) and `logits_BV` over classes."""

    feature_BD: Tensor
    logits_BV: Tensor


class _Stage(nn.Module):
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
                _Stage(config.image_channels, width, 2),
                _Stage(width, 2 * width, 2),
                _Stage(2 * width, 4 * width, 2),
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
