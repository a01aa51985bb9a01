"""The hub without a network: a cache that was filled before, and an API that only notes what it is asked."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load

from distilled_decoding import cli, hub
from distilled_decoding.pipeline import Pipeline
from tests import tiny

PIPE = tiny.pipeline()
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ADDRESS = "https://huggingface.co/toy/model"
RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of `toy/model` in a cache that is all there is: the constants are what the environment sets."""
    repository = tmp_path / "models--toy--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    PIPE.save_pretrained(repository / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


class Api:
    """In place of `HfApi`: keeps the calls and what the uploaded folder held."""

    def __init__(self, error: Exception | None = None, has_card: bool = False) -> None:
        self.error, self.has_card = error, has_card
        self.calls: list[tuple[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def __call__(self, token: str | None) -> "Api":
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        self.calls.append(("create", (repo_id, private, exist_ok)))
        if self.error:
            raise self.error
        return ADDRESS

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return self.has_card and filename == "README.md"

    def upload_folder(self, repo_id: str, folder_path: Path, ignore_patterns: list[str]) -> None:
        names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
        sent = filter_repo_objects(names, ignore_patterns=ignore_patterns)
        self.files = {name: (folder_path / name).read_bytes() for name in sent}
        self.calls.append(("upload", repo_id))


def test_a_hub_id_is_loaded_from_the_cache(snapshot: Path) -> None:
    loaded = Pipeline.from_pretrained("toy/model")
    assert loaded.fingerprint == PIPE.fingerprint and tiny.same_weights(loaded.student, PIPE.student)


def test_an_id_that_is_not_in_the_cache_gives_one_sentence(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match="no such folder, and could not download 'toy/other': .*shipped models"):
        Pipeline.from_pretrained("toy/other")
    monkeypatch.setattr(sys, "argv", ["distilled-decoding", "info", "toy/other"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err.count("\n") == 1


def test_a_repository_of_another_kind_is_named(snapshot: Path) -> None:
    (snapshot / "model_index.json").unlink()
    with pytest.raises(ValueError, match="toy/model holds no model_index.json"):
        Pipeline.from_pretrained("toy/model")


def test_only_what_a_pipeline_needs_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **words: asked.update(words) or str(tmp_path))
    assert hub.download("toy/model") == tmp_path
    PIPE.save_pretrained(tmp_path)
    own = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    others = ["pytorch_model.bin", "unet/model.ckpt", "samples.png", "notes.md"]
    assert sorted(filter_repo_objects(own + others, **asked)) == sorted(own)


def test_push_uploads_a_whole_folder_with_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api()
    monkeypatch.setattr(hub, "HfApi", api)
    assert PIPE.push_to_hub("toy/model", private=True, token="secret", dtype=torch.float16) == ADDRESS
    assert [call for call in api.calls if call[0] != "token"] == [
        ("create", ("toy/model", True, True)),
        ("upload", "toy/model"),
    ]
    assert {token for name, token in api.calls if name == "token"} == {"secret"}
    assert "\n# toy/model\n" in api.files["README.md"].decode()
    assert json.loads(api.files["model_index.json"])["student"] == ["distilled_decoding", "LlamaGenStudent"]
    assert all(w.dtype == torch.float16 for w in load(api.files["student/model.safetensors"]).values())
    for name, content in api.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert Pipeline.from_pretrained(tmp_path).config == PIPE.config


def test_push_leaves_a_card_that_the_repository_has(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api(has_card=True)
    monkeypatch.setattr(hub, "HfApi", api)
    PIPE.push_to_hub("toy/model")
    assert "README.md" not in api.files and "model_index.json" in api.files


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (HfHubHTTPError("403\n\nmore", response=RESPONSE, server_message="no right to write"), "no right to write"),
        (HfHubHTTPError("\n\n403 Forbidden\nmore", response=RESPONSE), "403 Forbidden"),
        (RepositoryNotFoundError("401", response=RESPONSE, server_message="Invalid password"), "hf auth login"),
        (HTTPError("no route to the hub"), "no route to the hub"),
        (ConnectionError(), "ConnectionError"),
    ],
)
def test_a_refusal_is_one_sentence_before_anything_is_written(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Api(error)
    monkeypatch.setattr(hub, "HfApi", api)
    with pytest.raises(ValueError, match="^could not create 'toy/model': ") as caught:
        PIPE.push_to_hub("toy/model")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert api.calls[-1][0] == "create"


def test_a_text_encoder_in_a_folder_of_its_own_is_not_pushed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lies in /models/t5, where nobody else .* with_settings\(text_encoder="):
        PIPE.with_settings(text_encoder="/models/t5").push_to_hub("toy/model")


@pytest.mark.parametrize("repo_id", ["model", "a/b/c", "toy/no spaces", "toy/-model"])
def test_a_bad_id_is_refused_without_a_network(repo_id: str) -> None:
    with pytest.raises(ValueError, match=repo_id):
        PIPE.push_to_hub(repo_id)
