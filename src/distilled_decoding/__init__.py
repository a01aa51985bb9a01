"""Distilled Decoding: pretrained image autoregressive models as generators of one or two steps."""
