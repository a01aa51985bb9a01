"""LlamaGen's image tokenizer: a VQGAN whose codes live on the unit sphere (arXiv 2406.06525, section 3.1).

Parameter names are those of the published files. Axis letters: B batch, L tokens, C code channels, h w
token grid, H W image, V codebook entries.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding import codebook
from distilled_decoding.families.vqgan import Decoder, Encoder


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
        depth, channels = config.num_res_blocks, config.z_channels
        self.encoder = Encoder(config.image_channels, config.ch, config.encoder_ch_mult, depth, channels)
        self.decoder = Decoder(config.image_channels, config.ch, config.decoder_ch_mult, depth, channels)
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
