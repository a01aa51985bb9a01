import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from distilled_decoding import training_log, zoo
from distilled_decoding.distill import DistillSettings
from distilled_decoding.training_command import Upkeep, distill_student
from distilled_decoding.training_log import TrainingLog
from distilled_decoding.watch import Watch
from tests import tiny


def test_a_model_that_the_shipped_features_do_not_fit_has_pictures_alone(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    assert Watch(pipe, tiny.CLASSES, tmp_path).look(pipe.student, 500) == {}
    assert Image.open(tmp_path / "000500.png").size == (10 * 8 * 2, 4 * 8 * 2)


def test_samples_are_compared_with_the_teachers_while_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extractor, reference = tiny.extractor()
    monkeypatch.setattr(zoo, "extractor", lambda *_: extractor)
    monkeypatch.setattr(zoo, "reference", lambda: reference)
    pipe, out = tiny.pipeline(), tmp_path / "out"
    settings = DistillSettings(num_updates=4, batch_size=4, bf16=False)
    store = tiny.store(tmp_path / "store", pipe)
    trained = distill_student("tiny", pipe, store, out, settings, upkeep=Upkeep(watch_every=2))
    assert sorted(path.name for path in (out / "watch").iterdir()) == ["000002.png", "000004.png"]
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [2, 4]
    assert lines[0]["distance_to_teacher"] != lines[1]["distance_to_teacher"]
    seen = Watch(trained, tiny.CLASSES, tmp_path / "again").look(trained.student, 4)
    assert seen["distance_to_teacher"] == lines[1]["distance_to_teacher"]


def test_a_log_forgets_what_is_done_again_and_counts_the_time_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(training_log, "perf_counter", lambda: clock[0])
    log = TrainingLog(tmp_path, tensorboard=False)
    for update in (20, 40, 60):
        clock[0] += 5
        log.write(update, {"total": update / 10, "gradient_norm": float("inf")})
    whole = (tmp_path / "log.jsonl").read_text()
    assert whole.splitlines()[0] == '{"update": 20, "total": 2.0, "gradient_norm": null, "seconds": 5.0}'
    (tmp_path / "log.jsonl").write_text(whole + '{"update": 8')
    clock[0] = 7.0
    again = TrainingLog(tmp_path, tensorboard=False)
    with again.untimed():
        clock[0] += 50
    for update in (40, 60):
        clock[0] += 5
        again.write(update, {"total": update / 10, "gradient_norm": float("inf")})
    assert (tmp_path / "log.jsonl").read_text() == whole


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    writer = SimpleNamespace(add_scalar=lambda *values: seen.append(values), flush=lambda: None)
    module = SimpleNamespace(SummaryWriter=lambda folder: seen.append((folder,)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    TrainingLog(tmp_path, tensorboard=True).write(20, {"total": 1.5})
    assert seen == [(str(tmp_path / "tensorboard"),), ("total", 1.5, 20)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match="--tensorboard needs its package: pip install tensorboard"):
        TrainingLog(tmp_path, tensorboard=True)


def test_a_checkpoint_can_be_asked_for(tmp_path: Path) -> None:
    pipe, out = tiny.pipeline(), tmp_path / "out"
    settings = DistillSettings(num_updates=6, batch_size=4, bf16=False)
    store = tiny.store(tmp_path / "store", pipe)
    first = distill_student("tiny", pipe, store, out, settings, upkeep=Upkeep(save_every=2))
    older = out / "checkpoints" / "update-000002"
    again = distill_student("tiny", pipe, store, out, settings, upkeep=Upkeep(save_every=2, resume=older))
    assert tiny.same_weights(first.student, again.student)
    with pytest.raises(ValueError, match="update-000099 is missing"):
        missing = Upkeep(resume=out / "checkpoints" / "update-000099")
        distill_student("tiny", pipe, store, out, settings, upkeep=missing)
    with pytest.raises(ValueError, match="watch_every must not be negative, got -1"):
        Upkeep(watch_every=-1)
