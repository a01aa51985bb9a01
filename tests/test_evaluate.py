import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distilled_decoding.checkpoint import fingerprint
from distilled_decoding.condition import Labels
from distilled_decoding.evaluate import (
    Evaluation,
    EvaluationSettings,
    Result,
    evaluate,
    kept_images,
    markdown_table,
    summary,
)
from distilled_decoding.flow import FlowSettings
from distilled_decoding.images import to_uint8
from distilled_decoding.metrics.features import Classifier, ClassifierConfig
from distilled_decoding.metrics.frechet import Statistics, frechet_distance
from distilled_decoding.metrics.reference import real_statistics
from distilled_decoding.noise import gaussian_noise, image_keys
from distilled_decoding.sampling import Plan
from distilled_decoding.store import Shard
from distilled_decoding.teacher import TeacherSampling
from tests import tiny

CLASSES, SIZE, MICRO_BATCH = 3, 8, 32
QUICK = EvaluationSettings(("teacher", "1", "onestep"), num=100, seeds=(0, 1, 2), keep=5)


class StubTeacher(nn.Module):
    """A token is the brightness of a pixel."""

    num_classes = CLASSES

    def __init__(self):
        super().__init__()
        self.codebook = nn.Parameter(torch.linspace(-1, 1, 16)[:, None], requires_grad=False)

    def decode(self, code_BLC):
        return code_BLC.mT.unflatten(2, (SIZE, SIZE))


class StubPipeline:
    """Images are flat, brighter with label and noise; the student copies the teacher and adds its bias."""

    def __init__(self, bias=0.0):
        self.teacher, self.student = StubTeacher(), nn.Linear(1, 1)
        nn.init.zeros_(self.student.weight), nn.init.constant_(self.student.bias, bias)
        self.config = SimpleNamespace(
            micro_batch=MICRO_BATCH, sampling=TeacherSampling(), flow=FlowSettings(), split_block=0
        )
        self.num_classes, self.device = CLASSES, torch.device("cpu")
        self.dtype, self.is_compiled = torch.float32, False
        self.fingerprint = fingerprint(self.teacher)
        self.calls = []

    def plan(self, steps):
        if isinstance(steps, str):
            return Plan((), ancestral=steps == "teacher-ancestral")
        if steps > 2:
            raise ValueError(f"steps must lie in 1..2, got {steps}")
        return Plan(tuple(range(steps)))

    def tokens(self, condition, key_B, shift=0.0):
        level_B = gaussian_noise(key_B, 1, 1).flatten() + 4 * condition.label_B + 4 + shift
        return level_B.round().clamp(0, 15).long()[:, None].expand(-1, SIZE**2)

    def images(self, plan, condition, key_B):
        self.calls.append((plan, len(condition)))
        for index_B in torch.arange(len(condition)).split(MICRO_BATCH):
            shift = self.student.bias.item() if plan.schedule else 0.0
            token_BL = self.tokens(condition[index_B], key_B[index_B], shift)
            yield to_uint8(self.teacher.decode(self.teacher.codebook[token_BL]))

    def shard(self, num=300):
        condition, key_N = Labels.balanced(num, CLASSES), image_keys("trajectories", 0, range(num))
        return Shard(self.tokens(condition, key_N), condition.label_B, key_N)


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(image_channels=1, width=2, num_classes=CLASSES)).eval()


@pytest.fixture(scope="module")
def reference(classifier):
    shape = (200, 1, SIZE, SIZE)
    image_NCHW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return real_statistics(classifier, image_NCHW)


def run(pipeline, classifier, reference, out, settings=QUICK, progress=lambda num: None):
    return evaluate(pipeline, classifier, settings, reference, out, pipeline.shard(), progress)


def of(evaluation, method):
    return [result for result in evaluation.results if result.method == method]


def test_every_method_of_a_real_pipeline_is_measured(classifier, reference, tmp_path):
    pipeline = tiny.pipeline()
    shard = tiny.store(tmp_path / "trajectories", pipeline).load()
    methods = ("teacher", "teacher-ancestral", "1", "2", "4", "onestep")
    settings = EvaluationSettings(methods, num=20, seeds=(0, 1), keep=3)
    evaluation = evaluate(pipeline, classifier, settings, reference, tmp_path / "out", shard)
    assert [(r.method, r.seed) for r in evaluation.results] == [(m, s) for m in settings.methods for s in (0, 1)]
    for result in evaluation.results:
        assert result.frechet_distance > 0 and result.distance_to_teacher > 0 and result.seconds_per_image > 0
        assert kept_images(tmp_path / "out", result.method, result.seed).shape == (3, 1, SIZE, SIZE)
    assert len(markdown_table(summary(evaluation)).splitlines()) == 2 + len(settings.methods) + 2


def test_results_are_what_measuring_all_images_at_once_gives(classifier, reference, tmp_path):
    pipeline = StubPipeline()
    result = of(run(pipeline, classifier, reference, tmp_path), "teacher")[1]
    condition, key_B = Labels.balanced(100, CLASSES), image_keys("evaluation", 1, range(100))
    image_NCHW = to_uint8(pipeline.teacher.decode(pipeline.teacher.codebook[pipeline.tokens(condition, key_B)]))
    whole = real_statistics(classifier, image_NCHW)
    assert result.frechet_distance == pytest.approx(frechet_distance(whole, reference), rel=1e-3)
    predicted = classifier(image_NCHW.float() / 127.5 - 1).logits_BV.argmax(1)
    assert result.accuracy == pytest.approx((predicted == condition.label_B).float().mean().item())
    assert torch.equal(kept_images(tmp_path, "teacher", 1), image_NCHW[:5])


def test_shared_noise_cannot_bring_a_student_closer_than_the_floor(classifier, reference, tmp_path):
    evaluation = run(StubPipeline(), classifier, reference, tmp_path)
    for student, teacher in zip(of(evaluation, "1"), of(evaluation, "teacher"), strict=True):
        assert student.distance_to_teacher == teacher.distance_to_teacher > 0
        assert student.ratio_to_teacher == 1
    assert torch.equal(kept_images(tmp_path, "1", 2), kept_images(tmp_path, "teacher", 2))


def test_the_floor_compares_each_seed_with_the_next_in_turn(classifier, reference, tmp_path):
    evaluation = run(StubPipeline(), classifier, reference, tmp_path)
    sets = [Statistics.load(tmp_path / f"teacher-seed{seed}.safetensors") for seed in QUICK.seeds]
    expected = [frechet_distance(sets[0], sets[1]), frechet_distance(sets[1], sets[2])]
    expected.append(frechet_distance(sets[2], sets[0]))
    assert [result.distance_to_teacher for result in of(evaluation, "teacher")] == expected


def test_a_biased_student_and_independent_positions_are_seen_to_be_worse(classifier, reference, tmp_path):
    evaluation = run(StubPipeline(bias=3.0), classifier, reference, tmp_path)
    floor = max(result.distance_to_teacher for result in of(evaluation, "teacher"))
    for method in ("1", "onestep"):
        assert all(result.distance_to_teacher > 2 * floor for result in of(evaluation, method))


def test_a_stopped_evaluation_goes_on_where_it_was(classifier, reference, tmp_path):
    whole = run(StubPipeline(), classifier, reference, tmp_path / "whole")
    stopped, done = StubPipeline(), []

    def stop_in_the_second_run(num):
        done.append(num)
        if sum(done) > 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stopped, classifier, reference, tmp_path / "parts", progress=stop_in_the_second_run)
    resumed, done = StubPipeline(), []
    evaluation = run(resumed, classifier, reference, tmp_path / "parts", progress=done.append)
    assert len(stopped.calls) == 2 and len(resumed.calls) == 5
    assert sum(done) == 9 * QUICK.num
    for ours, theirs in zip(evaluation.results, whole.results, strict=True):
        assert dataclasses.replace(ours, seconds_per_image=0) == dataclasses.replace(theirs, seconds_per_image=0)
    again = StubPipeline()
    assert run(again, classifier, reference, tmp_path / "parts").results == evaluation.results
    assert again.calls == []


def test_a_folder_of_another_model_is_refused_before_anything_is_sampled(classifier, reference, tmp_path):
    run(StubPipeline(), classifier, reference, tmp_path)
    other = StubPipeline(bias=1.0)
    with pytest.raises(
        ValueError, match="1-seed0.json was made from something else: its student is .* choose another --out"
    ):
        run(other, classifier, reference, tmp_path)
    teacher_only = dataclasses.replace(QUICK, methods=("teacher",))
    run(other, classifier, reference, tmp_path, teacher_only)
    assert other.calls == []
    with pytest.raises(ValueError, match="its num is 100, not 90"):
        run(StubPipeline(), classifier, reference, tmp_path, dataclasses.replace(QUICK, num=90))


def test_without_a_teacher_or_a_second_seed_there_is_no_distance_to_it(classifier, reference, tmp_path):
    one_seed = dataclasses.replace(QUICK, seeds=(0,))
    results = run(StubPipeline(), classifier, reference, tmp_path, one_seed).results
    assert all(result.distance_to_teacher is None and result.ratio_to_teacher for result in results)
    no_teacher = dataclasses.replace(QUICK, methods=("1",))
    evaluation = run(StubPipeline(), classifier, reference, tmp_path, no_teacher)
    assert all(result.distance_to_teacher is None for result in evaluation.results)
    assert "| 1 step |" in markdown_table(summary(evaluation)) and " - |" in markdown_table(summary(evaluation))


def test_what_cannot_be_measured_is_refused(classifier, reference, tmp_path):
    with pytest.raises(ValueError, match="leave it out"):
        evaluate(StubPipeline(), classifier, QUICK, reference, tmp_path)
    with pytest.raises(ValueError, match=r"1\.\.2, got 4"):
        run(StubPipeline(), classifier, reference, tmp_path, dataclasses.replace(QUICK, methods=("4",)))
    with pytest.raises(ValueError, match="extractor other"):
        foreign = dataclasses.replace(reference, extractor="other")
        run(StubPipeline(), classifier, foreign, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"methods": ("fast",)}, "unknown method 'fast'"),
        ({"methods": ("1", "1")}, "methods must be given, each once"),
        ({"seeds": ()}, "seeds must be given"),
        ({"num": 1}, "num must be at least 2"),
    ],
)
def test_settings_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        EvaluationSettings(**fields)


def test_a_summary_gives_mean_and_spread_and_never_the_best():
    values = [("teacher", 4.0, 1.0), ("teacher", 5.0, 1.0), ("1", 6.0, 1.5), ("1", 8.0, 1.6)]
    results = tuple(
        Result(method, i % 2, distance, ratio, 2.0, 0.925, 0.0123) for i, (method, distance, ratio) in enumerate(values)
    )
    real = Statistics(9000, torch.zeros(1), torch.zeros(1, 1), "abcdef", "real test images")
    settings = EvaluationSettings(("teacher", "1"), num=10_000, seeds=(0, 1))
    measured = summary(Evaluation(settings, real, 256, results))
    assert measured["methods"]["1"]["frechet_distance"] == {
        "mean": 7.0,
        "spread": pytest.approx(2**0.5),
        "per_seed": [6.0, 8.0],
    }
    assert json.loads(json.dumps(measured)) == measured
    lines = markdown_table(measured).splitlines()
    assert lines[3] == "| 1 step | 7.000 ± 1.414 | 1.55 ± 0.07 | 2.000 ± 0.000 | 92.5% ± 0.0% | 0.012 ± 0 |"
    assert "10,000 balanced samples at each of seeds 0, 1" in lines[-1] and "256 images at once" in lines[-1]
