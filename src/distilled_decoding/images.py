"""Images as bytes and pictures.

Axis letters: B N images, C channels (1 or 3), H W image.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def to_uint8(image_BCHW: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, as uint8."""
    return (image_BCHW.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)


def to_pil(image_BCHW: Tensor) -> list[Image.Image]:
    """uint8 images as PIL images, grey or RGB."""
    return [Image.fromarray(i.permute(1, 2, 0).squeeze(-1).numpy()) for i in image_BCHW]


def grid(image_NCHW: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """uint8 images as one picture, row by row, each pixel `scale` wide."""
    rows = [torch.cat(list(row), dim=2) for row in image_NCHW.split(columns)]
    width = rows[0].shape[2]
    padded = [F.pad(row, (0, width - row.shape[2])) for row in rows]
    picture = torch.cat(padded, dim=1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return to_pil(picture.unsqueeze(0))[0]
