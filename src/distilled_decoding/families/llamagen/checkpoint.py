"""LlamaGen models as pipeline folders: tokenizer, transformer, student, each with its config and weights."""

from distilled_decoding.families.family import Family
from distilled_decoding.families.llamagen.student import LlamaGenStudent, StudentConfig
from distilled_decoding.families.llamagen.teacher import LlamaGenTeacher
from distilled_decoding.families.llamagen.tokenizer import TokenizerConfig, VQTokenizer
from distilled_decoding.families.llamagen.transformer import Transformer, TransformerConfig

FAMILY = Family(
    name="llamagen",
    components={
        "tokenizer": (VQTokenizer, TokenizerConfig),
        "transformer": (Transformer, TransformerConfig),
    },
    teacher=LlamaGenTeacher,
    student=(LlamaGenStudent, StudentConfig),
)
