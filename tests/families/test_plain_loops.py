"""The published loops on our weights: they sample what our own loop samples, by the work they are known for."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from distilled_decoding.codebook import lookup, nearest
from distilled_decoding.condition import Condition, Labels
from distilled_decoding.families.llamagen import plain as llamagen_plain
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.transformer import Transformer
from distilled_decoding.families.var import plain as var_plain
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.families.var.transformer import Transformer as VARTransformer
from distilled_decoding.teacher import TeacherSampling, log_probabilities, rollout
from tests import tiny
from tests.families.llamagen import reference as llamagen_reference
from tests.families.llamagen.test_teacher import CAPTIONED, captions, small_tokenizer
from tests.families.var import reference as var_reference
from tests.families.var.test_teacher import small_tokenizer as var_tokenizer
from tests.families.var.test_transformer import CONFIG, randomised
from tests.golden import load_case

TEACHERS = {"llamagen": tiny.teacher(), "var": tiny.var_teacher()}
LOOPS = {"llamagen": llamagen_plain.plain_loop, "var": var_plain.plain_loop}
RAMPS = {"llamagen": "constant", "var": "linear"}
LABELS = Labels.checked([2, 0, 1, 1], 3)


def run(family: str, condition: Condition, sampling: TeacherSampling, seed: int = 0, teacher: nn.Module | None = None):
    teacher = teacher or TEACHERS[family]
    return LOOPS[family](teacher, condition, sampling, torch.Generator().manual_seed(seed))


def sampling(family: str, **settings) -> TeacherSampling:
    return TeacherSampling(**{"guidance_scale": 2.0, "guidance_ramp": RAMPS[family], **settings})


def best(_: int, log_p_BKV: Tensor) -> Tensor:
    return log_p_BKV.argmax(-1)


@pytest.fixture(params=LOOPS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


GREEDY = [
    ("llamagen", {}),
    ("llamagen", {"guidance_scale": 1.0}),
    ("llamagen", {"guidance_blocks": 5}),
    ("llamagen", {"guidance_blocks": 0}),
    ("var", {}),
    ("var", {"guidance_scale": 1.0, "guidance_ramp": "constant"}),
    ("var", {"guidance_scale": 5.0}),
]


@torch.no_grad()
@pytest.mark.parametrize(("family", "settings"), GREEDY)
@pytest.mark.parametrize("only_one", [{"top_k": 1}, {"top_p": 0.0}], ids=["top-k", "top-p"])
def test_greedy_tokens_are_those_of_our_own_loop(family: str, settings: dict, only_one: dict) -> None:
    teacher, greedy = TEACHERS[family], sampling(family, **settings, **only_one)
    expected_BL = rollout(teacher, LABELS, greedy.guidance, best)
    assert torch.equal(run(family, LABELS, greedy), lookup(expected_BL, teacher.codebook))


@pytest.mark.parametrize("name", ["nocfg", "cfg2_interval-1", "cfg2_interval3"])
def test_llamagens_greedy_tokens_are_the_published_codes(name: str) -> None:
    case = load_case(f"llamagen_gpt_c2i_{name}")
    transformer = llamagen_reference.transformer(case)
    teacher = LlamaGenTeacher(small_tokenizer(transformer.config.vocab_size), transformer)
    interval = case.config["cfg_interval"]
    greedy = TeacherSampling(
        guidance_scale=case.config["cfg_scale"], guidance_blocks=None if interval < 0 else interval + 2, top_k=1
    )
    code_BLC = run("llamagen", llamagen_reference.labels(case, 10), greedy, teacher=teacher)
    assert torch.equal(code_BLC, lookup(case.outputs["ids"], teacher.codebook))


@pytest.mark.parametrize("name", ["var_l2norm_ar_cfg1.5", "var_plain_ar_cfg1.5"])
def test_vars_greedy_tokens_are_the_published_codes(name: str) -> None:
    case = load_case(name)
    teacher, guidance = var_reference.teacher(case), var_reference.guidance(case)
    greedy = sampling("var", guidance_scale=guidance.scale, top_k=1)
    code_BLC = run("var", var_reference.labels(case, 10), greedy, teacher=teacher)
    scales = [case.outputs[f"idx_s{scale}"] for scale in range(teacher.order.num_blocks)]
    assert torch.equal(code_BLC, lookup(torch.cat(scales, dim=1), teacher.codebook))


@torch.no_grad()
@pytest.mark.parametrize("change", [{"shared_aln": True}, {"attn_l2_norm": False, "mlp_ratio": 2.5}])
def test_vars_variants_are_sampled_too(change: dict) -> None:
    torch.manual_seed(0)
    teacher = VARTeacher(var_tokenizer(), randomised(VARTransformer(replace(CONFIG, **change))))
    condition, greedy = Labels.checked([4, 0, 2], 5), sampling("var", top_k=1)
    expected_BL = rollout(teacher, condition, greedy.guidance, best)
    assert torch.equal(run("var", condition, greedy, teacher=teacher), lookup(expected_BL, teacher.codebook))


@torch.no_grad()
@pytest.mark.parametrize("filters", [{}, {"top_k": 6}, {"top_k": 12, "top_p": 0.8}])
def test_tokens_are_drawn_from_the_teachers_distribution(family: str, filters: dict) -> None:
    teacher, filtered = TEACHERS[family], sampling(family, **filters)
    condition = Labels(torch.full((2000,), 1), 3)
    token_BL = nearest(run(family, condition, filtered), teacher.codebook)
    log_p_BLV = log_probabilities(teacher.forced_logits(token_BL, condition, filtered.guidance), filtered)
    drawn_BL = log_p_BLV.gather(-1, token_BL[..., None])[..., 0]
    assert drawn_BL.isfinite().all()
    # The first token has one distribution for all; behind it, log p of a draw is minus the entropy on average.
    first_V = log_p_BLV[0, 0].exp()
    frequency_V = torch.bincount(token_BL[:, 0], minlength=len(first_V)) / len(token_BL)
    assert (frequency_V - first_V).abs().sum() / 2 < 0.04
    entropy_BL = torch.special.entr(log_p_BLV.exp()).sum(-1)
    excess_B = (drawn_BL + entropy_BL).sum(1)
    assert excess_B.mean().abs() < 4 * excess_B.std() / len(excess_B) ** 0.5


def test_the_generator_decides_the_draws(family: str) -> None:
    code_BLC = run(family, LABELS, sampling(family))
    assert torch.equal(run(family, LABELS, sampling(family)), code_BLC)
    assert not torch.equal(run(family, LABELS, sampling(family), seed=1), code_BLC)


def test_nothing_is_sorted_without_top_p(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("sorted")

    for owner in (torch, Tensor):
        for name in ("sort", "argsort"):
            monkeypatch.setattr(owner, name, refuse)
    run(family, LABELS, sampling(family, top_k=5))
    with pytest.raises(AssertionError, match="sorted"):
        run(family, LABELS, sampling(family, top_p=0.9))


def batches(module: nn.Module, call: Callable[[], Tensor]) -> list[int]:
    """The batch of each call of a module."""
    sizes: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    call()
    handle.remove()
    return sizes


def test_llamagen_doubles_the_batch_for_guidance_and_keeps_it_doubled() -> None:
    output = TEACHERS["llamagen"].transformer.output
    for settings, batch in (({"guidance_blocks": 5}, 8), ({"guidance_blocks": None}, 8), ({"guidance_scale": 1.0}, 4)):
        guided = sampling("llamagen", **settings)
        assert batches(output, lambda guided=guided: run("llamagen", LABELS, guided)) == [batch] * 16


def test_var_always_doubles_the_batch_and_modulates_anew_at_every_scale() -> None:
    transformer, inactive = TEACHERS["var"].transformer, sampling("var", guidance_scale=1.0)
    for module in (transformer.head, transformer.head_nm.ada_lin, transformer.blocks[1].ada_lin):
        assert batches(module, lambda: run("var", LABELS, inactive)) == [8] * 4


def test_weights_of_16_bits_and_autocast_give_float32_codes_of_the_codebook(family: str) -> None:
    teacher = TEACHERS[family]
    low = copy.deepcopy(teacher)
    low.transformer.bfloat16()
    settings = sampling(family, top_k=5, top_p=0.9)
    with torch.autocast("cpu", torch.bfloat16):
        cast_BLC = run(family, LABELS, settings)
    for code_BLC in (cast_BLC, run(family, LABELS, settings, teacher=low)):
        assert torch.equal(code_BLC, lookup(nearest(code_BLC, teacher.codebook), teacher.codebook))


def test_attention_is_as_before_when_the_loop_is_over() -> None:
    flags = (
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
    )
    before = [flag() for flag in flags]
    run("llamagen", LABELS, sampling("llamagen"))
    assert [flag() for flag in flags] == before


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llamagen", {"guidance_ramp": "linear"}, "constant guidance of 1 or more, got linear guidance of 2.0"),
        ("llamagen", {"guidance_scale": 0.5}, "constant guidance of 1 or more, got constant guidance of 0.5"),
        ("var", {"guidance_ramp": "constant"}, "linear guidance of all scales"),
        ("var", {"guidance_blocks": 2}, "linear guidance of all scales"),
        ("var", {"temperature": 0.9}, "knows temperature 1, got 0.9"),
    ],
)
def test_what_the_published_loops_cannot_do_is_refused(family: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(family, LABELS, sampling(family, **settings))


def test_captions_are_refused(family: str) -> None:
    with pytest.raises(ValueError, match="reads Labels, got Captions"):
        run(family, captions([3, 7]), sampling(family))
    reader = LlamaGenTeacher(small_tokenizer(CAPTIONED.vocab_size), Transformer(CAPTIONED))
    with pytest.raises(ValueError, match="reads classes, but this model reads captions"):
        run("llamagen", captions([3, 7]), sampling("llamagen"), teacher=reader)
