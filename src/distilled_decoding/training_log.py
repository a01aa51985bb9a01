"""What is written down while a student trains: `log.jsonl`, and TensorBoard's files where wanted."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from distilled_decoding.checkpoint import save_text


class TrainingLog:
    """The log of one training, one JSON object a line; a number that is not finite is null.

    A run that goes on from a checkpoint writes some updates again: their old lines go, so that the log is that of an
    unbroken run. Each line says how many seconds of training it took until then.

    Args:
        out: folder of `log.jsonl` and, with TensorBoard, of `tensorboard`.
        tensorboard: also write files for TensorBoard.

    Raises:
        ValueError: TensorBoard is wanted and not installed.
    """

    def __init__(self, out: Path, tensorboard: bool) -> None:
        self._path = out / "log.jsonl"
        self._begun = False
        self._since = perf_counter()
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard needs its package: pip install tensorboard") from error
            self._board = SummaryWriter(str(out / "tensorboard"))

    def write(self, update: int, values: Mapping[str, float]) -> None:
        """Write some numbers of an update, counted from 1."""
        if not self._begun:
            self._forget(update)
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line["seconds"] = round(perf_counter() - self._since, 1)
        with self._path.open("a") as file:
            file.write(json.dumps({"update": update, **line}) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, update)
            self._board.flush()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What is done within is no part of the training."""
        begin = perf_counter()
        yield
        self._since += perf_counter() - begin

    def _forget(self, update: int) -> None:
        """Drop the lines from an update on, and a last one that is not whole."""
        self._begun = True
        lines = self._path.read_text().splitlines(keepends=True) if self._path.is_file() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["update"] < update]
        self._since -= json.loads(kept[-1])["seconds"] if kept else 0
        save_text(self._path, "".join(kept))
