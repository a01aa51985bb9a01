"""What a model is, in words and numbers: one that can be loaded, or a published one whose files nobody has yet."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilled_decoding.families import family
from distilled_decoding.index import PipelineConfig
from distilled_decoding.pipeline import Pipeline
from distilled_decoding.presets import PRESETS, Preset, preset

_RECOMMENDED = ("sampling", "start_blocks", "split_block", "flow", "micro_batch", "num_trajectories", "training")


def skeleton(model: str) -> Pipeline:
    """A model to look at or to plan with: one that can be loaded, or a preset's, which has shapes but no weights.

    Raises:
        ValueError: there is no such model.
    """
    if model not in PRESETS or Path(model).exists():
        return Pipeline.from_pretrained(model)
    return _without_weights(preset(model))


def _without_weights(own: Preset) -> Pipeline:
    """A preset's models on the meta device."""
    maker = family(own.config.family)
    with torch.device("meta"):
        parts = {file.component: maker.kinds(file.component)[0](file.config) for file in own.files}
        student = maker.kinds("student")[0](own.student)
    parts.pop("student", None)
    return Pipeline(maker.teacher(**parts), student, own.config)


def random_weights(name: str, device: str, dtype: torch.dtype) -> Pipeline:
    """A published model with random weights: of its full size, good for nothing but to measure speed.

    Args:
        name: of a preset.
        device: where the models go.
        dtype: see `Pipeline.cast`.

    Raises:
        ValueError: there is no such preset.
    """
    pipeline, generator = _without_weights(preset(name)), torch.Generator().manual_seed(0)
    parts = [pipeline.teacher, pipeline.student]
    for module in (module for part in parts for module in part.to_empty(device="cpu").modules()):
        is_norm = isinstance(module, nn.RMSNorm | nn.GroupNorm | nn.LayerNorm)
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if is_norm:
                nn.init.constant_(tensor, float(own == "weight"))
            else:
                nn.init.normal_(tensor, std=0.02, generator=generator)
    for part in parts:
        part.eval().requires_grad_(False)
    pipeline.cast(dtype)
    for part in parts:
        part.to(device)
    return pipeline


def info(pipeline: Pipeline) -> dict[str, Any]:
    """What a model is: family, classes or captions, blocks, sizes, sampling, and what was published of it."""
    order = pipeline.teacher.order
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in pipeline.teacher.named_children()}
    if pipeline.student is not None:
        parameters["student"] = sum(p.numel() for p in pipeline.student.parameters())
    own = {} if pipeline.config.preset is None else {"published": _published(pipeline.config)}
    return {
        "family": pipeline.config.family,
        "classes": list(pipeline.config.class_names),
        "captions": None if pipeline.num_classes else _captions(pipeline),
        "blocks": order.num_blocks,
        "tokens": order.length,
        "codebook": list(pipeline.teacher.codebook.shape),
        "parameters": parameters,
        "sampling": asdict(pipeline.config.sampling),
        "flow": asdict(pipeline.config.flow),
        "start_blocks": list(pipeline.config.start_blocks),
        "split_block": pipeline.config.split_block,
        "student_temperature": pipeline.config.student_temperature,
        "student": pipeline.student is not None,
        "num_trajectories": pipeline.config.num_trajectories,
        "training": asdict(pipeline.config.training),
        "teacher_hash": None if pipeline.teacher.codebook.is_meta else pipeline.fingerprint,
        **own,
    }


def _captions(pipeline: Pipeline) -> dict[str, Any]:
    tokens, width = pipeline.teacher.caption_shape
    return {
        "tokens": tokens,
        "width": width,
        "text_encoder": pipeline.text_source,
        "prompts": len(pipeline.prompts),
    }


def _published(config: PipelineConfig) -> dict[str, Any]:
    """What a preset knows of a published model: its files, which settings are its authors', and their results."""
    assert config.preset is not None
    own = preset(config.preset)
    theirs = [name for name in own.published if getattr(config, name) == getattr(own.config, name)]
    return {
        "preset": own.name,
        "image_size": own.image_size,
        "files": {file.component: file.name for file in own.files},
        "settings_published": theirs,
        "settings_ours": [name for name in _RECOMMENDED if name not in theirs],
        "settings_source": own.source,
        "results": [asdict(result) for result in own.results],
    }
