import pytest
import torch
import torch.nn.functional as F

from distilled_decoding.checkpoint import fingerprint, save_component
from distilled_decoding.metrics.alignment import Retriever, RetrieverConfig, aligned, alignment, load_retriever

NAMES = tuple(f"name {number}" for number in range(150))
SMALL = RetrieverConfig(NAMES, widths=(4, 8), embedding=8)


@pytest.fixture
def retriever():
    torch.manual_seed(0)
    return Retriever(SMALL).eval()


def pictures(num, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=generator)


def perfect(retriever, image_NCHW):
    """Names that stand exactly where the first pictures are, the others where these are not."""
    with torch.no_grad():
        vector_ND = retriever(image_NCHW.float() / 127.5 - 1)
        retriever.names.copy_(-vector_ND.mean(0).expand_as(retriever.names))
        retriever.names[: len(vector_ND)] = 3 * vector_ND


def test_pictures_and_names_lie_on_the_unit_sphere_and_logits_are_their_cosines_over_the_temperature(retriever):
    image_BCHW = torch.randn(5, 3, 8, 8)
    vector_BD, name_VD = retriever(image_BCHW), retriever.name_VD
    for unit in (vector_BD, name_VD):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(len(unit)))
    cosine_BV = F.cosine_similarity(vector_BD[:, None], retriever.names[None], dim=2)
    torch.testing.assert_close(retriever.logits_BV(image_BCHW), cosine_BV * retriever.log_scale.exp())


def test_pictures_where_their_names_are_are_all_found_and_turned_names_are_not(retriever):
    image_NCHW, name_N = pictures(40), torch.arange(40)
    perfect(retriever, image_NCHW)
    assert alignment(retriever, [image_NCHW], name_N) == 1
    # Among the 99 others is the name of the picture itself, for most.
    assert alignment(retriever, [image_NCHW], name_N.roll(1)) < 0.5


def test_a_network_that_knows_nothing_finds_one_in_a_hundred(retriever):
    name_N = torch.arange(3000) % len(NAMES)
    torch.nn.init.normal_(retriever.head.weight), torch.nn.init.normal_(retriever.head.bias, std=0.01)
    assert alignment(retriever, pictures(3000).split(100), name_N) == pytest.approx(0.01, abs=0.008)


def test_each_picture_is_judged_by_itself_whatever_the_batch_and_unknown_names_are_left_out(retriever):
    image_NCHW = pictures(60)
    perfect(retriever, image_NCHW)
    name_N = torch.where(torch.arange(60) % 3 == 0, torch.arange(60), torch.arange(60).roll(5))
    whole_N = aligned(retriever, image_NCHW, name_N)
    assert 0 < whole_N.sum() < 60
    known_N = torch.arange(60) % 4 > 0
    parts = [
        aligned(retriever, image_BCHW, name_B)
        for image_BCHW, name_B in zip(image_NCHW.split(7), name_N.where(known_N, -1).split(7), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole_N[known_N])
    assert alignment(retriever, image_NCHW.split(7), torch.full((60,), -1)) is None


def test_a_prompt_is_known_by_its_name_whatever_stands_behind_a_comma():
    config = RetrieverConfig(("red apple", "woman, red hair", *NAMES))
    prompts = ["red apple", "red apple, flat", "woman, red hair, flat", "woman", "red", "name 1", ""]
    assert Retriever(config).numbers(prompts).tolist() == [0, 0, 1, -1, -1, 3, -1]


def test_a_retriever_survives_the_disk_and_its_usual_size_is_small(retriever, tmp_path):
    save_component(tmp_path, retriever, SMALL, torch.float32)
    loaded = load_retriever(tmp_path)
    assert loaded.config == SMALL and not loaded.training and fingerprint(loaded) == fingerprint(retriever)
    usual = Retriever(RetrieverConfig(tuple(f"name {number}" for number in range(1900))))
    assert sum(value.numel() for value in usual.state_dict().values()) * 2 < 1_210_000


@pytest.mark.parametrize("names", [NAMES[:99], (*NAMES, "name 0")])
def test_too_few_names_or_one_twice_are_refused(names):
    with pytest.raises(ValueError, match="needs 100 names or more, each once"):
        RetrieverConfig(names)
