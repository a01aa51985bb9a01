"""The shipped models: where they lie, and how a model's name becomes a folder."""

from collections.abc import Sequence
from pathlib import Path

import torch

from distilled_decoding.hub import download, is_id
from distilled_decoding.metrics.alignment import Judge, alignment, load_retriever
from distilled_decoding.metrics.features import (
    Classifier,
    Extractor,
    FeatureName,
    classifier_extractor,
    effnet_lite0_extractor,
    inception_extractor,
    load_classifier,
)
from distilled_decoding.metrics.pictures import Pictures
from distilled_decoding.metrics.reference import Reference, make_reference
from distilled_decoding.presets import PRESETS

FOLDER = Path(__file__).parent
_BATCH = 50


def shipped() -> dict[str, Path]:
    """Name and folder of every shipped model."""
    return {path.parent.name: path.parent for path in sorted(FOLDER.glob("*/model_index.json"))}


def classifier() -> Classifier:
    """The Fashion-MNIST classifier whose features measure the shipped models, ready for evaluation."""
    return load_classifier(FOLDER / "fashion-features")


def extractor(name: FeatureName, device: torch.device | str = "cpu", weights: Path | None = None) -> Extractor:
    """Features by name: `classifier` (the shipped one), `effnet-lite0` or `inception`.

    Args:
        name: of the features.
        device: to compute on.
        weights: file of the weights of `inception`; the others have their own.

    Raises:
        ValueError: packages or weights that it needs are missing, or the latter damaged.
    """
    if name == "inception":
        return inception_extractor(weights, device)
    return classifier_extractor(classifier(), device) if name == "classifier" else effnet_lite0_extractor(device)


def reference() -> Reference:
    """The 10,000 real Fashion-MNIST test images in the shipped classifier's features."""
    return Reference.load(FOLDER / "fashion-features" / "test_images.safetensors")


def emoji_reference(features: Extractor, image_shape: tuple[int, ...]) -> Reference:
    """Every second of the real emoji that the recipe trains on, of a shape they have; measured anew in any features."""
    real = emoji(image_shape)
    assert real is not None, image_shape
    return make_reference(features, real.image_NCHW.split(_BATCH), "real emoji")


def emoji(image_shape: tuple[int, ...]) -> Pictures | None:
    """Real emoji with their prompts; None where they are not shipped, or not of this shape."""
    folder = FOLDER / "emoji-features"
    real = Pictures.load(folder) if folder.is_dir() else None
    return real if real is not None and real.image_NCHW.shape[1:] == image_shape else None


def judge(prompts: Sequence[str], image_shape: tuple[int, ...], device: torch.device | str = "cpu") -> Judge | None:
    """What says whether pictures show the emoji that they were asked for by name, beside the real ones of these names.

    Args:
        prompts: what pictures are asked for, as a table of prompts holds them.
        image_shape: of the pictures.
        device: to compute on.

    Returns:
        None when no prompt names an emoji, or when the pictures are not of the emoji's shape.
    """
    real = emoji(image_shape)
    if real is None:
        return None
    retriever = load_retriever(FOLDER / "emoji-features" / "names").to(device)
    name_N = retriever.numbers(prompts)
    if not (name_N >= 0).any():
        return None
    asked = set(prompts)
    shown_N = retriever.numbers([prompt if prompt in asked else "" for prompt in real.prompts])
    return Judge(retriever, name_N, alignment(retriever, real.image_NCHW.split(_BATCH), shown_N))


def resolve(model: str | Path) -> Path:
    """The folder of a model: a shipped name, a folder, or a hub id (`owner/name`, downloaded once).

    Raises:
        ValueError: it is none of these, or the hub does not answer.
    """
    name = str(model)
    if name in shipped():
        return shipped()[name]
    folder = Path(model)
    ways = f"shipped models: {', '.join(shipped())}; or give a pipeline folder, or a hub id owner/name"
    if not folder.exists():
        if name in PRESETS:
            raise ValueError(f"{name} is a published model: convert its files first (docs/published-models.md)")
        if not is_id(name):
            raise ValueError(f"unknown model {name!r} ({ways})")
        try:
            folder = download(name)
        except ValueError as error:
            raise ValueError(f"unknown model {name!r}: no such folder, and {error} ({ways})") from error
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{name} holds no model_index.json, so it is no pipeline folder ({ways})")
    return folder
