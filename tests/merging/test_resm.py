import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from weightsmith.errors import InputError
from weightsmith.merging import merge, merge_state_dicts
from weightsmith.merging.methods.resm import Resm, resm, share_ranks
from weightsmith.merging.methods.tsvm import Tsvm, tsvm
from weightsmith.merging.parameter import Parameter


def reference_weights(deltas, kappa=3.0, g=1.0, stat="ratio"):
    """Task weights by plain loops over the entries."""
    shares = []
    for delta in deltas:
        a = [abs(float(x)) for x in delta.ravel()]
        mean = sum(a) / len(a)
        std = math.sqrt(sum((x - mean) ** 2 for x in a) / len(a))
        big = [x for x in a if x > mean + kappa * std]
        shares.append({"ratio": sum(big) / sum(a), "mass": sum(big), "count": len(big) / len(a)}[stat])
    powers = [(share + 1e-12) ** g for share in shares]
    return [len(deltas) * power / sum(powers) for power in powers]


def reference_ranks(deltas, eta=0.1, tol=None):
    q, tasks = min(deltas.shape[1:]), len(deltas)
    zeros = []
    for delta in deltas:
        bound = eta * math.sqrt(np.mean(delta**2)) if tol is None else tol
        zeros.append(np.mean(np.abs(delta) <= bound))
    budget = min(max(round(q * (1 - np.mean(zeros))), tasks), q)
    shares = [budget * (1 - z) / sum(1 - z for z in zeros) for z in zeros]
    ranks = [max(1, math.floor(share)) for share in shares]
    order = sorted(range(tasks), key=lambda t: (-(shares[t] - ranks[t]), t))
    for task in order[: budget - sum(ranks)]:
        ranks[task] += 1
    return ranks


def reference(deltas, weights, ranks):
    """RESM's last steps in fp64: full SVDs, polar factors by SVD."""
    us, ss, vs = [], [], []
    for delta, weight, rank in zip(deltas.astype(np.float64), weights, ranks, strict=True):
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        us.append(u[:, :rank])
        ss.append(weight * s[:rank])
        vs.append(vh[:rank].T)
    polar = [
        left @ right
        for left, _, right in (np.linalg.svd(np.hstack(x), full_matrices=False) for x in (us, vs))
    ]
    return polar[0] @ np.diag(np.concatenate(ss)) @ polar[1].T


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def uneven(m=20, n=30, seed=0):
    """Three changes: light-tailed, heavy-tailed, sparse."""
    light, heavy, sparse = random(3, m, n, seed=seed)
    heavy = heavy**3
    sparse[np.random.default_rng(seed + 1).random((m, n)) < 0.7] = 0
    return np.stack([light, heavy, sparse])


def merged(deltas, **options):
    return resm(torch.from_numpy(deltas), **options).numpy()


def in_memory(values, name, layer, tile_elements=64):
    """Parameter (T + 1, *shape) with the base first."""

    def reader(array):
        flat = np.ascontiguousarray(array).reshape(-1)
        return lambda start, stop, out: np.copyto(out, flat[start:stop])

    return Parameter(
        name,
        values.shape[1:],
        models=[f"m{index}" for index in range(len(values) - 1)],
        readers=[reader(model) for model in values[1:]],
        base_reader=reader(values[0]),
        layer=layer,
        tile_elements=tile_elements,
    )


def one_by_one(function, parameters):
    return [function(parameter) for parameter in parameters]


@pytest.mark.parametrize("options", [{}, {"kappa": 1.5, "g": 2.0}, {"eta": 0.5}, {"sparsity_tol": 0.3}])
@pytest.mark.parametrize("stat", ["ratio", "mass", "count"])
def test_the_merge_follows_its_equations(options, stat):
    deltas = uneven()
    weights = reference_weights(deltas, options.get("kappa", 3.0), options.get("g", 1.0), stat)
    ranks = reference_ranks(deltas, options.get("eta", 0.1), options.get("sparsity_tol"))
    change = Resm(stat=stat, **options).change(torch.from_numpy(deltas.copy()), None, "x")
    np.testing.assert_allclose(change.weights, weights, rtol=1e-9)
    assert change.ranks == ranks
    assert len(set(ranks)) > 1  # the case is worth testing
    np.testing.assert_allclose(
        merged(deltas, stat=stat, **options), reference(deltas, weights, ranks), atol=1e-8
    )
    single = merged(deltas.astype(np.float32), stat=stat, **options)
    np.testing.assert_allclose(single, reference(deltas, weights, ranks), atol=2e-3 * np.abs(single).max())


def test_suppressing_is_emphasizing_with_the_opposite_power():
    deltas = uneven()
    change = Resm(mode="suppress", g=0.5).change(torch.from_numpy(deltas), None, "x")
    np.testing.assert_allclose(change.weights, reference_weights(deltas, g=-0.5), rtol=1e-9)


def test_both_steps_off_is_tsvm():
    deltas = torch.from_numpy(random(3, 20, 31))
    torch.testing.assert_close(resm(deltas, g=0.0, eta=0.0), tsvm(deltas), rtol=0, atol=0)
    torch.testing.assert_close(resm(deltas, g=0.0, eta=0.0, rank=0.5), tsvm(deltas, rank=0.5), rtol=0, atol=0)


def test_equal_sparsity_and_outliers_give_weights_of_one_and_equal_ranks():
    values = random(20, 31)
    shuffled = np.random.default_rng(5).permuted(values.ravel()).reshape(20, 31)
    change = Resm().change(torch.from_numpy(np.stack([values, -values[::-1].copy(), shuffled])), None, "x")
    np.testing.assert_allclose(change.weights, 1.0, rtol=1e-9)
    assert len(set(change.ranks)) == 1


@pytest.mark.parametrize("options", [{}, {"mode": "suppress"}, {"granularity": "row"}, {"stat": "count"}])
def test_a_common_scale_passes_through(options):
    deltas = uneven()
    found = Resm(**options).change(torch.from_numpy(deltas.copy()), None, "x")
    small = Resm(**options).change(torch.from_numpy(1e-3 * deltas), None, "x")
    np.testing.assert_allclose(small.weights, found.weights, rtol=1e-6)
    assert small.ranks == found.ranks
    np.testing.assert_allclose(small.values, 1e-3 * found.values, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"mode": "suppress"}, {"granularity": "row"}, {"eta": 0.0}])
def test_a_task_that_changed_nothing_is_as_if_it_were_not_there(options):
    deltas = uneven()
    with_zero = np.stack([deltas[0], np.zeros_like(deltas[0]), deltas[1], deltas[2]])
    np.testing.assert_allclose(merged(with_zero, **options), merged(deltas, **options), atol=1e-12)
    assert not merged(np.zeros((2, 4, 5)), **options).any()


@pytest.mark.parametrize("seed", range(20))
def test_ranks_stay_within_the_matrix_and_leave_nobody_out(seed):
    rng = np.random.default_rng(seed)
    tasks = int(rng.integers(1, 9))
    q = int(rng.integers(tasks, 40))
    sparsity = np.round(rng.random(tasks) ** rng.integers(1, 5), 2)
    ranks = share_ranks(q, sparsity)
    assert min(ranks) >= 1
    assert tasks <= sum(ranks) <= q
    denser = np.argsort(sparsity, kind="stable")
    assert all(ranks[a] >= ranks[b] - 1 for a, b in pairwise(denser))


@pytest.mark.parametrize(
    ("q", "sparsity", "ranks"),
    [
        (10, [0.0, 0.0, 0.0], [3, 3, 3]),  # equal: the remainder stays unused
        (10, [0.5, 0.5], [2, 2]),
        (10, [0.0, 0.5, 0.5], [3, 2, 2]),  # budget 7: shares 3.5, 1.75, 1.75
        (4, [0.99, 0.99, 0.0], [1, 1, 1]),  # budget 3: everyone gets 1
        (12, [0.999, 0.999, 0.999, 0.0], [1, 1, 1, 1]),
        (100, [0.99, 0.0, 0.0], [1, 33, 33]),
    ],
)
def test_ranks_worked_out_by_hand(q, sparsity, ranks):
    assert share_ranks(q, sparsity) == ranks


def test_rows_can_have_weights_of_their_own():
    deltas = uneven()
    weights = np.stack([reference_weights(deltas[:, row]) for row in range(20)], axis=1)
    ranks = reference_ranks(deltas)
    expected = reference(deltas * weights[:, :, None], [1, 1, 1], ranks)
    np.testing.assert_allclose(merged(deltas, granularity="row"), expected, atol=1e-8)


def test_a_layer_pools_the_outliers_of_its_matrices():
    first, second, other, norm = uneven(), uneven(20, 30, 3), uneven(20, 30, 7), random(3, 1, 9)
    made = [
        in_memory(np.concatenate([np.zeros_like(values[:1]), values]).astype(np.float32), name, layer)
        for values, name, layer in [
            (first, "layers.0.a.weight", 0),
            (second, "layers.0.b.weight", 0),
            (other, "layers.1.a.weight", 1),
            (norm[:, 0], "layers.0.norm.weight", 0),
        ]
    ]
    method = Resm(granularity="layer")
    assert method.global_survey
    stats = method.survey_all(made, one_by_one)
    shares = []
    for task in range(3):
        outliers = total = 0.0
        for values in (first, second):
            a = np.abs(values[task].astype(np.float32).astype(np.float64))
            outliers += a[a > a.mean() + 3 * a.std()].sum()
            total += a.sum()
        shares.append(outliers / total)
    pooled = 3 * np.array(shares) / sum(shares)
    np.testing.assert_allclose(stats["layers.0.a.weight"], pooled, rtol=1e-5)
    np.testing.assert_allclose(stats["layers.0.b.weight"], pooled, rtol=1e-5)
    # A layer with one matrix has the weights that matrix has alone.
    np.testing.assert_allclose(stats["layers.1.a.weight"], reference_weights(other), rtol=1e-5)
    assert stats["layers.0.norm.weight"] is None

    change = method.change(torch.from_numpy(first.copy()), stats["layers.0.a.weight"], "layers.0.a.weight")
    np.testing.assert_allclose(change.values, reference(first, pooled, reference_ranks(first)), atol=1e-4)


def test_the_sums_of_a_layer_do_not_depend_on_the_tiles():
    values = np.concatenate([np.zeros((1, 20, 30)), uneven()]).astype(np.float32)
    method = Resm(granularity="layer")
    sums = [method._tile_sums(in_memory(values, "layers.0.a.weight", 0, tile)) for tile in (30, 64, 10_000)]
    assert sums[0].tobytes() == sums[1].tobytes() == sums[2].tobytes()


def test_a_layer_weight_without_its_layer_is_an_error():
    with pytest.raises(InputError, match="x: granularity `layer` needs the layer's other matrices"):
        Resm(granularity="layer").change(torch.from_numpy(uneven()), None, "x")


def test_vectors_are_averaged_as_in_tsvm():
    values = random(3, 7).astype(np.float32)
    one, other = (next(in_memory(values, "norm.weight", None).tiles()) for _ in range(2))
    assert Resm().merge_tile(one, None).tobytes() == Tsvm().merge_tile(other, None).tobytes()


@pytest.mark.parametrize(
    "options", [{"g": -1.0}, {"kappa": float("inf")}, {"eta": -0.1}, {"sparsity_tol": -1.0}]
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Resm(**options)


@pytest.mark.parametrize("granularity", ["tensor", "layer", "row"])
@pytest.mark.parametrize("method", ["resm", "tsvm"])
def test_threads_and_streaming_change_no_bit(exact_family, tmp_path, method, granularity):
    if method == "tsvm" and granularity != "tensor":
        pytest.skip("an option of RESM")
    options = {"granularity": granularity} if method == "resm" else {}
    folders = [exact_family / name for name in ("base", "m1", "m2", "m3")]
    page = {"method": method, "base": str(folders[0]), "models": [str(x) for x in folders[1:]], **options}
    for threads in (1, 3):
        merge(page, tmp_path / str(threads), threads=threads)
    one, three = (load_folder(tmp_path / str(threads)) for threads in (1, 3))
    base, *models = map(load_folder, folders)
    config = json.loads((folders[0] / "config.json").read_text())
    memory = merge_state_dicts(base, models, method, config=config, **options)
    assert one.keys() == three.keys() == memory.keys()
    for name, values in one.items():
        assert values.tobytes() == three[name].tobytes() == memory[name].tobytes(), name
    assert any(not np.array_equal(one[name], base[name]) for name in one)


def load_folder(folder):
    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }
