"""What experts keep of their differences, and how it is stored."""

import numpy as np
import pytest

from weightsmith.errors import CheckpointError
from weightsmith.merging.mediator import MediatorConfig
from weightsmith.merging.mediator.sparse import (
    Form,
    add_to,
    check_parts,
    choose_form,
    count_for_error,
    kept,
    pack,
    select,
    thinned,
    unpack,
)
from weightsmith.tensors.floats import from_float32, to_float32

SHAPES = [(7, 33), (1, 5), (16, 64), (3, 5, 11)]


def values_of(shape, seed=0, dtype="BF16"):
    values = np.random.default_rng(seed).standard_normal(np.prod(shape)).astype(np.float32)
    return to_float32(from_float32(values, dtype), dtype)


@pytest.mark.parametrize("layout", ["dense", "bitmap", "csr"])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
def test_every_layout_gives_back_every_bit(shape, density, dtype, layout):
    residual = values_of(shape, dtype=dtype)
    count = kept(residual.size, density)
    form = Form(shape, dtype, layout, residual.size if layout == "dense" else count)
    mask = select(residual, count)
    assert mask.sum() == count
    parts = pack(form, mask, residual[mask])
    assert sum(part.nbytes for part in parts.values()) == form.nbytes
    wanted = np.where(mask, residual, 0)
    given = np.zeros_like(residual)
    places, values = unpack(form, parts)
    given[places] = values
    np.testing.assert_array_equal(given, wanted)
    np.testing.assert_array_equal(np.signbit(given[mask]), np.signbit(wanted[mask]))
    target = np.zeros_like(residual)
    add_to(target, 1.0, form, parts)
    np.testing.assert_array_equal(target, wanted)
    check_parts(form, parts, "difference")


@pytest.mark.parametrize("density", [0.02, 1 / 16, 0.1, 0.3, 0.9])
def test_sizes_are_those_of_the_table(density):
    rows, width = 512, 1024
    numel, count = rows * width, kept(rows * width, density)
    sizes = {layout: Form((rows, width), "BF16", layout, count).nbytes for layout in ("bitmap", "csr")}
    assert sizes["bitmap"] == numel / 8 + 2 * count
    assert sizes["csr"] == 4 * count + 4 * (rows + 1)
    assert Form((rows, width), "BF16", "dense", count).nbytes == 2 * numel
    assert Form((rows, width), "I8", "bitmap", count).nbytes == numel / 8 + count + 4 * rows
    assert choose_form((rows, width), "BF16", count, MediatorConfig()).layout == (
        "csr" if density < 0.06 else "bitmap"
    )


def test_the_smallest_layout_is_taken_and_almost_everything_is_dense():
    assert choose_form((64, 64), "BF16", kept(4096, 0.95), MediatorConfig()).layout == "dense"
    assert choose_form((64, 64), "BF16", kept(4096, 0.1), MediatorConfig(layout="csr")).layout == "csr"
    # Rows of 65,536 columns or more need four bytes a column.
    assert Form((2, 70_000), "BF16", "csr", 10).nbytes == 10 * (4 + 2) + 4 * 3


def test_vectors_are_kept_whole_in_the_models_own_type():
    form = choose_form((40,), "BF16", 4, MediatorConfig(values="int8", layout="csr"))
    assert (form.layout, form.dtype, form.count) == ("dense", "BF16", 40)


def test_the_largest_are_kept_and_among_equals_the_lower_index():
    residual = np.float32([1, -3, 2, 2, -2, 0.5, 2])
    np.testing.assert_array_equal(np.flatnonzero(select(residual, 3)), [1, 2, 3])
    np.testing.assert_array_equal(np.flatnonzero(select(np.zeros(5, np.float32), 2)), [0, 1])


def test_selection_is_that_of_a_sort_across_tiles():
    residual = np.round(np.random.default_rng(0).standard_normal((1 << 20) + 12_345), 2).astype(np.float32)
    count = kept(residual.size, 0.1)
    order = np.argsort(-np.abs(residual), kind="stable")[:count]
    np.testing.assert_array_equal(np.flatnonzero(select(residual, count)), np.sort(order))


@pytest.mark.parametrize(
    ("numel", "density", "count"), [(30, 0.1, 3), (10, 0.29, 2), (7, 0.1, 0), (3, 1.0, 3)]
)
def test_a_share_is_rounded_down(numel, density, count):
    assert kept(numel, density) == count


def test_one_byte_values_are_off_by_half_a_step_of_their_row_at_most():
    residual = values_of((16, 64)) * np.repeat(np.logspace(-3, 0, 16), 64).astype(np.float32)
    for layout in ("bitmap", "csr", "dense"):
        form = Form((16, 64), "I8", layout, 1024 if layout == "dense" else 300)
        mask = select(residual, 300)
        parts = pack(form, mask, residual[mask])
        given = np.zeros_like(residual)
        add_to(given, 1.0, form, parts)
        wanted = np.where(mask, residual, 0)
        step = np.repeat(parts["scale"], 64)
        assert (np.abs(given - wanted) <= 0.5001 * step).all()
        assert parts["values"].dtype == np.int8


def test_random_choice_keeps_exactly_as_many_and_the_mean_of_what_there_was():
    residual = values_of((64, 64), dtype="F32") + 1
    config = MediatorConfig(select="random", expert_density=0.25)
    mask, values = thinned(residual, 1024, config, "w", "math")
    np.testing.assert_allclose(values, residual[mask] * 4)
    again, _ = thinned(residual, 1024, config, "w", "math")
    other, _ = thinned(residual, 1024, config, "w", "code")
    np.testing.assert_array_equal(mask, again)
    assert mask.sum() == other.sum() == 1024
    assert (mask != other).any()


def test_rescaling_restores_the_l1_norm():
    residual = values_of((64, 64), dtype="F32")
    _, values = thinned(residual, 400, MediatorConfig(rescale="l1"), "w", "t")
    assert np.abs(values).sum() == pytest.approx(np.abs(residual).sum(), rel=1e-5)


@pytest.mark.parametrize("limit", [0.05, 0.3, 0.7])
def test_the_density_is_raised_until_the_error_is_small_enough_and_no_further(limit):
    residual = values_of((40, 40), dtype="F32")

    def error(count):
        return np.linalg.norm(residual[~select(residual, count)]) / np.linalg.norm(residual)

    count = count_for_error(residual, 10, limit)
    assert error(count) <= limit < error(count - 1)
    assert count_for_error(residual, 1600, limit) == 1600
    assert count_for_error(np.zeros(9, np.float32), 2, limit) == 2


@pytest.mark.parametrize("layout", ["bitmap", "csr"])
def test_parts_that_contradict_each_other_are_refused(layout):
    residual = values_of((8, 8))
    form = Form((8, 8), "BF16", layout, 10)
    mask = select(residual, 10)
    parts = pack(form, mask, residual[mask])
    broken = dict(parts)
    if layout == "bitmap":
        broken["bitmap"] = parts["bitmap"] | np.uint8(255)
    else:
        broken["columns"] = parts["columns"] + np.uint16(8)
    with pytest.raises(CheckpointError, match="expert `math`"):
        check_parts(form, broken, "expert `math`")
