"""The distilled student on LlamaGen: the teacher's layers, reading codes or noise.

The class position or the caption's positions come first and attention is the teacher's, but the input at a position is
the code or the noise of that very token. With a code head the output there predicts it, in two ways, as in the
published files, whose parameter names these are; with a flow head, which is ours, the output there predicts how the
next token is distributed, as the teacher's does. The published students are of classes; reading captions is ours: their
positions count as known, padding is left out of attention, and where the code head takes the class it takes the mean of
the caption's positions with text.

Axis letters: B batch, L positions or tokens, T condition positions, P positions of a whole sequence, V codebook
entries, C code channels, D width.
"""

from dataclasses import asdict, dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition
from distilled_decoding.families.layers import CodeHead
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.transformer import Backbone, TransformerConfig, leading_mask, rope_table
from distilled_decoding.student import Head, StudentOutput


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TransformerConfig):
    """Sizes of the student: the transformer's, the number of code channels C, and the head."""

    code_dim: int
    head: Head = "code"


class LlamaGenStudent(Backbone):
    """A `Student` of one token a block."""

    config: StudentConfig

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config, dropout=0.0)
        self.tok_embeddings = nn.Linear(config.code_dim, config.dim)
        self.n_d_embed = nn.Embedding(2, config.dim)
        if config.head == "code":
            self.final_layer_conti = CodeHead(config.dim, config.code_dim)
        self.reset_parameters()

    @classmethod
    def from_teacher(cls, teacher: LlamaGenTeacher, seed: int = 0, head: Head = "code") -> "LlamaGenStudent":
        """A student that begins where the teacher stands.

        Condition embedding, layers and logits head are the teacher's. Codes come in through the affine map that
        fits the teacher's token embeddings best, the code head predicts zeros, and known and noise positions
        differ by little.

        Args:
            teacher: left as it is; nothing is shared with it.
            seed: of the noise/data embedding, the only part that is random.
            head: see `student.Head`.
        """
        transformer = teacher.transformer
        config = StudentConfig(**asdict(transformer.config), code_dim=teacher.codebook.shape[1], head=head)
        student = cls(config)
        for part in ("cls_embedding", "layers", "norm", "output"):
            getattr(student, part).load_state_dict(getattr(transformer, part).state_dict())
        with torch.no_grad():
            student._fit_input(teacher.codebook, transformer.tok_embeddings.weight)
            student.n_d_embed.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
            if head == "code":
                student.final_layer_conti.linear.weight.zero_()
        return student.to(teacher.codebook.device)

    @cached_property
    def order(self) -> BlockOrder:
        """One token a block, row by row."""
        return BlockOrder.raster(self.config.num_tokens)

    def forward(
        self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor, num_logits: int | None = None
    ) -> StudentOutput:
        """See `Student.__call__`."""
        condition_BTD, attended_BP = self.cls_embedding(condition), self.attended(condition)
        first, ahead = self.config.condition_tokens, self.config.head == "flow"
        if ahead:
            code_BLC = code_BLC[:, :-1]  # what is predicted is ahead of what is read
        length = first + code_BLC.shape[1]
        known_BL = F.pad(self.order.known_BL(known_blocks_B), (first, 0), value=True)[:, :length]
        token_BLD = self.tok_embeddings(code_BLC.to(condition_BTD.dtype))
        x_BLD = torch.cat([condition_BTD, token_BLD], dim=1) + self.n_d_embed(known_BL.long())
        rope, mask = rope_table(self.config, x_BLD.device)[:length], leading_mask(attended_BP, length)
        hidden_BLD = self.run_layers(x_BLD, rope, mask)[:, first - ahead :]
        if ahead:
            return StudentOutput(self.logits(hidden_BLD[:, :num_logits]), None)
        code_BLC = self.final_layer_conti(hidden_BLD, _summary(condition_BTD, attended_BP)).float()
        return StudentOutput(self.logits(hidden_BLD[:, :num_logits]), code_BLC)

    def _fit_input(self, codebook_VC: Tensor, embedding_VD: Tensor) -> None:
        """Least squares for embedding_VD = codebook_VC @ weight.T + bias."""
        design_VC = F.pad(codebook_VC.double().cpu(), (0, 1), value=1.0)
        solution_CD = torch.linalg.lstsq(design_VC, embedding_VD.double().cpu()).solution
        self.tok_embeddings.weight.copy_(solution_CD[:-1].T)
        self.tok_embeddings.bias.copy_(solution_CD[-1])


def _summary(condition_BTD: Tensor, attended_BP: Tensor | None) -> Tensor:
    """The class, or the mean of a caption's positions with text, [B, 1, D]."""
    if attended_BP is None:
        return condition_BTD
    text_BT1 = attended_BP[:, : condition_BTD.shape[1], None].to(condition_BTD.dtype)
    # A caption without any text would have the mean of nothing.
    return (condition_BTD * text_BT1).sum(1, keepdim=True) / text_BT1.sum(1, keepdim=True).clamp(min=1)
