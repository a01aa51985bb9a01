import pytest

from distilled_decoding.methods import check_names, method
from tests import tiny

PIPE = tiny.pipeline()


def named(name):
    return method(PIPE, PIPE.table(), name, lambda: pytest.fail("asked for samples too early"))


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("1", 1),
        ("3", 3),
        ("teacher", 16),
        ("teacher-ancestral", 16),
        ("onestep", 1),
        ("skip:1", 15),
        ("skip:15", 1),
        ("span:2:4", 4),
        ("span:0:4", 5),
        ("span:2:16", 15),
        ("refine:1:1", 2),
        ("refine:2:3", 5),
    ],
)
def test_passes_are_those_of_the_model(name, passes):
    assert named(name).passes == passes


def test_what_determines_the_images_differs_between_methods():
    names = (
        "1",
        "2",
        "teacher",
        "teacher-ancestral",
        "onestep",
        "skip:1",
        "skip:2",
        "span:2:4",
        "span:0:4",
        "refine:1:1",
    )
    made_from = [named(name).made_from for name in names]
    assert all(a != b for i, a in enumerate(made_from) for b in made_from[:i])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9", r"steps must lie in 1\.\.4"),
        ("span:2:5", "cannot start at blocks"),
        ("span:4:4", "must ascend"),
        ("skip:16", r"must lie in 1\.\.15"),
    ],
)
def test_what_this_model_cannot_do_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        named(name)


@pytest.mark.parametrize("name", ["fast", "skip", "skip:-1", "span:1", "1.5", ""])
def test_unknown_names_are_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"unknown method {name!r}; use a number of steps, .*, onestep or skip:N"):
        check_names((name,))


def test_onestep_needs_the_teacher_beside_it():
    with pytest.raises(ValueError, match="name the method teacher, too"):
        check_names(("1", "onestep"))
