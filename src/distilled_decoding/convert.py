"""Published files as the parts of a pipeline: what each file is, what it is called, and what it does not tell."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilled_decoding.families import FAMILIES, Family, family
from distilled_decoding.families.published import Published, load_published
from distilled_decoding.flow import FlowSettings
from distilled_decoding.index import PipelineConfig
from distilled_decoding.originals import Weights, read_original
from distilled_decoding.presets import PRESETS, Preset, preset
from distilled_decoding.teacher import TeacherSampling

_DEFAULT_WEIGHTS: dict[str, Weights] = {"tokenizer": "ema", "transformer": "raw", "student": "ema"}
"""What the publishers' own scripts take of a file that holds both."""


@dataclass(frozen=True)
class Original:
    """A published file: of which family, which component, and the sizes that its names and shapes tell."""

    family: str
    component: str
    sizes: dict[str, Any]
    published: Published


@dataclass(frozen=True)
class Parts:
    """What a pipeline is made of."""

    teacher: Any
    student: Any | None
    config: PipelineConfig


def identify(path: Path, weights: Weights | None = None, allow_namespace: bool = False) -> Original:
    """Read a published file and say what it is.

    Args:
        path: the file.
        weights: averaged or raw, of a file that holds both; None takes those that the publisher's own scripts take.
        allow_namespace: see `read_original`.

    Raises:
        ValueError: it cannot be read, or holds nothing known.
    """
    state_dicts = read_original(path, allow_namespace)
    for own in FAMILIES.values():
        if own.published is None:
            continue
        found = own.published.recognise(Published(next(iter(state_dicts.values())), path))
        if found is None:
            continue
        first = next(iter(state_dicts.values()))
        state_dict = state_dicts.get(weights or _DEFAULT_WEIGHTS[found.component], first)
        published = Published(state_dict, f"{path}, which seems to be a {own.name} {found.component},")
        return Original(own.name, found.component, found.sizes, published)
    names = ", ".join(list(next(iter(state_dicts.values())))[:4])
    raise ValueError(f"{path} is no published model of {', '.join(FAMILIES)}: its tensors are {names} ...")


def read_parts(
    paths: Sequence[Path],
    preset_name: str | None = None,
    weights: Weights | None = None,
    allow_namespace: bool = False,
    **sizes: Any,
) -> Parts:
    """The parts of a pipeline out of its published files, in any order.

    Args:
        paths: tokenizer, transformer and, if wanted, student.
        preset_name: which published model it is, where the files alone fit several.
        weights: see `identify`.
        allow_namespace: see `read_original`.
        sizes: what neither the files nor a preset tell: `num_heads`, `num_tokens` or `patch_nums`.

    Raises:
        ValueError: a file is not what it should be, the files do not belong together, or something is not told.
    """
    originals = _by_component([identify(path, weights, allow_namespace) for path in paths])
    found = _preset(originals, preset_name, sizes)
    names = family(next(iter(originals.values())).family)
    modules = {name: _module(names, original, found, originals, sizes) for name, original in originals.items()}
    for size in sizes:
        if not any(hasattr(module.config, size) for module in modules.values()):
            raise ValueError(f"a {names.name} model has no {size}")
    student = modules.pop("student", None)
    teacher = names.teacher(**modules)
    config = found.config if found is not None else _unknown(names.name, teacher)
    return Parts(teacher, student, config)


def _by_component(originals: Sequence[Original]) -> dict[str, Original]:
    families = {original.family for original in originals}
    if len(families) > 1:
        raise ValueError(f"these files are of several families: {', '.join(sorted(families))}; convert them apart")
    found: dict[str, Original] = {}
    for original in originals:
        if original.component in found:
            raise ValueError(f"two of these files hold a {original.component}; give one of each")
        found[original.component] = original
    if missing := [name for name in ("tokenizer", "transformer") if name not in found]:
        raise ValueError(f"no {' and no '.join(missing)} among these files; add it: a model is made of both")
    return found


def _preset(originals: Mapping[str, Original], name: str | None, sizes: Mapping[str, Any]) -> Preset | None:
    """The published model that these files are, None when they are none."""
    if name is not None:
        chosen = preset(name)
        if difference := _difference(chosen, originals, sizes):
            raise ValueError(f"these files are not {name}: {difference}; leave out --preset to see what they fit")
        return chosen
    fitting = [own for own in PRESETS.values() if _difference(own, originals, sizes) is None]
    if len(fitting) > 1:
        choices = " or ".join(own.name for own in fitting)
        raise ValueError(f"these files fit {choices}, whose names and shapes are the same; say which with --preset")
    return fitting[0] if fitting else None


def _difference(own: Preset, originals: Mapping[str, Original], sizes: Mapping[str, Any]) -> str | None:
    """The first thing in which files or given sizes are not a preset's, None when there is none."""
    for component, original in originals.items():
        file = own.file(component)
        if file is None or file.family != original.family:
            return f"it has no {original.family} {component}"
        for size, value in {**original.sizes, **sizes}.items():
            if getattr(file.config, size, value) != value:
                return f"{size} of the {component} is {value}, not {getattr(file.config, size)}"
    return None


def _module(
    names: Family,
    original: Original,
    found: Preset | None,
    originals: Mapping[str, Original],
    sizes: Mapping[str, Any],
) -> nn.Module:
    kind, config_kind = names.kinds(original.component)
    file = None if found is None else found.file(original.component)
    config = file.config if file is not None else _config(config_kind, original, originals, sizes)
    with torch.device("meta"):
        module = kind(config)
    assert names.published is not None
    load_published(module, original.published, names.published)
    return module.eval().requires_grad_(False)


def _config(kind: Any, original: Original, originals: Mapping[str, Original], sizes: Mapping[str, Any]) -> Any:
    """The config of a component that no preset knows, from what the files and the user tell."""
    # The scales are the only size that a file can lack and another one tell.
    scales = [own.sizes["patch_nums"] for own in originals.values() if "patch_nums" in own.sizes]
    known = ({"patch_nums": scales[0]} if scales else {}) | original.sizes
    for name, value in sizes.items():
        if known.get(name, value) != value:
            raise ValueError(f"{original.published.source} has {name} {known[name]}, not {value}")
    known |= sizes
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.name not in known]
    if needed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in needed)
        raise ValueError(
            f"{original.published.source} is none of the published models, and nothing tells its "
            f"{', '.join(needed)}; give {flags}"
        )
    return kind(**{field.name: known[field.name] for field in fields(kind) if field.name in known})


def _unknown(name: str, teacher: Any) -> PipelineConfig:
    """What a model of unknown settings starts with."""
    return PipelineConfig(
        family=name,
        class_names=tuple(map(str, range(teacher.num_classes))),
        sampling=TeacherSampling(),
        flow=FlowSettings(),
        start_blocks=(0,),
        split_block=teacher.order.num_blocks,
        micro_batch=8,
    )
