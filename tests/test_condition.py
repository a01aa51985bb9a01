import pytest
import torch

from distilled_decoding.condition import Condition


def test_labels_are_checked_and_become_int64():
    assert Condition.labels([0, 9], 10).label_B.dtype == torch.int64
    with pytest.raises(ValueError, match=r"label 10 is outside 0\.\.9"):
        Condition.labels([3, 10], 10)
    with pytest.raises(ValueError, match="label -1"):
        Condition.labels(torch.tensor([-1]), 10)
    with pytest.raises(ValueError, match="flat"):
        Condition.labels(torch.tensor([[1]]), 10)


def test_balanced_takes_the_labels_in_turn():
    assert Condition.balanced(7, 3).label_B.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_with_null_is_the_batch_then_its_null():
    both = Condition.labels([2, 0], 3).with_null()
    assert len(both) == 4
    assert both.label_B.tolist() == [2, 0, 3, 3]


def test_slices_and_indices_join_to_the_whole():
    condition = Condition.balanced(5, 3)
    joined = Condition.cat([condition[:2], condition[torch.tensor([2, 3, 4])]])
    assert torch.equal(joined.label_B, condition.label_B)
    with pytest.raises(ValueError, match=r"\[3, 4\]"):
        Condition.cat([condition, Condition.balanced(1, 4)])


def test_to_moves_the_labels():
    assert Condition.balanced(2, 2).to("meta").label_B.device.type == "meta"
