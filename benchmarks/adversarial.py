"""Streams of updates that leave the subspace in which a warm-started block searches.

What sparse embedding gradients, idle experts and frozen parts that thaw do in training. Each
stream is of gradients; `adam` makes updates of them.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

SIZE = 64
Stream = Callable[[np.random.Generator, int], Iterator[np.ndarray]]


def adam(grads: Iterable[np.ndarray], b1: float = 0.9, b2: float = 0.999) -> Iterator[np.ndarray]:
    """Adam's updates, in float64."""
    m = v = 0.0
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        yield (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-8)


def zeros() -> np.ndarray:
    """A gradient of nothing."""
    return np.zeros((SIZE, SIZE))


def block_at(i: int, block: np.ndarray) -> np.ndarray:
    """A block on the diagonal, and nothing else."""
    g = zeros()
    g[i : i + len(block), i : i + len(block)] = block
    return g


def another_block(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """One diagonal block for 50 steps, then another for good."""
    for t in range(steps):
        yield block_at(0 if t < 50 else 32, rng.normal(size=(16, 16)))


def blocks_of_four(hold: int) -> Stream:
    """A random one of 16 diagonal blocks, for some steps each."""

    def stream(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
        for t in range(steps):
            if t % hold == 0:
                i = 4 * int(rng.integers(SIZE // 4))
            yield block_at(i, rng.normal(size=(4, 4)))

    return stream


def louder_blocks(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """Each of the 8 diagonal blocks for 30 steps, every second a thousand times as large."""
    for t in range(steps):
        i = (t // 30) % 8
        yield block_at(8 * i, 1000.0 ** (i % 2) * rng.normal(size=(8, 8)))


def idle_and_thawed(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """Of low rank and noisy, then a few columns, then nothing, for 20 steps each."""
    low_rank = rng.normal(size=(SIZE, 2)) @ rng.normal(size=(2, SIZE))
    for t in range(steps):
        g = zeros()
        if t // 20 % 3 == 0:
            g = low_rank + 0.5 * rng.normal(size=(SIZE, SIZE))
        elif t // 20 % 3 == 1:
            g[:, :8] = rng.normal(size=(SIZE, 8))
        yield g


def alternating_blocks(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """Two halves of the diagonal in turn."""
    halves = [block_at(i, rng.normal(size=(SIZE // 2, SIZE // 2))) for i in (0, SIZE // 2)]
    for t in range(steps):
        yield halves[t % 2]


def spike_that_moves(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """One entry of the diagonal, the next in each step."""
    for t in range(steps):
        yield block_at(t % SIZE, np.ones((1, 1)))


def one_diagonal_entry(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """A random entry of the diagonal in each step."""
    for _ in range(steps):
        yield block_at(int(rng.integers(SIZE)), rng.normal(size=(1, 1)))


def one_entry(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """A random entry in each step."""
    for _ in range(steps):
        g = zeros()
        g[tuple(rng.integers(SIZE, size=2))] = rng.normal()
        yield g


def one_row(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """A row of random numbers, the next in each step."""
    for t in range(steps):
        g = zeros()
        g[t % SIZE] = rng.normal(size=SIZE)
        yield g


def one_column(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """A column of random numbers, the next in each step."""
    for g in one_row(rng, steps):
        yield g.T


def new_low_rank(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
    """A matrix of rank 2, another in each step."""
    for _ in range(steps):
        yield rng.normal(size=(SIZE, 2)) @ rng.normal(size=(2, SIZE))


def embedding(spread: float) -> Stream:
    """Rows of an embedding, 4 in each step and never the same, around a common direction."""

    def stream(rng: np.random.Generator, steps: int) -> Iterator[np.ndarray]:
        common = rng.normal(size=SIZE)
        for t in range(steps):
            g = np.zeros((4 * steps, SIZE))
            g[4 * t : 4 * t + 4] = common + spread * rng.normal(size=(4, SIZE))
            yield g

    return stream


# A change now and then, to which a block can adapt.
CHANGES: dict[str, Stream] = {
    "another block from step 50 on": another_block,
    "another block of four, 10 steps each": blocks_of_four(10),
    "another block, 30 steps each": louder_blocks,
    "idle and thawed": idle_and_thawed,
    "two blocks in turn": alternating_blocks,
}
# All of the largest part of an update is new in each step.
MOVES: dict[str, Stream] = {
    "a diagonal spike that moves": spike_that_moves,
    "a diagonal entry a step": one_diagonal_entry,
    "an entry a step": one_entry,
    "a row a step": one_row,
    "a column a step": one_column,
    "a block of four a step": blocks_of_four(1),
    "a matrix of rank 2 a step": new_low_rank,
    "4 rows of an embedding a step, related": embedding(0.1),
    "4 rows of an embedding a step, unrelated": embedding(10.0),
}
