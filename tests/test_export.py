from pathlib import Path

import numpy as np
import pytest
import torch

from distilled_decoding.export import check_suffix, read_pngs, write_npz, write_pngs


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back_from_their_pngs_exactly(tmp_path: Path, channels: int) -> None:
    image_BCHW = torch.arange(4 * channels * 30).view(4, channels, 5, 6).to(torch.uint8)
    write_pngs(tmp_path / "new", 7, image_BCHW)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [f"{i:06d}.png" for i in range(7, 11)]
    found = read_pngs(tmp_path / "new", range(7, 11))
    assert found is not None and torch.equal(found, image_BCHW)
    assert read_pngs(tmp_path / "new", range(6, 9)) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_the_evaluators_file_has_its_layout(tmp_path: Path, channels: int) -> None:
    image_NCHW = torch.arange(2 * channels * 30).view(2, channels, 5, 6).to(torch.uint8)
    write_npz(tmp_path / "new" / "s.npz", image_NCHW, torch.tensor([3, 1]))
    arrays = np.load(tmp_path / "new" / "s.npz")
    assert arrays["arr_0"].shape == (2, 5, 6, channels) and arrays["arr_0"].dtype == np.uint8
    assert np.array_equal(arrays["arr_0"][1, 2, 3], image_NCHW[1, :, 2, 3].numpy())
    assert arrays["arr_1"].tolist() == [3, 1] and arrays["arr_1"].dtype == np.int64
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.npz"]


def test_a_name_says_what_a_file_is() -> None:
    check_suffix(Path("a.PNG"), ".png")
    check_suffix(None, ".png")
    with pytest.raises(ValueError, match=r"a\.jpg must end in \.png, got '\.jpg'"):
        check_suffix(Path("a.jpg"), ".png")
    with pytest.raises(ValueError, match="'no suffix'"):
        check_suffix(Path("a"), ".npz")
