"""LlamaGen (arXiv 2406.06525): raster order, one token a block."""
