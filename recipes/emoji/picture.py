"""A picture of sixteen captions: python -m recipes.emoji.picture --out FILE; a column has one caption and one noise."""

from pathlib import Path

import torch
import tyro

from distilled_decoding.pipeline import Pipeline, Steps
from distilled_decoding.report_figures import samples_figure

PROMPTS = (
    *("red apple", "grinning face with big eyes", "cat face", "rocket", "red heart", "rainbow", "house", "soccer ball"),
    *("ghost", "strawberry", "octopus", "sunflower", "clown face, 3d", "rose, 3d", "hamburger, 3d", "robot, 3d"),
)
"""The generator learnt them all; chosen before the student had made any picture."""


def main(out: Path, model: str = "emoji-t2i") -> None:
    """Sample 16 captions from the teacher and in two steps and one.

    Args:
        out: the picture.
        model: shipped name or folder.
    """
    pipe = Pipeline.from_pretrained(model)
    ways: dict[str, Steps] = {"teacher": "teacher", "2 steps": 2, "1 step": 1}
    images = {
        name: pipe(prompts=PROMPTS, seeds=range(len(PROMPTS)), steps=steps, output="array").images
        for name, steps in ways.items()
    }
    samples_figure({name: torch.from_numpy(image).permute(0, 3, 1, 2) for name, image in images.items()}, out)


if __name__ == "__main__":
    tyro.cli(main)
