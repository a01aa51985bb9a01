"""Score distillation of tokens: the student takes the likeliest ones, and scores judge their codes, noised.

Both scores are those of mixtures of codes, and exact: the teacher's by its conditionals, the student's by those of the
tracker of token matching. So there is no network of scores to learn, and no vector lies between the codes.

Axis letters: B batch, L tokens in a sequence, V codebook entries, C code channels, R noised codes of a position.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distilled_decoding.codebook import lookup
from distilled_decoding.distill import STUDENT, Forward
from distilled_decoding.distill_scores import code_spread, expected_codes, noised_codes
from distilled_decoding.distill_tokens import Tokens
from distilled_decoding.flow import log_density_ratios
from distilled_decoding.losses import Noised, TokenScoreLosses, score_step, token_score_loss, unit_error
from distilled_decoding.on_policy import ALL
from distilled_decoding.store import Shard

_MOST = 5.0
"""Largest weight of a noised code that the teacher would make more often."""


@dataclass(frozen=True, eq=False)
class TokenScores(Tokens):
    """The method `token-scores`, a `distill.Method`; for attributes and errors see `OnPolicy`."""

    @property
    def draw_temperature(self) -> float:
        """None is drawn."""
        return 0.0

    def student_losses(
        self, begun: Shard, known_blocks: int, forwards: Mapping[str, Forward], part: slice = ALL
    ) -> TokenScoreLosses:
        """What the student learns from: the difference of two scores (Eq. 22); see `tracker_losses`."""
        drawn, codebook_VC = self.drawn(begun, known_blocks, forwards[STUDENT]), self.teacher.codebook
        with torch.no_grad():
            log_psi_BLV = self.followed(drawn, known_blocks, forwards)
            code_BLC = lookup(drawn.token_BL, codebook_VC)
            noised = noised_codes(code_BLC, drawn.key_B, self.settings.scores.noised)
            student_BLRC = expected_codes(noised, log_psi_BLV, codebook_VC)
            log_p_BLV = self.judged(drawn.token_BL, drawn.condition)
            teacher_BLRC = expected_codes(noised, log_p_BLV, codebook_VC)
            unit_BLR1 = unit_error(noised.time_BLR1, code_spread(codebook_VC))
            ratio_BLR1 = density_ratios(noised, log_p_BLV, log_psi_BLV, codebook_VC)
            step_BLC = score_step(code_BLC, student_BLRC, teacher_BLRC, unit_BLR1, ratio_BLR1)
        weight_BL = self.weights(known_blocks, part)
        losses = token_score_loss(drawn.log_pi_BLV, log_psi_BLV, step_BLC, drawn.token_BL, codebook_VC, weight_BL)
        return self.complete(losses, drawn, begun, known_blocks, part)


def density_ratios(noised: Noised, log_p_BLV: Tensor, log_psi_BLV: Tensor, codebook_VC: Tensor) -> Tensor:
    """How much denser the teacher is than the student at each noised code, at most 5 (Eq. 22), [B, L, R, 1].

    Args:
        noised: codes.
        log_p_BLV: the teacher's log probabilities of their tokens.
        log_psi_BLV: the tracker's.
        codebook_VC: the codes.
    """
    time_NR = 1 - noised.time_BLR1.flatten(0, 1).squeeze(-1)
    log_p_NV, log_psi_NV = log_p_BLV.flatten(0, 1), log_psi_BLV.flatten(0, 1)
    ratio_NR = log_density_ratios(noised.x_BLRC.flatten(0, 1), time_NR, log_p_NV, log_psi_NV, codebook_VC)
    return ratio_NR.exp().clamp(max=_MOST).view(noised.time_BLR1.shape)
