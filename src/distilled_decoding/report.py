"""Tables and pictures of what `evaluate` and `bench` measured, as a Markdown and an HTML page.

The HTML page is made from the Markdown one, so that both say the same.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilled_decoding import report_figures as figures
from distilled_decoding.bench import TEACHER, bench_figure, bench_table
from distilled_decoding.checkpoint import load_json, save_text, sha256
from distilled_decoding.evaluate import kept_images
from distilled_decoding.metrics.alignment import CANDIDATES
from distilled_decoding.neighbours import nearest_training_images
from distilled_decoding.records import record_anew
from distilled_decoding.report_page import html, table

_COLUMNS = 20
_NAMES = {"teacher-ancestral": "teacher (ancestral)", "onestep": "independent tokens"}


@dataclass(frozen=True, eq=False)
class _Evaluated:
    """A folder of `evaluate`, its summary, and what the model and its pictures are called in the report."""

    folder: Path
    summary: dict[str, Any]
    title: str
    file: str


def report(
    folders: Sequence[Path],
    out: Path,
    training: Path | None = None,
    inception_weights: Path | None = None,
    device: str = "cpu",
) -> list[Path]:
    """Write `report.md`, `report.html` and their pictures.

    Args:
        folders: each written by `evaluate` or `bench`; the models come in this order.
        out: a folder; an earlier report that it holds is replaced.
        training: images that the models were trained on, an .npz with `arr_0` or a folder; adds their nearest ones.
        inception_weights: file of the network's weights, needed with `training` where its features measured.
        device: where the features of the training images are computed.

    Returns:
        The files: the two pages, then the pictures.

    Raises:
        ValueError: a folder is of neither command, two benchmarks are of one model, matplotlib is missing, or `out`
            holds another command's results.
    """
    figures.check_matplotlib()
    if not folders:
        raise ValueError("give at least one folder that `evaluate` or `bench` wrote")
    evaluated, benches = _read(folders)
    sources = [sha256(path) for folder in folders for path in _results(folder)]
    record_anew(out, "report", {"results": sources}, {"folders": folders, "training": training})
    parts = [f"# {', '.join(dict.fromkeys([*(one.title for one in evaluated), *benches]))}"]
    parts += _quality(evaluated, benches, out)
    for one in evaluated:
        parts += [f"## {one.title}", _headline(one.summary), markdown_table(one.summary)]
        parts += [*_samples(one, out), *_agreement(one, out)]
        if training is not None:
            parts += _memory(one, training, inception_weights, device, out)
    parts += _speed(benches, out)
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    save_text(out / "report.md", text)
    save_text(out / "report.html", html(text, out))
    return [out / name for name in ("report.md", "report.html", *re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE))]


def method_name(method: str) -> str:
    """What a reader calls a method of `evaluate`."""
    kind, *numbers = method.split(":")
    if kind == "span":
        first, end = map(int, numbers)
        blocks = f"block {first}" if end == first + 1 else f"blocks {first} to {end - 1}"
        return f"student + teacher on {blocks}"
    if kind == "refine":
        passes = f"{numbers[1]} refining pass{'es' * (numbers[1] != '1')}"
        return f"{method_name(numbers[0])} + {passes}"
    if kind == "skip":
        return f"teacher without its last {'pass' if numbers == ['1'] else f'{numbers[0]} passes'}"
    return f"{method} step{'s' * (method != '1')}" if method.isdecimal() else _NAMES.get(method, method)


def markdown_table(summary: Mapping[str, Any]) -> str:
    """A summary of `evaluate` as a Markdown table, with a note that says how it was measured.

    What no method has is left out. A spread is the standard deviation over seeds; a single seed has none.
    """
    columns = _columns(summary["features"])
    methods = summary["methods"]
    shown = {field: form for field, form in columns.items() if any(_of(m, field) for m in methods.values())}
    rows = [["method", "passes", *(title for title, _, _ in shown.values())]]
    for name, measured in methods.items():
        cells = [_cell(_of(measured, field), form, scale) for field, (_, form, scale) in shown.items()]
        rows.append([method_name(name), str(measured["passes"]), *cells])
    return f"{table(rows)}\n\n{_note(summary)}\n"


def _results(folder: Path) -> list[Path]:
    return [path for path in (folder / "summary.json", folder / "bench.json") if path.is_file()][:1]


def _read(folders: Sequence[Path]) -> tuple[list[_Evaluated], dict[str, dict[str, Any]]]:
    """The evaluations in order, and the benchmarks by the model's name."""
    evaluated: list[_Evaluated] = []
    benches: dict[str, dict[str, Any]] = {}
    for folder in folders:
        values = load_json(_results(folder)[0]) if _results(folder) else {}
        fields = set(values)
        if {"model", "methods", "features", "asked"} <= fields:
            title = _unique(values["model"], [one.title for one in evaluated])
            evaluated.append(_Evaluated(folder, values, title, _unique(_file(title), [one.file for one in evaluated])))
        elif {"model", "ways"} <= fields:
            if values["model"] in benches:
                raise ValueError(f"{folder} is a second benchmark of {values['model']}; give one for each model")
            benches[values["model"]] = values
        else:
            raise ValueError(
                f"{folder} holds no results of `evaluate` (summary.json) or `bench` (bench.json) of this version"
            )
    return evaluated, benches


def _file(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", model).strip("-.")


def _unique(name: str, taken: Sequence[str]) -> str:
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 2))]
    return next(one for one in names if one not in taken)


def _columns(features: Mapping[str, Any]) -> dict[str, tuple[str, str, float]]:
    """Fields with their titles, formats and scales, in the order of the table."""
    score = "Inception score" if features["name"] == "inception" else "Inception-style score"
    return {
        "frechet_distance": (features["distance"], "{:.3f}", 1),
        "ratio_to_teacher": ("ratio to teacher", "{:.2f}", 1),
        "distance_to_teacher": ("distance to teacher's samples", "{:.3f}", 1),
        "kernel_distance": ("KID x 1000", "{:.2f}", 1000),
        "inception_score": (score, "{:.2f}", 1),
        "precision": ("precision", "{:.3f}", 1),
        "recall": ("recall", "{:.3f}", 1),
        "accuracy": ("class accuracy", "{:.1%}", 1),
        "alignment": ("alignment", "{:.1%}", 1),
        "agreement": ("tokens equal to teacher's", "{:.1%}", 1),
    }


def _of(measured: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    value = measured[field]
    return value["tokens"] if field == "agreement" and value else value


def _cell(moments: Mapping[str, Any] | None, form: str, scale: float) -> str:
    if moments is None:
        return "-"
    mean, spread = (form.format(scale * moments[key]) for key in ("mean", "spread"))
    return f"{mean} ± {spread}" if len(moments["per_seed"]) > 1 else mean


def _note(summary: Mapping[str, Any]) -> str:
    seeds, features, chance, asked = (summary[key] for key in ("seeds", "features", "chance", "asked"))
    samples = "balanced samples" if asked["kind"] == "label" else f"samples of {asked['count']:,} prompts in turn"
    which = f"seed {seeds[0]}"
    if len(seeds) > 1:
        which = f"each of seeds {', '.join(map(str, seeds))}; mean ± standard deviation over seeds"
    to_teacher = any(m["distance_to_teacher"] for m in summary["methods"].values())
    floor = ", and to the teacher's samples of another seed, where the teacher's own row is the floor" * to_teacher
    equal = (
        f" Two samples of the teacher of one {asked['kind']} share {chance['tokens']['mean']:.1%} of their tokens."
        if chance
        else ""
    )
    images, count, aligned = (summary["reference"][key] for key in ("images", "count", "alignment"))
    real = images if count is None else f"{count:,} {images}"
    names = (
        f" Alignment is how often a sample's right name scores best among {CANDIDATES}"
        f"{'' if aligned is None else f'; real pictures of these prompts reach {aligned:.1%}'}."
    ) * any(m["alignment"] is not None for m in summary["methods"].values())
    machine, versions = summary["machine"], summary["versions"]
    where = f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    where += f", {machine['gpu']}" if summary["device"].startswith("cuda") else ""
    commit = f", commit {summary['commit'][:7]}{' with changes' * bool(summary['dirty'])}" if summary["commit"] else ""
    return (
        f"{summary['num']:,} {samples} at {which}. Distances in the features of `{features['name']}` "
        f"({features['extractor'][:12]}), to {real}{floor}."
        f"{names}{equal} The teacher samples with {_sampling(summary['sampling'])}. "
        f"Sampled in {summary['dtype']}{', compiled' * summary['compiled']}, {summary['batch_size']} images at "
        f"once, on {where}, torch {versions['torch']}, distilled-decoding {versions['distilled_decoding']}{commit}."
    )


def _sampling(sampling: Mapping[str, Any]) -> str:
    """A teacher's settings in words; what is off is left out."""
    parts = [f"guidance {sampling['guidance_scale']:g}"]
    parts += ["growing linearly"] * (sampling["guidance_ramp"] == "linear")
    parts += [f"on {sampling['guidance_blocks']} blocks"] * (sampling["guidance_blocks"] is not None)
    parts += [f"temperature {sampling['temperature']:g}"] * (sampling["temperature"] != 1)
    parts += [f"top-k {sampling['top_k']}"] * (sampling["top_k"] > 0)
    parts += [f"top-p {sampling['top_p']:g}"] * (sampling["top_p"] < 1)
    return ", ".join(parts)


def _headline(summary: Mapping[str, Any]) -> str:
    """The first student's result in a sentence; nothing where it cannot be compared."""
    methods = summary["methods"]
    first = next((name for name in methods if name.isdecimal()), None)
    if first is None or "teacher" not in methods:
        return ""
    student, distance = methods[first], summary["features"]["distance"]
    return (
        f"The student needs {student['passes']} pass{'es' * (student['passes'] > 1)} of the transformer for an image, "
        f"the teacher {methods['teacher']['passes']}; its {distance} is "
        f"{student['ratio_to_teacher']['mean']:.2f} times the teacher's."
    )


def _kind(method: str) -> figures.Kind:
    if method.isdecimal():
        return "student"
    kinds: dict[str, figures.Kind] = {
        "teacher": "teacher",
        "teacher-ancestral": "ancestral",
        "span": "span",
        "refine": "span",
    }
    return kinds.get(method.split(":")[0], "baseline")


def _quality(evaluated: Sequence[_Evaluated], benches: Mapping[str, Mapping[str, Any]], out: Path) -> list[str]:
    """The figure of quality against time: latency when every model has one, else the evaluation's own time."""
    latency = {
        model: {way["name"]: way["images_ms"] for way in bench["ways"]}
        for model, bench in benches.items()
        if bench["batches"][0] == 1
    }
    timed = all(one.summary["model"] in latency for one in evaluated)
    # Distances in other features, or to other images, get axes of their own.
    panels: dict[tuple[str, ...], dict[str, list[figures.Point]]] = {}
    left_out: dict[str, list[str]] = {}
    for one in evaluated:
        features, points = one.summary["features"], []
        for name, measured in one.summary["methods"].items():
            time = latency[one.summary["model"]].get(_way(name)) if timed else _evaluation_time(name, measured)
            if time is None:
                left_out.setdefault(one.title, []).append(method_name(name))
            else:
                distance = measured["frechet_distance"]
                # The legend says the rest of a span's name.
                label = method_name(name).removeprefix("student + teacher on ")
                points.append(figures.Point(label, _kind(name), time, distance["mean"], distance["spread"]))
        line = one.title if timed else f"{one.title}, batch {one.summary['batch_size']}"
        panel = (features["distance"], features["extractor"], one.summary["reference"]["images"])
        panels.setdefault(panel, {})[line] = points
    if not any(points for models in panels.values() for points in models.values()):
        return []
    axis = "latency of one image (ms)" if timed else "time an image in a batch (ms)"
    figures.quality_figure([(distance, models) for (distance, *_), models in panels.items()], axis, out / "quality.png")
    return ["## Quality against time", "![quality against time](quality.png)", _quality_note(timed, left_out)]


def _quality_note(timed: bool, left_out: Mapping[str, Sequence[str]]) -> str:
    source = "Times are the evaluation's own: an image's share of its batch, decoder included."
    if timed:
        source = (
            "Times are those of one image, decoder included, of the compiled ways that `bench` timed; a teacher "
            "stands at the time of the compiled teacher's ordinary sampling."
        )
    note = f"Lower and further left is better; both scales are logarithmic; bars are standard deviations. {source}"
    missing = "; ".join(f"{', '.join(methods)} of {title}" for title, methods in left_out.items())
    return f"{note} Not shown for want of such a time: {missing}." if missing else note


def _way(method: str) -> str:
    """What `bench` calls a method."""
    return TEACHER if method.startswith("teacher") else f"{method_name(method)}, compiled"


def _evaluation_time(method: str, measured: Mapping[str, Any]) -> float | None:
    """Milliseconds an image; none for `skip`, which takes more passes to imitate than it stands for."""
    return None if method.startswith("skip:") else 1000 * measured["seconds_per_image"]["mean"]


def _samples(one: _Evaluated, out: Path) -> list[str]:
    seed, asked, picture = one.summary["seeds"][0], one.summary["asked"], f"samples-{one.file}.png"
    rows = {method_name(name): kept_images(one.folder, name, seed)[:_COLUMNS] for name in one.summary["methods"]}
    if not all(map(len, rows.values())):
        return []
    figures.samples_figure(rows, out / picture)
    text = (
        f"The first samples of seed {seed}, not chosen; a column has one {asked['kind']} and one noise. Rows from the "
    )
    text += f"top: {', '.join(rows)}."
    if asked["first"]:
        text += f" Prompts from the left: {'; '.join(prompt or '(none)' for prompt in asked['first'][:_COLUMNS])}."
    return [f"### Samples of {one.title}", f"![samples of {one.title}, a row for each method]({picture})", text]


def _agreement(one: _Evaluated, out: Path) -> list[str]:
    """Where along the sequence the students lose the teacher's tokens."""
    methods, chance, sizes = one.summary["methods"], one.summary["chance"], one.summary["blocks"]
    kind = one.summary["asked"]["kind"]
    students = {name: m["agreement"] for name, m in methods.items() if _kind(name) in ("student", "span")}
    measured = {method_name(name): agreement for name, agreement in students.items() if agreement}
    if not measured:
        return []
    curves, picture = {name: a["blocks"] for name, a in measured.items()}, f"agreement-{one.file}.png"
    figures.agreement_figure(curves, chance and chance["blocks"], sizes, out / picture)
    groups = _groups(len(sizes))
    rows = [["equal tokens, blocks", "all", *(f"{g[0]} to {g[-1]}" if len(g) > 1 else f"{g[0]}" for g in groups)]]
    for name, agreement in measured.items():
        rows.append([name, f"{agreement['tokens']['mean']:.1%}", *_shares(agreement["blocks"], sizes, groups)])
    if chance:
        rows.append(["chance", f"{chance['tokens']['mean']:.1%}", *_shares(chance["blocks"], sizes, groups)])
    return [
        f"### Tokens of {one.title}",
        f"![share of tokens equal to the teacher's, block by block]({picture})",
        table(rows),
        f"Equal tokens of student and teacher (the flow map) on the same {kind} and noise; chance is what two samples "
        f"of the teacher with one {kind} and different noise share. A step that starts at a block keeps the blocks "
        "before it and predicts the others anew, so it can gain only behind it: the curves of 1 and 2 steps tell how "
        "much it does.",
    ]


def _groups(num_blocks: int) -> list[range]:
    """At most eight runs of blocks."""
    width = -(-num_blocks // 8)
    return [range(start, min(start + width, num_blocks)) for start in range(0, num_blocks, width)]


def _shares(blocks: Sequence[float], sizes: Sequence[int], groups: Sequence[range]) -> list[str]:
    return [f"{sum(blocks[k] * sizes[k] for k in g) / sum(sizes[k] for k in g):.1%}" for g in groups]


def _memory(one: _Evaluated, training: Path, inception_weights: Path | None, device: str, out: Path) -> list[str]:
    """Whether the student (or, without one, the teacher) copies its training images."""
    summary, picture = one.summary, f"neighbours-{one.file}.png"
    method = next((name for name in summary["methods"] if name.isdecimal()), "teacher")
    if method not in summary["methods"]:
        return []
    found = nearest_training_images(one.folder, summary, method, training, inception_weights, device)
    name, parts = method_name(method), []
    if len(found.image_NCHW):
        figures.neighbours_figure(found.image_NCHW, found.nearest_NKCHW, out / picture)
        parts = [f"![samples of {name} and their nearest training images]({picture})"]
    rows = [["images", "median distance to the nearest training image"]]
    rows.append([f"samples, {name}", f"{found.sample_N.median():.3f}"])
    text = f"Of {found.count:,} training images, in the features of the table above; {len(found.sample_N):,} samples."
    if found.suspicious is not None and found.test_M is not None:
        rows[0].append("nearer than 1% of the real images are")
        rows[1].append(f"{found.suspicious:.2%}")
        rows.append([summary["reference"]["images"], f"{found.test_M.median():.3f}", "1.00%"])
        text += (
            " A model that learnt the distribution and copied nothing is as far from its training images as real "
            "images that it has not seen are, and has about 1% in the last column; copies would make the distance "
            "smaller and the share larger, and so would samples more typical than real images are: the picture tells."
        )
    return [f"### Nearest training images of {one.title}", *parts, table(rows), text]


def _speed(benches: Mapping[str, dict[str, Any]], out: Path) -> list[str]:
    parts: list[str] = []
    files: list[str] = []
    for model, bench in benches.items():
        files.append(_unique(_file(model), files))
        bench_figure(bench, out / f"speed-{files[-1]}.png")
        parts += [f"### Speed of {model}", f"![time of each way to sample](speed-{files[-1]}.png)", bench_table(bench)]
    return ["## Speed", *parts] if parts else []
