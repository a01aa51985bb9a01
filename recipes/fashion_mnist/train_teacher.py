"""Train the autoregressive teacher: python recipes/fashion_mnist/train_teacher.py --out DIR --tokenizer DIR/tokenizer.

Every image is encoded once, with its mirror image; labels are dropped for guidance.

Axis letters: B batch, L tokens in a sequence, N images.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from data import batch, load, normalise
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import cosine, run, start

from distilled_decoding.checkpoint import (
    load_component,
    load_config,
    load_tensors,
    save_component,
    save_json,
    save_tensors,
)
from distilled_decoding.condition import Condition
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig

CLASSES = (
    "t-shirt",
    "trousers",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(frozen=True)
class Settings:
    """Train the Fashion-MNIST teacher."""

    out: Path
    tokenizer: Path
    num_steps: int = 2100
    batch_size: int = 128
    learning_rate: float = 2e-3
    dropout: float = 0.0
    label_dropout: float = 0.1
    dim: int = 192
    num_layers: int = 6
    num_heads: int = 6
    seed: int = 0


@torch.no_grad()
def encode(tokenizer: VQTokenizer, image_NBHW: Tensor) -> Tensor:
    """Tokens uint16 [N, L] of uint8 images."""
    parts = [tokenizer.encode(normalise(part)).flatten(1) for part in image_NBHW.split(500)]
    return torch.cat(parts).to(torch.uint16)


def training_tokens(settings: Settings, tokenizer: VQTokenizer) -> tuple[Tensor, Tensor]:
    """Tokens int64 [2N, L] of the training images and their mirror images, and labels [2N]; cached in `out`."""
    path = settings.out / "tokens.safetensors"
    image, label = load("train")
    if not path.is_file():
        save_tensors(path, {"token_NL": torch.cat([encode(tokenizer, image), encode(tokenizer, image.flip(-1))])})
    return load_tensors(path)[0]["token_NL"].long(), label.repeat(2)


def main(settings: Settings) -> None:
    """Train and write the component."""
    start("train_teacher", settings)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.manual_seed(settings.seed)
    tokenizer = VQTokenizer(load_config(TokenizerConfig, settings.tokenizer / "config.json"))
    load_component(settings.tokenizer, tokenizer)
    tokenizer.eval()
    config = TransformerConfig(
        dim=settings.dim,
        num_layers=settings.num_layers,
        num_heads=settings.num_heads,
        vocab_size=tokenizer.config.codebook_size,
        num_tokens=(32 // tokenizer.config.downsampling) ** 2,
        num_classes=len(CLASSES),
    )
    model = Transformer(config, settings.dropout)
    # Twice as fast on a CPU; the parameters stay those of `model`.
    compiled = torch.compile(model)
    token_NL, label_N = training_tokens(settings, tokenizer)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def update(step: int) -> dict[str, float]:
        for group in optimizer.param_groups:
            group["lr"] = cosine(step, settings.num_steps, settings.learning_rate, 200)
        torch.manual_seed(settings.seed * 1_000_003 + step)
        index = batch(step, settings.batch_size, len(token_NL), settings.seed)
        token_BL, label_B = token_NL[index], label_N[index]
        label_B = torch.where(torch.rand(len(label_B)) < settings.label_dropout, config.num_classes, label_B)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits_BLV = compiled(token_BL, Condition(label_B, config.num_classes))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), token_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    model.train()
    seconds = run("teacher", settings.out, settings.num_steps, {"model": model}, {"optimizer": optimizer}, update)
    save_component(settings.out / "transformer", model.eval(), config, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
