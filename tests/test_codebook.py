import pytest
import torch

from distilled_decoding.codebook import lookup, nearest


@pytest.fixture
def codebook_VC():
    return torch.randn(300, 5, generator=torch.Generator().manual_seed(0))


def test_lookup_then_nearest_is_the_identity(codebook_VC):
    token_BL = torch.randint(300, (4, 7), generator=torch.Generator().manual_seed(1))
    code_BLC = lookup(token_BL, codebook_VC)
    assert torch.equal(code_BLC[2, 3], codebook_VC[token_BL[2, 3]])
    assert torch.equal(nearest(code_BLC, codebook_VC), token_BL)


@pytest.mark.parametrize("chunk", [1, 10, 1024])
def test_nearest_is_the_smallest_distance_for_every_chunk_size(codebook_VC, chunk):
    code_BLC = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(2))
    distance_BLV = (code_BLC[..., None, :].double() - codebook_VC.double()).norm(dim=-1)
    assert torch.equal(nearest(code_BLC, codebook_VC, chunk), distance_BLV.argmin(-1))


def test_norms_count_where_codes_are_not_on_a_sphere():
    codebook_VC = torch.tensor([[1.0, 0.0], [10.0, 0.0]])
    assert nearest(torch.tensor([[2.0, 0.0], [9.0, 0.0]]), codebook_VC).tolist() == [0, 1]


def test_half_precision_is_compared_in_float32(codebook_VC):
    code_LC = codebook_VC[:50].bfloat16()
    assert torch.equal(nearest(code_LC, codebook_VC.bfloat16()), torch.arange(50))


def test_channels_must_agree(codebook_VC):
    with pytest.raises(ValueError, match="4 channels but the codebook has 5"):
        nearest(torch.zeros(2, 3, 4), codebook_VC)
