"""The families of teachers: each brings a tokenizer, a transformer, a student and a checkpoint reader."""

from types import ModuleType

from distilled_decoding.families.llamagen import checkpoint as llamagen

FAMILIES: dict[str, ModuleType] = {"llamagen": llamagen}


def family(name: str) -> ModuleType:
    """The checkpoint reader of a family: `load_teacher`, `load_student`, `save_teacher`, `save_student`, `new_student`.

    Raises:
        ValueError: the family is unknown.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; this version knows {', '.join(FAMILIES)}")
    return FAMILIES[name]
