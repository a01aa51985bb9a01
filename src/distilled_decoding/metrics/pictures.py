"""Real pictures and the prompt of each, kept compactly: one lossless PNG with all of them and a JSON file.

Axis letters: N images, C image channels, H W image.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from distilled_decoding.checkpoint import load_json, replace_atomically, save_json

_COLUMNS = 50


@dataclass(frozen=True, eq=False)
class Pictures:
    """Square colour pictures of one size.

    Attributes:
        image_NCHW: uint8.
        prompts: what each shows.
    """

    image_NCHW: Tensor
    prompts: tuple[str, ...]

    def __post_init__(self) -> None:
        assert len(self.image_NCHW) == len(self.prompts), "one prompt a picture"

    def save(self, folder: Path) -> None:
        """Write `pictures.png` and, last, `pictures.json`."""
        num, _, size, _ = self.image_NCHW.shape
        full_NCHW = F.pad(self.image_NCHW, (0, 0, 0, 0, 0, 0, 0, -num % _COLUMNS), value=255)
        sheet_HWC = full_NCHW.unflatten(0, (-1, _COLUMNS)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet_HWC.numpy()).save(folder / "pictures.part", "PNG", optimize=True)
        replace_atomically(folder / "pictures.part", folder / "pictures.png")
        save_json(folder / "pictures.json", {"size": size, "prompts": self.prompts})

    @classmethod
    def load(cls, folder: Path) -> "Pictures":
        """Read what `save` wrote.

        Raises:
            ValueError: a file is missing, damaged, or does not fit the other.
        """
        values, path = load_json(folder / "pictures.json"), folder / "pictures.png"
        try:
            prompts, size = tuple(values["prompts"]), values["size"]
            with Image.open(path) as sheet:
                sheet_HWC = torch.from_numpy(np.array(sheet.convert("RGB")))
            full_NCHW = sheet_HWC.unfold(0, size, size).unfold(1, size, size).flatten(0, 1)
        except (OSError, TypeError, KeyError, RuntimeError) as error:
            raise ValueError(f"{path} and the JSON file beside it hold no pictures with prompts ({error})") from error
        if len(prompts) > len(full_NCHW):
            raise ValueError(f"{path} holds {len(full_NCHW)} pictures, but there are {len(prompts)} prompts")
        return cls(full_NCHW[: len(prompts)].contiguous(), prompts)
