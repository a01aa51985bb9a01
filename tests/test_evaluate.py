import dataclasses
import json

import pytest
import torch
from torch import nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.checkpoint import fingerprint
from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Captions, Classes, Labels
from distilled_decoding.evaluate import (
    EvaluationSettings,
    Likeness,
    Quality,
    Run,
    evaluate,
    kept_features,
    kept_images,
    summary,
)
from distilled_decoding.export import write_npz
from distilled_decoding.flow import FlowSettings
from distilled_decoding.images import to_uint8
from distilled_decoding.index import PipelineConfig
from distilled_decoding.metrics.alignment import Judge, Retriever, RetrieverConfig, alignment
from distilled_decoding.metrics.features import Classifier, ClassifierConfig, classifier_extractor
from distilled_decoding.metrics.frechet import Statistics, frechet_distance
from distilled_decoding.metrics.kernel_distance import kernel_distance
from distilled_decoding.metrics.precision_recall import precision_recall
from distilled_decoding.metrics.reference import make_reference
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.prompts import CaptionTable
from distilled_decoding.sampling import Plan
from distilled_decoding.teacher import TeacherSampling
from tests import children, tiny

CLASSES, SIZE, MICRO_BATCH = 3, 8, 32
QUICK = EvaluationSettings(("teacher", "1", "onestep"), num=100, seeds=(0, 1, 2), keep=5)


class StubTeacher(nn.Module):
    """A token is the brightness of a pixel."""

    num_classes = CLASSES
    order = BlockOrder((16, 48))

    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.linspace(-1, 1, 16)[:, None], requires_grad=False)

    def decode(self, code_BLC):
        return code_BLC.mT.unflatten(2, (SIZE, SIZE))


class StubPipeline:
    """Images are flat, brighter with label and noise; the student copies the teacher and adds its bias to block 1."""

    dtype, is_compiled, num_classes, device = torch.float32, False, CLASSES, torch.device("cpu")
    image_shape = (1, SIZE, SIZE)

    def __init__(self, bias=0.0):
        self.teacher, self.student = StubTeacher(), nn.Linear(1, 1)
        nn.init.zeros_(self.student.weight), nn.init.constant_(self.student.bias, bias)
        self.config = PipelineConfig(
            "stub", ("a", "b", "c"), TeacherSampling(), FlowSettings(), (0, 1), 0, micro_batch=MICRO_BATCH
        )
        self.fingerprint, self.student_fingerprint = fingerprint(self.teacher), fingerprint(self.student)
        self.calls = 0

    def plan(self, steps):
        if isinstance(steps, str):
            return Plan((), ancestral=steps == "teacher-ancestral")
        if steps > 2:
            raise ValueError(f"steps must lie in 1..2, got {steps}")
        return Plan(tuple(range(steps)))

    def codes(self, plan, condition, key_B):
        level_B = gaussian_noise(key_B, 1, 1).flatten() + 4 * condition.label_B + 4
        level_BL = level_B[:, None].repeat(1, SIZE**2)
        if plan.schedule:
            level_BL[:, 16:] += self.student.bias
        return lookup(level_BL.round().clamp(0, 15).long(), self.teacher.codebook)

    def generate(self, codes, condition, key_B):
        self.calls += 1
        for index_B in torch.arange(len(condition)).split(MICRO_BATCH):
            code_BLC = codes(condition[index_B], key_B[index_B])
            yield to_uint8(self.teacher.decode(code_BLC)), code_BLC


@pytest.fixture(scope="module")
def extractor():
    torch.manual_seed(0)
    return classifier_extractor(Classifier(ClassifierConfig(image_channels=1, width=2, num_classes=CLASSES)).eval())


@pytest.fixture(scope="module")
def reference(extractor):
    shape = (200, 1, SIZE, SIZE)
    image_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return make_reference(extractor, [image_NCHW], "noise")


def run(pipeline, extractor, reference, out, settings=QUICK, progress=lambda num: None):
    return evaluate(pipeline, Classes(pipeline.num_classes), extractor, settings, reference, out, progress)


def of(runs, method):
    return [one for one in runs if one.method == method]


def test_every_method_of_a_real_pipeline_is_measured(extractor, reference, tmp_path):
    pipeline = tiny.pipeline()
    methods = ("teacher", "teacher-ancestral", "1", "2", "4", "onestep", "skip:3", "span:2:4")
    settings = EvaluationSettings(methods, num=20, seeds=(0, 1), keep=3)
    runs = run(pipeline, extractor, reference, tmp_path / "out", settings)
    assert [(one.method, one.seed) for one in runs] == [(m, s) for m in methods for s in (0, 1)]
    assert [one.passes for one in runs[::2]] == [16, 16, 1, 2, 4, 1, 13, 4]
    for one in runs:
        assert one.quality.frechet_distance > 0 and one.likeness.distance_to_teacher > 0
        assert one.quality.seconds_per_image > 0 and one.quality.inception_score >= 1
        assert len(one.likeness.agreement_S) == 16 and one.quality.alignment is None
        assert kept_images(tmp_path / "out", one.method, one.seed).shape == (3, 1, SIZE, SIZE)
    values = summary(runs, settings, pipeline, pipeline.table(), "tiny", extractor, reference)
    assert json.loads(json.dumps(values)) == values
    assert values["asked"] == {"kind": "label", "count": 3, "first": []}
    assert values["blocks"] == [1] * 16 and list(values["methods"]) == list(methods)
    assert values["methods"]["teacher"]["agreement"]["tokens"]["mean"] == 1 > values["chance"]["tokens"]["mean"]


def test_a_run_is_what_measuring_all_its_images_at_once_gives(extractor, reference, tmp_path):
    pipeline = StubPipeline()
    quality = of(run(pipeline, extractor, reference, tmp_path), "teacher")[1].quality
    condition, key_B = tiny.labels(100, CLASSES), image_keys("evaluation", 1, range(100))
    code_BLC = pipeline.codes(pipeline.plan("teacher"), condition, key_B)
    image_NCHW = to_uint8(pipeline.teacher.decode(code_BLC))
    whole = make_reference(extractor, [image_NCHW], "all")
    assert quality.frechet_distance == pytest.approx(frechet_distance(whole.statistics, reference.statistics), rel=1e-3)
    distance = kernel_distance(reference.feature_ND, whole.feature_ND)
    assert quality.kernel_distance == pytest.approx(distance, rel=1e-3)
    assert (quality.precision, quality.recall) == precision_recall(reference.feature_ND, whole.feature_ND)
    predicted = extractor.scores(image_NCHW).logits_BV.argmax(1)
    assert quality.accuracy == pytest.approx((predicted == condition.label_B).float().mean().item())
    assert torch.equal(kept_images(tmp_path, "teacher", 1), image_NCHW[:5])


def test_shared_noise_cannot_bring_a_student_closer_than_the_floor(extractor, reference, tmp_path):
    runs = run(StubPipeline(), extractor, reference, tmp_path)
    for student, teacher in zip(of(runs, "1"), of(runs, "teacher"), strict=True):
        assert teacher.likeness == student.likeness
        assert student.likeness.distance_to_teacher > 0 and student.likeness.ratio_to_teacher == 1
        assert student.likeness.agreement_S == (1, 1) > teacher.likeness.repeat_S > (0, 0)
    assert torch.equal(kept_images(tmp_path, "1", 2), kept_images(tmp_path, "teacher", 2))


def test_the_floor_compares_each_seed_with_the_next_in_turn(extractor, reference, tmp_path):
    runs = run(StubPipeline(), extractor, reference, tmp_path)
    features = [kept_features(tmp_path, "teacher", seed) for seed in QUICK.seeds]
    sets = [Statistics.of(feature_ND, extractor.fingerprint, "samples", None) for feature_ND in features]
    expected = [frechet_distance(sets[0], sets[1]), frechet_distance(sets[1], sets[2])]
    expected.append(frechet_distance(sets[2], sets[0]))
    assert [one.likeness.distance_to_teacher for one in of(runs, "teacher")] == expected


def test_agreement_falls_in_the_block_that_the_student_gets_wrong(extractor, reference, tmp_path):
    for one in of(run(StubPipeline(bias=1.0), extractor, reference, tmp_path), "1"):
        assert one.likeness.agreement_S[0] == 1 and one.likeness.agreement_S[1] < 0.1
    pipeline, settings = StubPipeline(bias=1.0), QUICK
    runs = run(pipeline, extractor, reference, tmp_path)
    tokens = summary(runs, settings, pipeline, Classes(CLASSES), "stub", extractor, reference)["methods"]["1"][
        "agreement"
    ]["tokens"]
    assert 0.25 <= tokens["mean"] < 0.25 + 0.75 * 0.1


def test_a_biased_student_and_independent_positions_are_seen_to_be_worse(extractor, reference, tmp_path):
    runs = run(StubPipeline(bias=3.0), extractor, reference, tmp_path)
    floor = max(one.likeness.distance_to_teacher for one in of(runs, "teacher"))
    for method in ("1", "onestep"):
        assert all(one.likeness.distance_to_teacher > 2 * floor for one in of(runs, method))


def test_a_stopped_evaluation_goes_on_where_it_was(extractor, reference, tmp_path):
    def without_times(runs):
        return [dataclasses.replace(one, quality=dataclasses.replace(one.quality, seconds_per_image=0)) for one in runs]

    whole = run(StubPipeline(), extractor, reference, tmp_path / "whole")
    stopped, done = StubPipeline(), []

    def stop_in_the_second_run(num):
        done.append(num)
        if sum(done) > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, extractor, reference, tmp_path / "parts", progress=stop_in_the_second_run)
    resumed, done = StubPipeline(), []
    runs = run(resumed, extractor, reference, tmp_path / "parts", progress=done.append)
    assert stopped.calls == 2 and resumed.calls == 8
    assert sum(done) == 9 * QUICK.num
    assert without_times(runs) == without_times(whole)
    again = StubPipeline()
    assert run(again, extractor, reference, tmp_path / "parts") == runs
    assert again.calls == 0


def test_a_folder_of_another_model_is_refused_before_anything_is_sampled(extractor, reference, tmp_path):
    run(StubPipeline(), extractor, reference, tmp_path)
    other = StubPipeline(bias=1.0)
    with pytest.raises(
        ValueError, match="1-seed0.json was made from something else: its student is .* choose another --out"
    ):
        run(other, extractor, reference, tmp_path)
    teacher_only = dataclasses.replace(QUICK, methods=("teacher",))
    run(other, extractor, reference, tmp_path, teacher_only)
    assert other.calls == 0
    with pytest.raises(ValueError, match="its num is 100, not 90"):
        run(StubPipeline(), extractor, reference, tmp_path, dataclasses.replace(QUICK, num=90))
    brighter = make_reference(extractor, [torch.full((50, 1, SIZE, SIZE), 200, dtype=torch.uint8)], "bright")
    # Mean and covariance alone, as others publish them, of a number of images that they do not say.
    alone = dataclasses.replace(reference, statistics=dataclasses.replace(reference.statistics, count=None))
    wider = dataclasses.replace(alone.statistics, covariance_DD=2 * alone.statistics.covariance_DD)
    for other in (brighter, alone, dataclasses.replace(alone, statistics=wider)):
        with pytest.raises(ValueError, match="its reference is "):
            run(StubPipeline(), extractor, other, tmp_path)


def test_without_a_teacher_or_a_second_seed_there_is_no_distance_to_it(extractor, reference, tmp_path):
    one_seed = dataclasses.replace(QUICK, seeds=(0,))
    for one in run(StubPipeline(), extractor, reference, tmp_path, one_seed):
        assert one.likeness.distance_to_teacher is None and one.likeness.repeat_S is None
        assert one.likeness.ratio_to_teacher and one.likeness.agreement_S
    no_teacher = dataclasses.replace(QUICK, methods=("1",))
    runs = run(StubPipeline(), extractor, reference, tmp_path, no_teacher)
    beside = of(run(StubPipeline(), extractor, reference, tmp_path / "beside"), "1")
    assert [one.likeness for one in runs] == [Likeness(None, None, None, one.likeness.repeat_S) for one in beside]
    values = summary(runs, no_teacher, StubPipeline(), Classes(CLASSES), "stub", extractor, reference)
    assert values["chance"] is None and values["methods"]["1"]["agreement"] is None
    assert 0 < values["methods"]["1"]["repeat"]["tokens"]["mean"] < 1


class TextPipeline(StubPipeline):
    """The same of captions, whose first feature is the number of the prompt."""

    num_classes = 0

    def codes(self, plan, condition, key_B):
        assert not condition.null_B.any() and len(condition) <= MICRO_BATCH
        return super().codes(plan, Labels(condition.feature_BTF[:, 0, 0].long(), CLASSES), key_B)


def captions():
    """Of prompts 0, 1 and 2, whose features are their numbers."""
    feature_BTF = torch.arange(3.0)[:, None, None].expand(3, 2, 4)
    return Captions(feature_BTF, torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))


TABLE = CaptionTable(captions(), ["name 7", "something unheard of", "name 90, flat"], {"prompts": "abc"})


@pytest.fixture(scope="module")
def judge():
    torch.manual_seed(0)
    names = tuple(f"name {number}" for number in range(100))
    retriever = Retriever(RetrieverConfig(names, image_channels=1, widths=(4,), embedding=8)).eval()
    return Judge(retriever, retriever.numbers(TABLE.prompts), real=0.5)


TEXT = EvaluationSettings(("teacher", "1", "onestep"), num=40, seeds=(0, 1), keep=40)


@pytest.fixture(scope="module")
def by_prompt(extractor, reference, judge, tmp_path_factory):
    """A function that evaluates the model of captions, each time into the same folder."""
    blind, folder = dataclasses.replace(extractor, num_classes=None), tmp_path_factory.mktemp("text")

    def again(table=TABLE, judge=judge):
        return evaluate(TextPipeline(), table, blind, TEXT, reference, folder, judge=judge), folder

    return again


def test_a_model_of_captions_is_measured_as_its_like_of_classes_is(extractor, reference, by_prompt, tmp_path):
    """The same images are asked for, once by caption and once by label, so everything but names must agree."""
    by_label = run(StubPipeline(), dataclasses.replace(extractor, num_classes=None), reference, tmp_path, TEXT)
    for one, other in zip(by_prompt()[0], by_label, strict=True):
        expected = dataclasses.replace(other.quality, seconds_per_image=one.quality.seconds_per_image)
        assert dataclasses.replace(one.quality, alignment=None) == expected
        assert one.likeness == other.likeness and one.quality.accuracy is None


def test_the_summary_says_what_a_model_of_captions_was_asked(extractor, reference, judge, by_prompt):
    values = summary(by_prompt()[0], TEXT, TextPipeline(), TABLE, "text", extractor, reference, judge)
    assert values["asked"] == {"kind": "prompt", "count": 3, "first": [*TABLE.prompts * 13, TABLE.prompts[0]]}
    assert values["reference"]["alignment"] == 0.5 and values["methods"]["1"]["alignment"]


def test_alignment_of_a_run_is_that_of_all_its_images_whose_names_are_known(judge, by_prompt):
    runs, folder = by_prompt()
    name_N = judge.name_N.repeat(14)[: TEXT.num]
    assert (name_N >= 0).sum() == 27
    for one in runs:
        image_NCHW = kept_images(folder, one.method, one.seed)
        assert one.quality.alignment == alignment(judge.retriever, [image_NCHW], name_N)


def test_other_prompts_and_another_retriever_are_another_evaluation(by_prompt):
    by_prompt()
    with pytest.raises(ValueError, match='its asked.prompts is "abc", not "def"; choose another --out'):
        by_prompt(table=dataclasses.replace(TABLE, identity={"prompts": "def"}))
    with pytest.raises(ValueError, match="its retriever is"):
        by_prompt(judge=None)


def test_few_samples_or_few_real_images_are_warned_of(extractor, reference, tmp_path):
    few = EvaluationSettings(("1",), num=8, seeds=(0,))
    with pytest.warns(UserWarning, match="8 images do not fill 8 features.*KID"):
        run(StubPipeline(), extractor, reference, tmp_path / "a", few)
    shape = (5, 1, SIZE, SIZE)
    real = make_reference(extractor, [torch.randint(0, 256, shape, dtype=torch.uint8)], "five")
    with pytest.warns(UserWarning, match="5 images do not fill"):
        run(StubPipeline(), extractor, real, tmp_path / "b", dataclasses.replace(few, num=100))


def test_statistics_alone_give_a_frechet_distance_and_nothing_else(extractor, reference, tmp_path):
    alone = dataclasses.replace(reference, feature_ND=None)
    quality = run(StubPipeline(), extractor, alone, tmp_path)[0].quality
    assert quality.frechet_distance > 0
    assert quality.kernel_distance is quality.precision is quality.recall is None


def test_what_cannot_be_measured_is_refused_before_anything_is_written(extractor, reference, tmp_path):
    with pytest.raises(ValueError, match=r"1\.\.2, got 4"):
        run(StubPipeline(), extractor, reference, tmp_path, dataclasses.replace(QUICK, methods=("4",)))
    real = reference.statistics
    for field, value, message in [
        ("extractor", "other", "other"),
        ("image_shape", (1, 16, 16), "16"),
    ]:
        with pytest.raises(ValueError, match=message):
            foreign = dataclasses.replace(reference, statistics=dataclasses.replace(real, **{field: value}))
            run(StubPipeline(), extractor, foreign, tmp_path)
    with pytest.raises(ValueError, match="classes"):
        run(StubPipeline(), dataclasses.replace(extractor, num_classes=10), reference, tmp_path)
    with pytest.raises(ValueError, match="classifier of 3 classes, the model reads captions; choose other features"):
        run(TextPipeline(), extractor, reference, tmp_path)
    with pytest.raises(ValueError, match="needs at least 4"):
        few = dataclasses.replace(reference, statistics=dataclasses.replace(real, count=3))
        run(StubPipeline(), extractor, few, tmp_path)
    many = StubPipeline()
    many.num_classes = 200
    with pytest.raises(ValueError, match="samples of all 200 classes, got num 100"):
        run(many, dataclasses.replace(extractor, num_classes=None), reference, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("fast",)}, "unknown method 'fast'"),
        ({"methods": ("1", "1")}, "methods must be given, each once"),
        ({"seeds": ()}, "seeds must be given"),
        ({"num": 3}, "num must be at least 4"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**fields)


def test_a_summary_gives_mean_and_spread_and_never_the_best(extractor, reference):
    def one(method, seed, distance, ratio):
        quality = Quality(distance, None, 5.0, None, None, 0.925, None, 0.0123)
        place = {"machine": {"cores": 2, "gpu": None}, "commit": "abc" if seed else "def"}
        return Run(method, seed, 1, place, quality, Likeness(ratio, 2.0, (0.5, 0.1), None))

    runs = [one("teacher", 0, 4.0, 1.0), one("teacher", 1, 5.0, 1.0), one("1", 0, 6.0, 1.5), one("1", 1, 8.0, 1.6)]
    settings = EvaluationSettings(("teacher", "1"), num=10_000, seeds=(0, 1))
    values = summary(runs, settings, StubPipeline(), Classes(CLASSES), "stub", extractor, reference)
    assert values["commit"] == "several" and values["machine"] == {"cores": 2, "gpu": None}
    measured = values["methods"]["1"]
    assert measured["frechet_distance"] == {"mean": 7.0, "spread": pytest.approx(2**0.5), "per_seed": [6.0, 8.0]}
    assert measured["kernel_distance"] is None and measured["passes"] == 1
    # Blocks of 16 and 48 tokens.
    assert measured["agreement"]["tokens"]["mean"] == pytest.approx(0.2)
    assert measured["agreement"]["blocks"] == [0.5, 0.1]


def test_processes_that_share_an_evaluation_change_no_digit(tmp_path):
    real_NCHW = torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    write_npz(tmp_path / "real.npz", [real_NCHW], torch.zeros(20, dtype=torch.int64))
    words = ["evaluate", "fashion-llamagen", "--methods", "1", "--seeds", "0", "1", "--num", "8"]
    words += ["--reference", tmp_path / "real.npz", "--out"]
    ranks = children.ranks([*words, tmp_path / "two"], [tmp_path / "first.txt", tmp_path / "second.txt"])
    alone = children.command([*words, tmp_path / "one"], tmp_path / "alone.txt")
    assert [children.exit_code(process) for process in (*ranks, alone)] == [0, 0, 0]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("two", "one")]
    for one in summaries:
        for values in one["methods"].values():
            values.pop("seconds_per_image")
    assert summaries[0] == summaries[1]
    for file in (tmp_path / "one").glob("*-seed*.safetensors"):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
