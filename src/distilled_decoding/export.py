"""Images to disk: numbered PNGs, one picture, and the sample file of the ADM evaluator.

Axis letters: B N images, C channels (1 or 3), H W image.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distilled_decoding.images import to_pil


def check_suffix(path: Path | None, suffix: str) -> None:
    """Refuse a file whose name would not say what it is.

    Raises:
        ValueError: the name does not end in the suffix.
    """
    if path is not None and path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}, got {path.suffix or 'no suffix'!r}")


def png_path(folder: Path, index: int) -> Path:
    """Where image `index` of a run lies."""
    return folder / f"{index:06d}.png"


def write_pngs(folder: Path, first: int, image_BCHW: Tensor) -> None:
    """Write uint8 images as PNGs from number `first` on, each put in place whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(to_pil(image_BCHW), first):
        part = png_path(folder, index).with_suffix(".part")
        image.save(part, "PNG")
        part.replace(png_path(folder, index))


def read_pngs(folder: Path, indices: range) -> Tensor | None:
    """The uint8 images [B, 1 or 3, H, W] of these numbers when all of them are there."""
    paths = [png_path(folder, index) for index in indices]
    if not all(path.is_file() for path in paths):
        return None
    arrays = [np.atleast_3d(np.asarray(Image.open(path))) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def write_npz(path: Path, image_NCHW: Tensor, label_N: Tensor) -> None:
    """Write `arr_0` uint8 [N, H, W, 1 or 3] and `arr_1` int64 labels [N], put in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, arr_0=image_NCHW.permute(0, 2, 3, 1).numpy(), arr_1=label_N.numpy())
    part.replace(path)
