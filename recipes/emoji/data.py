"""Pictures of emoji by name, from npm packages: python -m recipes.emoji.data --out DIR (needs npm; resvg_py from PyPI).

Every picture lies on white, 32 px. Names are those of Unicode's CLDR ("grinning face with big eyes"), skin tones are
left out, and so are the few names that do not fit the generator's captions. The generator learns two sets, Noto
("red apple") and Fluent 3D ("red apple, 3d"); the network that judges alignment learns these and three more, and is
judged itself on Twemoji, which it never sees.

Axis letters: N pictures, H W image, R random numbers or places.
"""

import io
import json
import subprocess
import tarfile
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from distilled_decoding.checkpoint import load_json, load_tensors, save_json, save_tensors
from distilled_decoding.export import write_pngs
from distilled_decoding.progress import progress_bar

SIDE = 32
PACKAGES = {
    "unicode": "unicode-emoji-json@0.9.0",
    "noto": "emoji-datasource-google@16.0.0",
    "fluent-3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "fluent-flat": "@lobehub/fluent-emoji-flat@1.1.0",
    "openmoji": "openmoji@17.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "emojione": "emojione@2.2.7",
}
STYLES = {"noto": "", "fluent-3d": ", 3d"}
"""The sets that the generator learns, and what its captions say behind the name."""
MAX_TOKENS = 32
"""Positions of a caption: bytes, and one for its end."""

Split = Literal["train", "pair", "name"]
"""Seen in training; held out in this style but seen in the other; held out in both."""


@dataclass(frozen=True)
class Picture:
    """What is known of a picture: its set, its emoji's name, and whether the generator may learn it."""

    set: str
    name: str
    split: Split

    @property
    def prompt(self) -> str:
        """The caption; only the generator's sets have one."""
        return self.name + STYLES[self.set]


def split_of(name: str, set_name: str) -> Split:
    """A twentieth of the names are held out, and of the others a twentieth of the pairs of name and set."""
    if _draw(name) == 0:
        return "name"
    # Of a name at most one of the two pictures is held out.
    return "pair" if _draw(f"{name}, pair") == 0 and list(STYLES)[_draw(name) % 2] == set_name else "train"


def _draw(text: str) -> int:
    return int(sha256(text.encode()).hexdigest()[:8], 16) % 20


def load(folder: Path) -> tuple[list[Picture], Tensor]:
    """What `main` wrote: the pictures, and their pixels uint8 [N, 3, 32, 32]."""
    pictures = [Picture(**values) for values in load_json(folder / "pictures.json")]
    return pictures, load_tensors(folder / "pictures.safetensors")[0]["image_N3HW"]


def normalise(image_N3HW: Tensor) -> Tensor:
    """uint8 [0, 255] to float32 [-1, 1]."""
    return image_N3HW.float() / 127.5 - 1


def moved(image_N3HW: Tensor, variant_N: Tensor, seed: int) -> Tensor:
    """Pictures in [-1, 1], each turned, shrunk and shifted a little as its variant says; variant 0 leaves it alone."""
    random_NR = torch.rand(len(image_N3HW), 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    random_NR = torch.where(variant_N[:, None] > 0, random_NR, torch.tensor([0.0, -1.0, 0.0, 0.0]))
    angle_N, zoom_N = random_NR[:, 0] * 0.18, 1.09 + 0.09 * random_NR[:, 1]
    cos_N, sin_N = zoom_N * angle_N.cos(), zoom_N * angle_N.sin()
    shift_NR = random_NR[:, 2:] * 0.08
    rows = [torch.stack([cos_N, -sin_N, shift_NR[:, 0]], 1), torch.stack([sin_N, cos_N, shift_NR[:, 1]], 1)]
    place_NHWR = F.affine_grid(torch.stack(rows, 1), list(image_N3HW.shape), align_corners=False)
    # White is what lies outside.
    return F.grid_sample(image_N3HW - 1, place_NHWR, mode="bicubic", align_corners=False).add(1).clamp(-1, 1)


def _package(name: str, folder: Path) -> dict[str, bytes]:
    """The files of a npm package by their last name, downloaded once."""
    if not (found := list(folder.glob("*.tgz"))):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", name], cwd=folder, check=True)
        found = list(folder.glob("*.tgz"))
    kinds = (".png", ".webp", ".svg", ".json")
    # Many pictures in one; OpenMoji's sources; pictures without colour.
    others = ("/sheets", "/src/", "/black/", "_bw/")
    with tarfile.open(found[0]) as archive:
        files = [m for m in archive if m.isfile() and m.name.endswith(kinds)]
        wanted = [m for m in files if not any(other in m.name for other in others)]
        return {Path(m.name).name.lower(): archive.extractfile(m).read() for m in wanted}  # type: ignore[union-attr]


def _pixels(name: str, data: bytes) -> np.ndarray:
    """An image file on white, uint8 [32, 32, 3]."""
    if name.endswith(".svg"):
        from resvg_py import svg_to_bytes

        data = bytes(svg_to_bytes(svg_string=data.decode(), width=128, height=128))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    side = max(image.size)
    white = Image.new("RGBA", (side, side), "white")
    white.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(white.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(out: Path) -> None:
    """Download the packages and write `pictures.json` and `pictures.safetensors`, and a folder of PNGs a split.

    Args:
        out: the folder.
    """
    emoji = json.loads(_package(PACKAGES["unicode"], out / "packages/unicode")["data-by-emoji.json"])
    pictures, pixels = [], []
    with progress_bar("drawing", len(emoji) * (len(PACKAGES) - 1)) as bar:
        for set_name in list(PACKAGES)[1:]:
            files = _package(PACKAGES[set_name], out / f"packages/{set_name}")
            for character, about in emoji.items():
                bar.advance(1)
                name = about["name"].lower()
                if len((name + max(STYLES.values())).encode()) >= MAX_TOKENS:
                    continue
                points = [f"{ord(point):04x}" for point in character]
                stems = ("-".join(points), "-".join(point for point in points if point != "fe0f"))
                files_of = [f"{stem}{kind}" for stem in stems for kind in (".png", ".webp", ".svg")]
                if (found := next((file for file in files_of if file in files), None)) is not None:
                    pictures.append(Picture(set_name, name, split_of(name, set_name)))
                    pixels.append(_pixels(found, files[found]))
    seen = {picture.name for picture in pictures if picture.set in STYLES and picture.split == "train"}
    assert all(picture.name in seen for picture in pictures if picture.set in STYLES and picture.split == "pair")
    image_N3HW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    save_tensors(out / "pictures.safetensors", {"image_N3HW": image_N3HW})
    save_json(out / "pictures.json", [asdict(picture) for picture in pictures])
    for split in ("train", "pair", "name"):
        chosen = [i for i, p in enumerate(pictures) if p.set in STYLES and p.split == split]
        (out / split).mkdir(exist_ok=True)
        write_pngs(out / split, range(len(chosen)), image_N3HW[chosen])
        (out / f"{split}.txt").write_text("".join(f"{pictures[i].prompt}\n" for i in chosen))


if __name__ == "__main__":
    tyro.cli(main)
