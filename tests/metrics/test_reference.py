"""What an extractor says of images, and references from every kind of file."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from distilled_decoding import zoo
from distilled_decoding.checkpoint import save_tensors
from distilled_decoding.export import write_npz, write_pngs
from distilled_decoding.metrics import reference as module
from distilled_decoding.metrics.features import Extractor, Scores
from distilled_decoding.metrics.frechet import Statistics
from distilled_decoding.metrics.inception_score import inception_score
from distilled_decoding.metrics.reference import (
    Reference,
    check_reference,
    make_reference,
    measure,
    read_images,
    read_reference,
)


def extractor(name="classifier", fingerprint="abc", num_classes=2):
    """Features are the means of four quarters of the first channel, logits the first two of them."""

    def scores(image_BCHW):
        feature_BD = torch.nn.functional.adaptive_avg_pool2d(image_BCHW[:, 0].float(), 2).flatten(1)
        return Scores(feature_BD, feature_BD[:, :2])

    return Extractor(name, "FD", fingerprint, 4, num_classes, scores)


def uint8_images(num=30, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8, generator=generator)


def save_npz(path, **arrays):
    np.savez(path, **arrays)
    return path


def same(a, b):
    assert torch.equal(a.statistics.mean_D, b.statistics.mean_D)
    assert torch.equal(a.statistics.covariance_DD, b.statistics.covariance_DD)
    assert torch.equal(a.feature_ND, b.feature_ND)
    return (a.features, a.sha256, a.statistics.image_shape) == (b.features, b.sha256, b.statistics.image_shape)


def test_measuring_in_batches_is_measuring_at_once():
    image_NCHW = uint8_images()
    scores = extractor().scores(image_NCHW)
    label_N = torch.arange(30) % 2
    measured = measure(extractor(), image_NCHW.split(7), label_N, "noise")
    assert torch.equal(measured.feature_ND, scores.feature_BD) and measured.statistics.image_shape == (3, 8, 8)
    assert measured.accuracy == pytest.approx((scores.logits_BV.argmax(1) == label_N).float().mean().item())
    assert measured.inception_score == inception_score(scores.logits_BV)


def test_there_is_no_accuracy_without_labels_or_with_other_classes():
    images = [uint8_images()]
    assert measure(extractor(), images, None, "noise").accuracy is None
    assert measure(extractor(num_classes=None), images, torch.zeros(30), "noise").accuracy is None


def test_images_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="noise must be images of one shape .* found 3 x 4 x 4, 3 x 8 x 8"):
        measure(extractor(), [uint8_images(), uint8_images(size=4)], None, "noise")
    with pytest.raises(ValueError, match="found none"):
        measure(extractor(), [], None, "noise")
    with pytest.raises(ValueError, match="30 images, but there are 29 labels"):
        measure(extractor(), [uint8_images()], torch.zeros(29), "noise")
    with pytest.raises(ValueError, match="at least 2 images, got 1 of noise"):
        make_reference(extractor(), [uint8_images(1)], "noise")


def test_the_shipped_reference_is_of_the_shipped_classifier():
    reference, features = zoo.reference(), zoo.extractor("classifier")
    check_reference(reference, features, 10, (1, 32, 32))
    statistics = reference.statistics
    assert (statistics.count, statistics.image_shape) == (10_000, (1, 32, 32)) and len(reference.sha256) == 64
    again = Statistics.of(reference.feature_ND, features.fingerprint, "again", None)
    # Features are stored with half the digits, statistics with all.
    torch.testing.assert_close(again.mean_D, statistics.mean_D, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again.covariance_DD, statistics.covariance_DD, rtol=1e-2, atol=1e-4)


def test_a_reference_survives_the_disk(tmp_path):
    path, made = tmp_path / "reference.safetensors", make_reference(extractor(), uint8_images().split(7), "noise")
    made.save(path)
    loaded = read_reference(path, extractor())
    assert same(loaded, made) and (loaded.statistics.count, loaded.statistics.images) == (30, "noise")
    unknown = dataclasses.replace(made.statistics, count=None, image_shape=None)
    Reference(unknown, None, "inception", "").save(path)
    loaded = Reference.load(path)
    assert (loaded.statistics.count, loaded.statistics.image_shape, loaded.feature_ND) == (None, None, None)


def test_a_reference_of_another_extractor_or_another_model_is_refused(tmp_path):
    path, made = tmp_path / "reference.safetensors", make_reference(extractor(), [uint8_images()], "noise")
    made.save(path)
    with pytest.raises(ValueError, match=r"'noise' was measured with classifier \(abc\), not with inception \(def\)"):
        read_reference(path, extractor("inception", "def"))
    with pytest.raises(ValueError, match="of a classifier of 2 classes, the model has 10"):
        check_reference(made, extractor(), 10, (3, 8, 8))
    check_reference(made, extractor(num_classes=None), 10, (3, 8, 8))
    with pytest.raises(ValueError, match="'noise' are 3 x 8 x 8 .*, the model makes 3 x 16 x 16"):
        check_reference(made, extractor(num_classes=None), 10, (3, 16, 16))
    save_tensors(path, {"weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds no reference of images .found weight"):
        read_reference(path, extractor())


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_and_pictures_hold_the_same_images(channels, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 8)
    image_NCHW = uint8_images(channels=channels)
    write_npz(tmp_path / "images.npz", [image_NCHW], torch.zeros(30, dtype=torch.int64))
    np.savez_compressed(tmp_path / "small.npz", arr_0=image_NCHW.permute(0, 2, 3, 1).contiguous().numpy())
    write_pngs(tmp_path / "pictures", range(30), image_NCHW)
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture")
    made = make_reference(extractor(), [image_NCHW], "memory")
    for name in ("images.npz", "small.npz", "pictures"):
        batches = list(read_images(tmp_path / name))
        assert [len(batch) for batch in batches] == [8, 8, 8, 6] and torch.equal(torch.cat(batches), image_NCHW)
        assert same(read_reference(tmp_path / name, extractor()), made)


def test_published_moments_are_the_statistics_of_inception_alone(tmp_path):
    image_NCHW = uint8_images()
    moments = {"mu": np.arange(4.0), "sigma": np.eye(4), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    path = save_npz(tmp_path / "all.npz", arr_0=image_NCHW.permute(0, 2, 3, 1).numpy().copy(), **moments)
    inception = extractor("inception", num_classes=None)
    reference = read_reference(path, inception)
    assert reference.statistics.mean_D.tolist() == [0, 1, 2, 3] and reference.statistics.count is None
    made = make_reference(inception, [image_NCHW], "memory")
    assert torch.equal(reference.feature_ND, made.feature_ND) and reference.sha256 == made.sha256
    assert reference.statistics.image_shape == (3, 8, 8)
    assert same(read_reference(path, extractor()), make_reference(extractor(), [image_NCHW], "memory"))

    alone = save_npz(tmp_path / "alone.npz", **moments)
    reference = read_reference(alone, inception)
    assert torch.equal(reference.statistics.covariance_DD, torch.eye(4).double()) and reference.feature_ND is None
    with pytest.raises(ValueError, match="in Inception features but no images, which the features classifier need"):
        read_reference(alone, extractor())
    with pytest.raises(ValueError, match=r"mu must be floats of shape \(4,\), got float64 of \(5,\)"):
        read_reference(save_npz(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5)), inception)


def broken(path, kind):
    image_NHWC = uint8_images().permute(0, 2, 3, 1).numpy().copy()
    arrays = {
        "dtype": {"arr_0": image_NHWC.astype(np.float32)},
        "rank": {"arr_0": image_NHWC[0]},
        "channels": {"arr_0": uint8_images().numpy()},
        "order": {"arr_0": np.asfortranarray(image_NHWC)},
        "other": {"images": image_NHWC},
        "pickle": {"arr_0": np.array([None])},
    }
    save_npz(path, **arrays.get(kind, {"arr_0": image_NHWC}))
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        path.write_text("not a zip")
    elif kind == "missing":
        path.unlink()
    elif kind == "damaged":
        path.write_bytes(content[:400] + bytes(100) + content[500:])
    elif kind == "short":
        with zipfile.ZipFile(path) as archive:
            member = archive.read("arr_0.npy")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", member[:-100])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dtype", "must be uint8 images .* got float32"),
        ("rank", r"got uint8 of \(8, 8, 3\)"),
        ("channels", r"got uint8 of \(30, 3, 8, 8\)"),
        ("order", "in C order"),
        ("other", "no item named 'arr_0.npy'"),
        ("pickle", "got object"),
        ("truncated", "not a zip file"),
        ("text", "not a zip file"),
        ("missing", "No such file"),
        ("damaged", "CRC"),
        ("short", "ends within its 30 images"),
    ],
)
def test_an_npz_that_cannot_be_read_gets_a_sentence(kind, message, tmp_path):
    path = tmp_path / "images.npz"
    broken(path, kind)
    with pytest.raises(ValueError, match=f"images.npz cannot be read as .npz: .*{message}"):
        read_reference(path, extractor())


def test_pictures_that_cannot_be_read_get_a_sentence(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_reference(folder, extractor())
    write_pngs(folder, [0], uint8_images(1))
    write_pngs(folder, [1], uint8_images(1, size=16))
    with pytest.raises(ValueError, match=r"000000.png is \[8, 8\] with 3 channels, .*000001.png \[16, 16\] with 3"):
        read_reference(folder, extractor())
    Image.new("RGBA", (8, 8)).save(folder / "000001.png")
    with pytest.raises(ValueError, match="000001.png has pixels of mode RGBA"):
        read_reference(folder, extractor())
    content = (folder / "000000.png").read_bytes()
    for damaged in (content[:-60], b"text"):
        (folder / "000001.png").write_bytes(damaged)
        with pytest.raises(ValueError, match="000001.png is no picture, or a damaged one"):
            read_reference(folder, extractor())
    with pytest.raises(ValueError, match="images.csv is no source of images"):
        read_reference(tmp_path / "images.csv", extractor())
