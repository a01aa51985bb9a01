"""Text encoders: prompts become captions through a T5 encoder of the package transformers.

Axis letters: B batch, T caption positions, F caption feature channels.
"""

import html
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from distilled_decoding.checkpoint import fingerprint
from distilled_decoding.condition import Captions
from distilled_decoding.hub import download

ENCODER, TOKENIZER = "text_encoder", "text_tokenizer"
"""The two folders of a text encoder within that of its pipeline."""

_MISSING = "text needs the package transformers: pip install 'distilled-decoding[t2i]'"
_WAY_OUT = "give a folder that holds a T5 encoder with its tokenizer, or features made beforehand with `encode-prompts`"


def clean(prompt: str) -> str:
    """A prompt as the encoder reads it: HTML entities resolved, each run of white space one blank, lower case."""
    return " ".join(html.unescape(prompt).split()).lower()


class TextEncoder:
    """A T5 encoder with its tokenizer, for captions of at most `max_tokens` tokens, the end token among them.

    Attributes:
        encoder: transformers' `T5EncoderModel`.
        tokenizer: transformers' tokenizer of that model.
        max_tokens: T, the positions of a caption.

    Raises:
        ValueError: fewer than two tokens.
    """

    def __init__(self, encoder: nn.Module, tokenizer: Any, max_tokens: int) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, one for text and one for its end, got {max_tokens}")
        self.encoder: Any = encoder
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, max_tokens: int, device: str = "cpu") -> "TextEncoder":
        """Load an encoder in float32, its weights fixed.

        Args:
            name_or_folder: a pipeline folder with `text_encoder/` and `text_tokenizer/`, a folder that holds both in
                one, as transformers writes it, or a hub id such as google/flan-t5-xl.
            max_tokens: positions of a caption; longer prompts are cut.
            device: where the encoder goes.

        Raises:
            ValueError: transformers is not installed, or there is no such model, or it is no T5 encoder.
        """
        transformers, folder = _transformers(), _folder(name_or_folder)
        apart = (folder / ENCODER).is_dir()
        model, words = (folder / ENCODER, folder / TOKENIZER) if apart else (folder, folder)
        try:
            with _quiet(transformers):
                encoder, found = transformers.T5EncoderModel.from_pretrained(
                    model, output_loading_info=True, trust_remote_code=False
                )
                tokenizer = transformers.AutoTokenizer.from_pretrained(words, trust_remote_code=False)
        except Exception as error:  # what transformers raises depends on which file is wrong, and how
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
            raise ValueError(f"{folder} holds no text encoder ({reason}); {_WAY_OUT}") from error
        if found["missing_keys"]:
            lacks = sorted(found["missing_keys"])[0]
            raise ValueError(f"{folder} holds no T5 encoder, which would have {lacks!r}; {_WAY_OUT}")
        ids = tokenizer("a")["input_ids"]
        # Where its files are missing, transformers makes a tokenizer that knows no word.
        if tokenizer.unk_token_id in ids:
            raise ValueError(f"{words} holds no vocabulary of a tokenizer; {_WAY_OUT}")
        if ids[-1] != tokenizer.eos_token_id:
            raise ValueError(f"{words} holds a tokenizer that puts no end token behind a text; {_WAY_OUT}")
        return cls(encoder.float().to(device).eval().requires_grad_(False), tokenizer, max_tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `text_encoder/` and `text_tokenizer/` into a pipeline folder, as transformers writes them."""
        with _quiet(_transformers()):
            self.encoder.save_pretrained(Path(folder) / ENCODER)
            self.tokenizer.save_pretrained(Path(folder) / TOKENIZER)
        # transformers leaves weights to their owner alone, which an installed package must not.
        for name in (ENCODER, TOKENIZER):
            for path in (Path(folder) / name).iterdir():
                path.chmod(0o644)

    @property
    def width(self) -> int:
        """F, the channels of a feature."""
        return int(self.encoder.config.d_model)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return next(self.encoder.parameters()).device

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What determines the features of a text; vocabulary and weights are hashed when it is first asked for."""
        vocabulary = json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
        return {"tokenizer": sha256(vocabulary.encode()).hexdigest(), "weights": fingerprint(self.encoder)}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Captions:
        """Captions of some prompts, as one batch, on the encoder's device; an empty prompt becomes a null caption.

        Prompts are cleaned first, see `clean`. One that is too long is cut, and a warning says where.

        Raises:
            ValueError: there are no prompts.
        """
        return self.features(self.tokens(prompts))

    def tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt, cleaned and cut to `max_tokens`, with the end token.

        Raises:
            ValueError: there are no prompts.
        """
        if not prompts:
            raise ValueError("no prompts; give one at least")
        ids = self.tokenizer([clean(prompt) for prompt in prompts], verbose=False)["input_ids"]
        if too_long := [i for i, prompt_ids in enumerate(ids) if len(prompt_ids) > self.max_tokens]:
            warnings.warn(self._cut(too_long, ids[too_long[0]]), stacklevel=2)
        # The last one is the end token, which stays.
        return [prompt_ids[:-1][: self.max_tokens - 1] + prompt_ids[-1:] for prompt_ids in ids]

    def features(self, tokens: Sequence[Sequence[int]]) -> Captions:
        """Captions of tokens, through which gradients flow; those of nothing but an end token are null.

        All positions are computed, so that a caption does not depend on how long the others of its batch are.
        """
        length_B1 = torch.tensor([[len(prompt_ids)] for prompt_ids in tokens], dtype=torch.int64).view(-1, 1)
        mask_BT = torch.arange(self.max_tokens) < length_B1
        id_BT = torch.full(mask_BT.shape, self.tokenizer.pad_token_id)
        id_BT[mask_BT] = torch.tensor([i for prompt_ids in tokens for i in prompt_ids], dtype=torch.int64)
        mask_BT = mask_BT.to(self.device)
        feature_BTF: Tensor = self.encoder(id_BT.to(self.device), attention_mask=mask_BT.long()).last_hidden_state
        captions = Captions.right_padded(feature_BTF.float() * mask_BT[..., None], mask_BT)
        null_B = (length_B1[:, 0] == 1).to(self.device)
        return Captions(captions.feature_BTF, captions.mask_BT, null_B)

    def _cut(self, too_long: Sequence[int], ids: Sequence[int]) -> str:
        """What to say of prompts that are too long, counted from 1 as lines are; `ids` are the first one's."""
        kept = self.tokenizer.decode(ids[: self.max_tokens - 1], skip_special_tokens=True).split()
        first = f"prompt {too_long[0] + 1} is longer than {self.max_tokens} tokens and is cut after "
        first += f'"…{" ".join(kept[-4:])}"'
        return first if len(too_long) == 1 else f"{len(too_long)} prompts are too long: {first}"


def _folder(name_or_folder: str | Path) -> Path:
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    try:
        return download(str(name_or_folder))
    except ValueError as error:
        found = f"no such folder, and {error}"
        raise ValueError(f"no text encoder {str(name_or_folder)!r}: {found}; {_WAY_OUT}") from error


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(_MISSING) from error
    return transformers


@contextmanager
def _quiet(transformers: ModuleType) -> Iterator[None]:
    """Without the package's own progress bars and its lists of the decoder's weights, which an encoder does not use."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
