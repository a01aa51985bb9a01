import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from distilled_decoding.export import check_file, read_pngs, write_npz, write_picture, write_pngs


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(4, 1, 5, 6), (4, 3, 5, 6), (2, 3, 256, 256)])
def test_images_come_back_from_their_pngs_exactly(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image_BCHW, indices = noise(*shape), [7, 9, 10, 2][: shape[0]]
    write_pngs(tmp_path / "new", indices, image_BCHW)
    assert {p.name for p in (tmp_path / "new").iterdir()} == {f"{i:06d}.png" for i in indices}
    assert torch.equal(read_pngs(tmp_path / "new", indices), image_BCHW)


def test_a_damaged_png_is_named(tmp_path: Path) -> None:
    write_pngs(tmp_path, [0, 1], noise(2, 3, 16, 16))
    whole = (tmp_path / "000001.png").read_bytes()
    for damaged in (b"", whole[:100]):
        (tmp_path / "000001.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000001\.png is damaged .*; delete it and run again"):
            read_pngs(tmp_path, [0, 1])


def test_a_picture_is_put_in_place_whole(tmp_path: Path) -> None:
    for value in (1, 2):
        write_picture(tmp_path / "new" / "g.png", Image.new("L", (3, 2), value))
        assert Image.open(tmp_path / "new" / "g.png").getpixel((0, 0)) == value
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["g.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_the_evaluators_file_is_what_numpy_writes(tmp_path: Path, channels: int) -> None:
    image_NCHW, label_N = noise(7, channels, 5, 6), torch.tensor([3, 1, 0, 2, 3, 3, 1])
    write_npz(tmp_path / "new" / "s.npz", image_NCHW.split(3), label_N)
    arrays = np.load(tmp_path / "new" / "s.npz")
    assert arrays["arr_0"].shape == (7, 5, 6, channels) and arrays["arr_0"].dtype == np.uint8
    assert np.array_equal(arrays["arr_0"][1, 2, 3], image_NCHW[1, :, 2, 3].numpy())
    assert arrays["arr_1"].tolist() == label_N.tolist() and arrays["arr_1"].dtype == np.int64
    images = np.ascontiguousarray(image_NCHW.permute(0, 2, 3, 1).numpy())
    np.savez(tmp_path / "numpy.npz", arr_0=images, arr_1=label_N.numpy())
    assert (tmp_path / "new" / "s.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["s.npz"]


def test_writing_holds_one_batch_however_many_there_are(tmp_path: Path) -> None:
    write_pngs(tmp_path, range(4), noise(4, 3, 64, 64))

    def peak(num_batches: int) -> int:
        tracemalloc.start()
        batches = (read_pngs(tmp_path, range(4)) for _ in range(num_batches))
        write_npz(tmp_path / "s.npz", batches, torch.zeros(4 * num_batches, dtype=torch.int64))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak(100) < peak(4) + 4 * 3 * 64 * 64 < 100 * 4 * 3 * 64 * 64 / 10


def test_a_broken_write_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    def broken() -> Iterator[torch.Tensor]:
        yield noise(2, 3, 4, 4)
        raise KeyboardInterrupt

    write_npz(tmp_path / "s.npz", [noise(2, 3, 4, 4)], torch.tensor([0, 1]))
    before = (tmp_path / "s.npz").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "s.npz", broken(), torch.zeros(4, dtype=torch.int64))
    assert (tmp_path / "s.npz").read_bytes() == before


def test_a_name_says_what_a_file_is(tmp_path: Path) -> None:
    check_file(Path("a.PNG"), ".png")
    check_file(None, ".png")
    with pytest.raises(ValueError, match=r"a\.jpg must end in \.png, got '\.jpg'"):
        check_file(Path("a.jpg"), ".png")
    with pytest.raises(ValueError, match="'no suffix'"):
        check_file(Path("a"), ".npz")
    (tmp_path / "s.npz").mkdir()
    with pytest.raises(ValueError, match=r"s\.npz is a folder; give the name of a file"):
        check_file(tmp_path / "s.npz", ".npz")
