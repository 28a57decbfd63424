"""Exact selection out of a stream, against a full sort."""

import numpy as np
import pytest

from weightsmith.tensors import selection
from weightsmith.tensors.selection import Selection, keep_mask, largest, magnitude_bits


def kept_by_sorting(values, count):
    """Indices of the `count` largest magnitudes; among equals the lower index."""
    return np.sort(np.argsort(-np.abs(values).astype(np.float64), kind="stable")[:count])


def kept_by_cut(values, cut, tile):
    kept = []
    for start in range(0, values.size, tile):
        bits = magnitude_bits(
            values[start : start + tile], np.empty(values[start : start + tile].size, np.int32)
        )
        mask = keep_mask(bits[None], [cut], start, np.empty_like(bits)[None])[0]
        assert set(np.unique(mask)) <= {0, -1}
        kept.append(start + np.flatnonzero(mask))
    return np.concatenate(kept)


def bfloat16(values):
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)


def streams(kind, numel, rng):
    weights = bfloat16(rng.normal(0, 0.02, numel))
    return {
        "normal": rng.normal(size=numel).astype(np.float32),
        "bfloat16 changes": bfloat16(weights + rng.normal(0, 3e-5, numel)) - weights,
        "all equal": np.full(numel, -0.5, np.float32),
        "all zero": np.zeros(numel, np.float32),
        "two values": np.where(rng.random(numel) < 0.3, 1.0, -2.0).astype(np.float32),
        "ascending": np.arange(numel, dtype=np.float32),
        "descending": -np.arange(numel, dtype=np.float32)[::-1].copy(),
        "one outlier": np.r_[np.zeros(numel - 1), 1e30].astype(np.float32),
        "huge range": (10.0 ** rng.uniform(-38, 38, numel)).astype(np.float32),
        "subnormal": np.arange(numel, dtype=np.int32).view(np.float32).copy(),
    }[kind]


KINDS = [
    "normal",
    "bfloat16 changes",
    "all equal",
    "all zero",
    "two values",
    "ascending",
    "descending",
    "one outlier",
    "huge range",
    "subnormal",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.001, 0.2, 0.5, 0.97])
def test_a_stream_keeps_what_a_full_sort_keeps(kind, density):
    values = streams(kind, 5000, np.random.default_rng(1))
    count = int(density * values.size)
    tiles = [values[start : start + 700] for start in range(0, values.size, 700)]
    kept = kept_by_cut(values, largest(tiles, count), 700)
    np.testing.assert_array_equal(kept, kept_by_sorting(values, count))


@pytest.mark.parametrize("numel", [1, 2, 3, 9])
def test_every_count_of_a_tiny_stream_is_exact(numel):
    values = np.float32([0.5, -0.5, 0, 0.25, 0.5, -1, 0, -0.25, 0.5])[:numel]
    for count in range(numel + 1):
        for tile in (1, 2, 9):
            tiles = [values[start : start + tile] for start in range(0, numel, tile)]
            kept = kept_by_cut(values, largest(tiles, count), tile)
            np.testing.assert_array_equal(kept, kept_by_sorting(values, count))


@pytest.mark.parametrize("lie", [0.0, 1e-30, 1e30])
def test_a_sample_that_misleads_costs_passes_but_no_accuracy(lie):
    values = np.random.default_rng(2).normal(size=4000).astype(np.float32)
    sample = np.full(200, lie, np.float32)
    kept = kept_by_cut(values, largest([values], 800, sample), 4000)
    np.testing.assert_array_equal(kept, kept_by_sorting(values, 800))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bracket_too_full_to_keep_is_narrowed(kind, monkeypatch):
    monkeypatch.setattr(selection, "COLLECTED_ELEMENTS", 0)
    values = streams(kind, 20_000, np.random.default_rng(3))
    tiles = [values[start : start + 3000] for start in range(0, values.size, 3000)]
    passes = 0
    wanted = Selection(4000, values.size, np.empty(0, np.int32))
    while wanted.cuts is None:
        scan, passes = wanted.scan(values.size), passes + 1
        assert passes <= 5
        for start, tile in zip(range(0, values.size, 3000), tiles, strict=True):
            bits = magnitude_bits(tile, np.empty(tile.size, np.int32))
            scan.add(start, bits, np.empty((2, tile.size), np.bool_))
        wanted.finish([scan])
    np.testing.assert_array_equal(kept_by_cut(values, wanted.cuts[0], 3000), kept_by_sorting(values, 4000))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_in_order_are_one_stream(kind):
    values = streams(kind, 3000, np.random.default_rng(4))
    parts = np.split(values, [100, 101, 1500, 1500])
    wanted = Selection(700, values.size, magnitude_bits(values[::7].copy(), np.empty(429, np.int32)))
    while wanted.cuts is None:
        scans = []
        for part in parts:
            scan = wanted.scan(part.size)
            for start in range(0, part.size, 64):
                bits = magnitude_bits(
                    part[start : start + 64], np.empty(part[start : start + 64].size, np.int32)
                )
                scan.add(start, bits, np.empty((2, bits.size), np.bool_))
            scans.append(scan)
        wanted.finish(scans)
    begins = np.cumsum([0, *(part.size for part in parts)])
    kept = np.concatenate(
        [
            begin + kept_by_cut(part, cut, 64)
            for begin, part, cut in zip(begins, parts, wanted.cuts, strict=False)
            if part.size
        ]
    )
    np.testing.assert_array_equal(kept, kept_by_sorting(values, 700))
