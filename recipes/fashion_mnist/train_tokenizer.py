"""Train a tokenizer: python -m recipes.fashion_mnist.train_tokenizer --out DIR --family var --perceptual DIR.

VQGAN's losses: L1 + L2, a perceptual distance on a classifier that measures nothing later, codebook and commitment,
and a patch discriminator from half-way on, its weight set by the ratio of gradients at the last layer.

Axis letters: B batch, C code channels, h w token grid, H W image, N tokens, V codebook entries.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from distilled_decoding.checkpoint import save_component, save_json
from distilled_decoding.codebook import nearest
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig as GridConfig
from distilled_decoding.families.llamagen.tokenizer import VQTokenizer
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer
from distilled_decoding.families.var.tokenizer import TokenizerConfig as ScalesConfig
from distilled_decoding.metrics.features import load_classifier
from distilled_decoding.metrics.perceptual import classifier_distance
from recipes.fashion_mnist.data import batch, flip, load, normalise
from recipes.training import cosine, run, start


@dataclass(frozen=True)
class Settings:
    """Train the Fashion-MNIST tokenizer."""

    out: Path
    perceptual: Path
    family: Literal["llamagen", "var"]
    num_steps: int = 6000
    batch_size: int = 32
    learning_rate: float = 6e-4
    perceptual_weight: float = 1.0
    adversarial_weight: float = 0.25
    seed: int = 0


def discriminator(image_channels: int) -> nn.Sequential:
    """PatchGAN: one real-or-fake logit for every patch of 22 px."""
    return nn.Sequential(
        nn.Conv2d(image_channels, 32, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(32, 64, 4, 2, 1),
        nn.GroupNorm(8, 64),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 3, 1, 1),
        nn.GroupNorm(8, 128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 1, 3, 1, 1),
    )


def new_tokenizer(family: str) -> VQTokenizer | MultiScaleTokenizer:
    """An untrained tokenizer of 8 x 8 positions for images of 32 px, 512 codes of 8 channels."""
    if family == "llamagen":
        ch_mult = (1, 1, 2)
        return VQTokenizer(GridConfig(1, 32, ch_mult, ch_mult, 1, z_channels=64, codebook_size=512, code_dim=8))
    patch_nums = (1, 2, 3, 4, 6, 8)
    return MultiScaleTokenizer(ScalesConfig(1, 32, (1, 1, 2), 1, 8, codebook_size=512, patch_nums=patch_nums))


def fooling_loss(loss: Tensor, critic: nn.Module, made_BCHW: Tensor, last: Tensor) -> Tensor:
    """How little the critic is fooled, scaled so that its gradient at the last layer is as large as that of `loss`."""
    fooled = -critic(made_BCHW).mean()
    ratio = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (loss, fooled)]
    return (ratio[0] / (ratio[1] + 1e-6)).clamp(max=1e3) * fooled


def train_critic(critic: nn.Module, optimizer: torch.optim.Optimizer, real_BCHW: Tensor, made_BCHW: Tensor) -> float:
    """One update of the critic; its hinge loss."""
    hinge = F.relu(1 - critic(real_BCHW)).mean() + F.relu(1 + critic(made_BCHW.detach())).mean()
    optimizer.zero_grad()
    hinge.backward()
    optimizer.step()
    return hinge.item()


@dataclass(frozen=True)
class Quantised:
    """Features as the decoder reads them, gradients straight through, and what became of the codebook.

    Attributes:
        z_BChw: the quantised features.
        loss: the codebook's, and a quarter of the commitment.
        row_NC: the vectors that were quantised.
        token_N: their tokens.
    """

    z_BChw: Tensor
    loss: Tensor
    row_NC: Tensor
    token_N: Tensor


def quantise_grid(tokenizer: VQTokenizer, z_BChw: Tensor) -> Quantised:
    """Every position to its nearest code."""
    row_NC = z_BChw.detach().permute(0, 2, 3, 1).flatten(0, 2)
    codebook_VC = tokenizer.codebook_VC
    token_N = nearest(row_NC, codebook_VC.detach())
    code_BChw = codebook_VC[token_N].view(len(z_BChw), *z_BChw.shape[2:], -1).permute(0, 3, 1, 2)
    loss = F.mse_loss(code_BChw, z_BChw.detach()) + 0.25 * F.mse_loss(z_BChw, code_BChw.detach())
    return Quantised(z_BChw + (code_BChw - z_BChw).detach(), loss, row_NC, token_N)


def quantise_scales(tokenizer: MultiScaleTokenizer, z_BChw: Tensor) -> Quantised:
    """Scale by scale what the coarser ones left over; the loss is the mean over scales (VAR, section 3.2)."""
    quantizer, codebook_VC = tokenizer.quantize, tokenizer.codebook_VC
    scales = range(len(tokenizer.config.patch_nums))
    sum_BChw, loss, rows, tokens = torch.zeros_like(z_BChw), z_BChw.new_zeros(()), [], []
    for scale in scales:
        row_BKC = quantizer.reduce((z_BChw - sum_BChw).detach(), scale)
        token_BK = nearest(row_BKC, codebook_VC.detach())
        sum_BChw = sum_BChw + quantizer.share(codebook_VC[token_BK], scale)
        codebook_loss, commitment = F.mse_loss(sum_BChw, z_BChw.detach()), F.mse_loss(z_BChw, sum_BChw.detach())
        loss = loss + (codebook_loss + 0.25 * commitment) / len(scales)
        rows.append(row_BKC.flatten(0, 1))
        tokens.append(token_BK.flatten())
    return Quantised(z_BChw + (sum_BChw - z_BChw).detach(), loss, torch.cat(rows), torch.cat(tokens))


@torch.no_grad()
def revive(tokenizer: VQTokenizer | MultiScaleTokenizer, found: Quantised, step: int) -> None:
    """Move codes that this batch did not use onto features that it did produce."""
    weight_VC = tokenizer.quantize.embedding.weight
    unused_V = torch.bincount(found.token_N, minlength=len(weight_VC)) == 0
    order_N = torch.randperm(len(found.row_NC), generator=torch.Generator().manual_seed(step))
    weight_VC[unused_V] = found.row_NC[order_N[: int(unused_V.sum())]]


@torch.no_grad()
def unit_features(tokenizer: MultiScaleTokenizer, image_BHW: Tensor) -> None:
    """Rescale features and codes so that features have deviation 1 on these images; images stay what they were.

    LlamaGen's codes have length 1 by construction. The flow starts from noise of deviation 1, and tells codes apart
    in fewer steps when they are of its size.
    """
    scale = 1 / tokenizer.features(normalise(image_BHW)).std()
    tokenizer.quant_conv.weight *= scale
    tokenizer.quant_conv.bias *= scale
    tokenizer.quantize.embedding.weight *= scale
    for phi in tokenizer.quantize.quant_resi.qresi_ls:
        phi.bias *= scale
    tokenizer.post_quant_conv.weight /= scale


def main(settings: Settings) -> None:
    """Train and write the component."""
    start("train_tokenizer", settings)
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    tokenizer, critic = new_tokenizer(settings.family), discriminator(1)
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
        found = (quantise_grid if isinstance(tokenizer, VQTokenizer) else quantise_scales)(tokenizer, z)
        y = tokenizer.decode_features(found.z_BChw)
        pixels = F.l1_loss(y, x) + F.mse_loss(y, x)
        distance = perceptual(y, x)
        loss = pixels + settings.perceptual_weight * distance
        losses = {"pixels": pixels.item(), "perceptual": distance.item(), "codebook": found.loss.item()}
        adversarial = step >= settings.num_steps // 2
        if adversarial:
            last = tokenizer.decoder.conv_out.weight
            loss = loss + settings.adversarial_weight * fooling_loss(loss, critic, y, last)
        optimizers["tokenizer_optimizer"].zero_grad()
        (loss + found.loss).backward()
        nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizers["tokenizer_optimizer"].step()
        if adversarial:
            losses["critic"] = train_critic(critic, optimizers["critic_optimizer"], x, y)
        if step % 50 == 0 and step < settings.num_steps // 2:
            revive(tokenizer, found, step)
        return losses | {"codes_in_batch": len(found.token_N.unique())}

    seconds = run(
        "tokenizer",
        settings.out,
        settings.num_steps,
        {"tokenizer": tokenizer, "critic": critic},
        optimizers,
        update,
    )
    if isinstance(tokenizer, MultiScaleTokenizer):
        unit_features(tokenizer, image[:1000])
    save_component(settings.out / "tokenizer", tokenizer.eval(), tokenizer.config, torch.float16)
    save_json(settings.out / "measured.json", {"seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
