"""VAR models as pipeline folders: what their parts are."""

from distilled_decoding.families.family import Family
from distilled_decoding.families.var.student import StudentConfig, VARStudent
from distilled_decoding.families.var.tokenizer import MultiScaleTokenizer, TokenizerConfig
from distilled_decoding.families.var.transformer import Transformer, TransformerConfig, VARTeacher

FAMILY = Family(
    name="var",
    components={
        "tokenizer": (MultiScaleTokenizer, TokenizerConfig),
        "transformer": (Transformer, TransformerConfig),
    },
    teacher=VARTeacher,
    student=(VARStudent, StudentConfig),
)
