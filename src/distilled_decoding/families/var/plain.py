"""VAR's sampling as its published code does it: what our own loop is timed against.

On our weights, this is the work of FoundationVision/VAR at commit 78b95394fc5896192e3a003e4b295f8ea743c48f. Its files
here are in models/.

- var.py:151 the batch is always doubled, the classes first, also without guidance
- var.py:153-154 the places of all scales once, then the first position
- var.py:165, basic_var.py:154, 156 what the class does to a layer is computed anew in every layer at every scale
- basic_var.py:93 the biases of queries, keys (zeros) and values are joined in every call
- basic_var.py:99, 101-105 heads first; unit queries and keys, the query times the head's temperature
- basic_var.py:108-109 keys and values of the scales before are copied in front of the new ones at every scale
- basic_var.py:97, 112-117 torch's own attention, with whatever kernel it prefers. Where flash-attn or xformers is
  installed, the published code calls these instead
- basic_var.py:119, 157 projection, gate, sum
- basic_var.py:52, 158 feed-forward of two products, gate, sum. Where flash-attn has its fused operators, :46 uses one
- var.py:124, basic_var.py:173-174 the norm in front of the head on float32, its scale and shift anew at every scale;
  logits in float32
- var.py:161, 172-173 guidance grows from none: (1 + t) conditional - t unconditional
- helpers.py:8-10, 11-15 top-k, then top-p by an ascending sort, which keeps the best in any case; only if it is on
- helpers.py:19 softmax, torch.multinomial
- var.py:177, 182 the codes of the tokens as a map
- var.py:157, quant.py:190-192 bicubic to full size, phi, into the sum in place; its averages are the next scale's input
- var.py:185-187 embedded, placed, and only then doubled

Left out, which makes this loop faster than the published one: the last scale's share of the sum (quant.py:194-195),
which belongs to `decode` here, one of phi's three elementwise operations (quant.py:206), and the sort at top-p 1, which
is off here and 0 is off there (helpers.py:11). In the other direction, `decode` adds all scales' shares again.

Precision is the caller's: demo_sample.ipynb:93 runs float32 weights under float16 autocast, and :84-87 allow TF32.

Axis letters: B batch (doubled inside the transformer), K tokens of one scale, L tokens of all scales, V codebook
entries, C code channels, D width, H heads, E head channels, h w full token grid.
"""

import math
from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from distilled_decoding.condition import Condition
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.transformer import Attention, Layer, Transformer
from distilled_decoding.teacher import TeacherSampling


@torch.no_grad()
def plain_loop(
    teacher: VARTeacher, condition: Condition, sampling: TeacherSampling, generator: torch.Generator
) -> Tensor:
    """Images as codes, sampled the published way.

    Args:
        teacher: its transformer may have weights of any floating type, and may run under autocast.
        condition: labels, one an image.
        sampling: the teacher's distribution.
        generator: draws the tokens; on the teacher's device.

    Returns:
        code_BLC to decode.

    Raises:
        ValueError: the published loop cannot do it: guidance without a ramp or on some scales only, a temperature, or
            captions.
    """
    transformer, quantizer, guidance = teacher.transformer, teacher.tokenizer.quantize, sampling.guidance
    if guidance.is_active and (guidance.ramp != "linear" or guidance.num_blocks is not None):
        raise ValueError(
            f"VAR's own loop knows linear guidance of all scales, got {guidance}; leave the plain loop out"
        )
    if sampling.temperature != 1:
        raise ValueError(f"VAR's own loop knows temperature 1, got {sampling.temperature}; leave the plain loop out")
    order, sides = teacher.order, transformer.config.patch_nums
    full, last = (sides[-1], sides[-1]), len(sides) - 1
    class_BD = transformer.embed_class(condition.with_null())
    place_1LD = transformer.place(slice(None))
    x_BKD = class_BD[:, None] + transformer.pos_start + place_1LD[:, :1]
    sum_BChw = teacher.codebook.new_zeros(len(condition), transformer.config.code_dim, *full)
    generation, codes = _Generation(transformer, class_BD), []
    for scale, side in enumerate(sides):
        cond_BKV, uncond_BKV = generation.logits(x_BKD).chunk(2)
        t = guidance.at(scale, len(sides)) - 1
        token_BK = _draw((1 + t) * cond_BKV - t * uncond_BKV, sampling, generator)
        codes.append(quantizer.embedding(token_BK))
        if scale < last:
            map_BChw = F.interpolate(codes[-1].mT.unflatten(2, (side, side)), size=full, mode="bicubic")
            sum_BChw.add_(quantizer.quant_resi.of_scale(scale, len(sides))(map_BChw))
            input_BChw = F.interpolate(sum_BChw, size=(sides[scale + 1],) * 2, mode="area")
            input_BKC = input_BChw.flatten(2).mT.to(transformer.word_embed.weight.dtype)
            x_BKD = (transformer.word_embed(input_BKC) + place_1LD[:, order.span(scale + 1)]).repeat(2, 1, 1)
    return torch.cat(codes, dim=1)


class _Generation:
    """The transformer with the classes of one batch, and keys and values of the scales so far."""

    def __init__(self, transformer: Transformer, class_BD: Tensor) -> None:
        self.transformer = transformer
        self.class_BD = class_BD
        self.no_bias_D = torch.zeros_like(class_BD[0])
        self.caches: list[tuple[Tensor, Tensor] | None] = [None] * len(transformer.blocks)

    def logits(self, x_BKD: Tensor) -> Tensor:
        """Logits of the next scale, float32 [B, K, V]."""
        transformer, class_BD, shared = self.transformer, self.class_BD, None
        if transformer.config.shared_aln:
            shared = transformer.shared_ada_lin(class_BD).unflatten(-1, (1, 6, -1))
        for index, layer in enumerate(cast(Iterable[Layer], transformer.blocks)):
            gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = layer.modulation(class_BD, shared).unbind(2)
            hidden = layer.norm(x_BKD).mul(scale_1 + 1).add_(shift_1)
            x_BKD = x_BKD + self._attend(layer.attn, hidden, index).mul_(gate_1)
            hidden = layer.norm(x_BKD).mul(scale_2 + 1).add_(shift_2)
            x_BKD = x_BKD + layer.ffn.fc2(F.gelu(layer.ffn.fc1(hidden), approximate="tanh")).mul(gate_2)
        norm, head = transformer.head_nm, transformer.head
        scale, shift = norm.ada_lin(class_BD).unflatten(-1, (1, 2, -1)).unbind(2)
        hidden = norm.norm(x_BKD.float()).mul(scale + 1).add_(shift)
        return head(hidden.to(head.weight.dtype)).float()

    def _attend(self, attn: Attention, x_BKD: Tensor, index: int) -> Tensor:
        bias = torch.cat([attn.q_bias, self.no_bias_D, attn.v_bias])
        qkv = F.linear(x_BKD, attn.mat_qkv.weight, bias).unflatten(-1, (3, attn.num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        if attn.attn_l2_norm:
            query = F.normalize(query, dim=-1) * attn.scale_mul_1H11.clamp(max=math.log(100)).exp()
            key = F.normalize(key, dim=-1)
        if (past := self.caches[index]) is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        self.caches[index] = key, value
        out_BHKE = F.scaled_dot_product_attention(query, key, value, scale=attn.scale)
        return attn.proj(out_BHKE.transpose(1, 2).flatten(2))


def _draw(logits_BKV: Tensor, sampling: TeacherSampling, generator: torch.Generator) -> Tensor:
    """Tokens [B, K]."""
    if sampling.top_k > 0:
        best = logits_BKV.topk(min(sampling.top_k, logits_BKV.shape[-1]), sorted=False).values
        logits_BKV.masked_fill_(logits_BKV < best.amin(-1, keepdim=True), -math.inf)
    if sampling.top_p < 1:
        sorted_BKV, index_BKV = logits_BKV.sort()
        dropped_BKV = sorted_BKV.softmax(-1).cumsum_(-1) <= 1 - sampling.top_p
        dropped_BKV[..., -1] = False
        logits_BKV.masked_fill_(dropped_BKV.scatter(-1, index_BKV, dropped_BKV), -math.inf)
    p_NV = logits_BKV.softmax(-1).flatten(0, 1)
    return torch.multinomial(p_NV, 1, replacement=True, generator=generator).view(logits_BKV.shape[:2])
