import math

import pytest
import torch
from scipy import stats

from distilled_decoding import noise
from distilled_decoding.noise import gaussian_noise, image_keys, philox, shuffled, uniform

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = noise._philox4x32(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(word.item() for word in words) == expected


def plain_philox(key: int, counter: int, stream: int) -> list[int]:
    """Philox4x32-10 in Python's own integers."""
    key0, key1 = key & ONES, key >> 32 & ONES
    words = [counter & ONES, counter >> 32 & ONES, stream, 0]
    for _ in range(10):
        left, right = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = [right >> 32 ^ words[1] ^ key0, right & ONES, left >> 32 ^ words[3] ^ key1, left & ONES]
        key0, key1 = key0 + 0x9E3779B9 & ONES, key1 + 0xBB67AE85 & ONES
    return words


def test_philox_equals_plain_integers_for_signed_keys_and_long_counters():
    keys, counters = [-(2**63), -1, 0, 2**63 - 1, 123456789123456789], [0, 1, 2**32 - 1, 2**32, 2**40 + 7]
    words_BN4 = philox(torch.tensor(keys), torch.tensor(counters), stream=3)
    expected = [[plain_philox(key, counter, 3) for counter in counters] for key in keys]
    assert words_BN4.tolist() == expected


def test_noise_is_box_muller_of_the_words():
    key = image_keys("sampling", 5, [9])
    words = [word for counter in range(2) for word in plain_philox(key.item(), counter, 0)]
    unit = [(word + 0.5) / 2**32 for word in words]
    expected = []
    for radius, angle in zip(unit[::2], unit[1::2], strict=True):
        length = math.sqrt(-2 * math.log(radius))
        expected += [length * math.cos(2 * math.pi * angle), length * math.sin(2 * math.pi * angle)]
    torch.testing.assert_close(gaussian_noise(key, 2, 4).flatten(), torch.tensor(expected))


def test_keys_never_change_because_stored_trajectories_are_replayed_from_them():
    assert image_keys("trajectories", 0, [0, 1]).tolist() == [7206946775675810700, 6246055459915132360]
    assert image_keys("evaluation", -3, [10**12]).tolist() == [4599695067320448425]


def test_noise_is_standard_normal_and_uncorrelated():
    noise_BLC = gaussian_noise(image_keys("sampling", 0, range(100)), 125, 16)
    assert noise_BLC.dtype == torch.float32
    flat = noise_BLC.flatten().double()
    assert stats.kstest(flat.numpy(), "norm").pvalue > 1e-3
    num = len(flat)
    for power, moment, spread in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(flat.pow(power).mean() - moment) < 4 * math.sqrt(spread / num)
    for lag in (1, 2, 3, 4, 16, 2000):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 / math.sqrt(num)


def test_uniform_is_uniform_and_inside():
    uniform_BL = uniform(image_keys("sampling", 0, range(100)), 501, stream=1)
    assert uniform_BL.shape == (100, 501) and uniform_BL.dtype == torch.float64
    assert uniform_BL.min() > 0 and uniform_BL.max() < 1
    assert stats.kstest(uniform_BL.flatten().numpy(), "uniform").pvalue > 1e-3


def test_extreme_words_stay_finite(monkeypatch):
    for word in (0, ONES):
        words = torch.full((1, 1, 4), word)
        monkeypatch.setattr(noise, "philox", lambda *_, words=words: words)
        assert gaussian_noise(torch.zeros(1, dtype=torch.int64), 2, 2).isfinite().all()
        assert 0 < uniform(torch.zeros(1, dtype=torch.int64), 4, 0).min() <= uniform(torch.zeros(1), 4, 0).max() < 1


def test_an_image_depends_on_its_key_alone():
    whole_BLC = gaussian_noise(image_keys("evaluation", 1, range(10)), 7, 3)
    for index in (9, 0, 4):
        alone_BLC = gaussian_noise(image_keys("evaluation", 1, [index]), 7, 3)
        assert torch.equal(alone_BLC[0], whole_BLC[index])
    assert torch.equal(gaussian_noise(image_keys("evaluation", 1, range(4, 10)), 7, 3), whole_BLC[4:])


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_a_shorter_sequence_is_a_prefix(channels):
    key_B = image_keys("sampling", 2, range(3))
    assert torch.equal(gaussian_noise(key_B, 9, channels)[:, :5], gaussian_noise(key_B, 5, channels))
    assert torch.equal(uniform(key_B, 9, 1)[:, :5], uniform(key_B, 5, 1))


def test_domains_seeds_indices_and_streams_are_all_unrelated():
    keys = [
        key
        for domain in noise.DOMAINS
        for run_seed in (0, 1, 2, 10, 11)
        for key in image_keys(domain, run_seed, range(200)).tolist()
    ]
    assert len(set(keys)) == len(keys) == 5 * 5 * 200
    noise_BLC = gaussian_noise(torch.tensor(keys[::50]), 16, 8).flatten(1)
    correlation_BB = torch.corrcoef(noise_BLC) - torch.eye(len(noise_BLC))
    assert correlation_BB.abs().max() < 6 / math.sqrt(128)
    key_B = image_keys("sampling", 0, [0])
    first, second = gaussian_noise(key_B, 500, 8), gaussian_noise(key_B, 500, 8, stream=1)
    assert abs((first * second).mean()) < 4 / math.sqrt(4000)


def test_unknown_domain_is_refused():
    with pytest.raises(ValueError, match="unknown domain 'test'; use one of trajectories"):
        image_keys("test", 0, [0])


@pytest.mark.gpu
def test_cpu_and_gpu_agree():
    key_B = image_keys("trajectories", 0, range(64))
    assert torch.equal(uniform(key_B, 99, 1), uniform(key_B.cuda(), 99, 1).cpu())
    on_gpu = gaussian_noise(key_B.cuda(), 256, 8).cpu()
    torch.testing.assert_close(gaussian_noise(key_B, 256, 8), on_gpu, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("num", [1, 2, 3, 12, 1000])
def test_a_shuffled_order_holds_every_number_once(num: int) -> None:
    orders = [shuffled(torch.arange(num), num, image_keys("training", 0, [epoch])) for epoch in range(2)]
    assert all(sorted(order.tolist()) == list(range(num)) for order in orders)
    assert num < 10 or not torch.equal(*orders)
    # A place is looked up alone, in however long an order.
    assert (
        orders[0][num // 2 :].tolist()
        == shuffled(torch.arange(num // 2, num), num, image_keys("training", 0, [0])).tolist()
    )
    assert 0 <= shuffled(torch.tensor([10**12 - 1]), 10**12, image_keys("training", 0, [0])).item() < 10**12


def test_a_shuffled_order_is_a_random_one() -> None:
    """Neither places and numbers, nor neighbours, nor two orders have anything to do with each other."""
    first, second = (shuffled(torch.arange(5000), 5000, image_keys("training", 0, [i])).double() for i in range(2))
    for a, b in ((torch.arange(5000.0), first), (first[1:], first[:-1]), (first, second)):
        assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / 5000**0.5
