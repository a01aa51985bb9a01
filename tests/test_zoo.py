"""The shipped models are whole, small, keep every promise, and their students imitate their teachers."""

from pathlib import Path

import pytest
import torch

from distilled_decoding import commands, describe, zoo
from distilled_decoding.check import check_student, check_teacher
from distilled_decoding.checkpoint import load_json
from distilled_decoding.codebook import nearest
from distilled_decoding.index import INDEX
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline


@pytest.fixture(scope="module", params=zoo.shipped())
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name: str) -> Pipeline:
    return Pipeline.from_pretrained(name)


def test_both_families_are_shipped() -> None:
    assert {"llamagen", "var"} == {load_json(folder / INDEX)["family"] for folder in zoo.shipped().values()}


def test_nothing_is_damaged_or_large(name: str) -> None:
    folder = zoo.shipped()[name]
    assert commands.verify(folder) == {"kind": "pipeline", "problems": []}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 15_000_000


def test_its_card_counts_its_parameters(name: str, pipe: Pipeline) -> None:
    card = Path(zoo.shipped()[name] / "README.md").read_text()
    for part, count in describe.info(pipe)["parameters"].items():
        assert f"| {count:,} |" in card, part


def test_it_keeps_the_promises(pipe: Pipeline) -> None:
    check_teacher(pipe.teacher)
    check_student(pipe.student, pipe.teacher)


@torch.no_grad()
def test_the_tokens_of_one_step_hang_together_as_the_teachers_do(pipe: Pipeline) -> None:
    """The teacher finds them likelier than a mixture, token by token, of images of one class or of some prompts."""
    table, key_B = pipe.table(pipe.prompts[:8] or None), image_keys("sampling", 0, range(32))
    number_B = torch.full((32,), 3) if pipe.num_classes else torch.arange(32) % 8
    condition, guidance = table[number_B], pipe.config.sampling.guidance
    token_BL = nearest(pipe.codes(pipe.plan(1), condition, key_B), pipe.teacher.codebook)
    order_BL = torch.rand(token_BL.shape, generator=torch.Generator().manual_seed(0)).argsort(0)

    def surprise(token_BL: torch.Tensor) -> float:
        log_p_BLV = pipe.teacher.forced_logits(token_BL, condition, guidance).log_softmax(-1)
        return -log_p_BLV.gather(-1, token_BL[..., None]).mean().item()

    assert surprise(token_BL) < 0.8 * surprise(token_BL.gather(0, order_BL))


def test_one_step_makes_its_own_teacher_image_rather_than_another(name: str) -> None:
    pipe = Pipeline.from_pretrained(name)
    table, key_B = pipe.table(pipe.prompts[:8] or None), image_keys("sampling", 0, range(8))
    # A class leaves much to the noise, a caption little.
    condition = table[torch.full((8,), 3) if pipe.num_classes else torch.arange(8)]
    teacher, student = (pipe.codes(pipe.plan(steps), condition, key_B) for steps in ("teacher", 1))
    student_BL, teacher_BL = (nearest(code_BLC, pipe.teacher.codebook) for code_BLC in (student, teacher))
    agree_BB = (student_BL[:, None] == teacher_BL[None]).float().mean(2)
    own_B, best_other_B = agree_BB.diag(), (agree_BB - 2 * torch.eye(8)).amax(1)
    assert own_B.mean() > 1.5 * best_other_B.mean()
