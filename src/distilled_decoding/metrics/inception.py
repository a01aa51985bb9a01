"""The Inception network of FID: that of the TensorFlow graph of 2015-12-05, as its weights were carried to torch.

It differs from later Inception v3: average pools leave padding out, the last block pools by maximum, and there are
1008 classes. Names of parameters are those of the published weights file.

Axis letters: B batch, C channels, H W image, D feature width.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZE = 299
_ROW, _COLUMN = (1, 7), (7, 1)

_Kernel = int | tuple[int, int]
# Output channels and kernel of a convolution; a list of two are applied to one input, side by side.
_Layer = tuple[int, _Kernel] | list[tuple[int, _Kernel]]
_Branches = dict[str, list[_Layer]]
_Pool = Callable[[Tensor], Tensor]

_FORK: _Layer = [(384, (1, 3)), (384, (3, 1))]
_B: _Branches = {"branch3x3": [(384, 3)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": []}
_D: _Branches = {
    "branch3x3": [(192, 1), (320, 3)],
    "branch7x7x3": [(192, 1), (192, _ROW), (192, _COLUMN), (192, 3)],
    "branch_pool": [],
}
_E: _Branches = {
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), _FORK],
    "branch3x3dbl": [(448, 1), (384, 3), _FORK],
    "branch_pool": [(192, 1)],
}


def _a(pooled: int) -> _Branches:
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pooled, 1)],
    }


def _c(width: int) -> _Branches:
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(width, 1), (width, _ROW), (192, _COLUMN)],
        "branch7x7dbl": [(width, 1), (width, _COLUMN), (width, _ROW), (width, _COLUMN), (192, _ROW)],
        "branch_pool": [(192, 1)],
    }


_AVERAGE: _Pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
_MAXIMUM: _Pool = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
_HALVE: _Pool = partial(F.max_pool2d, kernel_size=3, stride=2)


def resize_tf1(image_BCHW: Tensor, size: int) -> Tensor:
    """Bilinear as TensorFlow 1 did it: output pixel i reads at i * input / output, between two pixels, no smoothing."""
    for dim in (3, 2):
        length = image_BCHW.shape[dim]
        place = torch.arange(size, dtype=torch.float32, device=image_BCHW.device) * (length / size)
        low = place.long()
        share = (place - low).view(-1, *[1] * (3 - dim))
        left = image_BCHW.index_select(dim, low)
        image_BCHW = left + (image_BCHW.index_select(dim, (low + 1).clamp(max=length - 1)) - left) * share
    return image_BCHW


class _Conv(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel: _Kernel, stride: int = 1, same: bool = False):
        super().__init__()
        padding = [k // 2 for k in (kernel if isinstance(kernel, tuple) else (kernel, kernel))] if same else 0
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCHW)))


class _Block(nn.Module):
    """Branches whose outputs are joined; `branch_pool` reads the pooled input, and with a halving pool all halve."""

    def __init__(self, in_channels: int, branches: _Branches, pool: _Pool) -> None:
        super().__init__()
        self.pool = pool
        self.paths = {branch: self._path(in_channels, branch, layers) for branch, layers in branches.items()}

    def _path(self, channels: int, branch: str, layers: list[_Layer]) -> list[list[str]]:
        """Make the convolutions of a branch, and give their names, those side by side together."""
        path = []
        for number, layer in enumerate(layers, 1):
            convs = layer if isinstance(layer, list) else [layer]
            place = f"_{number}" if len(layers) > 1 else ""
            names = [f"{branch}{place}{letter}" for letter in ("ab" if len(convs) > 1 else [""])]
            halves = self.pool is _HALVE and number == len(layers)
            for name, (out_channels, kernel) in zip(names, convs, strict=True):
                self.add_module(name, _Conv(channels, out_channels, kernel, 1 + halves, same=not halves))
            channels = sum(out_channels for out_channels, _ in convs)
            path.append(names)
        return path

    def forward(self, x_BCHW: Tensor) -> Tensor:
        joined = []
        for branch, path in self.paths.items():
            h_BCHW = self.pool(x_BCHW) if branch == "branch_pool" else x_BCHW
            for names in path:
                h_BCHW = torch.cat([self.get_submodule(name)(h_BCHW) for name in names], 1)
            joined.append(h_BCHW)
        return torch.cat(joined, 1)


# Name, input channels, branches and pool of the blocks.
_BLOCKS: list[tuple[str, int, _Branches, _Pool]] = [
    ("Mixed_5b", 192, _a(32), _AVERAGE),
    ("Mixed_5c", 256, _a(64), _AVERAGE),
    ("Mixed_5d", 288, _a(64), _AVERAGE),
    ("Mixed_6a", 288, _B, _HALVE),
    ("Mixed_6b", 768, _c(128), _AVERAGE),
    ("Mixed_6c", 768, _c(160), _AVERAGE),
    ("Mixed_6d", 768, _c(160), _AVERAGE),
    ("Mixed_6e", 768, _c(192), _AVERAGE),
    ("Mixed_7a", 768, _D, _HALVE),
    ("Mixed_7b", 1280, _E, _AVERAGE),
    ("Mixed_7c", 2048, _E, _MAXIMUM),
]


class Inception(nn.Module):
    """Pooled features, 2048 wide, and 1008 logits; the weights are the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        for name, in_channels, branches, pool in _BLOCKS:
            self.add_module(name, _Block(in_channels, branches, pool))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 2048] and logits [B, 1008] of RGB images of any size with values in [0, 255].

        The logits are without bias, as in the Inception Score of the ADM evaluator.
        """
        h_BCHW = (resize_tf1(image_BCHW, _SIZE) - 128) / 128
        h_BCHW = _HALVE(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(h_BCHW))))
        h_BCHW = _HALVE(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h_BCHW)))
        for name, *_ in _BLOCKS:
            h_BCHW = self.get_submodule(name)(h_BCHW)
        feature_BD = h_BCHW.mean((2, 3))
        return feature_BD, feature_BD @ self.fc.weight.T
