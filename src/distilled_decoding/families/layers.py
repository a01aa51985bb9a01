"""Small parts that both families use: the tokenizers' convolutions, the key-value cache, the student's code head.

Axis letters: B batch, C channels, H height, W width; of transformers: L positions, D width, H heads, E head channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation as both tokenizers use it: 32 groups, eps 1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two normalised 3x3 convolutions around a skip connection, [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Apply the block."""
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW)))
        return (self.nin_shortcut(x_BCHW) if self.changes_width else x_BCHW) + h_BCHW


class Downsample(nn.Module):
    """Halves the resolution: one zero row and column at the bottom right, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class KVCache:
    """Keys and values of the positions already run, for every layer, allocated once for a whole sequence."""

    def __init__(self, num_layers: int, num_heads: int, num_positions: int, x_BLD: Tensor) -> None:
        shape = (num_layers, len(x_BLD), num_heads, num_positions, x_BLD.shape[2] // num_heads)
        self.keys, self.values = x_BLD.new_empty(shape), x_BLD.new_empty(shape)
        self.length = 0

    def append(self, layer: int, key_BHLE: Tensor, value_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of one layer behind `length` and return all of that layer so far."""
        end = self.length + key_BHLE.shape[2]
        self.keys[layer, :, :, self.length : end] = key_BHLE
        self.values[layer, :, :, self.length : end] = value_BHLE
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class CodeHead(nn.Module):
    """A student's code vectors out of its hidden states, modulated by the class; it begins by predicting zeros."""

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, code_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BLD: Tensor, class_B1D: Tensor) -> Tensor:
        """code_BLC; the class embedding enters both the shift (row 0) and the scale (row 1)."""
        shift_B1D, scale_B1D = (self.scale_shift_table + class_B1D).split(1, dim=1)
        return self.linear(self.norm_final(hidden_BLD) * (1 + scale_B1D) + shift_B1D)
