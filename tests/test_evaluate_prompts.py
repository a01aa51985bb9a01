"""The command `evaluate` on a model of captions, against a handful of emoji that are squares of noise."""

import dataclasses

import pytest
import torch

from distilled_decoding import commands, zoo
from distilled_decoding.checkpoint import save_component
from distilled_decoding.evaluate import EvaluationSettings
from distilled_decoding.metrics.alignment import Retriever, RetrieverConfig, alignment
from distilled_decoding.metrics.features import Classifier, ClassifierConfig, classifier_extractor
from distilled_decoding.metrics.pictures import Pictures
from tests.test_evaluate import SIZE, TABLE, TextPipeline

NAMES = tuple(f"name {number}" for number in range(100))
SETTINGS = EvaluationSettings(("teacher", "1"), num=20, seeds=(0,), keep=4)


class ColourPipeline(TextPipeline):
    """Its images in three equal channels, asked for by the prompts of any folder."""

    image_shape = (3, SIZE, SIZE)

    def table(self, prompts, column=None):
        assert prompts.is_dir() and column is None
        return TABLE

    def generate(self, codes, condition, key_B):
        for image_BCHW, code_BLC in super().generate(codes, condition, key_B):
            yield image_BCHW.expand(-1, 3, -1, -1), code_BLC


@pytest.fixture
def shown(monkeypatch, tmp_path):
    """The pictures and the retriever that lie in the zoo."""
    torch.manual_seed(0)
    features = classifier_extractor(Classifier(ClassifierConfig(image_channels=3, width=2, num_classes=5)).eval())
    features = dataclasses.replace(features, name="effnet-lite0", distance="FD-EffLite0", num_classes=None)
    monkeypatch.setattr(zoo, "FOLDER", tmp_path / "zoo")
    monkeypatch.setattr(zoo, "effnet_lite0_extractor", lambda device: features)
    image_NCHW = torch.randint(0, 256, (60, 3, SIZE, SIZE), dtype=torch.uint8)
    pictures = Pictures(image_NCHW, (*NAMES[:58], "name 90", "name 90, flat"))
    config = RetrieverConfig(NAMES, widths=(4,), embedding=8)
    retriever = Retriever(config).eval()
    pictures.save(tmp_path / "zoo" / "emoji-features")
    save_component(tmp_path / "zoo" / "emoji-features" / "names", retriever, config, torch.float32)
    return pictures, retriever


def test_a_model_of_captions_is_measured_against_emoji_and_by_the_names_of_its_prompts(shown, tmp_path):
    values = commands.evaluate_model("text", ColourPipeline(), tmp_path / "out", SETTINGS, prompts=tmp_path)
    assert values["features"]["name"] == "effnet-lite0"
    assert values["reference"]["images"] == "real emoji" and values["reference"]["count"] == 60
    assert values["methods"]["teacher"]["alignment"] and not values["methods"]["teacher"]["accuracy"]
    text = (tmp_path / "out" / "table.md").read_text()
    assert "FD-EffLite0" in text and "| alignment |" in text and "of 3 prompts in turn" in text
    again = commands.evaluate_model("text", ColourPipeline(), tmp_path / "out", SETTINGS, prompts=tmp_path)
    assert again == values


def test_real_pictures_are_judged_by_the_prompts_that_were_asked_for(shown):
    pictures, retriever = shown
    judge = zoo.judge(TABLE.prompts, (3, SIZE, SIZE))
    assert judge.name_N.tolist() == [7, -1, 90]
    assert judge.real == alignment(retriever, [pictures.image_NCHW[[7, 59]]], torch.tensor([7, 90]))


def test_nothing_is_said_of_prompts_without_a_known_name_or_of_pictures_of_another_shape(shown):
    assert zoo.judge(["a dog on the moon"], (3, SIZE, SIZE)) is None
    assert zoo.judge(TABLE.prompts, (3, 2 * SIZE, SIZE)) is None
    assert zoo.judge(["name 99"], (3, SIZE, SIZE)).real is None


def test_where_no_emoji_of_their_shape_are_shipped_real_images_are_asked_for(shown, monkeypatch, tmp_path):
    pipeline = ColourPipeline()
    for folder, shape in ((tmp_path / "zoo", (3, 2 * SIZE, SIZE)), (tmp_path / "empty", (3, SIZE, SIZE))):
        monkeypatch.setattr(zoo, "FOLDER", folder)
        pipeline.image_shape = shape
        with pytest.raises(ValueError, match=f"pictures of 3x{shape[1]}x8 are shipped: give --reference"):
            commands.evaluate_model("text", pipeline, tmp_path / "out", SETTINGS, prompts=tmp_path)
    assert zoo.judge(TABLE.prompts, (3, SIZE, SIZE)) is None and not (tmp_path / "out").exists()


def test_other_features_of_a_model_of_captions_need_real_images(tmp_path):
    with pytest.raises(ValueError, match="--features classifier needs real images"):
        commands.evaluate_model("text", ColourPipeline(), tmp_path, SETTINGS, features="classifier")
