"""Published files as the parts of a pipeline: what each file is, what it is called, and what it does not tell."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from distilled_decoding.families import FAMILIES, Family, family
from distilled_decoding.families.published import Published, load_published
from distilled_decoding.flow import FlowSettings
from distilled_decoding.index import PipelineConfig
from distilled_decoding.originals import Weights, read_original
from distilled_decoding.presets import FILES, PRESETS, Preset, preset
from distilled_decoding.teacher import TeacherSampling

_DEFAULT_WEIGHTS: dict[str, Weights] = {"tokenizer": "ema", "transformer": "raw", "student": "ema"}
"""What the publishers' own scripts take of a file that holds both."""


@dataclass(frozen=True)
class Original:
    """A published file: of which family, which component, and the sizes that its names and shapes tell."""

    path: Path
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
    if weights is not None and weights not in get_args(Weights):
        raise ValueError(f"unknown weights {weights!r}; choose one of {', '.join(get_args(Weights))}")
    state_dicts = read_original(path, allow_namespace)
    for own in FAMILIES.values():
        if own.published is None:
            continue
        first = next(iter(state_dicts.values()))
        component = own.published.component(Published(first, path))
        if component is None:
            continue
        state_dict = state_dicts.get(weights or _DEFAULT_WEIGHTS[component], first)
        published = Published(state_dict, f"{path} (by its names a {own.name} {component})")
        return Original(path, own.name, component, own.published.sizes(published), published)
    names = ", ".join(list(next(iter(state_dicts.values())))[:4])
    known = ", ".join(own.name for own in FAMILIES.values() if own.published is not None)
    raise ValueError(f"{path} is no published model of {known}: its tensors are {names} ...")


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
    sizes = {name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()}
    originals = _by_component([identify(path, weights, allow_namespace) for path in paths])
    found = _preset(originals, preset_name, sizes)
    maker = family(next(iter(originals.values())).family)
    modules = {name: _module(maker, original, found, originals, sizes) for name, original in originals.items()}
    for size in sizes:
        if not any(hasattr(module.config, size) for module in modules.values()):
            raise ValueError(f"a {maker.name} model has no {size}")
    student = modules.pop("student", None)
    teacher = maker.teacher(**modules)
    config = found.config if found is not None else _unknown(maker.name, teacher)
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
    fitting = [own for own in PRESETS.values() if _difference(own, originals, sizes) is None]
    if name is not None:
        chosen = preset(name)
        if difference := _difference(chosen, originals, sizes):
            raise ValueError(f"these files are not {name}: {difference}; leave out --preset to see what they fit")
    elif len(fitting) > 1:
        choices = " or ".join(own.name for own in fitting)
        raise ValueError(f"these files fit {choices}, whose names and shapes are the same; say which with --preset")
    elif fitting:
        chosen = fitting[0]
    else:
        _check_strangers(originals)
        return None
    _check_names(originals, chosen)
    return chosen


def _difference(own: Preset, originals: Mapping[str, Original], sizes: Mapping[str, Any]) -> str | None:
    """The first thing in which files or given sizes are not a preset's, None when there is none."""
    for component, original in originals.items():
        file = own.file(component)
        if file is None or file.family != original.family:
            return f"it has no {original.family} {component}"
        if difference := file.difference({**original.sizes, **sizes}):
            return f"of the {component} {difference}"
    return None


def _check_strangers(originals: Mapping[str, Original]) -> None:
    """Refuse files that are all published, but of several models."""
    alike = {
        component: [
            file.name
            for file in FILES
            if (file.family, file.component) == (original.family, component) and not file.difference(original.sizes)
        ]
        for component, original in originals.items()
    }
    if all(alike.values()):
        found = ", ".join(
            f"the {component} is {' or '.join(dict.fromkeys(names))}" for component, names in alike.items()
        )
        raise ValueError(f"these are files of several published models: {found}; give those of one")


def _check_names(originals: Mapping[str, Original], chosen: Preset) -> None:
    """Refuse a file under the published name of its twin, which nothing in it could tell."""
    published = {Path(file.name).name for file in FILES}
    for component, original in originals.items():
        file = chosen.file(component)
        assert file is not None
        if original.path.name in published - {Path(file.name).name}:
            raise ValueError(
                f"{original.path} has the name of another published file than {chosen.name}'s {component}, "
                f"{file.name}; give that one, or rename it if it is"
            )


def _module(
    maker: Family,
    original: Original,
    found: Preset | None,
    originals: Mapping[str, Original],
    sizes: Mapping[str, Any],
) -> nn.Module:
    kind, config_kind = maker.kinds(original.component)
    file = None if found is None else found.file(original.component)
    config = file.config if file is not None else _config(config_kind, original, originals, sizes)
    with torch.device("meta"):
        module = kind(config)
    assert maker.published is not None
    load_published(module, original.published, maker.published)
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
