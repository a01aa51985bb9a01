"""Fashion-MNIST from the Debian package `dataset-fashion-mnist` (apt-get install dataset-fashion-mnist).

As .npz, for `--reference`: python -m recipes.fashion_mnist.data --split train --out train.npz.

Axis letters: B batch, H W image.
"""

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from distilled_decoding.export import write_npz

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def _read(name: str) -> np.ndarray:
    path = FOLDER / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; apt-get install dataset-fashion-mnist")
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">i4", rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def load(split: str) -> tuple[Tensor, Tensor]:
    """Images, uint8 [N, 1, 32, 32] (28 px padded with black), and labels, int64 [N]; split is `train` or `t10k`."""
    image_NHW = np.pad(_read(f"{split}-images-idx3-ubyte.gz"), ((0, 0), (2, 2), (2, 2)))
    label_N = _read(f"{split}-labels-idx1-ubyte.gz").astype(np.int64)
    return torch.from_numpy(image_NHW).unsqueeze(1), torch.from_numpy(label_N)


def normalise(image_B1HW: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return image_B1HW.float() / 127.5 - 1


def batch(step: int, batch_size: int, num_images: int, seed: int) -> Tensor:
    """Indices of the training batch of one step: epochs are seeded permutations, so any step can be replayed."""
    per_epoch = num_images // batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    return order[place * batch_size : (place + 1) * batch_size]


def flip(image_B1HW: Tensor, step: int, seed: int) -> Tensor:
    """Mirror a random half of the images."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    flipped_B = torch.rand(len(image_B1HW), generator=generator) < 0.5
    return torch.where(flipped_B[:, None, None, None], image_B1HW.flip(-1), image_B1HW)


def main(out: Path, split: Literal["train", "t10k"] = "train") -> None:
    """Write images and labels as `arr_0` [N, 32, 32, 1] and `arr_1` [N].

    Args:
        out: the .npz file.
        split: 60,000 training or 10,000 test images.
    """
    image_N1HW, label_N = load(split)
    write_npz(out, image_N1HW.split(1000), label_N)


if __name__ == "__main__":
    tyro.cli(main)
