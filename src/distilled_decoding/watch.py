"""Looking at a student while it trains: a picture of samples and, where the features fit, a quick Fréchet distance.

Axis letters: N images, C image channels, H W image, D feature width.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from distilled_decoding import zoo
from distilled_decoding.condition import Asked, ConditionTable
from distilled_decoding.images import grid
from distilled_decoding.metrics.features import Extractor
from distilled_decoding.metrics.frechet import Statistics, frechet_distance
from distilled_decoding.metrics.reference import measure
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.processes import is_first

_PICTURED = 40
_MEASURED = 500
_BATCH = 250


class Watch:
    """One-step samples of equal conditions and noise, again and again.

    Args:
        pipeline: the teacher; its settings say where the student starts.
        table: what the samples are asked for, in turn.
        folder: of the pictures, `000500.png` after 500 updates.
    """

    def __init__(self, pipeline: Pipeline, table: ConditionTable, folder: Path) -> None:
        self._pipeline = pipeline
        self._table = table
        self._folder = folder
        self._real = _reference(pipeline)

    def look(self, student: nn.Module, update: int) -> dict[str, float]:
        """Write the picture of a student after an update.

        A sharded student needs every process to call this; the first one writes.

        Returns:
            `frechet_distance` of 500 samples to the real images, too few to compare with an evaluation; nothing when
            the shipped models' features and images are not for this model.
        """
        config = self._pipeline.config
        pipeline = self._pipeline.with_student(student, config.start_blocks, config.split_block)
        num = _PICTURED if self._real is None else _MEASURED
        asked, key_N = Asked.in_turn(self._table, num), image_keys("sampling", 0, range(num))
        image_NCHW = torch.cat(list(pipeline.images(pipeline.plan(1), asked, key_N)))
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            grid(image_NCHW[:_PICTURED], columns=10).save(self._folder / f"{update:06d}.png")
        return {} if self._real is None else {"frechet_distance": _distance(image_NCHW, *self._real)}


def _distance(image_NCHW: Tensor, extractor: Extractor, real: Statistics) -> float:
    return frechet_distance(measure(extractor, image_NCHW.split(_BATCH), None, "samples").statistics, real)


def _reference(pipeline: Pipeline) -> tuple[Extractor, Statistics] | None:
    """The shipped models' features and real images, when they are of this model's classes and size."""
    extractor, real = zoo.extractor("classifier", str(pipeline.device)), zoo.reference().statistics
    fits = extractor.num_classes == pipeline.num_classes and pipeline.image_shape == real.image_shape
    return (extractor, real) if fits else None
