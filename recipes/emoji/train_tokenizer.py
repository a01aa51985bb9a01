"""Train the tokenizer: python -m recipes.emoji.train_tokenizer --data DIR --out DIR.

L1 + L2 and the codebook's losses alone: what makes the pictures sharp is learnt by the decoder later, see
`train_decoder`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from distilled_decoding.checkpoint import save_component, save_json
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from recipes.emoji.data import STYLES, load, moved, normalise
from recipes.fashion_mnist.data import batch
from recipes.fashion_mnist.train_tokenizer import quantise_grid, revive
from recipes.training import cosine, run, start


@dataclass(frozen=True)
class Settings:
    """Train the emoji tokenizer."""

    data: Path
    out: Path
    num_steps: int = 2000
    batch_size: int = 32
    learning_rate: float = 6e-4
    codebook_size: int = 1024
    seed: int = 0


def main(settings: Settings) -> None:
    """Train and write the component."""
    start("train_tokenizer", settings)
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    ch_mult = (1, 1, 2)
    sizes = {"num_res_blocks": 1, "z_channels": 64, "codebook_size": settings.codebook_size, "code_dim": 8}
    tokenizer = VQTokenizer(TokenizerConfig(3, 32, ch_mult, ch_mult, **sizes)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.95), weight_decay=1e-4)
    pictures, image_N3HW = load(settings.data)
    image_N3HW = image_N3HW[[p.set in STYLES and p.split == "train" for p in pictures]]

    def update(step: int) -> dict[str, float]:
        optimizer.param_groups[0]["lr"] = cosine(step, settings.num_steps, settings.learning_rate, 200)
        index = batch(step, settings.batch_size, len(image_N3HW), settings.seed)
        x = moved(normalise(image_N3HW[index]), index % 2, settings.seed * 1_000_003 + step)
        x = x.contiguous(memory_format=torch.channels_last)
        z = tokenizer.features(x)
        found = quantise_grid(tokenizer, z)
        y = tokenizer.decode_features(found.z_BChw)
        pixels = F.l1_loss(y, x) + F.mse_loss(y, x)
        optimizer.zero_grad()
        (pixels + found.loss).backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 and step < settings.num_steps // 2:
            revive(tokenizer, found, step)
        return {"pixels": pixels.item(), "codebook": found.loss.item(), "codes_in_batch": len(found.token_N.unique())}

    modules, optimizers = {"tokenizer": tokenizer}, {"tokenizer_optimizer": optimizer}
    seconds = run("tokenizer", settings.out, settings.num_steps, modules, optimizers, update)
    save_component(settings.out / "tokenizer", tokenizer.eval(), tokenizer.config, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
