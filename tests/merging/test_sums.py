"""Sums that may not depend on how a parameter was cut into tiles."""

import numpy as np
import pytest

from weightsmith.merging.parameter import Parameter, Scratch
from weightsmith.merging.sums import piece_absolutes, piece_dots, total


def parameter(values, tile_elements):
    flat = values.reshape(-1)

    def read(start, stop, out):
        out[:] = flat[start:stop]

    return Parameter("w", values.shape, models=["m"], readers=[read], tile_elements=tile_elements)


@pytest.mark.parametrize("shape", [(40_000,), (7, 5), (3, 20_000), (2, 9, 100), (5, 4097), (1,)])
def test_sums_are_the_same_bits_for_every_tile_size(shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = set()
    for tile_elements in (1, 5000, 1 << 20):
        one = parameter(values, tile_elements)
        dots, sums = [], []
        for tile in one.tiles():
            dots.append(piece_dots(tile.models[0], tile.models[0], one))
            sums.append(piece_absolutes(tile.models[0], one, Scratch()))
        found.add((total(dots), total(sums)))
    assert len(found) == 1
    dot, absolute = found.pop()
    np.testing.assert_allclose(dot, (values.astype(float) ** 2).sum(), rtol=1e-5)
    np.testing.assert_allclose(absolute, np.abs(values.astype(float)).sum(), rtol=1e-5)


@pytest.mark.parametrize(("shape", "row"), [((10, 6), 6), ((2, 5, 3), 3), ((17,), 17)])
@pytest.mark.parametrize("tile_elements", [1, 7, 12, 1000])
def test_tiles_are_whole_rows_in_order_and_cover_everything_once(shape, row, tile_elements):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    one = parameter(values, tile_elements)
    tiles = [(tile.start, tile.models[0].copy()) for tile in one.tiles()]
    np.testing.assert_array_equal(np.concatenate([part for _, part in tiles]), values.reshape(-1))
    assert all(start % row == 0 and part.size % row == 0 for start, part in tiles)


def test_a_sample_is_spread_over_the_parameter_and_never_longer_than_it():
    values = np.arange(100_000, dtype=np.float32)
    sample = parameter(values, 1 << 18).sample(8192).models[0]
    assert sample.size == 8192
    assert sample.min() == 0
    assert sample.max() == 99_999
    np.testing.assert_array_equal(parameter(values, 1 << 18).sample(200_000).models[0], values)
    assert parameter(values[:300], 1 << 18).sample(8).models[0].size == 8
    assert parameter(values[:300], 1 << 18).sample(0).models[0].size == 0
