"""Bring your own teacher: one file, from training images to one-step samples (docs/extending.md walks through it).

The images show sparks: they flare up at random, and each row repeats the row above it one grey level darker, moved to
the left, not at all or to the right, as the class says. The teacher samples a row a step, so a row is a block.

Axis letters: B batch, L tokens (pixels), N tokens of the first rows, S rows, K tokens in a row, V grey levels, C code
channels, D width, H heads, E head channels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.check import check_student, check_teacher
from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Classes, Condition, Labels
from distilled_decoding.distill import DistillSettings, distill
from distilled_decoding.distill_trajectories import Trajectories
from distilled_decoding.families import Family, register
from distilled_decoding.flow import FlowSettings
from distilled_decoding.images import grid
from distilled_decoding.noise import image_keys
from distilled_decoding.pipeline import Pipeline, PipelineConfig
from distilled_decoding.store import TrajectoryStore
from distilled_decoding.student import StudentOutput
from distilled_decoding.teacher import Guidance, TeacherSampling
from distilled_decoding.training_state import Checkpoints
from distilled_decoding.trajectories import TrajectorySettings, generate

CLASSES = ("left", "down", "right")
SIDE, LEVELS = 8, 5


@dataclass(frozen=True)
class Config:
    """Sizes of the network."""

    vocab_size: int = LEVELS
    code_dim: int = 1
    dim: int = 48
    num_heads: int = 6
    num_layers: int = 2


class Layer(nn.Module):
    """Tokens mix by learned matrices, as far as they see each other; then an MLP, token by token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        dim = config.dim
        self.mix_HLL = nn.Parameter(torch.randn(config.num_heads, SIDE**2, SIDE**2) / SIDE)
        self.value = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))

    def forward(self, x_BLD: Tensor, sees_LL: Tensor) -> Tensor:
        """Of the first tokens, as many as there are."""
        mix_HLL = self.mix_HLL[:, : len(sees_LL), : len(sees_LL)] * sees_LL
        value_BHLE = self.value(x_BLD).unflatten(2, (len(mix_HLL), -1)).transpose(1, 2)
        x_BLD = x_BLD + (mix_HLL @ value_BHLE).transpose(1, 2).flatten(2)
        return x_BLD + self.mlp(x_BLD)


class Network(nn.Module):
    """What teacher and student share: it reads a code at every token, and predicts one there."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, dim = config, config.dim
        self.order = BlockOrder((SIDE,) * SIDE)
        self.code_in, self.known = nn.Linear(config.code_dim, dim), nn.Embedding(2, dim)
        self.place, self.label = nn.Embedding(SIDE**2, dim), nn.Embedding(len(CLASSES) + 1, dim)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.heads = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, config.vocab_size + config.code_dim))
        for table in (self.known, self.place, self.label):
            nn.init.normal_(table.weight, std=0.1)

    def predict(self, code_BLC: Tensor, known_BL: Tensor, condition: Condition, own_block: bool) -> StudentOutput:
        """Logits and codes, of the first rows or of all."""
        length = code_BLC.shape[1]
        x_BLD = self.code_in(code_BLC.to(self.code_in.weight.dtype)) + self.known(known_BL.long())
        x_BLD = x_BLD + self.place.weight[:length] + self.label(Labels.require(condition).label_B)[:, None]
        sees_LL = self.order.attends_LL(own_block, x_BLD.device)[:length, :length]
        for layer in self.layers:
            x_BLD = layer(x_BLD, sees_LL)
        logits_BLV, code_BLC = self.heads(x_BLD).float().split([self.config.vocab_size, self.config.code_dim], dim=2)
        return StudentOutput(logits_BLV, code_BLC)


State = tuple[Condition, Guidance, Tensor]
"""A generation between two rows: the tokens so far, which are read anew for every row. A cache would go here."""


class PixelTeacher(nn.Module):
    """A `Teacher` whose codes are grey values, which spares it a tokenizer."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.order, self.num_classes = network, network.order, len(CLASSES)
        self.register_buffer("codebook", torch.linspace(-1, 1, LEVELS)[:, None], persistent=False)

    def start(self, condition: Condition, guidance: Guidance, prefix_BL: Tensor | None = None) -> State:
        """See `Teacher.start`."""
        if prefix_BL is None:
            prefix_BL = torch.empty(len(condition), 0, dtype=torch.int64, device=self.codebook.device)
        if prefix_BL.shape[1] not in self.order.starts:
            raise ValueError(f"a prefix must be whole rows and leave one to predict, got {prefix_BL.shape[1]} tokens")
        return condition, guidance, prefix_BL

    def next_logits(self, state: State) -> Tensor:
        """See `Teacher.next_logits`."""
        return self._logits(*state)[:, -SIDE:]

    def feed(self, state: State, token_BK: Tensor) -> State:
        """See `Teacher.feed`."""
        condition, guidance, token_BN = state
        return condition, guidance, torch.cat([token_BN, token_BK], dim=1)

    def forced_logits(self, token_BL: Tensor, condition: Condition, guidance: Guidance) -> Tensor:
        """See `Teacher.forced_logits`."""
        return self._logits(condition, guidance, token_BL[:, :-SIDE])

    def encode(self, image_B1HW: Tensor) -> Tensor:
        """See `Teacher.encode`."""
        return nearest(image_B1HW.flatten(1).unsqueeze(2), self.codebook)

    def decode(self, code_BLC: Tensor) -> Tensor:
        """See `Teacher.decode`."""
        return code_BLC.transpose(1, 2).unflatten(2, (SIDE, SIDE))

    def _logits(self, condition: Condition, guidance: Guidance, token_BN: Tensor) -> Tensor:
        """Guided logits of the first rows and of the next one: a token reads the one above it."""
        if guidance.is_active:
            condition, token_BN = condition.with_null(), token_BN.repeat(2, 1)
        above_BLC = F.pad(lookup(token_BN, self.codebook), (0, 0, SIDE, 0))
        known_BL = F.pad(torch.ones_like(token_BN), (SIDE, 0))
        logits_BLV = self.network.predict(above_BLC, known_BL, condition, own_block=True).logits_BLV
        scale_L = guidance.at_tokens(self.order, logits_BLV.device)[: logits_BLV.shape[1]]
        return guidance.apply(logits_BLV, scale_L[:, None])


class PixelStudent(Network):
    """A `Student`: a token reads its own code or noise, and sees the rows above it."""

    @classmethod
    def from_teacher(cls, teacher: PixelTeacher, seed: int) -> "PixelStudent":
        """A student with the teacher's weights; as all of them are taken over, nothing is left to the seed."""
        student = cls(teacher.network.config)
        student.load_state_dict(teacher.network.state_dict())
        return student.to(teacher.codebook.device)

    def forward(
        self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor, num_logits: int | None = None
    ) -> StudentOutput:
        """See `Student.__call__`."""
        known_BL = self.order.known_BL(known_blocks_B)[:, : code_BLC.shape[1]]
        return self.predict(code_BLC, known_BL, condition, own_block=False)


register(Family("pixels", {"network": (Network, Config)}, PixelTeacher, (PixelStudent, Config)))


def drift(row_BSK: Tensor, label_B: Tensor) -> Tensor:
    """Rows moved as the class says."""
    column_B1K = (torch.arange(SIDE) + 1 - label_B[:, None, None]) % SIDE
    return row_BSK.gather(2, column_B1K.expand_as(row_BSK))


def draw_sparks(label_B: Tensor, generator: torch.Generator) -> Tensor:
    """Training images as tokens [B, L]; 12% of the dark places flare up."""
    rows = [torch.zeros(len(label_B), 1, SIDE, dtype=torch.int64)]
    for _ in range(SIDE):
        above_B1K = drift(rows[-1], label_B)
        flare_B1K = (torch.rand(above_B1K.shape, generator=generator) < 0.12) * (LEVELS - 1)
        rows.append(torch.where(above_B1K > 0, above_B1K - 1, flare_B1K))
    return torch.cat(rows[1:], dim=2).flatten(1)


def is_right(token_BL: Tensor, label_B: Tensor) -> Tensor:
    """Whether every pixel follows from the one above it: one level darker, or else a flare or dark, bool [B]."""
    row_BSK = token_BL.unflatten(1, (SIDE, SIDE))
    above_BSK = F.pad(drift(row_BSK[:, :-1], label_B), (0, 0, 1, 0))
    flare_or_dark_BSK = (row_BSK == LEVELS - 1) | (row_BSK == 0)
    return torch.where(above_BSK > 0, row_BSK == above_BSK - 1, flare_or_dark_BSK).flatten(1).all(1)


def train_teacher(teacher: PixelTeacher, num_updates: int, batch_size: int = 64) -> None:
    """Cross-entropy on fresh images; one label in ten is dropped, so that the null class means something."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(teacher.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, num_updates, pct_start=0.1)
    for _ in range(num_updates):
        label_B = torch.randint(len(CLASSES), (batch_size,), generator=generator)
        dropped_B = torch.rand(batch_size, generator=generator) < 0.1
        condition = Labels(label_B.masked_fill(dropped_B, len(CLASSES)), len(CLASSES))
        token_BL = draw_sparks(label_B, generator)
        logits_BLV = teacher.forced_logits(token_BL, condition, Guidance())
        optimizer.zero_grad()
        F.cross_entropy(logits_BLV.flatten(0, 1), token_BL.flatten()).backward()
        optimizer.step()
        schedule.step()


class Row(NamedTuple):
    """What 300 samples of one kind are like; the dark picture has no mistake, which is why flares are counted."""

    name: str
    right_images: float
    pixels_as_the_teachers: float
    flares_per_image: float


def main(out: Path, teacher_updates: int = 500, trajectories: int = 8192, updates: int = 1200) -> list[Row]:
    """Train a teacher and distil it into a model in `out`, where the same call goes on.

    Args:
        out: folder of the trajectories, the model and the picture `grid.png`.
        teacher_updates: how long the teacher is trained.
        trajectories: how many the student learns from.
        updates: how long the student is trained.
    """
    torch.manual_seed(0)
    teacher = PixelTeacher(Network(Config()))
    train_teacher(teacher, teacher_updates)
    check_teacher(teacher.eval().requires_grad_(False))

    sampling, flow, starts = TeacherSampling(top_p=0.97), FlowSettings(), (0, SIDE // 2)
    pipe = Pipeline(teacher, None, PipelineConfig("pixels", CLASSES, sampling, flow, starts, SIDE, micro_batch=256))
    student = pipe.new_student(seed=0)
    check_student(student, teacher)

    settings = TrajectorySettings(sampling, flow)
    table = Classes(len(CLASSES))
    manifest = settings.manifest(teacher, pipe.fingerprint, table.identity)
    store = TrajectoryStore.create(out / "trajectories", manifest, trajectories)
    generate(teacher, table, store, settings, progress=lambda items: None)

    training = DistillSettings(updates, learning_rate=8e-3, ema_rate=0.99, start_blocks=starts, bf16=False)
    checkpoints = Checkpoints(out / "checkpoints")
    method = Trajectories(teacher, store, table, training, SIDE)
    distilled = distill(method, student, checkpoints, on_update=lambda update: True)
    pipe.with_student(distilled, starts, SIDE).save_pretrained(out / "model")
    return compare(Pipeline.from_pretrained(out / "model"), out / "grid.png")


def compare(pipe: Pipeline, picture: Path) -> list[Row]:
    """300 samples of every way to sample, from the same labels and noise; a dozen of each are drawn."""
    untrained = pipe.with_student(pipe.new_student(seed=0), pipe.config.start_blocks, SIDE)
    ways = [("teacher", pipe, "teacher"), ("2 steps", pipe, 2), ("1 step", pipe, 1), ("untrained", untrained, 1)]
    condition = Labels.checked(torch.arange(300) * len(CLASSES) // 300, len(CLASSES))
    key_N = image_keys("evaluation", 0, range(300))
    rows, images = [], []
    for name, model, steps in ways:
        image_N1HW = torch.cat(list(model.images(model.plan(steps), condition, key_N)))
        images.append(image_N1HW)
        token_NL, teachers_NL = (pipe.teacher.encode(x / 127.5 - 1) for x in (image_N1HW, images[0]))
        right, same = is_right(token_NL, condition.label_B), token_NL == teachers_NL
        flares = (token_NL == LEVELS - 1).sum(1)
        rows.append(Row(name, *(float(value.double().mean()) for value in (right, same, flares))))
    drawn = torch.cat([F.pad(image_N1HW[::25], (1, 1, 1, 1), value=96) for image_N1HW in images])
    grid(drawn, columns=12, scale=6).save(picture)
    return rows


if __name__ == "__main__":
    for row in tyro.cli(main):
        print(row)  # noqa: T201
