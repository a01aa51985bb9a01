from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from distilled_decoding import families
from distilled_decoding.families.family import Family
from tests import tiny


@dataclass(frozen=True)
class Sizes:
    width: int


class Part(nn.Module):
    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config = config
        self.layer = nn.Linear(config.width, config.width)


class Other(Part):
    pass


class Pair(nn.Module):
    def __init__(self, eye: Part, hand: Other) -> None:
        super().__init__()
        self.eye, self.hand = eye, hand


class Pupil(Part):
    @classmethod
    def from_teacher(cls, teacher: Pair, seed: int) -> "Pupil":
        return cls(Sizes(teacher.eye.config.width + seed))


OWN = Family("own", {"eye": (Part, Sizes), "hand": (Other, Sizes)}, Pair, (Pupil, Sizes))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))


def test_any_family_is_written_and_read_a_folder_a_component(tmp_path: Path) -> None:
    teacher = Pair(Part(Sizes(3)), Other(Sizes(4)))
    student = OWN.new_student(teacher, seed=2)
    OWN.save_teacher(tmp_path, teacher, torch.float32)
    OWN.save_student(tmp_path, student, torch.float32)
    assert (
        {path.name for path in tmp_path.iterdir()} == set(OWN.class_names(student=True)) == {"eye", "hand", "student"}
    )
    read = OWN.load_teacher(tmp_path)
    assert type(read.hand) is Other
    assert tiny.same_weights(read.eye, teacher.eye) and tiny.same_weights(read.hand, teacher.hand)
    assert tiny.same_weights(OWN.load_student(tmp_path), student) and asdict(student.config) == {"width": 5}


def test_class_names_are_those_of_the_index() -> None:
    assert OWN.class_names(student=False) == {"eye": "Part", "hand": "Other"}
    assert OWN.class_names(student=True) == {"eye": "Part", "hand": "Other", "student": "Pupil"}


def test_a_family_of_ones_own_is_known_after_one_line(registry: None) -> None:
    with pytest.raises(ValueError, match=r"unknown family 'own'; this version knows llamagen.*families\.register"):
        families.family("own")
    families.register(OWN)
    families.register(OWN)
    assert families.family("own") is OWN


def test_a_taken_name_is_refused(registry: None) -> None:
    with pytest.raises(ValueError, match="another family 'llamagen' already"):
        families.register(Family("llamagen", OWN.components, Pair, OWN.student))
    assert families.family("llamagen").teacher is not Pair
