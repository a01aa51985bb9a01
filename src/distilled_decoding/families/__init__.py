"""The families of teachers: each brings a tokenizer, a transformer and a student, and says so in a `Family`."""

from distilled_decoding.families.family import Component, Family
from distilled_decoding.families.llamagen.checkpoint import FAMILY as LLAMAGEN
from distilled_decoding.families.var.checkpoint import FAMILY as VAR

__all__ = ["FAMILIES", "Component", "Family", "family", "register"]

FAMILIES: dict[str, Family] = {own.name: own for own in (LLAMAGEN, VAR)}


def family(name: str) -> Family:
    """A family by its name.

    Raises:
        ValueError: the family is unknown.
    """
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"unknown family {name!r}; this version knows {known}, and `families.register` adds your own")
    return FAMILIES[name]


def register(own: Family) -> None:
    """Make a family of your own known to `Pipeline`; doing so again changes nothing.

    Raises:
        ValueError: another family has that name.
    """
    if FAMILIES.setdefault(own.name, own) != own:
        raise ValueError(f"there is another family {own.name!r} already; give yours a name of its own")
