"""LlamaGen's image tokenizer: a VQGAN whose codes live on the unit sphere (arXiv 2406.06525, section 3.1).

Parameter names are those of the published files. Axis letters: B batch, L tokens, C code channels, h w
token grid, H W image, V codebook entries.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding import codebook
from distilled_decoding.families.layers import Downsample, ResnetBlock, Upsample, group_norm


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer; channel multipliers run from the highest resolution to the lowest."""

    image_channels: int
    ch: int
    encoder_ch_mult: tuple[int, ...]
    decoder_ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    code_dim: int

    @property
    def downsampling(self) -> int:
        """Image pixels along one side of a token."""
        return 2 ** (len(self.encoder_ch_mult) - 1)


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
        h_BCHW = self.norm(x_BCHW)
        q, k, v = (layer(h_BCHW).flatten(2).mT.unsqueeze(1) for layer in (self.q, self.k, self.v))
        h_BCHW = F.scaled_dot_product_attention(q, k, v).squeeze(1).mT.reshape(x_BCHW.shape)
        return x_BCHW + self.proj_out(h_BCHW)


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
    """Image to features, [B, 3, H, W] -> [B, z_channels, h, w]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch] + [config.ch * m for m in config.encoder_ch_mult]
        last = len(config.encoder_ch_mult) - 1
        self.conv_in = nn.Conv2d(config.image_channels, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = _Level(widths[i], widths[i + 1], config.num_res_blocks, attends=i == last)
            if i < last:
                level.downsample = Downsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Apply the encoder."""
        h_BCHW = self.conv_in(image_BCHW)
        for layer in [*self.conv_blocks, *self.mid]:
            h_BCHW = layer(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))


class Decoder(nn.Module):
    """Features to image, [B, z_channels, h, w] -> [B, 3, H, W]; levels are stored in order of computation."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in reversed(config.decoder_ch_mult)]
        widths = [widths[0], *widths]
        last = len(config.decoder_ch_mult) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0])
        self.conv_blocks = nn.ModuleList()
        for i in range(last + 1):
            level = _Level(widths[i], widths[i + 1], config.num_res_blocks + 1, attends=i == 0)
            if i < last:
                level.upsample = Upsample(widths[i + 1])
            self.conv_blocks.append(level)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.image_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """Apply the decoder."""
        h_BCHW = self.conv_in(z_BCHW)
        for layer in [*self.mid, *self.conv_blocks]:
            h_BCHW = layer(h_BCHW)
        return self.conv_out(F.silu(self.norm_out(h_BCHW)))


class Codebook(nn.Module):
    """The stored codes; the method only ever sees them normalised to length 1."""

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, code_dim)
        self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)


class VQTokenizer(nn.Module):
    """Images to tokens and codes to images."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Codebook(config.codebook_size, config.code_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @property
    def codebook_VC(self) -> Tensor:
        """The codes, [V, C], each of length 1."""
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Continuous codes of length 1 before quantisation, [B, C, h, w]; image in [-1, 1]."""
        return F.normalize(self.quant_conv(self.encoder(image_BCHW)), dim=1)

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Tokens row by row, int64 [B, L], of images in [-1, 1]."""
        return codebook.nearest(self.features(image_BCHW).flatten(2).mT, self.codebook_VC)

    def decode(self, code_BLC: Tensor) -> Tensor:
        """Images, nominally in [-1, 1] but not clamped, of continuous or quantised codes [B, L, C]."""
        grid = math.isqrt(code_BLC.shape[1])
        return self.decode_features(code_BLC.mT.unflatten(2, (grid, grid)))

    def decode_features(self, z_BChw: Tensor) -> Tensor:
        """Images of the codes as a map [B, C, h, w]."""
        return self.decoder(self.post_quant_conv(z_BChw))
