"""Which of the rows that shards left go where: duplicates out, the mix's shares kept to, the splits stratified.

Everything here is arrays of one number a row. Rows are numbered through all shards, in the order of the recipe's sources: of two equal
rows the earlier one stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from data.words import Hashes

Rows = NDArray[np.int64]
Mask = NDArray[np.bool_]


def draw(keys: Hashes, seed: int, salt: str) -> Hashes:
    """[R] a random number for each key, the same for the same key, seed and salt."""
    start = np.random.SeedSequence([seed, *salt.encode()]).generate_state(1, np.uint64)
    values = keys ^ start
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def quotas(available: Sequence[int], weights: Sequence[float], num_rows: int | None) -> list[int]:
    """Rows to take of each source so that they are in the proportion of the weights, none taken twice.

    Raises:
        ValueError: when a source has too few for `num_rows`; says how many would be possible.
    """
    total = sum(weights)
    possible = min(int(n * total / w) for n, w in zip(available, weights, strict=True))
    if num_rows is not None and num_rows > possible:
        raise ValueError(
            f"mix.num_rows is {num_rows:,}, but with these weights and {', '.join(f'{n:,}' for n in available)} rows left of the sources "
            f"no more than {possible:,} are possible without repeating any; lower it or change the weights"
        )
    wanted = possible if num_rows is None else num_rows
    return largest_remainder([wanted * w / total for w in weights], wanted, available)


def largest_remainder(exact: Sequence[float], total: int, limits: Sequence[int]) -> list[int]:
    """Whole numbers that add up to `total`, each the exact share rounded down or up, none above its limit."""
    counts = [min(int(x), limit) for x, limit in zip(exact, limits, strict=True)]
    by_remainder = sorted(range(len(exact)), key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder * 2:
        if sum(counts) >= total:
            break
        counts[i] += counts[i] < limits[i]
    return counts


def take_smallest(values: Hashes, rows: Rows, count: int) -> Rows:
    """The `count` of `rows` with the smallest values, in order."""
    if count >= len(rows):
        return rows
    return np.sort(rows[np.argpartition(values[rows], count)[:count]])


def assign_splits(
    groups: Hashes, strata: NDArray[np.integer], shares: Mapping[str, float], *, seed: int
) -> NDArray[np.int8]:
    """[R] index of the split of each row: within each stratum the shares are kept to as closely as whole groups allow.

    Args:
        groups: rows of one group (the same question) always go to the same split; they count in the stratum of the first.
        strata: a code for each row.
        shares: of each split; they add up to 1.
        seed: of the draw.
    """
    unique, first, member = np.unique(groups, return_index=True, return_inverse=True)
    drawn = draw(unique, seed, "split")
    stratum = strata[first]
    order = np.lexsort((drawn, stratum))
    sizes = np.bincount(stratum)
    begins = np.cumsum(sizes) - sizes
    place = np.arange(len(order)) - begins[stratum[order]]
    cuts = np.cumsum(list(shares.values()))
    ends = np.rint(sizes[:, None] * cuts[None, :]).astype(np.int64)
    ends[:, -1] = sizes
    split = np.empty(len(unique), np.int8)
    split[order] = (place[:, None] >= ends[stratum[order]]).sum(1)
    return split[member]
