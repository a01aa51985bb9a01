import pytest
import torch
import torch.nn.functional as F

from distilled_decoding import zoo
from distilled_decoding.checkpoint import fingerprint
from distilled_decoding.metrics.features import (
    Classifier,
    ClassifierConfig,
    canonical,
    classifier_extractor,
    effnet_lite0_extractor,
    load_effnet_lite0,
)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(image_channels=1, width=4, num_classes=3)).eval()


@pytest.fixture(scope="module")
def effnet():
    return effnet_lite0_extractor()


def uint8_images(num, channels=1, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, channels, size, size), dtype=torch.uint8, generator=generator)


def test_features_are_the_pooled_last_stage_and_the_head_reads_them(classifier):
    image_BCHW = torch.randn(5, 1, 32, 32)
    scores = classifier(image_BCHW)
    maps = classifier.stages_BCHW(image_BCHW)
    assert [m.shape for m in maps] == [(5, 4, 16, 16), (5, 8, 8, 8), (5, 16, 4, 4)]
    torch.testing.assert_close(scores.feature_BD, maps[-1].mean((2, 3)))
    torch.testing.assert_close(scores.logits_BV, classifier.head(scores.feature_BD))


def test_an_image_is_judged_alone(classifier):
    image_BCHW = torch.randn(6, 1, 16, 16)
    together, alone = classifier(image_BCHW).feature_BD, classifier(image_BCHW[2:3]).feature_BD
    torch.testing.assert_close(together[2:3], alone, rtol=1e-5, atol=1e-5)


def test_the_classifier_reads_uint8_images_on_the_scale_of_its_training(classifier):
    extractor, image_BCHW = classifier_extractor(classifier), uint8_images(120)
    scores = extractor.scores(image_BCHW)
    torch.testing.assert_close(scores.logits_BV, classifier(image_BCHW.float() / 127.5 - 1).logits_BV)
    assert not scores.feature_BD.requires_grad
    assert (extractor.width, extractor.num_classes) == (16, 3) == (scores.feature_BD.shape[1], 3)
    assert extractor.fingerprint == fingerprint(classifier)


def test_effnet_lite0_is_the_network_of_its_package_on_the_scale_of_its_training(effnet):
    image_BCHW = uint8_images(2, channels=3, size=224)
    scores = effnet.scores(image_BCHW)
    assert scores.feature_BD.shape == (2, effnet.width) == (2, 1280)
    with torch.no_grad():
        logits_BV = load_effnet_lite0()((image_BCHW.float() - 127) / 128)
    torch.testing.assert_close(scores.logits_BV, logits_BV, rtol=1e-4, atol=1e-4)


def test_effnet_lite0_repeats_grey_and_resizes(effnet):
    grey_B1HW = uint8_images(2, size=32)
    logits_BV = effnet.scores(grey_B1HW).logits_BV
    torch.testing.assert_close(effnet.scores(grey_B1HW.expand(-1, 3, -1, -1)).logits_BV, logits_BV)
    enlarged = F.interpolate(grey_B1HW.float(), (224, 224), mode="bilinear", antialias=True).round().to(torch.uint8)
    torch.testing.assert_close(effnet.scores(enlarged).logits_BV, logits_BV, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["classifier", "effnet-lite0"])
def test_features_come_by_name(name):
    extractor = zoo.extractor(name)
    assert extractor.name == name and (extractor.num_classes == 10) == (name == "classifier")


def test_an_extractor_that_cannot_measure_is_refused(classifier, effnet):
    with pytest.raises(ValueError, match="read images of 1 channels, but these have 3"):
        classifier_extractor(classifier).scores(uint8_images(2, channels=3))
    with pytest.raises(ValueError, match="read images of 1 or 3 channels, but these have 2"):
        effnet.scores(uint8_images(2, channels=2))
    with pytest.raises(ValueError, match="training mode"):
        classifier_extractor(classifier.train())


def test_canonical_rows_are_those_given_whatever_their_order():
    row_NV = torch.randn(50, 3).round()
    canonical_NV = canonical(row_NV)
    assert canonical_NV.dtype == torch.float64
    assert sorted(canonical_NV.tolist()) == sorted(row_NV.double().tolist())
    assert torch.equal(canonical(row_NV.flip(0)), canonical_NV)
