"""What the flow map costs beside the teacher's own sampling: a Markdown table.

For blocks spread over a sequence: seconds of the teacher's forward pass with an ordinary draw, and seconds of the flow
map in place of the draw, both eager, medians of runs that take turns. The share is what making trajectories costs more
than sampling. Weights are random, of full published size.

`python benchmarks/flow_cost.py --preset llamagen-b --batch 64`

Axis letters: B batch, L tokens, K tokens of a block, V codebook entries, C code channels.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
import tyro
from torch import Tensor

from distilled_decoding.condition import stand_ins
from distilled_decoding.describe import random_weights
from distilled_decoding.noise import gaussian_noise, image_keys, uniform
from distilled_decoding.records import environment
from distilled_decoding.teacher import by_chance, by_flow


@torch.no_grad()
def main(preset: str, batch: int = 64, blocks: int = 4, repeats: int = 3, num_steps: int | None = None) -> None:
    """Print the table.

    Args:
        preset: a published model.
        batch: images at once.
        blocks: how many blocks are timed, spread evenly from the first to the last.
        repeats: runs of each.
        num_steps: of the flow's solver; by default the preset's.
    """
    pipeline = random_weights(preset, "cpu", torch.float32)
    teacher, config = pipeline.teacher, pipeline.config
    order, flow = teacher.order, config.flow if num_steps is None else replace(config.flow, num_steps=num_steps)
    condition, key_B = stand_ins(teacher, batch), image_keys("trajectories", 0, range(batch))
    noise_BLC = gaussian_noise(key_B, order.length, teacher.codebook.shape[1])
    chance = by_chance(order, uniform(key_B, order.length, 1), config.sampling)
    flowing = by_flow(order, noise_BLC, teacher.codebook, config.sampling, flow)
    token_BL = torch.zeros(batch, order.length, dtype=torch.int64)

    def seconds(function: Callable[[], Tensor]) -> float:
        begin = perf_counter()
        function()
        return perf_counter() - begin

    print("| block | tokens | forward and draw, s | flow map in place of the draw, s more | share |")
    print("|---|---|---|---|---|")
    totals = [0.0, 0.0]
    for block in torch.linspace(0, order.num_blocks - 2, blocks).long().tolist():
        guidance, before = config.sampling.guidance, order.tokens_before(block)
        times: list[list[float]] = [[], [], []]
        for _ in range(repeats + 1):
            state = teacher.start(condition, guidance, token_BL[:, :before])
            begin = perf_counter()
            state = teacher.feed(state, token_BL[:, order.span(block)])
            times[0].append(perf_counter() - begin)
            logits_BKV = teacher.next_logits(state)
            times[1].append(seconds(lambda: chance(block + 1, logits_BKV)))  # noqa: B023
            times[2].append(seconds(lambda: flowing(block + 1, logits_BKV)))  # noqa: B023
        forward, draw, mapped = (median(runs[1:]) for runs in times)
        totals = [totals[0] + forward + draw, totals[1] + mapped - draw]
        row = f"{forward + draw:.3f} | {mapped - draw:.3f} | {(mapped - draw) / (forward + draw):.1%}"
        print(f"| {block + 1} | {order.sizes[block + 1]} | {row} |", flush=True)
    print(f"\n{preset}, batch {batch}, {flow}, {config.sampling}")
    print(f"sum over these blocks: {totals[1] / totals[0]:.1%}; {environment()['machine']}, torch {torch.__version__}")


if __name__ == "__main__":
    tyro.cli(main)
