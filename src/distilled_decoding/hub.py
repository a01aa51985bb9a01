"""Models on the Hugging Face hub, down and up, with one sentence when it fails."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError

from distilled_decoding.checkpoint import PROMPTS

FILES = ("*.json", "*.safetensors", "*.model", PROMPTS, "README.md")
"""All that a pipeline folder holds (`*.model` are tokenizers); what else lies in a repository is not downloaded."""


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `owner/name`."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None


def download(repo_id: str) -> Path:
    """The folder of a hub model, a pipeline or a text encoder, downloaded once.

    Raises:
        ValueError: there is no such model, or the hub does not answer.
    """
    with _one_sentence(f"could not download {repo_id!r}"):
        return Path(snapshot_download(repo_id, allow_patterns=list(FILES)))


def create_repository(repo_id: str, private: bool, token: str | None) -> str:
    """Make a repository where there is none and return its address.

    Raises:
        ValueError: the id is no `owner/name`, or the hub refuses or does not answer.
    """
    if not is_id(repo_id):
        raise ValueError(f"a hub id is owner/name, got {repo_id!r}")
    with _one_sentence(f"could not create {repo_id!r}"):
        return str(HfApi(token=token).create_repo(repo_id, private=private, exist_ok=True))


def upload(folder: Path, repo_id: str, token: str | None) -> None:
    """Put a pipeline folder into a repository; a model card that lies there stays, for someone may have written it.

    Raises:
        ValueError: the hub refuses or does not answer.
    """
    api = HfApi(token=token)
    with _one_sentence(f"could not upload to {repo_id!r}"):
        kept = ["README.md"] if api.file_exists(repo_id, "README.md") else []
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=kept)


@contextmanager
def _one_sentence(failure: str) -> Iterator[None]:
    """Turn the hub's errors into one: what failed, and what the server said or how the error begins."""
    try:
        yield
    except RepositoryNotFoundError as error:  # the server itself only says that the password is wrong
        reason = "no such repository, or a private one; log in with `hf auth login` or give a token"
        raise ValueError(f"{failure}: {reason}") from error
    except (HTTPError, HFValidationError, OSError) as error:  # OSError: no network, or not in the cache
        said = getattr(error, "server_message", None) or str(error) or type(error).__name__
        raise ValueError(f"{failure}: {said.strip().splitlines()[0]}") from error
