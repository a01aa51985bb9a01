"""Trajectories: for every image its condition, its noise and the tokens that the teacher's flow map makes of it.

Trajectory i depends on the run seed and i alone: its condition is number i of a table, counted round, its noise is
replayed from its key. The teacher always runs on full micro-batches, so that floating point is the same
however a run was cut up.

Axis letters: B batch, L tokens in a sequence, C code channels.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256

import torch

from distilled_decoding.condition import ConditionTable
from distilled_decoding.flow import FlowSettings
from distilled_decoding.noise import SCHEME, gaussian_noise, image_keys, sample_checksum
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.teacher import Teacher, TeacherSampling, by_flow, rollout

Progress = Callable[[int], None]
"""Called after each batch with the number of items that it finished."""


@dataclass(frozen=True)
class TrajectorySettings:
    """What determines trajectories besides the teacher.

    Attributes:
        sampling: the teacher's distribution.
        flow: the solver of the flow map.
        run_seed: all noise follows from it.
        micro_batch: images the teacher samples at once.
        shard_size: trajectories in one file, a multiple of `micro_batch`.

    Raises:
        ValueError: sizes that are not positive or do not fit each other.
    """

    sampling: TeacherSampling
    flow: FlowSettings
    run_seed: int = 0
    micro_batch: int = 256
    shard_size: int = 4096

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.shard_size < 1 or self.shard_size % self.micro_batch:
            raise ValueError(
                f"shard size {self.shard_size} must be a positive multiple of micro-batch {self.micro_batch}"
            )

    def manifest(self, teacher: Teacher, fingerprint: str, asked: Mapping[str, object]) -> dict[str, object]:
        """Everything that must agree between two runs that write into one folder.

        Args:
            teacher: the model.
            fingerprint: a hash of its weights.
            asked: the identity of the table that images are asked for from.
        """
        made_of = origin(teacher, fingerprint, self.sampling, self.flow)
        return {**made_of, "length": teacher.order.length, **asked, **asdict(self)}


def origin(
    teacher: Teacher, fingerprint: str, sampling: TeacherSampling, flow: FlowSettings
) -> dict[str, dict[str, object] | str]:
    """What must agree between trajectories and the model that learns from them: teacher, distribution and noise.

    Args:
        teacher: the model; of its tokenizer, trajectories depend on the codebook.
        fingerprint: a hash of its weights.
        sampling: the teacher's distribution.
        flow: the solver of the flow map.
    """
    codebook_VC = teacher.codebook.float().cpu().contiguous()
    return {
        "tokenizer": sha256(codebook_VC.numpy().tobytes()).hexdigest(),
        "teacher": fingerprint,
        "noise": {"scheme": SCHEME, "sample": sample_checksum()},
        "sampling": asdict(sampling),
        "flow": asdict(flow),
    }


@torch.no_grad()
def _tokens(teacher: Teacher, table: ConditionTable, settings: TrajectorySettings, indices: range) -> Shard:
    """The trajectories of one micro-batch; the indices may run past the end of the shard."""
    device = teacher.codebook.device
    key_B = image_keys("trajectories", settings.run_seed, indices)
    label_B = torch.tensor(indices) % len(table)
    noise_BLC = gaussian_noise(key_B.to(device), teacher.order.length, teacher.codebook.shape[1])
    choose = by_flow(teacher.order, noise_BLC, teacher.codebook, settings.sampling, settings.flow)
    token_BL = rollout(teacher, table[label_B].to(device), settings.sampling.guidance, choose)
    return Shard(token_BL.cpu(), label_B, key_B)


def generate(
    teacher: Teacher,
    table: ConditionTable,
    store: TrajectoryStore,
    settings: TrajectorySettings,
    progress: Progress,
    numbers: Iterable[int] | None = None,
) -> int:
    """Write the trajectories that the store does not have yet; what is damaged counts as missing.

    Args:
        teacher: the model.
        table: what images are asked for.
        store: an opened store. What is finished of a shard is written even when `progress` raises.
        settings: what the store's manifest was made from.
        progress: called with the number of trajectories finished, those found on disk included.
        numbers: the shards to see to; None means all. Processes that share a run take different ones.

    Returns:
        How many were made.
    """
    made = 0
    for number in range(store.num_shards) if numbers is None else numbers:
        found, wanted = store.num_begun(number), len(store.span(number))
        # Micro-batches begin at multiples of their size, wherever a run was cut.
        kept = found if found == wanted else found // settings.micro_batch * settings.micro_batch
        if kept:
            progress(kept)
        if kept < wanted:
            _fill(teacher, table, store, settings, number, kept, progress)
        made += wanted - kept
    return made


def _fill(
    teacher: Teacher,
    table: ConditionTable,
    store: TrajectoryStore,
    settings: TrajectorySettings,
    number: int,
    kept: int,
    progress: Progress,
) -> None:
    """Complete a shard of which some trajectories are there."""
    size, span = settings.micro_batch, store.span(number)
    parts = [store[torch.tensor(span[:kept])]] if kept else []
    try:
        for first in span[kept::size]:
            parts.append(_tokens(teacher, table, settings, range(first, first + size))[: span.stop - first])
            progress(len(parts[-1]))
    finally:
        if parts:
            store.write(number, Shard.cat(parts))
