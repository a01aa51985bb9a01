"""Distilled Decoding: pretrained image autoregressive models as generators of one or two steps."""

from distilled_decoding.pipeline import Pipeline

__all__ = ["Pipeline"]
