"""Small parts that the transformers of both families use: the key-value cache and the student's code head.

Axis letters: B batch, L positions, C code channels, D width, H heads, E head channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class KVCache:
    """Keys and values of the positions already run, for every layer, allocated once for a whole sequence.

    Args:
        num_layers: layers.
        shape: B, H, P, E.
        like: a weight of the model, whose device and dtype the cache has.

    Attributes:
        keys: of that shape, a tensor for each layer, because the compiler would copy all layers of one.
        values: likewise.
        length: positions run.
    """

    def __init__(self, num_layers: int, shape: tuple[int, int, int, int], like: Tensor) -> None:
        # Zeros: what is masked must still be finite.
        self.keys, self.values = ([like.new_zeros(shape) for _ in range(num_layers)] for _ in range(2))
        self.length = 0

    def append(self, layer: int, key_BHLE: Tensor, value_BHLE: Tensor) -> tuple[Tensor, Tensor]:
        """Store new positions of one layer behind `length` and return all of that layer so far."""
        end = self.length + key_BHLE.shape[2]
        self.keys[layer][:, :, self.length : end] = key_BHLE
        self.values[layer][:, :, self.length : end] = value_BHLE
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class CacheShelf:
    """The cache of a compiled teacher: one, used again and again, because a recorded GPU graph writes where it did."""

    def __init__(self) -> None:
        self._cache: KVCache | None = None

    def take(self, num_layers: int, shape: tuple[int, int, int, int], like: Tensor) -> KVCache:
        """The cache, emptied; a new one when the last was of another shape."""
        cache = self._cache
        if cache is None or cache.keys[0].shape != shape or cache.keys[0].dtype != like.dtype:
            cache = self._cache = KVCache(num_layers, shape, like)
            for stored in cache.keys + cache.values:
                torch._dynamo.mark_static_address(stored)
        for stored in cache.keys + cache.values:
            # A generation that failed may have left what is not finite.
            stored.zero_()
        cache.length = 0
        return cache


@dataclass(frozen=True)
class CacheSlot:
    """One position of a cache, named by a tensor: the same compiled step then serves every position.

    Attributes:
        cache: where to store.
        position_1: the position, int64 [1].
        span: how many leading positions are returned; those behind `position_1` are to be masked.
    """

    cache: KVCache
    position_1: Tensor
    span: int

    def append(self, layer: int, key_BH1E: Tensor, value_BH1E: Tensor) -> tuple[Tensor, Tensor]:
        """Store the position of one layer and return the first `span` of that layer."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        keys.index_copy_(2, self.position_1, key_BH1E.to(keys.dtype))
        values.index_copy_(2, self.position_1, value_BH1E.to(values.dtype))
        return keys[:, :, : self.span], values[:, :, : self.span]


class CodeHead(nn.Module):
    """A student's code vectors out of its hidden states, modulated by the class; it begins by predicting zeros."""

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, code_dim)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_BLD: Tensor, class_B1D: Tensor) -> Tensor:
        """code_BLC; the class embedding enters both the shift (row 0) and the scale (row 1)."""
        shift_B1D, scale_B1D = (self.scale_shift_table + class_B1D).split(1, dim=1)
        return self.linear(self.norm_final(hidden_BLD) * (1 + scale_B1D) + shift_B1D)
