"""Train a teacher: python -m recipes.fashion_mnist.train_teacher --family var --out DIR --tokenizer DIR/tokenizer.

Every image is encoded once, with its mirror image; labels are dropped for guidance.

Axis letters: B batch, L tokens in a sequence, C code channels, N images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distilled_decoding.checkpoint import load_tensors, save_component, save_json, save_tensors
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Labels
from distilled_decoding.families import family
from distilled_decoding.families.llamagen import transformer as llamagen
from distilled_decoding.families.llamagen.tokenizer import VQTokenizer
from distilled_decoding.families.var import transformer as var
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer
from recipes.fashion_mnist.data import batch, load, normalise
from recipes.training import cosine, run, start

Tokenizer = VQTokenizer | MultiScaleTokenizer

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
    family: Literal["llamagen", "var"]
    num_steps: int = 2100
    batch_size: int = 128
    learning_rate: float = 2e-3
    label_dropout: float = 0.1
    dim: int = 192
    num_layers: int = 6
    num_heads: int = 6
    seed: int = 0


@torch.no_grad()
def encode(tokenizer: Tokenizer, image_NBHW: Tensor) -> Tensor:
    """Tokens uint16 [N, L] of uint8 images."""
    parts = [tokenizer.encode(normalise(part)) for part in image_NBHW.split(500)]
    return torch.cat(parts).to(torch.uint16)


def training_tokens(settings: Settings, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Tokens int64 [2N, L] of the training images and their mirror images, and labels [2N]; cached in `out`."""
    path = settings.out / "tokens.safetensors"
    image, label = load("train")
    if not path.is_file():
        save_tensors(path, {"token_NL": torch.cat([encode(tokenizer, image), encode(tokenizer, image.flip(-1))])})
    return load_tensors(path)[0]["token_NL"].long(), label.repeat(2)


def new_transformer(settings: Settings, tokenizer: Tokenizer) -> llamagen.Transformer | var.Transformer:
    """An untrained transformer for the tokenizer's sequences."""
    sizes = {"dim": settings.dim, "num_layers": settings.num_layers, "num_heads": settings.num_heads}
    sizes |= {"vocab_size": tokenizer.config.codebook_size, "num_classes": len(CLASSES)}
    if isinstance(tokenizer, VQTokenizer):
        num_tokens = (32 // tokenizer.config.downsampling) ** 2
        return llamagen.Transformer(llamagen.TransformerConfig(**sizes, num_tokens=num_tokens))
    code_dim, patch_nums = tokenizer.config.z_channels, tokenizer.config.patch_nums
    config = var.TransformerConfig(**sizes, code_dim=code_dim, patch_nums=patch_nums, shared_aln=True)
    return var.Transformer(config)


@torch.no_grad()
def forced_input(tokenizer: Tokenizer, token_BL: Tensor) -> Tensor:
    """What the transformer reads of whole sequences: tokens, or the sums of coarser scales [B, L - 1, C]."""
    if isinstance(tokenizer, VQTokenizer):
        return token_BL
    return tokenizer.next_inputs(tokenizer.partial_sums(lookup(token_BL, tokenizer.codebook_VC)))


def main(settings: Settings) -> None:
    """Train and write the component."""
    start("train_teacher", settings)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.manual_seed(settings.seed)
    tokenizer = family(settings.family).load("tokenizer", settings.tokenizer).eval()
    model = new_transformer(settings, tokenizer)
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
        label_B = torch.where(torch.rand(len(label_B)) < settings.label_dropout, len(CLASSES), label_B)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            logits_BLV = compiled(forced_input(tokenizer, token_BL), Labels(label_B, len(CLASSES)))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), token_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": loss.item()}

    model.train()
    seconds = run("teacher", settings.out, settings.num_steps, {"model": model}, {"optimizer": optimizer}, update)
    save_component(settings.out / "transformer", model.eval(), model.config, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
