"""Whole pipelines of toy size with random weights: 16 codes, three classes or captions of 12 tokens, images of 8 px."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import torch

from distilled_decoding.condition import Asked, Classes, Condition, ConditionTable, stand_ins
from distilled_decoding.families import family as family_of
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig
from distilled_decoding.families.var import tokenizer as var_tokenizer
from distilled_decoding.families.var import transformer as var_transformer
from distilled_decoding.families.var.teacher import VARTeacher
from distilled_decoding.flow import FlowSettings
from distilled_decoding.metrics.features import Classifier, ClassifierConfig, Extractor, classifier_extractor
from distilled_decoding.metrics.reference import Reference, make_reference
from distilled_decoding.pipeline import Pipeline, PipelineConfig
from distilled_decoding.prompts import CaptionTable
from distilled_decoding.store import Shard, TrajectoryStore
from distilled_decoding.teacher import Teacher, TeacherSampling
from distilled_decoding.text import TextEncoder
from distilled_decoding.trajectories import TrajectorySettings, generate

SAMPLING = TeacherSampling(guidance_scale=2.0, top_k=12)
FLOW = FlowSettings(num_steps=8)
CLASSES = Classes(3)


def teacher(**reads: int) -> LlamaGenTeacher:
    """Sixteen blocks of one token; it reads classes where nothing else is said."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQTokenizer(
            TokenizerConfig(
                image_channels=1,
                ch=32,
                encoder_ch_mult=(1, 1),
                decoder_ch_mult=(1, 1),
                num_res_blocks=1,
                z_channels=8,
                codebook_size=16,
                code_dim=4,
            )
        )
        sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 16, "num_tokens": 16}
        transformer = Transformer(TransformerConfig(**sizes, **(reads or {"num_classes": 3})))
        # The fresh head predicts zeros, and a flat teacher would hide mistakes.
        torch.nn.init.normal_(transformer.output.weight, std=0.5)
    return LlamaGenTeacher(tokenizer, transformer).eval().requires_grad_(False)


def var_teacher() -> VARTeacher:
    """Four scales of 1, 4, 9 and 16 tokens."""
    scales = (1, 2, 3, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = var_tokenizer.MultiScaleTokenizer(
            var_tokenizer.TokenizerConfig(
                image_channels=1,
                ch=32,
                ch_mult=(1, 1),
                num_res_blocks=1,
                z_channels=4,
                codebook_size=16,
                patch_nums=scales,
            )
        )
        sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 16, "code_dim": 4, "num_classes": 3}
        transformer = var_transformer.Transformer(var_transformer.TransformerConfig(**sizes, patch_nums=scales))
        torch.nn.init.normal_(transformer.head.weight, std=0.5)
        torch.nn.init.normal_(transformer.class_emb.weight)
    return VARTeacher(tokenizer, transformer).eval().requires_grad_(False)


def text_teacher() -> LlamaGenTeacher:
    """Sixteen blocks of one token, from the captions of `text_encoder`."""
    return teacher(num_classes=0, caption_tokens=12, caption_dim=8)


def pipeline(student: bool = True, family: str = "llamagen") -> Pipeline:
    """Of a family, or, as the family `text`, LlamaGen's from captions, without an encoder."""
    model = {"llamagen": teacher, "var": var_teacher, "text": text_teacher}[family]()
    family = "llamagen" if family == "text" else family
    config = PipelineConfig(
        family=family,
        class_names=("a", "b", "c")[: model.num_classes],
        sampling=SAMPLING,
        flow=FLOW,
        start_blocks=(0, 4, 8, 12) if family == "llamagen" else (0, 1, 2, 3),
        split_block=model.order.num_blocks,
        micro_batch=8,
    )
    untrained = family_of(family).new_student(model, seed=0).eval().requires_grad_(False)
    return Pipeline(model, untrained if student else None, config)


def text_pipeline(student: bool = True) -> Pipeline:
    """From prompts: it has an encoder, and three prompts of its own."""
    bare = pipeline(student, "text")
    return Pipeline(bare.teacher, bare.student, bare.config, text_encoder(), ["red apple", "", "a face"])


def labels(num: int, num_classes: int = 3) -> Condition:
    """The labels in turn."""
    return Asked.in_turn(Classes(num_classes), num)[:]


def table(teacher: Teacher) -> ConditionTable:
    """The classes, or three captions, one of them without padding and one null."""
    if teacher.num_classes:
        return Classes(teacher.num_classes)
    captions = stand_ins(teacher, 3)
    mask_BT = torch.arange(12) >= torch.tensor([[0], [11], [5]])
    captions = replace(captions, mask_BT=mask_BT, null_B=torch.tensor([False, True, False]))
    return CaptionTable(captions, ["a", "", "c"], {"prompts": "a, none, c"})


def trajectory_settings(run_seed: int = 0) -> TrajectorySettings:
    return TrajectorySettings(SAMPLING, FLOW, run_seed, micro_batch=8, shard_size=16)


def store(folder: Path, pipe: Pipeline, num: int = 32) -> TrajectoryStore:
    settings = trajectory_settings()
    asked = table(pipe.teacher)
    made = TrajectoryStore.create(folder, settings.manifest(pipe.teacher, pipe.fingerprint, asked.identity), num)
    generate(pipe.teacher, asked, made, settings, lambda items: None)
    return made


def shard(folder: Path, pipe: Pipeline, num: int = 32) -> Shard:
    return store(folder, pipe, num)[torch.arange(num)]


def extractor() -> tuple[Extractor, Reference]:
    """The features of a classifier of the toy images with random weights, and noise to compare with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(ClassifierConfig(image_channels=1, width=2, num_classes=3)).eval()
        image_NCHW = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8)
    features = classifier_extractor(model)
    return features, make_reference(features, [image_NCHW], "noise images")


def timeless(path: Path) -> bytes:
    """What a file holds; of a training's log all but how long it took."""
    held = path.read_bytes()
    return re.sub(rb', "seconds": [0-9.]+', b"", held) if path.name == "log.jsonl" else held


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return asdict(a.config) == asdict(b.config) and all(torch.equal(x, y) for x, y in pairs)


def text_encoder(max_tokens: int = 12) -> TextEncoder:
    """A T5 encoder of bytes with random weights; eight features a token."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel  # it takes seconds, and few tests need it

    tokenizer = ByT5Tokenizer(extra_ids=0)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = T5EncoderModel(T5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes))
    return TextEncoder(encoder.eval().requires_grad_(False), tokenizer, max_tokens)
