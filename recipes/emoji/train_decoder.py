"""Sharpen the tokenizer's decoder: python -m recipes.emoji.train_decoder --data DIR --out DIR --tokenizer DIR.

Encoder and codes stay what they are, so the tokens do, and whatever was trained on them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from distilled_decoding.checkpoint import save_component, save_json
from distilled_decoding.codebook import lookup
from distilled_decoding.families import family
from recipes.emoji.data import STYLES, load, moved, normalise
from recipes.fashion_mnist.data import batch
from recipes.fashion_mnist.train_tokenizer import discriminator, fooling_loss, train_critic
from recipes.training import cosine, run, start


@dataclass(frozen=True)
class Settings:
    """Train the decoder of the emoji tokenizer."""

    data: Path
    out: Path
    tokenizer: Path
    num_steps: int = 2500
    batch_size: int = 32
    learning_rate: float = 8e-4
    adversarial_weight: float = 0.2
    seed: int = 1


def main(settings: Settings) -> None:
    """Train and write the whole tokenizer."""
    start("train_decoder", settings)
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    tokenizer = family("llamagen").load("tokenizer", settings.tokenizer).to(memory_format=torch.channels_last)
    decoding = nn.ModuleList([tokenizer.post_quant_conv, tokenizer.decoder])
    tokenizer.requires_grad_(False)
    decoding.requires_grad_(True)
    critic = discriminator(3)
    optimizers = {
        "decoder_optimizer": torch.optim.AdamW(decoding.parameters(), betas=(0.9, 0.95), weight_decay=1e-4),
        "critic_optimizer": torch.optim.AdamW(critic.parameters(), betas=(0.5, 0.9), weight_decay=1e-4),
    }
    pictures, image_N3HW = load(settings.data)
    image_N3HW = image_N3HW[[p.set in STYLES and p.split == "train" for p in pictures]]

    def update(step: int) -> dict[str, float]:
        learning_rate = cosine(step, settings.num_steps, settings.learning_rate, 200)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate
        index = batch(step, settings.batch_size, len(image_N3HW), settings.seed)
        x = moved(normalise(image_N3HW[index]), index % 4, settings.seed * 1_000_003 + step)
        x = x.contiguous(memory_format=torch.channels_last)
        y = tokenizer.decode(lookup(tokenizer.encode(x), tokenizer.codebook_VC.detach()))
        pixels = F.l1_loss(y, x) + F.mse_loss(y, x)
        last = tokenizer.decoder.conv_out.weight
        loss = pixels + settings.adversarial_weight * fooling_loss(pixels, critic, y, last)
        optimizers["decoder_optimizer"].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoding.parameters(), 1.0)
        optimizers["decoder_optimizer"].step()
        return {"pixels": pixels.item(), "critic": train_critic(critic, optimizers["critic_optimizer"], x, y)}

    modules = {"tokenizer": tokenizer, "critic": critic}
    seconds = run("decoder", settings.out, settings.num_steps, modules, optimizers, update)
    save_component(settings.out / "tokenizer", tokenizer.eval(), tokenizer.config, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
