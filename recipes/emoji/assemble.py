"""Put trained components together: python -m recipes.emoji.assemble --data DIR --out DIR --tokenizer DIR ...

Writes `emoji-t2i` as the package ships it: the teacher with its text encoder from their folders, or, with --student,
the whole pipeline that `distill` wrote; and, with --retriever, `emoji-features`, half of the real pictures and what
judges alignment.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from distilled_decoding.families import family
from distilled_decoding.flow import FlowSettings
from distilled_decoding.metrics.pictures import Pictures
from distilled_decoding.pipeline import Pipeline, PipelineConfig
from distilled_decoding.teacher import TeacherSampling
from distilled_decoding.text import TextEncoder
from recipes.emoji.data import MAX_TOKENS, STYLES, load


@dataclass(frozen=True)
class Settings:
    """Assemble the shipped model; what follows `student` describes a teacher without one."""

    data: Path
    out: Path
    tokenizer: Path | None = None
    teacher: Path | None = None
    retriever: Path | None = None
    student: Path | None = None
    guidance_scale: float = 1.25
    top_p: float = 0.6
    start_blocks: tuple[int, ...] = (0, 8, 20, 36)
    split_block: int = 64
    micro_batch: int = 250


def main(settings: Settings) -> None:
    """Write what was given."""
    torch.set_num_threads(2)
    folder = settings.out / "emoji-t2i"
    pictures, image_N3HW = load(settings.data)
    chosen = [i for i, p in enumerate(pictures) if p.set in STYLES and p.split == "train"]
    prompts = tuple(pictures[i].prompt for i in chosen)
    if settings.retriever:
        # Every second one, for the sake of the package's size: both styles, all kinds.
        Pictures(image_N3HW[chosen[::2]], prompts[::2]).save(settings.out / "emoji-features")
        shutil.copytree(settings.retriever, settings.out / "emoji-features/names", dirs_exist_ok=True)
    if settings.student:
        Pipeline.from_pretrained(settings.student).save_pretrained(folder, torch.float16)
    elif settings.tokenizer and settings.teacher:
        shutil.copytree(settings.tokenizer, folder / "tokenizer", dirs_exist_ok=True)
        shutil.copytree(settings.teacher / "transformer", folder / "transformer", dirs_exist_ok=True)
        config = PipelineConfig(
            family="llamagen",
            class_names=(),
            sampling=TeacherSampling(settings.guidance_scale, top_p=settings.top_p),
            flow=FlowSettings(num_steps=20),
            start_blocks=settings.start_blocks,
            split_block=settings.split_block,
            micro_batch=settings.micro_batch,
        )
        text = TextEncoder.from_pretrained(settings.teacher, MAX_TOKENS)
        text.encoder.half()
        teacher = family("llamagen").load_teacher(folder)
        Pipeline(teacher, None, config, text, prompts).save_pretrained(folder, torch.float16)


if __name__ == "__main__":
    main(tyro.cli(Settings))
