"""Put trained components together: python -m recipes.fashion_mnist.assemble --out DIR --classifier DIR ...

Writes `fashion-features` (classifier, and features and statistics of the 10,000 test images) and `fashion-FAMILY`
as the package ships them: the teacher from its tokenizer and transformer, or, with --student, the whole pipeline
that `distill` wrote.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from distilled_decoding.families import family
from distilled_decoding.flow import FlowSettings
from distilled_decoding.metrics.features import classifier_extractor, load_classifier
from distilled_decoding.metrics.reference import make_reference
from distilled_decoding.pipeline import Pipeline, PipelineConfig
from distilled_decoding.teacher import Ramp, TeacherSampling
from recipes.fashion_mnist.data import load
from recipes.fashion_mnist.train_teacher import CLASSES


@dataclass(frozen=True)
class Settings:
    """Assemble the shipped models; what follows `student` describes a teacher without one."""

    out: Path
    family: Literal["llamagen", "var"]
    classifier: Path | None = None
    tokenizer: Path | None = None
    transformer: Path | None = None
    student: Path | None = None
    guidance_scale: float = 2.0
    guidance_ramp: Ramp = "constant"
    top_k: int = 0
    top_p: float = 1.0
    start_blocks: tuple[int, ...] = (0, 8, 20, 36)
    split_block: int = 64
    micro_batch: int = 250


def write_features(settings: Settings, classifier: Path) -> None:
    """The classifier, and what it says of real test images."""
    folder = settings.out / "fashion-features"
    shutil.copytree(classifier, folder, dirs_exist_ok=True)
    extractor = classifier_extractor(load_classifier(folder))
    reference = make_reference(extractor, load("t10k")[0].split(250), "real test images")
    assert reference.feature_ND is not None
    # Half the digits keep the file small; the statistics have all of them.
    replace(reference, feature_ND=reference.feature_ND.half()).save(folder / "test_images.safetensors")


def write_teacher(settings: Settings, folder: Path, tokenizer: Path, transformer: Path) -> None:
    """The pipeline of a teacher without a student."""
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(transformer, folder / "transformer", dirs_exist_ok=True)
    config = PipelineConfig(
        family=settings.family,
        class_names=CLASSES,
        sampling=TeacherSampling(
            settings.guidance_scale, settings.guidance_ramp, top_k=settings.top_k, top_p=settings.top_p
        ),
        flow=FlowSettings(num_steps=20),
        start_blocks=settings.start_blocks,
        split_block=settings.split_block,
        micro_batch=settings.micro_batch,
    )
    Pipeline(family(settings.family).load_teacher(folder), None, config).save_pretrained(folder, torch.float16)


def main(settings: Settings) -> None:
    """Write what was given."""
    torch.set_num_threads(2)
    folder = settings.out / f"fashion-{settings.family}"
    if settings.classifier:
        write_features(settings, settings.classifier)
    if settings.student:
        Pipeline.from_pretrained(settings.student).save_pretrained(folder, torch.float16)
    elif settings.tokenizer and settings.transformer:
        write_teacher(settings, folder, settings.tokenizer, settings.transformer)


if __name__ == "__main__":
    main(tyro.cli(Settings))
