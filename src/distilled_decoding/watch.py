"""Looking at a student while it trains: a picture of samples and, where features fit, how far from the teacher it is.

No real image has a part in it: what is chosen by such a look is not chosen by what it will be judged by.

Axis letters: N images, C image channels, H W image, D feature width.
"""

from functools import cached_property
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
from distilled_decoding.pipeline import Pipeline, Steps
from distilled_decoding.processes import is_first

_PICTURED = 40
_MEASURED = 1_000
_TAUGHT = 2_000
_BATCH = 250


class Watch:
    """One-step samples of equal conditions and noise, again and again, beside samples of the teacher of other noise.

    Args:
        pipeline: the teacher; its settings say where the student starts.
        table: what the samples are asked for, in turn.
        folder: of the pictures, `000500.png` after 500 updates.
    """

    def __init__(self, pipeline: Pipeline, table: ConditionTable, folder: Path) -> None:
        self._pipeline = pipeline
        self._table = table
        self._folder = folder
        self._extractor = _fitting_extractor(pipeline)

    def look(self, student: nn.Module, update: int) -> dict[str, float]:
        """Write the picture of a student after an update.

        A sharded student needs every process to call this; the first one writes.

        Returns:
            `distance_to_teacher`: the Fréchet distance of 1,000 samples to 2,000 of the teacher, too few to compare
            with an evaluation; nothing when the shipped models' features are not for this model's images.
        """
        config = self._pipeline.config
        pipeline = self._pipeline.with_student(student, config.start_blocks, config.split_block)
        image_NCHW = self._samples(pipeline, 1, _PICTURED if self._extractor is None else _MEASURED, seed=0)
        if is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            grid(image_NCHW[:_PICTURED], columns=10).save(self._folder / f"{update:06d}.png")
        if self._extractor is None:
            return {}
        return {"distance_to_teacher": frechet_distance(_statistics(self._extractor, image_NCHW), self._taught)}

    @cached_property
    def _taught(self) -> Statistics:
        """Features of the teacher's samples, for all looks."""
        assert self._extractor is not None
        return _statistics(self._extractor, self._samples(self._pipeline, "teacher", _TAUGHT, seed=1))

    def _samples(self, pipeline: Pipeline, steps: Steps, num: int, seed: int) -> Tensor:
        asked, key_N = Asked.in_turn(self._table, num), image_keys("sampling", seed, range(num))
        return torch.cat(list(pipeline.images(pipeline.plan(steps), asked, key_N)))


def _statistics(extractor: Extractor, image_NCHW: Tensor) -> Statistics:
    return measure(extractor, image_NCHW.split(_BATCH), None, "samples").statistics


def _fitting_extractor(pipeline: Pipeline) -> Extractor | None:
    """The shipped models' features, when they are of this model's classes and image size."""
    extractor = zoo.extractor("classifier", str(pipeline.device))
    fits = extractor.num_classes == pipeline.num_classes
    return extractor if fits and pipeline.image_shape == zoo.reference().statistics.image_shape else None
