"""How good tokenizer and teacher are: python -m recipes.fashion_mnist.measure --family var --tokenizer DIR --model DIR.

Prints Fréchet distances in the shipped classifier's features. Choices (guidance, top-k) are made against training
images (`--reference train`); the test images are for the final numbers only.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from distilled_decoding import zoo
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Asked
from distilled_decoding.families import family
from distilled_decoding.images import grid, to_uint8
from distilled_decoding.metrics.frechet import frechet_distance
from distilled_decoding.metrics.reference import make_reference, measure
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.sampling import Plan
from recipes.fashion_mnist.data import load, normalise


@dataclass(frozen=True)
class Settings:
    """Measure reconstructions and, with a model, teacher samples at some guidance scales."""

    family: Literal["llamagen", "var"]
    tokenizer: Path
    model: Path | None = None
    reference: Literal["train", "test"] = "train"
    num: int = 10_000
    guidance_scales: tuple[float, ...] = ()
    top_ks: tuple[int, ...] = (0,)
    top_ps: tuple[float, ...] = (1.0,)
    picture: Path | None = None


@torch.no_grad()
def reconstructions(tokenizer: nn.Module, image_NCHW: Tensor) -> Iterator[Tensor]:
    """uint8 images through the tokenizer and back."""
    for part in image_NCHW.split(250):
        yield to_uint8(tokenizer.decode(lookup(tokenizer.encode(normalise(part)), tokenizer.codebook_VC)))


def main(settings: Settings) -> None:
    """Measure and print one JSON object a line."""
    torch.set_num_threads(2)
    extractor = zoo.extractor("classifier")
    (train, train_label), (test, test_label) = load("train"), load("t10k")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    train, train_label = train[order], train_label[order]
    against_train = settings.reference == "train"
    real = train[:20_000] if against_train else test
    reference = make_reference(extractor, real.split(250), f"{settings.reference} images").statistics

    def report(name: str, images: Iterable[Tensor], label_N: Tensor) -> None:
        measured = measure(extractor, images, label_N, name)
        values = {"what": name, "reference": settings.reference, "accuracy": measured.accuracy}
        distance = frechet_distance(measured.statistics, reference)
        print(json.dumps({**values, "frechet_distance": distance}), flush=True)

    other, other_label = (test, test_label) if against_train else (train, train_label)
    num = settings.num
    report("real images of the other split", other[:num].split(250), other_label[:num])
    tokenizer = family(settings.family).load("tokenizer", settings.tokenizer).eval()
    # The last of the shuffled training images are not among those of the reference.
    source, source_label = (train[-num:], train_label[-num:]) if against_train else (test[:num], test_label[:num])
    report("reconstructions", reconstructions(tokenizer, source), source_label)
    if settings.picture is not None:
        pairs = torch.stack([source[:40], torch.cat(list(reconstructions(tokenizer, source[:40])))], 1).flatten(0, 1)
        grid(pairs, columns=10).save(settings.picture)
    if settings.model is None:
        return
    pipe = Pipeline.from_pretrained(settings.model)
    asked = Asked.in_turn(pipe.table(), settings.num)
    # Another domain than that of the final measurements.
    key_N = image_keys("sampling", 0, range(settings.num))
    for scale in settings.guidance_scales:
        for top_k in settings.top_ks:
            for top_p in settings.top_ps:
                sampling = replace(pipe.config.sampling, guidance_scale=scale, top_k=top_k, top_p=top_p)
                config = replace(pipe.config, sampling=sampling)
                images = Pipeline(pipe.teacher, None, config).images(Plan((), ancestral=True), asked, key_N)
                name = f"teacher, guidance {scale}, top-k {top_k}, top-p {top_p}"
                report(name, images, asked.number_N)


if __name__ == "__main__":
    main(tyro.cli(Settings))
