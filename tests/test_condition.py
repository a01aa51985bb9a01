import pytest
import torch

from distilled_decoding.condition import Asked, Captions, Classes, Labels
from tests import tiny


def captions(num: int) -> Captions:
    """Captions of 1, 2, ... positions of four, with distinct features."""
    feature_BTF = 1 + torch.arange(num * 4 * 3).view(num, 4, 3).float()
    return Captions.right_padded(feature_BTF, torch.arange(4) < 1 + torch.arange(num)[:, None])


def same(one: Captions, other: Captions) -> bool:
    return all(torch.equal(value, getattr(other, name)) for name, value in vars(one).items())


def test_labels_are_checked_and_become_int64():
    assert Labels.checked([0, 9], 10).label_B.dtype == torch.int64
    with pytest.raises(ValueError, match=r"label 10 is outside 0\.\.9"):
        Labels.checked([3, 10], 10)
    with pytest.raises(ValueError, match="label -1"):
        Labels.checked(torch.tensor([-1]), 10)
    with pytest.raises(ValueError, match="flat"):
        Labels.checked(torch.tensor([[1]]), 10)


def test_with_null_is_the_batch_then_its_null():
    both = Labels.checked([2, 0], 3).with_null()
    assert len(both) == 4
    assert both.label_B.tolist() == [2, 0, 3, 3]


def test_slices_and_indices_join_to_the_whole():
    condition = tiny.labels(5)
    joined = Labels.cat([condition[:2], condition[torch.tensor([2, 3, 4])]])
    assert torch.equal(joined.label_B, condition.label_B)
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        Labels.cat([condition, tiny.labels(1, 4)])


def test_to_moves_the_labels():
    assert tiny.labels(2, 2).to("meta").label_B.device.type == "meta"


def test_a_condition_of_the_kind_required_comes_back_as_it_is():
    labels, text = tiny.labels(2), captions(2)
    assert Labels.require(labels) is labels and Captions.require(text) is text
    with pytest.raises(ValueError, match="reads Labels, got Captions; give Labels"):
        Labels.require(text)
    with pytest.raises(ValueError, match="reads Captions, got Labels; give Captions"):
        Captions.require(labels)


def test_right_padded_captions_are_rotated_until_their_text_comes_last():
    feature_BTF = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])[..., None]
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    text = Captions.right_padded(feature_BTF, mask_BT)
    assert text.feature_BTF.squeeze(2).tolist() == [[4, 1, 2, 3], [6, 7, 8, 5], [9, 10, 11, 12]]
    assert text.mask_BT.int().tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert not text.null_B.any()
    with pytest.raises(ValueError, match="caption 1 has text behind padding"):
        Captions.right_padded(feature_BTF[:2], torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]]).bool())


def test_a_null_caption_keeps_its_mask():
    text = captions(3)
    null, both = text.null(), text.with_null()
    assert torch.equal(null.mask_BT, text.mask_BT) and null.null_B.all()
    assert len(null) == 3 and len(both) == 6
    assert same(both[:3], text) and same(both[3:], null)


def test_captions_are_selected_joined_and_moved_as_a_whole():
    text = captions(4).with_null()
    selected = text[torch.tensor([5, 0])]
    assert torch.equal(selected.feature_BTF, text.feature_BTF[[5, 0]])
    assert selected.mask_BT.sum(1).tolist() == [2, 1] and selected.null_B.tolist() == [True, False]
    assert same(Captions.cat([text[:3], text[3:]]), text)
    assert all(value.device.type == "meta" for value in vars(text.to("meta")).values())
    with pytest.raises(ValueError, match=r"\[\(4, 2\), \(4, 3\)\]"):
        Captions.cat([text, Captions(text.feature_BTF[..., :2], text.mask_BT, text.null_B)])


def test_captions_of_other_shapes_or_types_are_refused():
    feature_BTF, mask_BT, null_B = torch.zeros(2, 4, 3), torch.ones(2, 4).bool(), torch.zeros(2).bool()
    with pytest.raises(ValueError, match=r"features must be floating point \[B, T, F\], got torch.float32 \[2, 4\]"):
        Captions(feature_BTF[..., 0], mask_BT, null_B)
    with pytest.raises(ValueError, match=r"got torch.int64 \[2, 4, 3\]"):
        Captions(feature_BTF.long(), mask_BT, null_B)
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 4\] .* got torch.int64 \[2, 4\]"):
        Captions(feature_BTF, mask_BT.long(), null_B)
    with pytest.raises(ValueError, match=r"mask must be bool \[2, 4\] .* got torch.bool \[2, 3\]"):
        Captions(feature_BTF, mask_BT[:, 1:], null_B)
    with pytest.raises(ValueError, match=r"null must be bool \[2\] .* got torch.bool \[1\]"):
        Captions(feature_BTF, mask_BT, null_B[1:])


def test_a_table_of_classes_gives_labels_by_number() -> None:
    table = Classes(3)
    assert (len(table), table.identity) == (3, {"num_classes": 3})
    found = table[torch.tensor([2, 0])]
    assert (found.label_B.tolist(), found.num_classes) == ([2, 0], 3)


def test_a_run_asks_its_table_in_turn_a_part_at_a_time() -> None:
    asked = Asked.in_turn(Classes(3), 7)
    assert len(asked) == 7 and asked[:].label_B.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert asked[torch.tensor([5, 6])].label_B.tolist() == [2, 0]
