"""Token matching: the student draws tokens of its own, and the teacher's conditionals on them say what to change.

The tracker learns how likely the student makes a token after those before it; where that is more than the teacher would
have it, the student is turned down.

Axis letters: B batch, L tokens in a sequence, V codebook entries, C code channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition
from distilled_decoding.distill import STUDENT, Forward
from distilled_decoding.losses import Losses, MixedLosses, token_loss, tracker_loss
from distilled_decoding.noise import uniform
from distilled_decoding.on_policy import ALL, Lesson, Mixed, OnPolicy, tracker_name
from distilled_decoding.store import Shard
from distilled_decoding.student import STUDENT_STREAM, StudentOutput, draw_tokens, flow_tokens
from distilled_decoding.teacher import Guidance


class Tracker(nn.Module):
    """A teacher's network as a function: log probabilities of all tokens of a sequence, without guidance.

    Args:
        teacher: a `Teacher` that is a module; those of its parameters are trained that require a gradient.
    """

    def __init__(self, teacher: Any) -> None:
        super().__init__()
        self.teacher = teacher

    def forward(self, token_BL: Tensor, condition: Condition) -> Tensor:
        """Log probabilities of each token given the blocks before its own, float32 [B, L, V]."""
        return self.teacher.forced_logits(token_BL, condition, Guidance()).float().log_softmax(-1)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a student made of some noise.

    Attributes:
        output: its predictions.
        log_pi_BLV: the distributions that its tokens come from, float32.
        token_BL: known tokens, and behind them those that it made.
        condition: what was asked for.
        key_B: keys of the images.
    """

    output: StudentOutput
    log_pi_BLV: Tensor
    token_BL: Tensor
    condition: Condition
    key_B: Tensor


@dataclass(frozen=True, eq=False)
class Tokens(OnPolicy):
    """The method `tokens`, a `distill.Method`; for attributes and errors see `OnPolicy`."""

    @property
    def split_block(self) -> int:
        """Behind the last block: all come from the logits."""
        return self.teacher.order.num_blocks

    @property
    def draw_temperature(self) -> float:
        """What the logits are divided by where a code head's tokens are drawn; 0 takes the likeliest."""
        return self.settings.tokens.draw_temperature

    def tracker(self) -> nn.Module:
        """See `OnPolicy`."""
        return Tracker(self.new_tracker())

    def lessons(self, update: int) -> tuple[Lesson, Lesson | None]:
        """See `OnPolicy`."""
        return self.tracker_losses, None if update < self.settings.first_update else self.student_losses

    def tracker_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> Losses:
        """What the tracker of a start learns from: the student's tokens (Eq. 12).

        Args:
            begun: rows of a batch, see `batch`.
            known_blocks: how many leading blocks are known.
            forwards: student and trackers by name.
            part: which rows of the update these are.
        """
        with torch.no_grad():
            drawn = self.drawn(begun, known_blocks, forwards[STUDENT])
        log_psi_BLV = self.followed(drawn, known_blocks, forwards)
        return Losses(tracker_loss(log_psi_BLV, drawn.token_BL, self.weights(known_blocks, part)))

    def student_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> MixedLosses:
        """What the student learns from: the teacher's conditionals on its tokens (Eq. 11, 14); see `tracker_losses`."""
        drawn = self.drawn(begun, known_blocks, forwards[STUDENT])
        log_p_BLV = self.judged(drawn.token_BL, drawn.condition)
        with torch.no_grad():
            log_psi_BLV = self.followed(drawn, known_blocks, forwards)
        weight_BL, order, settings = self.weights(known_blocks, part), self.teacher.order, self.settings.tokens
        losses = token_loss(drawn.log_pi_BLV, log_psi_BLV, log_p_BLV, drawn.token_BL, weight_BL, order, settings)
        return self.complete(losses, drawn, begun, known_blocks, part)

    def followed(self, drawn: Drawn, known_blocks: int, forwards: Mapping[str, Forward]) -> Tensor:
        """The log probabilities that the tracker of a start gives all tokens, float32 [B, L, V]."""
        return self.track(forwards[tracker_name(known_blocks)], drawn.token_BL, drawn.condition)

    def complete(self, losses: Mixed, drawn: Drawn, begun: Shard, known_blocks: int, part: slice) -> Mixed:
        """A student's losses with a gradient, zero, for a code head that is not read, and the loss on trajectories."""
        if drawn.output.code_BLC is not None:
            # The code head has no say, but processes wait for a gradient of every parameter.
            losses = replace(losses, total=losses.total + 0 * drawn.output.code_BLC.sum())
        return self.mixed(losses, drawn.output, begun, known_blocks, part)

    def drawn(self, begun: Shard, known_blocks: int, student: Forward) -> Drawn:
        """Let a student finish sequences, its tokens taken or drawn as in sampling.

        Args:
            begun: some rows of a batch.
            known_blocks: how many leading blocks are known.
            student: the model; gradients flow through its last pass.
        """
        order, codebook_VC = self.teacher.order, self.teacher.codebook
        temperature = self.draw_temperature
        condition, key_B, noise_BLC = self.asked(begun)
        uniform_BL = uniform(key_B, order.length, STUDENT_STREAM)

        def tokens(output: StudentOutput) -> Tensor:
            logits_BLV = output.logits_BLV.detach()
            if output.code_BLC is None:
                return flow_tokens(logits_BLV, noise_BLC[:, : logits_BLV.shape[1]], codebook_VC, self.flow)
            return draw_tokens(logits_BLV, temperature, uniform_BL) if temperature > 0 else logits_BLV.argmax(-1)

        num_known = order.tokens_before(known_blocks)
        known_BK = begun.token_NL[:, :num_known].to(codebook_VC.device)
        if num_known and self.trajectories is None:
            with torch.no_grad():
                known_BK = tokens(self.predict(student, noise_BLC[:, :num_known], condition, 0))
        x_BLC = torch.cat([lookup(known_BK, codebook_VC), noise_BLC[:, num_known:]], 1)
        output = self.predict(student, x_BLC, condition, known_blocks)
        log_pi_BLV = (output.logits_BLV / (temperature or 1)).log_softmax(-1)
        return Drawn(output, log_pi_BLV, torch.cat([known_BK, tokens(output)[:, num_known:]], 1), condition, key_B)
