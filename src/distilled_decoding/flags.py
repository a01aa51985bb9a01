"""Settings of a model as flags of the command line: what is not given stays as the model has it."""

import dataclasses
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from tyro.conf import OmitArgPrefixes, arg

Settings = TypeVar("Settings")


def flags_for(kind: type[Any], own_defaults: Sequence[str] = ()) -> Any:
    """A dataclass of the same fields for the command line, None where nothing is given.

    Args:
        kind: a dataclass of settings that a model carries.
        own_defaults: fields that belong to the run instead, and keep the defaults they have.
    """
    hints = typing.get_type_hints(kind)
    made: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if field.name in own_defaults:
            made.append((field.name, hint, dataclasses.field(default=field.default)))
        elif dataclasses.is_dataclass(hint):
            nested = flags_for(hint)  # type: ignore[arg-type]
            made.append((field.name, nested, dataclasses.field(default_factory=typing.get_args(nested)[0])))
        else:
            by_default = arg(help_behavior_hint="(default: the model's)")
            made.append((field.name, Annotated[hint | None, by_default], dataclasses.field(default=None)))
    flags = dataclasses.make_dataclass(f"{kind.__name__}Flags", made, frozen=True)
    flags.__doc__ = kind.__doc__
    return Annotated[flags, OmitArgPrefixes]


def given_names(flags: Any) -> set[str]:
    """Names of the settings, nested ones by their own, for which a flag was given."""
    names = set()
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if dataclasses.is_dataclass(value):
            names |= given_names(value)
        elif value is not None:
            names.add(field.name)
    return names


def override(settings: Settings, flags: Any) -> Settings:
    """The settings of a model, changed where flags were given."""
    changes = {}
    for field in dataclasses.fields(flags):
        value = getattr(flags, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = override(getattr(settings, field.name), value)
        elif value is not None:
            changes[field.name] = value
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]
