"""Keys and replayable noise: everything random of image i follows from key = hash(domain, run seed, i).

The generator is Philox4x32-10 (Salmon et al. 2011), which turns a key and a counter into four random words by
integer arithmetic alone: the same on CPU and GPU, for any batch split, order or interruption. torch's own
`randn` keeps none of this. Value n of a sequence depends on the key, the stream and n only, so a shorter
sequence is always a prefix of a longer one.

Axis letters: B batch (one key each), L tokens in a sequence, C code channels, N counters or places.
"""

import math
from collections.abc import Iterable
from hashlib import blake2b, sha256

import torch
from torch import Tensor

DOMAINS = ("trajectories", "evaluation", "sampling", "training", "image")

SCHEME = "philox4x32-10, box-muller"
"""The name of the generator."""

_ROUNDS = 10
_SHUFFLE_STREAMS = range(4, 10)
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def image_keys(domain: str, run_seed: int, indices: Iterable[int]) -> Tensor:
    """Return the key of each image of a run.

    Args:
        domain: what the randomness is for, one of `DOMAINS`; different domains never share noise.
        run_seed: the seed of the run; neighbouring seeds are as unrelated as any two.
        indices: numbers of the images, B of them.

    Returns:
        key_B, int64 [B] on the CPU.

    Raises:
        ValueError: when the domain is unknown.
    """
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; use one of {', '.join(DOMAINS)}")
    return torch.tensor([_hash(f"{domain}:{run_seed}:{index}") for index in indices], dtype=torch.int64)


def gaussian_noise(key_B: Tensor, length: int, channels: int, stream: int = 0) -> Tensor:
    """Return the standard normal noise of each image.

    Box-Muller in float64 on pairs of Philox words, running over the flattened [L * C] sequence.

    Args:
        key_B: keys of the images, int64 [B], from `image_keys`.
        length: tokens, L.
        channels: code channels, C.
        stream: which of the key's independent sequences.

    Returns:
        noise_BLC, float32 [B, L, C] on the device of the keys.
    """
    count = length * channels
    unit_BP2 = _unit(key_B, count + count % 2, stream).unflatten(1, (-1, 2))
    radius_BP = (-2 * unit_BP2[..., 0].log()).sqrt()
    angle_BP = 2 * math.pi * unit_BP2[..., 1]
    normal_BP2 = torch.stack([radius_BP * angle_BP.cos(), radius_BP * angle_BP.sin()], dim=-1)
    return normal_BP2.flatten(1)[:, :count].unflatten(1, (length, channels)).float()


def sample_checksum() -> str:
    """A hash of a little noise, made on the CPU and rounded to what all machines agree on: equal for equal schemes."""
    noise_BLC = gaussian_noise(image_keys("trajectories", 0, range(4)), 4, 4)
    return sha256((noise_BLC * 1000).round().long().numpy().tobytes()).hexdigest()


def uniform(key_B: Tensor, length: int, stream: int) -> Tensor:
    """Return uniform numbers of each image, one a token.

    Args:
        key_B: keys of the images, int64 [B], from `image_keys`.
        length: tokens, L.
        stream: which of the key's independent sequences (1: the teacher's ancestral draws).

    Returns:
        uniform_BL, float64 [B, L] strictly inside (0, 1), in steps of 2^-32, on the device of the keys.
    """
    return _unit(key_B, length, stream)


def shuffled(place_N: Tensor, num: int, key_1: Tensor) -> Tensor:
    """Return what stands at some places of a random order of 0..num-1, which is itself never written down.

    A Feistel network whose rounds are Philox words permutes the numbers below a power of four; a result behind `num`
    goes through it again until it lies before.

    Args:
        place_N: int64 [N], each in 0..num-1.
        num: how many numbers are in the order.
        key_1: key of the order, int64 [1].

    Returns:
        int64 [N]; all places together give every number once.
    """
    half = max(1, ((num - 1).bit_length() + 1) // 2)

    def permuted(value_N: Tensor) -> Tensor:
        left_N, right_N = value_N >> half, value_N & (2**half - 1)
        for stream in _SHUFFLE_STREAMS:
            word_N = philox(key_1, right_N, stream)[0, :, 0]
            left_N, right_N = right_N, left_N ^ (word_N & (2**half - 1))
        return left_N << half | right_N

    value_N = permuted(place_N)
    while (behind_N := value_N >= num).any():
        value_N = torch.where(behind_N, permuted(value_N), value_N)
    return value_N


def philox(key_B: Tensor, counter_N: Tensor, stream: int) -> Tensor:
    """Return the random words of each key at each counter (Philox4x32-10).

    Args:
        key_B: int64 [B]; its low and high 32 bits are the two key words.
        counter_N: int64 [N]; its low and high 32 bits are counter words 0 and 1.
        stream: counter word 2, in [0, 2^32). Word 3 is 0.

    Returns:
        words_BN4, int64 [B, N, 4] with values in [0, 2^32).
    """
    key = (key_B[:, None] & _LOW, (key_B[:, None] >> 32) & _LOW)
    low_N, high_N = counter_N & _LOW, (counter_N >> 32) & _LOW
    counter = (low_N, high_N, torch.full_like(low_N, stream), torch.zeros_like(low_N))
    return torch.stack(_philox4x32(counter, key), dim=-1)


def _philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return four words from four counter words and two key words, all broadcast together."""
    word0, word1, word2, word3 = counter
    key0, key1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, so masking after the shift gives the unsigned high half.
        product0, product1 = word0 * _MULTIPLIERS[0], word2 * _MULTIPLIERS[1]
        word0, word2 = (product1 >> 32 & _LOW) ^ word1 ^ key0, (product0 >> 32 & _LOW) ^ word3 ^ key1
        word1, word3 = product1 & _LOW, product0 & _LOW
        key0, key1 = (key0 + _KEY_STEPS[0]) & _LOW, (key1 + _KEY_STEPS[1]) & _LOW
    return tuple(torch.broadcast_tensors(word0, word1, word2, word3))


def _unit(key_B: Tensor, count: int, stream: int) -> Tensor:
    """Return float64 [B, count] strictly inside (0, 1), one Philox word each."""
    counter_N = torch.arange(-(-count // 4), device=key_B.device)
    words_BN = philox(key_B, counter_N, stream).flatten(1)[:, :count]
    return (words_BN.double() + 0.5) * 2.0**-32


def _hash(text: str) -> int:
    """Return a signed 64-bit hash."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
