"""The distilled student on VAR: the teacher's layers, reading codes or noise.

With a code head, as published, there is one level more than the teacher has: the class position, in front. A token's
position reads the code or the noise of that very token, the output there predicts it, in two ways, and it attends to
the levels before its own and to itself. Whether it is known or noise is told to every layer. Parameter names are those
of the published files.

With a flow head, which is ours, levels and attention are the teacher's. A scale reads the one before it, codes or
noise, on top of the sum of those coarser ones that are known, and the output predicts how its tokens are distributed.
The tokenizer's convolutions, which the teacher reads through, are left out.

Axis letters: B batch, L positions or tokens, V codebook entries, C code channels, D width.
"""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distilled_decoding.blocks import BlockOrder
from distilled_decoding.condition import Condition
from distilled_decoding.families.layers import CodeHead
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.tokenizer import average, scale_order, spread
from distilled_decoding.families.var.transformer import Backbone, TransformerConfig
from distilled_decoding.student import Head, StudentOutput


@dataclass(frozen=True, kw_only=True)
class StudentConfig(TransformerConfig):
    """Sizes of the student, which are the teacher's, and the head."""

    head: Head = "code"


class VARStudent(Backbone):
    """A `Student` of one scale a block."""

    config: StudentConfig

    def __init__(self, config: StudentConfig) -> None:
        scales = scale_order(config.patch_nums)
        super().__init__(config, scales if config.head == "flow" else BlockOrder((1, *scales.sizes)))
        self.n_d_embed = nn.Embedding(2, config.dim)
        if config.head == "code":
            self.layerwise_n_d_embed = nn.ModuleList(
                nn.Linear(config.dim, config.dim) for _ in range(config.num_layers + 1)
            )
            self.final_layer_conti = CodeHead(config.dim, config.code_dim)
        self.reset_parameters()

    @classmethod
    def from_teacher(cls, teacher: VARTeacher, seed: int = 0, head: Head = "code") -> "VARStudent":
        """A student that begins where the teacher stands.

        All that the teacher has is the teacher's. With a code head, the class position takes the place and level of the
        teacher's first scale, and those of the student's own first scale are new and small. So are the noise/data
        embeddings. The code head predicts zeros.

        Args:
            teacher: left as it is; nothing is shared with it.
            seed: of the parts that are new.
            head: see `student.Head`.
        """
        config = StudentConfig(**asdict(teacher.transformer.config), head=head)
        student = cls(config)
        generator = torch.Generator().manual_seed(seed)
        weights = {name: value.cpu() for name, value in teacher.transformer.state_dict().items()}
        told: list[nn.Module] = [student.n_d_embed]
        if head == "code":
            weights["pos_1LC"] = _with_new_row(weights["pos_1LC"], 1, generator)
            weights["lvl_embed.weight"] = _with_new_row(weights["lvl_embed.weight"], 0, generator)
            told.extend(student.layerwise_n_d_embed)
        # What is new in the student keeps its fresh start; nothing of the teacher is left over.
        left_over = student.load_state_dict(weights, strict=False).unexpected_keys
        assert not left_over
        with torch.no_grad():
            for layer in told:
                cast(Tensor, layer.weight).normal_(std=0.02, generator=generator)
            if head == "code":
                student.final_layer_conti.linear.weight.zero_()
        return student.to(teacher.codebook.device)

    @cached_property
    def order(self) -> BlockOrder:
        """One scale a block, the teacher's."""
        return scale_order(self.config.patch_nums)

    def forward(
        self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor, num_logits: int | None = None
    ) -> StudentOutput:
        """See `Student.__call__`."""
        if self.config.head == "flow":
            return StudentOutput(self._conditionals(code_BLC, condition, known_blocks_B)[:, :num_logits], None)
        class_BD = self.embed_class(condition)
        length = 1 + code_BLC.shape[1]
        known_BL = F.pad(self.order.known_BL(known_blocks_B), (1, 0), value=True)[:, :length].long()
        x_BLD = torch.cat([self.start(class_BD), self.embed(code_BLC, slice(1, length))], dim=1)
        # There are two embeddings, so each layer's projection is of two rows rather than of every position.
        told = [F.embedding(known_BL, project(self.n_d_embed.weight)) for project in self.layerwise_n_d_embed]
        hidden_BLD = self.run_layers(
            x_BLD + self.n_d_embed(known_BL),
            self.modulations(class_BD),
            self.levels.attends_LL(own_block=False, device=x_BLD.device)[:length, :length],
            between=told[:-1],
        )
        hidden_BLD = (hidden_BLD + told[-1])[:, 1:]
        code_BLC = self.final_layer_conti(hidden_BLD, class_BD[:, None]).float()
        return StudentOutput(self.logits(hidden_BLD[:, :num_logits], class_BD), code_BLC)

    def _conditionals(self, code_BLC: Tensor, condition: Condition, known_blocks_B: Tensor) -> Tensor:
        """Logits of every token given the scales before its own, codes or noise, [B, L, V]."""
        order, length = self.levels, code_BLC.shape[1]
        class_BD = self.embed_class(condition)
        input_BLC = self._read(code_BLC, known_blocks_B)
        x_BLD = torch.cat([self.start(class_BD), self.embed(input_BLC, slice(1, length))], dim=1)
        known_BL = order.block_L(x_BLD.device)[:length] <= known_blocks_B[:, None]
        hidden_BLD = self.run_layers(
            x_BLD + self.n_d_embed(known_BL.long()),
            self.modulations(class_BD),
            order.attends_LL(own_block=True, device=x_BLD.device)[:length, :length],
        )
        return self.logits(hidden_BLD, class_BD)

    def _read(self, code_BLC: Tensor, known_blocks_B: Tensor) -> Tensor:
        """What each scale but the first reads, [B, L', C]."""
        sides, order = self.config.patch_nums, self.levels
        known_BChw, inputs = code_BLC.new_zeros(()), [code_BLC[:, :0]]
        for scale in range(order.blocks_in(code_BLC.shape[1]) - 1):
            own_BChw = spread(code_BLC[:, order.span(scale)], sides[scale], sides[-1])
            inputs.append(average(known_BChw + own_BChw, sides[scale + 1]))
            known_BChw = known_BChw + own_BChw * (scale < known_blocks_B)[:, None, None, None]
        return torch.cat(inputs, dim=1)


def _with_new_row(table: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """The table with a small random row behind its first."""
    first, rest = table.split([1, table.shape[dim] - 1], dim)
    return torch.cat([first, 0.02 * torch.randn(first.shape, generator=generator), rest], dim)
