"""The convolutional encoder and decoder that the tokenizers of both families share, VQGAN's (arXiv 2012.09841).

Parameter names are those of LlamaGen's published files.

Axis letters: B batch, C channels, H W resolution at hand, N its positions; of the code map, h w.
"""

from itertools import pairwise

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


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map, with a skip connection."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        h_B1NC = self.norm(x_BCHW).flatten(2).mT.unsqueeze(1)
        query, key, value = (_at_positions(h_B1NC, layer) for layer in (self.q, self.k, self.v))
        h_B1NC = _at_positions(F.scaled_dot_product_attention(query, key, value), self.proj_out)
        return x_BCHW + h_B1NC.squeeze(1).mT.unflatten(2, x_BCHW.shape[2:])


def _at_positions(h_B1NC: Tensor, layer: nn.Conv2d) -> Tensor:
    """A 1x1 convolution of N positions, which as a matrix product takes half the time."""
    return F.linear(h_B1NC, layer.weight.flatten(1), layer.bias)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(channels, channels), SpatialAttention(channels), ResnetBlock(channels, channels)])


class _Level(nn.Module):
    """The residual blocks of one resolution, each followed by attention at the lowest resolution."""

    def __init__(self, in_channels: int, out_channels: int, num_res_blocks: int, attends: bool) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.res = nn.ModuleList([ResnetBlock(i, o) for i, o in pairwise(widths)])
        self.attn = nn.ModuleList([SpatialAttention(out_channels) for _ in range(num_res_blocks if attends else 0)])
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()

    def forward(self, h_BCHW: Tensor) -> Tensor:
        for i, res in enumerate(self.res):
            h_BCHW = res(h_BCHW)
            if len(self.attn):
                h_BCHW = self.attn[i](h_BCHW)
        return self.upsample(self.downsample(h_BCHW))


class Encoder(nn.Module):
    """Image to features, [B, image_channels, H, W] -> [B, z_channels, h, w].

    Args:
        image_channels: 1 grey, 3 colour.
        ch: channels at the highest resolution.
        ch_mult: multiples of `ch`, from the highest resolution to the lowest.
        num_res_blocks: residual blocks at each resolution.
        z_channels: channels of the features.
    """

    def __init__(
        self, image_channels: int, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int
    ) -> None:
        super().__init__()
        widths = [ch, *(ch * m for m in ch_mult)]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(image_channels, ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = _Level(widths[i], widths[i + 1], num_res_blocks, attends=i == last)
            if i < last:
                level.downsample = Downsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Apply the encoder."""
        h_BCHW = self.conv_in(image_BCHW)
        for layer in [*self.conv_blocks, *self.mid]:
            h_BCHW = layer(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))


class Decoder(nn.Module):
    """Features to image, [B, z_channels, h, w] -> [B, image_channels, H, W].

    The arguments are the encoder's, but each resolution has one residual block more; levels are stored in order of
    computation, lowest resolution first.
    """

    def __init__(
        self, image_channels: int, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int
    ) -> None:
        super().__init__()
        widths = [ch * m for m in reversed(ch_mult)]
        widths = [widths[0], *widths]
        last = len(ch_mult) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = _Level(widths[i], widths[i + 1], num_res_blocks + 1, attends=i == 0)
            if i < last:
                level.upsample = Upsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

    def forward(self, z_BChw: Tensor) -> Tensor:
        """Apply the decoder."""
        h_BCHW = self.conv_in(z_BChw)
        for layer in [*self.mid, *self.conv_blocks]:
            h_BCHW = layer(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))
