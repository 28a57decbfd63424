"""Fingerprints: the same for the same content, another one for any change that matters."""

import itertools
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from weightsmith.checkpoints import Checkpoint
from weightsmith.checkpoints.fingerprint import ZERO, add, checksum


def both(folder):
    with Checkpoint.open(folder) as checkpoint:
        return checkpoint.fingerprint(), checkpoint.fingerprint(full=True)


def test_sharding_order_and_json_spacing_play_no_part(write_model, tensors):
    expected = both(write_model("a", tensors))
    assert expected[0].startswith("quick:")
    assert len(expected[0]) == len("quick:") + 32
    assert both(write_model("b", tensors, shards=3)) == expected
    folder = write_model("c", dict(reversed(tensors.items())))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    (folder / "README.md").write_text("x")
    assert both(folder) == expected


def test_every_part_of_the_content_counts(write_model, tensors):
    norm = tensors["model.norm.weight"]
    variants = {
        "value": {**tensors, "model.norm.weight": np.nextafter(norm, np.float32(9))},
        "name": {**{n: t for n, t in tensors.items() if t is not norm}, "model.morn.weight": norm},
        "shape": {**tensors, "model.norm.weight": norm.reshape(2, 4)},
        "dtype": {**tensors, "model.norm.weight": norm.view(np.int32)},
        "fewer": {n: t for n, t in tensors.items() if t is not norm},
    }
    found = [both(write_model("a", tensors)), both(write_model("config", tensors, {"vocab_size": 17}))]
    found += [both(write_model(name, changed)) for name, changed in variants.items()]
    for kind in zip(*found, strict=True):
        assert len(set(kind)) == len(found)


def test_the_full_one_sees_a_single_bit_the_quick_one_a_fine_tune(write_model, rng):
    values = rng.standard_normal((512, 512)).astype(np.float32)
    quick, full = both(write_model("a", {"w": values}))
    flipped = values.copy()
    flipped.view(np.uint32)[300, 301] ^= 1
    assert both(write_model("bit", {"w": flipped}))[1] != full
    tuned = values + rng.standard_normal(values.shape).astype(np.float32) * 1e-4
    assert both(write_model("tuned", {"w": tuned}))[0] != quick
    assert both(write_model("last", {"w": np.r_[values[:-1], values[-1:] + 1]}))[0] != quick


MISCHIEF = {
    "two rows exchanged": lambda w: w[[1, 0, *range(2, len(w))]],
    "all rows shifted": lambda w: np.roll(w, 1, axis=0),
    "two columns exchanged": lambda w: w[:, [1, 0, *range(2, w.shape[1])]],
    "a row negated": lambda w: np.r_[-w[:1], w[1:]],
    "two signs flipped in top bits": lambda w: np.where(
        np.isin(np.arange(w.size).reshape(w.shape), (1, 3)), -w, w
    ),
    "zeros at the end": lambda w: np.r_[w[:-1], np.zeros_like(w[-1:])],
    "transposed": lambda w: w.T,
}


@pytest.mark.parametrize("shape", [(1024, 1024), (64, 64), (509, 509)])
@pytest.mark.parametrize("case", MISCHIEF)
def test_the_checksum_sees_what_happens_to_matrices(case, shape, rng):
    matrix = rng.standard_normal(shape).astype(np.float32)

    def total(values):
        return checksum(np.ascontiguousarray(values).reshape(-1).view(np.uint8), 0)

    assert total(MISCHIEF[case](matrix)) != total(matrix)


@given(st.integers(0, 30_000), st.lists(st.integers(0, 30_000), max_size=6), st.integers(0, 2**32))
def test_checksums_of_pieces_add_up_however_the_tensor_is_cut(size, cuts, seed):
    data = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    edges = [0, *sorted(min(cut, size) for cut in cuts), size]
    total = ZERO
    for start, stop in itertools.pairwise(edges):
        total = add(total, checksum(data[start:stop], start))
    padded = np.zeros(-(-size // 8) * 8, np.uint8)
    padded[:size] = data
    low = high = 0
    for place, word in enumerate(padded.view("<u8").tolist()):  # the definition, word by word
        weight = 2 * (place % 509) + 1
        low, high = low + weight * word, high + weight * (word >> 32)
    assert total == (low % 2**64, high % 2**64)


def test_a_large_tensor_is_sampled_not_read(tmp_path, monkeypatch):
    save_file({"w": np.zeros(5_000_000, np.float32)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        read = 0
        pread = os.pread

        def count(descriptor, size, offset):
            nonlocal read
            read += size
            return pread(descriptor, size, offset)

        monkeypatch.setattr(os, "pread", count)
        checkpoint.fingerprint()
    assert read == 16 * 1024
