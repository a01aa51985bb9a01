"""`python -m distilled_decoding`, for torchrun."""

from distilled_decoding.cli import main

main()
