import pytest
import torch

from distilled_decoding.blocks import BlockOrder

VAR_LIKE = BlockOrder((1, 4, 9))


def test_sizes_add_up_and_spans_tile_the_sequence():
    assert (VAR_LIKE.length, VAR_LIKE.num_blocks, VAR_LIKE.starts) == (14, 3, (0, 1, 5))
    tokens = [token for block in range(3) for token in range(14)[VAR_LIKE.span(block)]]
    assert tokens == list(range(14))
    assert VAR_LIKE.block_L().tolist() == [0] + [1] * 4 + [2] * 9


def test_raster_is_one_token_a_block():
    order = BlockOrder.raster(5)
    assert order.sizes == (1, 1, 1, 1, 1)
    assert order.block_L().tolist() == [0, 1, 2, 3, 4]


def test_known_tokens_are_those_of_the_leading_blocks():
    known_BL = VAR_LIKE.known_BL(torch.tensor([0, 1, 2, 3]))
    assert known_BL.sum(-1).tolist() == [0, 1, 5, 14]
    assert known_BL.dtype == torch.bool
    assert (known_BL.int().diff(dim=1) <= 0).all()  # known first, noise behind


@pytest.mark.parametrize("own_block", [True, False])
def test_attention_mask_pair_by_pair(own_block):
    block_of = VAR_LIKE.block_L().tolist()
    attends_LL = VAR_LIKE.attends_LL(own_block)
    for query in range(14):
        for key in range(14):
            own = block_of[query] == block_of[key] if own_block else query == key
            assert attends_LL[query, key].item() == (own or block_of[key] < block_of[query])


def test_raster_masks_are_causal_for_teacher_and_student():
    causal_LL = torch.ones(6, 6).tril().bool()
    assert torch.equal(BlockOrder.raster(6).attends_LL(True), causal_LL)
    assert torch.equal(BlockOrder.raster(6).attends_LL(False), causal_LL)


@pytest.mark.parametrize("sizes", [(), (1, 0), (2, -1)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="sizes="):
        BlockOrder(sizes)


@pytest.mark.parametrize("block", [-1, 3])
def test_blocks_that_do_not_exist_are_refused(block):
    with pytest.raises(ValueError, match=f"block {block} does not exist"):
        VAR_LIKE.span(block)


def test_good_schedules_come_back_as_tuples():
    assert VAR_LIKE.check_schedule([0], [0, 2]) == (0,)
    assert VAR_LIKE.check_schedule([0, 2], [0, 2]) == (0, 2)


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ([], "begin with block 0"),
        ([1], "begin with block 0"),
        ([0, 0], "ascend"),
        ([0, 2, 1], "ascend"),
        ([0, 3], "past the last"),
        ([0, 1], r"cannot start at blocks \[1\]"),
    ],
)
def test_bad_schedules_are_refused(blocks, sentence):
    with pytest.raises(ValueError, match=sentence):
        VAR_LIKE.check_schedule(blocks, [0, 2])
