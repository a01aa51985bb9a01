"""LlamaGen's sampling as its published code does it: what our own loop is timed against.

On our weights, this is the work of FoundationVision/LlamaGen at commit ce98ec41803a74a90ce68c40ababa9eaeffeb4ec. Its
files here are autoregressive/models/{generate,gpt}.py, autoregressive/sample/sample_c2i{,_ddp}.py and
tokenizer/tokenizer_image/vq_model.py.

- generate.py:152, gpt.py:320-324, 174-175 keys and values of every layer begin as zeros, anew for each generation, for
  all positions up to the next multiple of 8
- gpt.py:326-327, 330 a bool causal mask for each image, and the rotations, anew as well
- generate.py:129-131, 151 one doubled batch, but only if guidance is above 1
- generate.py:168-169 the class goes first, with whatever attention kernel torch prefers
- generate.py:112 the tokens follow without flash and memory-efficient attention, on a CPU too: torch is left its
  unfused kernel and, since it has one, cuDNN's, which that call does not turn off
- gpt.py:147-148 norms in float32, back to the type of the input, times the weight
- gpt.py:220-221, 423-430 query and key are rotated one after the other, in float32 and real arithmetic
- gpt.py:182-183 both caches are written at a tensor of positions
- gpt.py:354, 232-236 a query attends to all P positions, under its row of the mask
- gpt.py:167 w1, w3 and w2 are separate products
- gpt.py:368 logits in float32
- generate.py:91-99 a guided batch stays doubled after cfg_interval has ended guidance
- generate.py:58, 32-36, 38-53 temperature, top-k, top-p; it sorts only when top-p is below 1
- generate.py:61, 63 softmax, torch.multinomial
- generate.py:118, 121 position and token stay on the device; :174 the tokens are joined at the end
- vq_model.py:264-267 the codes of the tokens, normalised

Left out, which makes this loop faster than the published one: another copy of every layer's keys and values in each
step (gpt.py:229-230, a repetition by 1), clones of tokens and probabilities (generate.py:119-120), dropout that drops
nothing (gpt.py:240, 167, 355), positions in int32 (generate.py:172), and the float32 copies of 16-bit keys and values
that torch's unfused kernel makes by default today and did not make when that code was written.

Left out, which makes it slower: torch.compile, which sample_c2i_ddp.py:169 has on and sample_c2i.py:109 off by default,
and serving by vLLM (autoregressive/serve). Precision is the caller's: sample_c2i.py:46 casts the transformer, to
bfloat16 by default (:108), and :4-6 allow TF32.

Axis letters: B batch (doubled if guided), L positions run at once, P all positions, V codebook entries, C code
channels, D width, H heads, E head channels.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from distilled_decoding.codebook import lookup
from distilled_decoding.condition import Condition
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.transformer import Attention, Layer, Transformer, rope_table
from distilled_decoding.teacher import TeacherSampling


@torch.no_grad()
def plain_loop(
    teacher: LlamaGenTeacher, condition: Condition, sampling: TeacherSampling, generator: torch.Generator
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
        ValueError: the published loop cannot do it: guidance on a ramp or below 1; or captions, which this one leaves
            out.
    """
    transformer, guidance = teacher.transformer, sampling.guidance
    if transformer.config.caption_tokens:
        raise ValueError("the plain loop reads classes, but this model reads captions; leave the plain loop out")
    if guidance.is_active and (guidance.ramp != "constant" or guidance.scale < 1):
        raise ValueError(
            "LlamaGen's own loop knows constant guidance of 1 or more, "
            f"got {guidance.ramp} guidance of {guidance.scale}; leave the plain loop out"
        )
    x_BLD = transformer.cls_embedding(condition.with_null() if guidance.is_active else condition)
    generation = _Generation(transformer, len(x_BLD))
    position_L = torch.zeros(1, dtype=torch.int64, device=x_BLD.device)
    tokens: list[Tensor] = []

    def step(x_BLD: Tensor) -> None:
        logits_BLV = generation.logits(x_BLD, position_L)
        if guidance.is_active:
            logits_BLV, uncond_BLV = logits_BLV.chunk(2)
            scale = guidance.at(len(tokens), transformer.config.num_tokens)
            if scale != 1:
                logits_BLV = uncond_BLV + (logits_BLV - uncond_BLV) * scale
        tokens.append(_draw(logits_BLV[:, -1], sampling, generator))

    step(x_BLD)
    with _unfused_attention():
        for _ in range(1, transformer.config.num_tokens):
            position_L += 1
            token_BL = torch.cat([tokens[-1], tokens[-1]]) if guidance.is_active else tokens[-1]
            step(transformer.tok_embeddings(token_BL))
    return lookup(torch.cat(tokens, dim=1), teacher.codebook)


class _Generation:
    """The transformer with the caches, the mask and the rotations of one batch."""

    def __init__(self, transformer: Transformer, batch: int) -> None:
        config, weight = transformer.config, transformer.tok_embeddings.weight
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        positions = math.ceil((config.condition_tokens + config.num_tokens) / 8) * 8
        shape = (2, batch, config.num_heads, positions, config.head_dim)
        self.transformer = transformer
        self.caches = [torch.zeros(shape, dtype=dtype, device=device).unbind() for _ in transformer.layers]
        causal_PP = torch.ones(positions, positions, dtype=torch.bool, device=device).tril()
        self.causal_BPP = causal_PP.repeat(batch, 1, 1)
        self.rope = rope_table(config, device)

    def logits(self, x_BLD: Tensor, position_L: Tensor) -> Tensor:
        """Logits behind the positions given, float32 [B, L, V]."""
        mask, rope = self.causal_BPP[:, None, position_L], self.rope[position_L]
        for layer, cache in zip(cast(Iterable[Layer], self.transformer.layers), self.caches, strict=True):
            attention, feed = layer.attention, layer.feed_forward
            x_BLD = x_BLD + _attend(attention, _norm(x_BLD, layer.attention_norm), rope, mask, position_L, cache)
            hidden = _norm(x_BLD, layer.ffn_norm)
            x_BLD = x_BLD + feed.w2(F.silu(feed.w1(hidden)) * feed.w3(hidden))
        return self.transformer.output(_norm(x_BLD, self.transformer.norm)).float()


def _attend(
    attention: Attention, x_BLD: Tensor, rope: Tensor, mask: Tensor, position_L: Tensor, cache: tuple[Tensor, ...]
) -> Tensor:
    query, key, value = attention.wqkv(x_BLD).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    query, key, value = (x.transpose(1, 2) for x in (_rotate(query, rope), _rotate(key, rope), value))
    keys, values = cache
    keys[:, :, position_L] = key
    values[:, :, position_L] = value
    out_BHLE = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    return attention.wo(out_BHLE.transpose(1, 2).flatten(2))


def _rotate(x_BLHE: Tensor, rope: Tensor) -> Tensor:
    even, odd = x_BLHE.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x_BLHE)


def _norm(x_BLD: Tensor, norm: nn.RMSNorm) -> Tensor:
    wide = x_BLD.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + cast(float, norm.eps))
    return (wide * scale).type_as(x_BLD) * norm.weight


def _draw(logits_BV: Tensor, sampling: TeacherSampling, generator: torch.Generator) -> Tensor:
    """Tokens [B, 1]."""
    logits_BV = logits_BV / max(sampling.temperature, 1e-5)
    if sampling.top_k > 0:
        kth_B1 = logits_BV.topk(min(sampling.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV.masked_fill_(logits_BV < kth_B1, -math.inf)
    if sampling.top_p < 1:
        sorted_BV, index_BV = logits_BV.sort(descending=True)
        passed_BV = sorted_BV.softmax(-1).cumsum(-1) > sampling.top_p
        # The code that passes top-p stays too.
        dropped_BV = F.pad(passed_BV[:, :-1], (1, 0))
        logits_BV.masked_fill_(dropped_BV.scatter(1, index_BV, dropped_BV), -math.inf)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Attention kernels as the published loop restricts them, in the type of the keys."""
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(allowed)
