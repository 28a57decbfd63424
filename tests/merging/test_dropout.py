"""DARE's masks: a fair coin for each entry that knows its place and nothing else."""

from itertools import pairwise

import numpy as np
import pytest

from weightsmith.merging.dropout import keep_flags, keys


def flags(key, start, count, density):
    return keep_flags(key, start, density, np.empty(count, np.bool_)).copy()


@pytest.mark.parametrize("density", [0.5, 0.3, 1e-3, 0.999])
def test_an_entrys_fate_does_not_depend_on_where_its_tile_begins(density):
    whole = flags(11, 0, 5000, density)
    cuts = [0, 1, 7, 16, 17, 1000, 1003, 4096, 5000]
    pieces = [flags(11, a, b - a, density) for a, b in pairwise(cuts)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.123456789, 0.9])
def test_as_many_are_kept_as_the_density_says(density):
    count = 1 << 20
    kept = flags(3, 0, count, density).sum()
    assert abs(kept - density * count) < 4 * np.sqrt(count * density * (1 - density))


def test_a_density_between_the_steps_of_a_byte_is_met():
    # 256 steps of a byte would give 0 or 1/256 here, 16 bits 0 or 1/65536.
    density, count = 0.25 / 65536, 1 << 26
    kept = flags(5, 0, count, density).sum()
    assert 200 < kept < 320


def test_masks_of_tensors_models_and_seeds_are_unrelated():
    made = [keys(seed, name, 2)[model] for seed in (0, 1) for name in ("a", "b") for model in (0, 1)]
    assert len(set(made)) == 8
    masks = np.stack([flags(key, 0, 40_000, 0.5) for key in made]).astype(float)
    related = np.abs(np.corrcoef(masks) - np.eye(8))
    assert related.max() < 5 / np.sqrt(40_000)


def test_neighbours_are_unrelated():
    mask = flags(9, 0, 200_000, 0.5).astype(float) - 0.5
    for step in (1, 2, 4, 16, 64, 4096):
        assert abs((mask[step:] * mask[:-step]).mean() * 4) < 5 / np.sqrt(200_000)


def test_the_stream_of_bits_stays_the_same_for_ever():
    # A merge must be repeatable years later: these are its first entries.
    assert (
        "".join(map(str, flags(keys(0, "model.norm.weight", 1)[0], 0, 32, 0.5).astype(int)))
        == "11100000100101100010001110000011"
    )
