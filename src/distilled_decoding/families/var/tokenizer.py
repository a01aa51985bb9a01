"""VAR's image tokenizer: a VQGAN whose features are quantised scale by scale (arXiv 2404.02905, section 3.2).

An image is a sequence of token maps, coarse to fine, with one codebook for all. Each scale quantises what the
coarser ones left of the features, so the codes of all scales, brought to full size, sum to the features.

Axis letters: B batch, L tokens of all scales, K tokens of one scale, S scales, C code channels, h w full token
grid, H W image, V codebook entries.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.families.vqgan import Decoder, Encoder

# Four ticks from 1/12 to 11/12. Some scales lie half-way between two, also of the published ten; the last bit of these
# very sums decides, as it did when the models were trained.
_FIRST, _LAST = 1 / 3 / 4, 1 - 1 / 3 / 4
_STEP = (_LAST - _FIRST) / 3
_TICKS = (_FIRST, _FIRST + _STEP, _FIRST + 2 * _STEP, _LAST)


def scale_order(patch_nums: tuple[int, ...]) -> BlockOrder:
    """One block for each scale, of as many tokens as its map has.

    Raises:
        ValueError: fewer than two scales, or sides that do not ascend from 1.
    """
    if len(patch_nums) < 2 or patch_nums[0] != 1 or any(later < earlier for earlier, later in pairwise(patch_nums)):
        raise ValueError(f"patch_nums must be two or more sides of token maps, ascending from 1, got {patch_nums}")
    return BlockOrder(tuple(side**2 for side in patch_nums))


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of the tokenizer.

    Attributes:
        image_channels: 1 grey, 3 colour.
        ch: channels at the highest resolution.
        ch_mult: multiples of `ch`, from the highest resolution to the lowest.
        num_res_blocks: residual blocks at each resolution of the encoder; the decoder has one more.
        z_channels: code channels C.
        codebook_size: codebook entries V.
        patch_nums: side of each scale's token map, the last one that of the full grid.
    """

    image_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    codebook_size: int
    patch_nums: tuple[int, ...]

    def __post_init__(self) -> None:
        scale_order(self.patch_nums)


def spread(code_BKC: Tensor, side: int, full: int) -> Tensor:
    """A scale's map at full size, [B, C, h, w]."""
    h_BChw = code_BKC.mT.unflatten(2, (side, side))
    return h_BChw if side == full else F.interpolate(h_BChw, size=(full, full), mode="bicubic")


def average(f_BChw: Tensor, side: int) -> Tensor:
    """A map of full size averaged down to a scale's, [B, K, C]."""
    if side < f_BChw.shape[-1]:
        f_BChw = F.interpolate(f_BChw, size=(side, side), mode="area")
    return f_BChw.flatten(2).mT


class Phi(nn.Conv2d):
    """Half the map itself, half its 3x3 convolution: mends what resampling blurred."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, h_BChw: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        return (h_BChw + super().forward(h_BChw)) / 2


class SharedPhi(nn.Module):
    """The four convolutions that all scales share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(channels) for _ in _TICKS)

    def of_scale(self, scale: int, num_scales: int) -> nn.Module:
        """The convolution whose tick is nearest to the scale's place k / (S - 1), the first of equals."""
        place = scale / (num_scales - 1)
        return self.qresi_ls[min(range(len(_TICKS)), key=lambda i: abs(_TICKS[i] - place))]


class ScaleQuantizer(nn.Module):
    """The codebook, and how a scale's map of codes becomes its share of the features."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.patch_nums = config.patch_nums
        self.embedding = nn.Embedding(config.codebook_size, config.z_channels)
        self.quant_resi = SharedPhi(config.z_channels)

    def share(self, code_BKC: Tensor, scale: int) -> Tensor:
        """What one scale adds to the features: its codes brought to full size, through phi; [B, C, h, w]."""
        h_BChw = spread(code_BKC, self.patch_nums[scale], self.patch_nums[-1])
        return self.quant_resi.of_scale(scale, len(self.patch_nums))(h_BChw)

    def reduce(self, f_BChw: Tensor, scale: int) -> Tensor:
        """Features averaged down to one scale's map, [B, K, C]."""
        return average(f_BChw, self.patch_nums[scale])


class MultiScaleTokenizer(nn.Module):
    """Images to the tokens of all scales, and their codes to images."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.image_channels, config.ch, config.ch_mult, config.num_res_blocks, config.z_channels)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.quantize = ScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 3, padding=1)

    @property
    def codebook_VC(self) -> Tensor:
        """The codes, [V, C], the same for every scale."""
        return self.quantize.embedding.weight

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Continuous features before quantisation, [B, C, h, w]; image in [-1, 1]."""
        return self.quant_conv(self.encoder(image_BCHW))

    def encode(self, image_BCHW: Tensor) -> Tensor:
        """Tokens of all scales, coarse to fine, int64 [B, L], of images in [-1, 1]."""
        rest_BChw, tokens = self.features(image_BCHW), []
        for scale in range(len(self.config.patch_nums)):
            token_BK = nearest(self.quantize.reduce(rest_BChw, scale), self.codebook_VC)
            rest_BChw = rest_BChw - self.quantize.share(lookup(token_BK, self.codebook_VC), scale)
            tokens.append(token_BK)
        return torch.cat(tokens, dim=1)

    def partial_sums(self, code_BLC: Tensor) -> list[Tensor]:
        """The features before the first scale, which are zero, and after each scale given, [B, C, h, w] each."""
        order, full = scale_order(self.config.patch_nums), self.config.patch_nums[-1]
        sums = [code_BLC.new_zeros(len(code_BLC), code_BLC.shape[2], full, full)]
        for scale in range(order.blocks_in(code_BLC.shape[1])):
            sums.append(sums[-1] + self.quantize.share(code_BLC[:, order.span(scale)], scale))
        return sums

    def next_inputs(self, sums: list[Tensor]) -> Tensor:
        """What the transformer reads at every scale but the first, out of `partial_sums`, [B, L', C].

        Each scale reads the sum of the coarser ones, averaged down to its own size; there is nothing behind the last.
        """
        scales = range(1, min(len(sums), len(self.config.patch_nums)))
        nothing_BLC = sums[0].flatten(2).mT[:, :0]
        return torch.cat([nothing_BLC, *(self.quantize.reduce(sums[scale], scale) for scale in scales)], dim=1)

    def decode(self, code_BLC: Tensor) -> Tensor:
        """Images, nominally in [-1, 1] but not clamped, of the codes of all scales [B, L, C]."""
        return self.decode_features(self.partial_sums(code_BLC)[-1])

    def decode_features(self, f_BChw: Tensor) -> Tensor:
        """Images of summed features [B, C, h, w]."""
        return self.decoder(self.post_quant_conv(f_BChw))
