"""The network was compared with torch-fidelity's module: with equal random weights its features and logits are equal
to the last bit; the list of keys is that module's."""

from pathlib import Path

import pytest
import torch

from distilled_decoding import zoo
from distilled_decoding.checkpoint import save_tensors
from distilled_decoding.metrics.features import inception_extractor
from distilled_decoding.metrics.inception import Inception, resize_tf1

KEYS = Path(__file__).parent / "inception_keys.txt"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("inception") / "weights.pth"
        torch.save({key: value.half() for key, value in Inception().state_dict().items()}, path)
    return path


def test_parameters_are_those_of_the_published_file():
    found = {key: tuple(value.shape) for key, value in Inception().state_dict().items()}
    lines = [line.split() for line in KEYS.read_text().splitlines()]
    expected = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, *shape in lines:
        expected[f"{name}.conv.weight"] = tuple(map(int, shape))
        expected |= {f"{name}.bn.{key}": (int(shape[0]),) for key in NORM[:-1]} | {f"{name}.bn.{NORM[-1]}": ()}
    assert len(lines) == 94 and found == expected


def test_a_small_grey_image_has_2048_features_and_1008_logits_without_bias(weights):
    extractor = zoo.extractor("inception", weights=weights)
    image_BCHW = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8) * 4
    scores = extractor.scores(image_BCHW)
    assert scores.feature_BD.shape == (1, extractor.width) == (1, 2048) and scores.logits_BV.shape == (1, 1008)
    assert extractor.num_classes is None and extractor.distance == "FID"
    weight_VD = torch.load(weights)["fc.weight"].float()
    torch.testing.assert_close(scores.logits_BV, scores.feature_BD @ weight_VD.T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(extractor.scores(image_BCHW.expand(-1, 3, -1, -1)).feature_BD, scores.feature_BD)


def test_both_kinds_of_file_and_ones_without_counters_give_one_network(weights, tmp_path):
    tensors = {key: value for key, value in torch.load(weights).items() if not key.endswith("num_batches_tracked")}
    save_tensors(tmp_path / "weights.safetensors", tensors)
    fingerprints = {inception_extractor(path).fingerprint for path in (weights, tmp_path / "weights.safetensors")}
    assert len(fingerprints) == 1


def test_resizing_is_that_of_tensorflow_1():
    # Output pixel i of 5 reads at i * 3 / 5: 0, 0.6, 1.2, 1.8, 2.4, and beyond the last pixel that pixel.
    row = resize_tf1(torch.tensor([[0.0, 10.0, 40.0]] * 3)[None, None], 5)
    torch.testing.assert_close(row, torch.tensor([0.0, 6.0, 16.0, 34.0, 40.0]).expand(1, 1, 5, 5))
    column = resize_tf1(torch.tensor([[0.0], [10.0], [40.0]])[None, None], 5)
    torch.testing.assert_close(column, row.mT)
    # Shrinking skips pixels.
    assert resize_tf1(torch.arange(6.0).expand(1, 1, 6, 6), 3)[0, 0, 0].tolist() == [0, 2, 4]


def test_a_file_that_is_missing_or_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pt_inception-2015-12-05-6726825d.pth.*--inception-weights \(got None\)"):
        inception_extractor(None)
    with pytest.raises(ValueError, match="got .*absent.pth"):
        inception_extractor(tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth is no file of weights"):
        inception_extractor(tmp_path / "text.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no tensors by name, but a list"):
        inception_extractor(tmp_path / "list.pth")
    torch.save({"fc.bias": torch.zeros(1008)}, tmp_path / "part.pth")
    with pytest.raises(ValueError, match="lacks 'Conv2d_1a_3x3.conv.weight'"):
        inception_extractor(tmp_path / "part.pth")
