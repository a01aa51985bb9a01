"""The report on small hand-made results."""

import base64
import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distilled_decoding import neighbours as neighbours_module
from distilled_decoding import report as report_module
from distilled_decoding.checkpoint import save_tensors
from distilled_decoding.metrics.features import Extractor, Scores
from distilled_decoding.metrics.reference import make_reference
from distilled_decoding.neighbours import neighbours
from distilled_decoding.report import markdown_table, method_name, report
from distilled_decoding.report_page import html
from distilled_decoding.teacher import TeacherSampling

MACHINE = {"processor": "Abacus", "cores": 2, "threads": 1, "gpu": None}
PLACE = {"versions": {"distilled_decoding": "1", "torch": "2"}, "commit": "0123456789", "dirty": False}


def moments(*values: float) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "spread": spread, "per_seed": list(values)}


def method(passes: int, *distances: float, **measured: Any) -> dict[str, Any]:
    fields = ["ratio_to_teacher", "distance_to_teacher", "kernel_distance", "inception_score", "precision", "recall"]
    nothing = dict.fromkeys([*fields, "accuracy", "alignment", "agreement"])
    known = {"frechet_distance": moments(*distances), "seconds_per_image": moments(0.01 * passes)}
    return {"passes": passes, **nothing, **known, **measured}


def summary(model: str = "toy", **changes: Any) -> dict[str, Any]:
    equal = {"tokens": moments(0.5), "blocks": [1.0, 0.25]}
    own = {"ratio_to_teacher": moments(1.0, 1.0), "accuracy": moments(0.9, 0.9)}
    methods = {
        "teacher": method(2, 1.0, 1.0, **own),
        "1": method(1, 2.0, 4.0, ratio_to_teacher=moments(2.0, 4.0), accuracy=moments(0.8, 0.8), agreement=equal),
        "onestep": method(1, 6.0, 6.0, ratio_to_teacher=moments(6.0, 6.0), kernel_distance=moments(0.0125, 0.0125)),
    }
    features = {"name": "classifier", "distance": "Fréchet distance", "extractor": "abcdef", "width": 4}
    return {
        "model": model,
        "asked": {"kind": "label", "count": 10, "first": []},
        "blocks": [1, 3],
        "num": 1000,
        "seeds": [0, 1],
        "batch_size": 50,
        "dtype": "float32",
        "compiled": False,
        "device": "cpu",
        "sampling": asdict(TeacherSampling(guidance_scale=3, guidance_ramp="linear", top_k=112, top_p=0.95)),
        "features": features,
        "reference": {"images": "real images", "count": 2000, "alignment": None},
        "chance": {"tokens": moments(0.1), "blocks": [0.1, 0.1]},
        "methods": methods,
        "machine": MACHINE,
        **PLACE,
        **changes,
    }


def images(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, 8, 8), dtype=torch.uint8, generator=generator)


def evaluated(folder: Path, values: dict[str, Any]) -> Path:
    """A folder as `evaluate` leaves it, as far as the report reads it."""
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(values))
    for place, name in enumerate(values["methods"]):
        save_tensors(folder / f"{name}-seed0.images.safetensors", {"image_NCHW": images(24, place)})
    return folder


def benched(folder: Path, model: str = "toy") -> Path:
    """A folder of `bench` that did not time every method."""
    times = {"teacher, compiled": 40.0, "1 step": 9.0, "1 step, compiled": 5.0}
    row = {"passes": 1, "codes_ms": 1.0, "images_per_second": 2.0, "best_batch": 1, "memory_mib": 3, "runs": []}
    row["speed_up"] = {"plain_loop": None, "compiled_teacher": None}
    values = {"model": model, "device": "cpu", "dtype": "float32", "tokens": 4, "batches": [1], "repeats": 1}
    values |= {"ways": [{"name": name, "images_ms": time, **row} for name, time in times.items()], "left_out": None}
    folder.mkdir()
    (folder / "bench.json").write_text(json.dumps({**values, "machine": MACHINE, **PLACE}))
    return folder


def test_a_table_has_the_columns_that_were_measured_and_says_how() -> None:
    lines = markdown_table(summary()).splitlines()
    assert lines[:5] == [
        "| method | passes | Fréchet distance | ratio to teacher | KID x 1000 | class accuracy "
        "| tokens equal to teacher's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| teacher | 2 | 1.000 ± 0.000 | 1.00 ± 0.00 | - | 90.0% ± 0.0% | - |",
        "| 1 step | 1 | 3.000 ± 1.414 | 3.00 ± 1.41 | - | 80.0% ± 0.0% | 50.0% |",
        "| independent tokens | 1 | 6.000 ± 0.000 | 6.00 ± 0.00 | 12.50 ± 0.00 | - | - |",
    ]
    for words in (
        "1,000 balanced samples at each of seeds 0, 1; mean ± standard deviation",
        "`classifier` (abcdef), to 2,000 real images.",
        "The teacher samples with guidance 3, growing linearly, top-k 112, top-p 0.95. ",
        "float32, 50 images at once, on Abacus, 1 thread, torch 2, distilled-decoding 1, commit 0123456.",
    ):
        assert words in lines[6]


def prompted() -> dict[str, Any]:
    """The summary of a model of captions."""
    values = summary(asked={"kind": "prompt", "count": 1900, "first": ["red apple", "man, bald"] * 32})
    for place, measured in enumerate(values["methods"].values()):
        measured |= {"accuracy": None, "alignment": moments(0.9 - place / 100, 0.9 - place / 100)}
    values["reference"]["alignment"] = 0.9312
    return values


def test_the_table_of_a_model_of_captions_has_alignment_beside_that_of_real_pictures() -> None:
    lines = markdown_table(prompted()).splitlines()
    assert "| alignment |" in lines[0] and "accuracy" not in lines[0]
    assert "| 89.0% ± 0.0% |" in lines[3]
    for words in (
        "1,000 samples of 1,900 prompts in turn at each of",
        "a sample's right name scores best among 100; real pictures of these prompts reach 93.1%. Two",
        "Two samples of the teacher of one prompt share",
    ):
        assert words in lines[6]


def test_a_distance_and_a_score_have_their_proper_names() -> None:
    own = {"name": "inception", "distance": "FID", "extractor": "abc", "width": 2048}
    methods = {"teacher": method(2, 5.0, inception_score=moments(200.0))}
    lines = markdown_table(summary(features=own, methods=methods, seeds=[7])).splitlines()
    assert lines[0] == "| method | passes | FID | Inception score |"
    assert lines[2] == "| teacher | 2 | 5.000 | 200.00 |"
    assert "samples at seed 7. " in lines[4]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("1", "1 step"),
        ("4", "4 steps"),
        ("span:16:24", "student + teacher on blocks 16 to 23"),
        ("span:5:6", "student + teacher on block 5"),
        ("refine:1:1", "1 step + 1 refining pass"),
        ("refine:2:3", "2 steps + 3 refining passes"),
        ("skip:8", "teacher without its last 8 passes"),
        ("teacher-ancestral", "teacher (ancestral)"),
    ],
)
def test_methods_have_names_for_people(name: str, words: str) -> None:
    assert method_name(name) == words


def test_a_report_lists_models_in_order_and_both_pages_hold_the_same(tmp_path: Path) -> None:
    folders = [evaluated(tmp_path / name, summary(name)) for name in ("second", "a/first".replace("/", "-"))]
    files = report([*folders, benched(tmp_path / "bench", "second")], tmp_path / "out")
    text, page = files[0].read_text(), files[1].read_text()
    assert text.index("## second") < text.index("## a-first") < text.index("### Speed of second")
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert (
        [path.name for path in files[2:]]
        == pictures
        == [
            "quality.png",
            "samples-second.png",
            "agreement-second.png",
            "samples-a-first.png",
            "agreement-a-first.png",
            "speed-second.png",
        ]
    )
    inside = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert [base64.b64decode(data) for data in inside] == [path.read_bytes() for path in files[2:]]
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for row in (line for line in text.splitlines() if line.startswith("| 1 step")):
        cells = "".join(f"<td>{cell.strip()}</td>" for cell in row.strip("|").split("|"))
        assert f"<tr>{cells}</tr>" in page


def test_equal_results_make_equal_pages_over_an_earlier_report(tmp_path: Path) -> None:
    folder = evaluated(tmp_path / "e", summary())
    first = [path.read_bytes() for path in report([folder], tmp_path / "out")[:2]]
    assert [path.read_bytes() for path in report([folder], tmp_path / "out")[:2]] == first


def test_two_results_of_one_model_keep_their_own_pictures(tmp_path: Path) -> None:
    files = report([evaluated(tmp_path / name, summary("a/b")) for name in "xy"], tmp_path / "out")
    assert {"samples-a-b.png", "samples-a-b-2.png"} <= {path.name for path in files}
    assert "## a/b-2" in files[0].read_text()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list, str]]:
    """What the figure of quality against time was asked to draw."""
    calls: list[tuple[list, str]] = []

    def quality_figure(panels: list, time: str, path: Path) -> None:
        calls.append((panels, time))
        Image.new("L", (1, 1)).save(path)

    monkeypatch.setattr(report_module.figures, "quality_figure", quality_figure)
    return calls


def test_latency_is_drawn_when_every_model_has_one_and_never_mixed(tmp_path: Path, drawn: list) -> None:
    first, second = (evaluated(tmp_path / name, summary(name)) for name in ("first", "second"))
    benches = [benched(tmp_path / f"bench-{name}", name) for name in ("first", "second")]
    text = report([first, second, *benches], tmp_path / "both")[0].read_text()
    report([first, second, benches[0]], tmp_path / "one")
    (latency, axis), (own, other_axis) = drawn
    points = {name: [(p.name, p.milliseconds, p.distance) for p in points] for name, points in latency[0][1].items()}
    assert points == dict.fromkeys(("first", "second"), [("teacher", 40.0, 1.0), ("1 step", 5.0, 3.0)])
    assert axis.startswith("latency") and "want of such a time: independent tokens of first; independent" in text
    assert {name: [p.milliseconds for p in points] for name, points in own[0][1].items()} == {
        f"{name}, batch 50": [20.0, 10.0, 10.0] for name in ("first", "second")
    }
    assert "batch" in other_axis


def test_the_time_of_an_imitated_shortcut_is_not_drawn(tmp_path: Path, drawn: list) -> None:
    values = summary()
    folder = evaluated(tmp_path / "e", values)
    values["methods"]["skip:1"] = values["methods"]["onestep"]
    (folder / "skip-1-seed0.images.safetensors").write_bytes((folder / "1-seed0.images.safetensors").read_bytes())
    (folder / "summary.json").write_text(json.dumps(values))
    text = report([folder], tmp_path / "out")[0].read_text()
    assert [point.name for point in drawn[0][0][0][1]["toy, batch 50"]] == ["teacher", "1 step", "independent tokens"]
    assert "want of such a time: teacher without its last pass of toy." in text


def test_distances_in_other_features_get_axes_of_their_own(tmp_path: Path, drawn: list) -> None:
    other = {"name": "inception", "distance": "FID", "extractor": "f", "width": 2}
    report([evaluated(tmp_path / "a", summary()), evaluated(tmp_path / "b", summary(features=other))], tmp_path / "out")
    assert [distance for distance, _ in drawn[0][0]] == ["Fréchet distance", "FID"]


def test_agreement_of_blocks_is_of_their_tokens(tmp_path: Path) -> None:
    equal = {"tokens": moments(0.5), "blocks": [k / 16 for k in range(16)]}
    values = summary(blocks=[1, 3] * 8, methods={"1": method(1, 2.0, agreement=equal)}, chance=None)
    text = report([evaluated(tmp_path / "e", values)], tmp_path / "out")[0].read_text()
    shares = [(2 * g + 3 * (2 * g + 1)) / 64 for g in range(8)]
    assert f"| 1 step | 50.0% | {' | '.join(f'{share:.1%}' for share in shares)} |" in text
    assert "| all | 0 to 1 | 2 to 3 |" in text and "| chance |" not in text


def test_samples_stand_pixel_by_pixel_in_rows_of_twenty(tmp_path: Path) -> None:
    report([evaluated(tmp_path / "e", summary())], tmp_path / "out")
    picture = np.asarray(Image.open(tmp_path / "out" / "samples-toy.png").convert("L"))
    cell, left = 66, picture.shape[1] - 20 * 66
    assert picture.shape[0] == 3 * cell and left > 0
    for row, column in ((0, 0), (1, 19), (2, 7)):
        corner = row * cell, left + column * cell
        found = picture[corner[0] : corner[0] + 64, corner[1] : corner[1] + 64]
        assert np.array_equal(found[4::8, 4::8], images(24, row)[column, 0].numpy())


def test_the_samples_of_a_model_of_captions_stand_under_their_prompts(
    tmp_path: Path, drawn: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("samples_figure", "agreement_figure"):
        monkeypatch.setattr(report_module.figures, name, lambda *args: Image.new("L", (1, 1)).save(args[-1]))
    text = report([evaluated(tmp_path / "e", prompted())], tmp_path / "out")[0].read_text()
    assert f"Prompts from the left: {'; '.join(['red apple', 'man, bald'] * 10)}." in text
    assert "label" not in text


def test_what_is_no_result_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, bench = evaluated(tmp_path / "e", summary()), benched(tmp_path / "b")
    with pytest.raises(ValueError, match="at least one folder"):
        report([], tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere holds no results of `evaluate`"):
        report([folder, tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(ValueError, match="b2 is a second benchmark of toy"):
        report([bench, benched(tmp_path / "b2")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "e" / "run.json").write_text(json.dumps({"command": "evaluate", "settings": {}}))
    with pytest.raises(ValueError, match="holds a run of 'evaluate'; choose another --out"):
        report([folder], folder)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'distilled-decoding\[plot\]'"):
        report([folder], tmp_path / "out")


def test_html_escapes_text_and_marks_code(tmp_path: Path) -> None:
    page = html("# <a>\n\nwords & `x < y`\n\n| `p` | q |\n| --- | --- |\n| 1 | 2 |\n", tmp_path)
    assert "<title>&lt;a&gt;</title>" in page and "<p>words &amp; <code>x &lt; y</code></p>" in page
    assert "<tr><th><code>p</code></th><th>q</th></tr>\n<tr><td>1</td><td>2</td></tr>" in page


def pixels(image_BCHW: torch.Tensor) -> torch.Tensor:
    return image_BCHW.flatten(1).float()


def test_nearest_training_images_are_those_of_a_full_search_however_they_arrive() -> None:
    sample, training, test = images(30, 1), images(600, 2), images(40, 3)
    whole = torch.cdist(pixels(sample).double(), pixels(training).double())
    for batches in ([training], training.split(7)):
        found = neighbours(pixels, batches, pixels(sample), sample[:4], pixels(test))
        assert torch.allclose(found.sample_N, whole.amin(1)) and found.count == 600
        assert torch.equal(found.nearest_NKCHW, training[whole[:4].argsort(1)[:, :5]])
        assert found.test_M is not None and len(found.test_M) == 40


def test_copies_are_found_and_fresh_images_are_not_suspected() -> None:
    training, test = images(300, 2), images(400, 3)
    copied = neighbours(pixels, [training], pixels(training[40:60]), training[40:43], pixels(test))
    assert torch.equal(copied.nearest_NKCHW[:, 0], training[40:43])
    assert copied.sample_N.max() < 1e-3 and copied.suspicious == 1.0
    fresh = neighbours(pixels, [training], pixels(images(400, 4)), images(4, 4), pixels(test))
    assert fresh.suspicious is not None and fresh.suspicious < 0.05
    assert neighbours(pixels, [training], pixels(test), test[:2], None).suspicious is None


def test_training_images_of_another_shape_or_too_few_are_refused() -> None:
    sample = images(3)
    with pytest.raises(ValueError, match="training images are 1 x 4 x 4, the samples 1 x 8 x 8"):
        neighbours(pixels, [sample[:, :, :4, :4]], pixels(sample), sample, None)
    with pytest.raises(ValueError, match="3 training images are too few to show the 5 nearest"):
        neighbours(pixels, [sample], pixels(sample), sample, None)


def test_with_training_images_the_report_answers_whether_the_student_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(image_BCHW: torch.Tensor) -> Scores:
        return Scores(pixels(image_BCHW), pixels(image_BCHW)[:, :3])

    extractor = Extractor("classifier", "Fréchet distance", "abcdef", 64, 3, scores)
    monkeypatch.setattr(neighbours_module.zoo, "extractor", lambda name, device="cpu", weights=None: extractor)
    folder, training = evaluated(tmp_path / "e", summary()), images(200, 1)
    # The student's samples are the training images 0 ... 23 themselves, see `evaluated`.
    training[:24] = images(24, 1)
    save_tensors(folder / "1-seed0.features.safetensors", {"feature_ND": pixels(images(24, 1))})
    make_reference(extractor, [images(100, 9)], "real images").save(folder / "reference.safetensors")
    np.savez(tmp_path / "training.npz", arr_0=training.permute(0, 2, 3, 1).numpy())
    files = report([folder], tmp_path / "out", tmp_path / "training.npz")
    assert "neighbours-toy.png" in {path.name for path in files}
    assert "| samples, 1 step | 0.000 | 100.00% |" in files[0].read_text()
    # A published reference may be of training images; then there is nothing to compare with.
    make_reference(extractor, [training], "real images").save(folder / "reference.safetensors")
    text = report([folder], tmp_path / "out", tmp_path / "training.npz")[0].read_text()
    assert "| samples, 1 step | 0.000 |\n" in text and "nearer than 1%" not in text
    other = SimpleNamespace(fingerprint="fedcba")
    monkeypatch.setattr(neighbours_module.zoo, "extractor", lambda name, device="cpu", weights=None: other)
    with pytest.raises(ValueError, match="classifier abcdef, but here it is fedcba"):
        report([folder], tmp_path / "out", tmp_path / "training.npz")
