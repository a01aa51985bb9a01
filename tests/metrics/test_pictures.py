import json

import pytest
import torch

from distilled_decoding.metrics.pictures import Pictures


@pytest.mark.parametrize("num", [1, 50, 123])
def test_pictures_come_back_to_the_last_bit_with_their_prompts(num, tmp_path):
    image_NCHW = torch.randint(0, 256, (num, 3, 6, 6), dtype=torch.uint8)
    pictures = Pictures(image_NCHW, tuple(f"prompt “{number}”" for number in range(num)))
    pictures.save(tmp_path)
    loaded = Pictures.load(tmp_path)
    assert torch.equal(loaded.image_NCHW, image_NCHW) and loaded.prompts == pictures.prompts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures.json", "pictures.png"]


def test_what_is_missing_or_does_not_fit_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="pictures.json is missing"):
        Pictures.load(tmp_path)
    Pictures(torch.zeros(3, 3, 6, 6, dtype=torch.uint8), ("a", "b", "c")).save(tmp_path)
    for values, message in (
        ({"size": 6, "prompts": ["a"] * 51}, "holds 50 pictures, but there are 51 prompts"),
        ({"size": 6}, "hold no pictures with prompts .'prompts'"),
        ({"size": 7000, "prompts": ["a"]}, "hold no pictures with prompts"),
    ):
        (tmp_path / "pictures.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=message):
            Pictures.load(tmp_path)
    (tmp_path / "pictures.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="pictures.png and the JSON file beside it hold no pictures"):
        Pictures.load(tmp_path)
