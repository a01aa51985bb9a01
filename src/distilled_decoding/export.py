"""Images to disk: numbered PNGs, one picture, and the sample file of the ADM evaluator.

Axis letters: B N images, C channels (1 or 3), H W image.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distilled_decoding.checkpoint import replace_atomically
from distilled_decoding.images import to_pil


def check_file(path: Path | None, suffix: str) -> None:
    """Refuse a file whose name would not say what it is.

    Raises:
        ValueError: the name does not end in the suffix, or is that of a folder.
    """
    if path is not None and path.suffix.lower() != suffix:
        raise ValueError(f"{path} must end in {suffix}, got {path.suffix or 'no suffix'!r}")
    if path is not None and path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")


def png_path(folder: Path, index: int) -> Path:
    """Where image `index` of a run lies."""
    return folder / f"{index:06d}.png"


def write_pngs(folder: Path, indices: Sequence[int], image_BCHW: Tensor) -> None:
    """Write uint8 images as PNGs of these numbers, each put in place whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in zip(indices, to_pil(image_BCHW), strict=True):
        part = png_path(folder, index).with_suffix(".part")
        image.save(part, "PNG")
        part.replace(png_path(folder, index))


def read_pngs(folder: Path, indices: Iterable[int]) -> Tensor:
    """The uint8 images [B, 1 or 3, H, W] of these numbers.

    Raises:
        ValueError: a PNG is damaged.
    """
    arrays = []
    for index in indices:
        path = png_path(folder, index)
        try:
            arrays.append(np.atleast_3d(np.asarray(Image.open(path))))
        except OSError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write one PNG, put in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    picture.save(part, "PNG")
    replace_atomically(part, path)


def write_npz(path: Path, images: Iterable[Tensor], label_N: Tensor) -> None:
    """Write `arr_0` uint8 [N, H, W, 1 or 3] and `arr_1` int64 labels [N], put in place whole.

    Args:
        path: of the file; what lies there is replaced.
        images: batches of uint8 images [B, C, H, W], N images in all; never more than one is held.
        label_N: their labels.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # `np.savez` would hold all images; this is what it writes, to the last byte.
    with ZipFile(part, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for number, image_BCHW in enumerate(images):
                array_BHWC = image_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
                if number == 0:
                    shape = (len(label_N), *array_BHWC.shape[1:])
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(array_BHWC.data)
        with archive.open("arr_1.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array(file, label_N.numpy())
    replace_atomically(part, path)
