"""Train the tokenizer: python recipes/fashion_mnist/train_tokenizer.py --out DIR --perceptual DIR/classifier.

VQGAN's losses: L1 + L2, a perceptual distance on a classifier that measures nothing later, codebook and commitment,
and a patch discriminator from half-way on, its weight set by the ratio of gradients at the last layer.

Axis letters: B batch, C code channels, h w token grid, H W image, N tokens, V codebook entries.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from data import batch, flip, load, normalise
from torch import Tensor, nn
from training import cosine, run, start

from distilled_decoding.checkpoint import save_component, save_json
from distilled_decoding.codebook import nearest
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.metrics.features import load_classifier
from distilled_decoding.metrics.perceptual import classifier_distance

CONFIG = TokenizerConfig(
    image_channels=1,
    ch=32,
    encoder_ch_mult=(1, 1, 2),
    decoder_ch_mult=(1, 1, 2),
    num_res_blocks=1,
    z_channels=64,
    codebook_size=512,
    code_dim=8,
)


@dataclass(frozen=True)
class Settings:
    """Train the Fashion-MNIST tokenizer."""

    out: Path
    perceptual: Path
    num_steps: int = 6000
    batch_size: int = 32
    learning_rate: float = 6e-4
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.25
    seed: int = 0


def discriminator() -> nn.Sequential:
    """PatchGAN: one real-or-fake logit for every patch of 22 px."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.GroupNorm(8, 64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 3, 1, 1),
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 3, 1, 1),
    )


def quantise(tokenizer: VQTokenizer, z_BChw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through codes, the codebook + 0.25 commitment loss, and the tokens [N]."""
    z_NC = z_BChw.permute(0, 2, 3, 1).flatten(0, 2)
    codebook_VC = tokenizer.codebook_VC
    token_N = nearest(z_NC.detach().unsqueeze(0), codebook_VC.detach()).squeeze(0)
    code_BChw = codebook_VC[token_N].view(*z_BChw.shape[:1], *z_BChw.shape[2:], -1).permute(0, 3, 1, 2)
    loss = F.mse_loss(code_BChw, z_BChw.detach()) + 0.25 * F.mse_loss(z_BChw, code_BChw.detach())
    return z_BChw + (code_BChw - z_BChw).detach(), loss, token_N


@torch.no_grad()
def revive(tokenizer: VQTokenizer, token_N: Tensor, z_BChw: Tensor, step: int) -> None:
    """Move codes that this batch did not use onto features that it did produce."""
    z_NC = z_BChw.permute(0, 2, 3, 1).flatten(0, 2)
    unused_V = torch.bincount(token_N, minlength=tokenizer.config.codebook_size) == 0
    order_N = torch.randperm(len(z_NC), generator=torch.Generator().manual_seed(step))
    tokenizer.quantize.embedding.weight[unused_V] = z_NC[order_N[: int(unused_V.sum())]]


def main(settings: Settings) -> None:
    """Train and write the component."""
    start("train_tokenizer", settings)
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    tokenizer, critic = VQTokenizer(CONFIG), discriminator()
    perceptual = classifier_distance(load_classifier(settings.perceptual))
    optimizers = {
        "tokenizer_optimizer": torch.optim.AdamW(tokenizer.parameters(), betas=(0.9, 0.95), weight_decay=1e-4),
        "critic_optimizer": torch.optim.AdamW(critic.parameters(), betas=(0.5, 0.9), weight_decay=1e-4),
    }
    image, _ = load("train")

    def update(step: int) -> dict[str, float]:
        learning_rate = cosine(step, settings.num_steps, settings.learning_rate, 200)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = learning_rate
        x = flip(normalise(image[batch(step, settings.batch_size, len(image), settings.seed)]), step, settings.seed)
        z = tokenizer.features(x)
        code, codebook_loss, token_N = quantise(tokenizer, z)
        y = tokenizer.decode(code)
        pixels = F.l1_loss(y, x) + F.mse_loss(y, x)
        distance = perceptual(y, x)
        loss = pixels + settings.perceptual_weight * distance
        losses = {"pixels": pixels.item(), "perceptual": distance.item(), "codebook": codebook_loss.item()}
        adversarial = step >= settings.num_steps // 2
        if adversarial:
            fooled = -critic(y).mean()
            last = tokenizer.decoder.conv_out.weight
            ratio = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, fooled)]
            loss = loss + settings.adversarial_weight * (ratio[0] / (ratio[1] + 1e-6)).clamp(max=1e3) * fooled
        optimizers["tokenizer_optimizer"].zero_grad()
        (loss + codebook_loss).backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizers["tokenizer_optimizer"].step()
        if adversarial:
            hinge = F.relu(1 - critic(x)).mean() + F.relu(1 + critic(y.detach())).mean()
            optimizers["critic_optimizer"].zero_grad()
            hinge.backward()
            optimizers["critic_optimizer"].step()
            losses["critic"] = hinge.item()
        if step % 50 == 0 and step < settings.num_steps // 2:
            revive(tokenizer, token_N, z, step)
        return losses | {"codes_in_batch": len(token_N.unique())}

    seconds = run(
        "tokenizer",
        settings.out,
        settings.num_steps,
        {"tokenizer": tokenizer, "critic": critic},
        optimizers,
        update,
    )
    save_component(settings.out / "tokenizer", tokenizer.eval(), CONFIG, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
