"""Train teacher and text encoder together: python -m recipes.emoji.train_teacher --data DIR --out DIR --tokenizer DIR.

The text encoder is a small T5 that reads bytes. It first learns alone to find the picture of a caption among those of a
batch; then both learn together. Every picture is encoded once in each of a few variants, see `data.moved`; captions are
dropped for guidance, and up to half of the tokens that a picture's next one is told from are wrong; in the second half
of the training fewer are, which makes the details sharp. At last the learning rate rises twice more, to half.

Axis letters: B batch, L tokens in a sequence, N sequences, C code channels, E width of the common sphere.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

from distilled_decoding.checkpoint import load_tensors, save_component, save_json, save_tensors
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Captions
from distilled_decoding.families import family
from distilled_decoding.families.llamagen.tokenizer import VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig
from distilled_decoding.text import TextEncoder
from recipes.emoji.data import MAX_TOKENS, SIDE, STYLES, load, moved, normalise
from recipes.fashion_mnist.data import batch
from recipes.training import cosine, run, start


@dataclass(frozen=True)
class Settings:
    """Train the emoji teacher."""

    data: Path
    out: Path
    tokenizer: Path
    num_steps: int = 4500
    batch_size: int = 64
    learning_rate: float = 2e-3
    muon_learning_rate: float = 4e-3
    caption_dropout: float = 0.1
    wrong_tokens: float = 0.5
    late_wrong_tokens: float = 0.2
    more_steps: tuple[int, ...] = (2000, 3500)
    more_rate: float = 0.5
    variants: int = 2
    dim: int = 160
    num_layers: int = 6
    num_heads: int = 5
    text_dim: int = 128
    text_layers: int = 3
    text_steps: int = 1000
    text_batch_size: int = 256
    text_learning_rate: float = 1e-3
    seed: int = 0


def new_text_encoder(settings: Settings) -> TextEncoder:
    """An untrained T5 encoder of bytes."""
    width = settings.text_dim
    words = ByT5Tokenizer(extra_ids=0)
    config = T5Config(
        vocab_size=len(words),
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=settings.text_layers,
        num_heads=width // 32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return TextEncoder(T5EncoderModel(config), words, MAX_TOKENS)


@torch.no_grad()
def training_tokens(settings: Settings, tokenizer: VQTokenizer, image_N3HW: Tensor) -> Tensor:
    """Tokens int64 [variants * N, L], one variant of all pictures after the other; cached in `out`."""
    path = settings.out / "tokens.safetensors"
    if not path.is_file():
        parts = []
        for variant in range(settings.variants):
            moved_N3HW = moved(normalise(image_N3HW), torch.full((len(image_N3HW),), variant), variant)
            parts += [tokenizer.encode(part) for part in moved_N3HW.split(250)]
        save_tensors(path, {"token_NL": torch.cat(parts).to(torch.uint16)})
    return load_tensors(path)[0]["token_NL"].long()


def train_text(settings: Settings, text: TextEncoder, caption_N: list[list[int]], code_NLC: Tensor) -> float:
    """Teach the text encoder by itself which picture a caption is of, among those of a batch; the seconds.

    It is asked through the mean of its features, as the transformer reads them. What maps captions and pictures to one
    sphere is thrown away.
    """
    picture = nn.Sequential(nn.Linear(code_NLC[0].numel(), 512), nn.GELU(), nn.Linear(512, 256))
    heads = nn.ModuleDict({"text": nn.Linear(settings.text_dim, 256), "picture": picture})
    heads.register_parameter("log_scale", nn.Parameter(torch.tensor(math.log(15))))
    modules = {"text": text.encoder.encoder, "heads": heads}
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=0.05)

    def update(step: int) -> dict[str, float]:
        optimizer.param_groups[0]["lr"] = cosine(step, settings.text_steps, settings.text_learning_rate, 100)
        index_B = batch(step, settings.text_batch_size, len(code_NLC), settings.seed)
        caption_B = index_B % len(caption_N)
        with torch.autocast("cpu", torch.bfloat16):
            captions = text.features([caption_N[i] for i in caption_B.tolist()])
            mask_BT1 = captions.mask_BT[..., None]
            mean_BF = (captions.feature_BTF * mask_BT1).sum(1) / mask_BT1.sum(1)
            text_BE, picture_BE = heads["text"](mean_BF), heads["picture"](code_NLC[index_B].flatten(1))
        score_BB = F.normalize(text_BE.float(), dim=-1) @ F.normalize(picture_BE.float(), dim=-1).T
        # Another variant of the same picture is as right as its own.
        twin_BB = (caption_B[:, None] == caption_B).fill_diagonal_(False)
        score_BB = (score_BB * heads.log_scale.exp()).masked_fill(twin_BB, -math.inf)
        right_B = torch.arange(len(index_B))
        loss = (F.cross_entropy(score_BB, right_B) + F.cross_entropy(score_BB.T, right_B)) / 2
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return {"loss": loss.item(), "right": (score_BB.argmax(1) == right_B).float().mean().item()}

    settings.out.mkdir(exist_ok=True)
    return run("text", settings.out, settings.text_steps, modules, {"optimizer": optimizer}, update)


def learning_rate(settings: Settings, step: int) -> float:
    """The share of its peak: a cosine over `num_steps`, then one up to `more_rate` over each of `more_steps`."""
    num_steps, peak, more = settings.num_steps, 1.0, iter(settings.more_steps)
    while step >= num_steps:
        step -= num_steps
        num_steps, peak = next(more), settings.more_rate
    return cosine(step, num_steps, peak, 100)


def main(settings: Settings) -> None:
    """Train and write the components."""
    start("train_teacher", settings)
    torch.set_num_threads(2)
    torch.set_flush_denormal(True)
    torch.manual_seed(settings.seed)
    tokenizer = family("llamagen").load("tokenizer", settings.tokenizer).eval()
    pictures, image_N3HW = load(settings.data)
    chosen = [i for i, p in enumerate(pictures) if p.set in STYLES and p.split == "train"]
    token_NL = training_tokens(settings, tokenizer, image_N3HW[chosen])
    text = new_text_encoder(settings)
    caption_N = text.tokens([pictures[i].prompt for i in chosen])
    sizes = {"dim": settings.dim, "num_layers": settings.num_layers, "num_heads": settings.num_heads}
    sizes |= {"vocab_size": tokenizer.config.codebook_size, "num_tokens": (SIDE // tokenizer.config.downsampling) ** 2}
    sizes |= {"num_classes": 0, "caption_tokens": MAX_TOKENS, "caption_dim": settings.text_dim}
    text.encoder.train()
    code_NLC = lookup(token_NL, tokenizer.codebook_VC.detach())
    text_seconds = train_text(replace(settings, out=settings.out / "text"), text, caption_N, code_NLC)
    model = Transformer(TransformerConfig(**sizes))
    # Twice as fast on a CPU; the parameters stay those of `model`.
    compiled = torch.compile(model)
    # T5 shares its embedding between two names; the encoder within has it once.
    modules = {"model": model, "text": text.encoder.encoder}
    hidden = [p for p in model.layers.parameters() if p.ndim > 1]
    outer = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("layers.")]
    groups = [
        {"params": outer, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(text.encoder.encoder.parameters()), "weight_decay": 0.0},
    ]
    parameters = [*hidden, *(p for group in groups for p in group["params"])]
    optimizers = {
        "muon": torch.optim.Muon(
            hidden, settings.muon_learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        "optimizer": torch.optim.AdamW(groups, betas=(0.9, 0.95)),
    }
    peaks = (settings.muon_learning_rate, settings.learning_rate, settings.learning_rate, settings.text_learning_rate)

    def update(step: int) -> dict[str, float]:
        rate = learning_rate(settings, step)
        wrong_tokens = settings.wrong_tokens if 2 * step < settings.num_steps else settings.late_wrong_tokens
        all_groups = [group for optimizer in optimizers.values() for group in optimizer.param_groups]
        for group, peak in zip(all_groups, peaks, strict=True):
            group["lr"] = rate * peak
        torch.manual_seed(settings.seed * 1_000_003 + step)
        index = batch(step, settings.batch_size, len(token_NL), settings.seed)
        token_BL = token_NL[index]
        null_B = torch.rand(len(index)) < settings.caption_dropout
        # A wrong token, once sampled, must not lead to another picture: those of others stand among what is read.
        other_BL = token_NL[torch.randint(len(token_NL), token_BL.shape), torch.arange(token_BL.shape[1])]
        wrong_BL = torch.rand(token_BL.shape) < wrong_tokens * torch.rand(len(index), 1)
        read_BL = torch.where(wrong_BL, other_BL, token_BL)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            captions = text.features([caption_N[i] for i in (index % len(chosen)).tolist()])
            logits_BLV = compiled(read_BL, Captions(captions.feature_BTF, captions.mask_BT, null_B))
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), token_BL.flatten())
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        return {"loss": loss.item()}

    model.train()
    num_steps = settings.num_steps + sum(settings.more_steps)
    seconds = run("teacher", settings.out, num_steps, modules, optimizers, update)
    save_component(settings.out / "transformer", model.eval(), model.config, torch.float16)
    TextEncoder(text.encoder.half(), text.tokenizer, MAX_TOKENS).save_pretrained(settings.out)
    save_json(settings.out / "measured.json", {"text_seconds": text_seconds, "seconds": seconds})


if __name__ == "__main__":
    main(tyro.cli(Settings))
