"""Train the classifier whose features measure the models: python -m recipes.fashion_mnist.train_classifier --out DIR.

The same script with another seed makes the network of the tokenizer's perceptual loss, so that no model is trained
on the features it is measured with.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from distilled_decoding.checkpoint import save_component, save_json
from distilled_decoding.metrics.features import Classifier, ClassifierConfig
from recipes.fashion_mnist.data import batch, flip, load, normalise
from recipes.training import cosine, run, start


@dataclass(frozen=True)
class Settings:
    """Train the Fashion-MNIST classifier."""

    out: Path
    num_steps: int = 1800
    batch_size: int = 128
    width: int = 32
    learning_rate: float = 3e-3
    seed: int = 0


def accuracy(model: Classifier) -> float:
    """Share of the 10,000 test images that are recognised."""
    image, label = load("t10k")
    with torch.no_grad():
        hits = [
            (model(normalise(i)).logits_BV.argmax(1) == n)
            for i, n in zip(image.split(500), label.split(500), strict=True)
        ]
    return torch.cat(hits).float().mean().item()


def main(settings: Settings) -> None:
    """Train, measure, and write the component."""
    start("train_classifier", settings)
    torch.set_num_threads(2)
    torch.manual_seed(settings.seed)
    config = ClassifierConfig(image_channels=1, width=settings.width, num_classes=10)
    model = Classifier(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    image, label = load("train")

    def update(step: int) -> dict[str, float]:
        index = batch(step, settings.batch_size, len(image), settings.seed)
        optimizer.param_groups[0]["lr"] = cosine(step, settings.num_steps, settings.learning_rate, 100)
        shift = torch.randint(-2, 3, (2,), generator=torch.Generator().manual_seed(step)).tolist()
        x = flip(normalise(image[index]), step, settings.seed).roll(shift, (2, 3))
        loss = F.cross_entropy(model(x).logits_BV, label[index], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    model.train()
    seconds = run("classifier", settings.out, settings.num_steps, {"model": model}, {"optimizer": optimizer}, update)
    model.eval()
    measured = {"test_accuracy": accuracy(model), "seconds": seconds}
    save_component(settings.out / "classifier", model, config, torch.float16)
    save_json(settings.out / "measured.json", measured)
    print(measured)


if __name__ == "__main__":
    main(tyro.cli(Settings))
