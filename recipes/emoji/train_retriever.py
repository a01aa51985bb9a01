"""Train the network that retrieves names: python -m recipes.emoji.train_retriever --data DIR --out DIR.

It learns five sets of pictures, each moved and painted over a little, and is measured on Twemoji, of which it has seen
none. Settings are to be chosen on a set that --left-out keeps from it, not on Twemoji.

Axis letters: B batch, C image channels, H W image.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from distilled_decoding.checkpoint import save_component, save_json
from distilled_decoding.metrics.alignment import Retriever, RetrieverConfig, alignment
from recipes.emoji.data import load, moved, normalise
from recipes.fashion_mnist.data import batch
from recipes.training import cosine, run, start

SetName = Literal["noto", "fluent-3d", "fluent-flat", "openmoji", "emojione"]
SETS: tuple[SetName, ...] = get_args(SetName)


@dataclass(frozen=True)
class Settings:
    """Train the retriever of emoji names."""

    data: Path
    out: Path
    num_steps: int = 3000
    batch_size: int = 96
    learning_rate: float = 2e-3
    label_smoothing: float = 0.1
    left_out: tuple[SetName, ...] = ()
    seed: int = 0


def painted(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures in [-1, 1] in other colours, some blurred, and with a white square somewhere."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(len(x_BCHW), *shape, generator=generator)

    # Sets differ in how dark and how colourful they are.
    x_BCHW = x_BCHW.lerp(x_BCHW.mean(1, keepdim=True), 0.8 * uniform(1, 1, 1) ** 2)
    x_BCHW = 1 - (1 - x_BCHW) * (1 + 0.6 * (uniform(3, 1, 1) - 0.5)) * (1 + 0.6 * (uniform(1, 1, 1) - 0.5))
    blurred_BCHW = F.avg_pool2d(F.pad(x_BCHW, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x_BCHW = x_BCHW.lerp(blurred_BCHW, (uniform(1, 1, 1) < 0.3) * uniform(1, 1, 1))
    place_H, middle_B2 = torch.arange(x_BCHW.shape[-1]), uniform(2) * x_BCHW.shape[-1]
    row_BH, column_BW = ((place_H - middle_B2[:, i : i + 1]).abs() < 5 for i in range(2))
    return x_BCHW.masked_fill((row_BH[:, :, None] & column_BW[:, None])[:, None], 1.0)


def main(settings: Settings) -> None:
    """Train, measure and write the component."""
    start("train_retriever", settings)
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    pictures, image_N3HW = load(settings.data)
    seen = set(SETS) - set(settings.left_out)
    names = sorted({picture.name for picture in pictures if picture.set in SETS})
    model = Retriever(RetrieverConfig(tuple(names)))
    model.to(memory_format=torch.channels_last)
    number = {name: i for i, name in enumerate(names)}
    name_N = torch.tensor([number.get(picture.name, -1) for picture in pictures])
    seen_N = torch.tensor([picture.set in seen for picture in pictures])
    image_MCHW, name_M = image_N3HW[seen_N], name_N[seen_N]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)

    def update(step: int) -> dict[str, float]:
        optimizer.param_groups[0]["lr"] = cosine(step, settings.num_steps, settings.learning_rate, 100)
        index = batch(step, settings.batch_size, len(image_MCHW), settings.seed)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        x = moved(normalise(image_MCHW[index]), torch.ones(len(index)), step)
        x = painted(x, generator)
        loss = F.cross_entropy(model.logits_BV(x), name_M[index], label_smoothing=settings.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    seconds = run("retriever", settings.out, settings.num_steps, {"model": model}, {"optimizer": optimizer}, update)
    model.eval()
    found = {}
    for set_name in sorted({picture.set for picture in pictures}):
        chosen_N = torch.tensor([picture.set == set_name for picture in pictures])
        found[set_name] = alignment(model, image_N3HW[chosen_N].split(500), name_N[chosen_N])
    save_component(settings.out / "retriever", model, model.config, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds, "right_name_among_100": found})
    print({name: round(value, 3) for name, value in found.items()})


if __name__ == "__main__":
    main(tyro.cli(Settings))
