import numpy as np
import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.merging import merge_state_dicts
from weightsmith.merging.methods.resm import Resm
from weightsmith.merging.methods.tsvm import Tsvm, tsvm
from weightsmith.merging.parameter import Parameter, Tile


def reference(deltas, alpha=None, rank=1.0):
    """TSV-M from its equations in fp64: full SVDs, polar factors by SVD without their null directions."""
    tasks, m, n = deltas.shape
    kept = max(1, int(rank * min(m, n) / tasks))
    us, ss, vs = [], [], []
    for task in range(tasks):
        u, s, vh = np.linalg.svd(deltas[task].astype(np.float64), full_matrices=False)
        us.append(u[:, :kept])
        ss.append(s[:kept] * (1.0 if alpha is None else alpha[task]))
        vs.append(vh[:kept].T)

    def polar(matrix):
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
        real = s > 1e-5 * s[0]
        return u[:, real] @ vh[real]

    return polar(np.hstack(us)) @ np.diag(np.concatenate(ss)) @ polar(np.hstack(vs)).T


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def orthogonal(size, seed):
    return np.linalg.qr(random(size, size, seed=seed))[0]


def merged(deltas, **options):
    return tsvm(torch.from_numpy(deltas), **options).numpy()


def parameter_of(base, models, name="layers.0.mlp.weight", config=None):
    """A parameter whose values live in memory."""

    def reader(values):
        flat = values.reshape(-1)
        return lambda start, stop, out: np.copyto(out, flat[start:stop])

    made = Parameter(
        name,
        base.shape,
        models=[f"m{index}" for index in range(len(models))],
        readers=[reader(model) for model in models],
        base_reader=reader(base),
    )
    made.config = config or {}
    return made


def merge_whole(method, base, models, **kwargs):
    parameter = parameter_of(base, models, **kwargs)
    assert method.takes(parameter)
    return method.merge_whole(*parameter.whole(), parameter, "cpu")


@pytest.mark.parametrize("shape", [(2, 12, 20), (3, 20, 12), (3, 16, 16), (5, 30, 41), (4, 7, 9)])
@pytest.mark.parametrize("rank", [1.0, 0.5])
def test_the_merge_follows_its_equations(shape, rank):
    deltas = random(*shape)
    np.testing.assert_allclose(merged(deltas, rank=rank), reference(deltas, rank=rank), atol=1e-9)
    single = merged(deltas.astype(np.float32), rank=rank)
    assert np.linalg.norm(single - reference(deltas, rank=rank)) < 1e-4 * np.linalg.norm(single)


def test_one_task_at_full_rank_is_that_task():
    deltas = random(1, 15, 40)
    np.testing.assert_allclose(merged(deltas), deltas[0], atol=1e-12)
    single = deltas.astype(np.float32)
    np.testing.assert_allclose(merged(single), single[0], atol=1e-5)


def test_tasks_in_orthogonal_spaces_add_up():
    rows, columns = orthogonal(12, 1), orthogonal(18, 2)
    values = np.abs(random(3, 4)) + 0.1
    deltas = np.stack(
        [(rows[:, 4 * t : 4 * t + 4] * values[t]) @ columns[:, 4 * t : 4 * t + 4].T for t in range(3)]
    )
    np.testing.assert_allclose(merged(deltas), deltas.sum(axis=0), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_of_one_task_give_its_truncation(copies, dtype):
    one = random(12, 20).astype(dtype)
    u, s, vh = np.linalg.svd(one, full_matrices=False)
    kept = 12 // copies
    expected = (u[:, :kept] * s[:kept]) @ vh[:kept]
    found = merged(np.stack([one] * copies))
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == np.float32 else 1e-12)


def test_directions_shared_by_some_tasks_are_not_made_up_for_by_arbitrary_ones():
    # Two tasks share one pair of directions; the third is apart. A polar factor by SVD is arbitrary here.
    rows, columns = orthogonal(9, 3), orthogonal(9, 4)
    shared = np.outer(rows[:, 0], columns[:, 0])
    deltas = np.stack([2.0 * shared, 4.0 * shared, 5.0 * np.outer(rows[:, 1], columns[:, 1])])
    expected = 3.0 * shared + deltas[2]  # equal shares of the direction, so the mean of 2 and 4
    np.testing.assert_allclose(merged(deltas), expected, atol=1e-12)


def test_singular_values_of_the_merge_are_those_kept_of_the_tasks():
    deltas = random(3, 18, 25)
    kept = np.concatenate([np.linalg.svd(delta, compute_uv=False)[:6] for delta in deltas])
    found = np.linalg.svd(merged(deltas), compute_uv=False)
    np.testing.assert_allclose(found, np.sort(kept)[::-1], rtol=1e-9)


def test_order_scale_and_rotation_pass_through():
    deltas = random(3, 14, 20)
    found = merged(deltas)
    np.testing.assert_allclose(merged(deltas[[2, 0, 1]]), found, atol=1e-10)
    np.testing.assert_allclose(merged(-1e-4 * deltas), -1e-4 * found, atol=1e-13)
    left, right = orthogonal(14, 5), orthogonal(20, 6)
    np.testing.assert_allclose(merged(left @ deltas @ right), left @ found @ right, atol=1e-10)
    np.testing.assert_allclose(merged(deltas.transpose(0, 2, 1).copy()), found.T, atol=1e-10)


def test_one_alpha_scales_the_result_and_several_scale_the_tasks():
    deltas = random(3, 12, 15)
    np.testing.assert_allclose(merged(deltas, alpha=0.3), 0.3 * merged(deltas), atol=1e-12)
    alpha = (0.5, -1.0, 2.0)
    expected = merged(deltas * np.array(alpha)[:, None, None])
    np.testing.assert_allclose(merged(deltas, alpha=alpha), expected, atol=1e-10)
    np.testing.assert_allclose(merged(deltas, alpha=alpha), reference(deltas, alpha), atol=1e-9)


def test_a_task_that_changed_nothing_adds_nothing():
    deltas = random(3, 12, 15)
    deltas[1] = 0
    others = merged(deltas[[0, 2]], rank=2 / 3)  # three tasks share the ranks
    np.testing.assert_allclose(merged(deltas), others, atol=1e-10)
    assert not merged(np.zeros((2, 4, 5))).any()


def test_more_tasks_than_directions_keep_the_largest_changes():
    base, models = random(2, 9).astype(np.float32), random(4, 2, 9).astype(np.float32)
    models = base + models * np.array([1.0, 5.0, 0.1, 9.0], np.float32)[:, None, None]
    found, info = merge_whole(Tsvm(), base, models)
    assert info["ranks"] == [0, 1, 0, 1]
    deltas = models[[1, 3]] - base
    np.testing.assert_allclose(found - base, reference(deltas), atol=1e-4)


def test_a_merge_in_memory_logs_that_there_are_more_tasks_than_directions(caplog):
    models = [{"layers.0.mlp.weight": model} for model in random(4, 2, 9)]
    merge_state_dicts({"layers.0.mlp.weight": np.zeros((2, 9))}, models, "tsvm")
    assert [record.message for record in caplog.records] == [
        "tsvm: 1 tensor has fewer directions than the 4 models to merge (layers.0.mlp.weight: 2); there only "
        "the largest changes count"
    ]


def test_an_unchanged_matrix_is_the_base_bit_for_bit():
    base = random(6, 8).astype(np.float32)
    base[0, :3] = [-0.0, 0.0, 1e-42]
    found, info = merge_whole(Tsvm(), base, np.stack([base] * 3))
    assert found.tobytes() == base.tobytes()
    assert info["ranks"] == [0, 0, 0]
    tile = Tile(0, base.ravel().copy(), np.stack([base.ravel()] * 3))
    assert Tsvm().merge_tile(tile, None).tobytes() == base.tobytes()


def test_the_change_is_added_to_the_base():
    base, models = random(10, 12).astype(np.float32), random(3, 10, 12, seed=1).astype(np.float32)
    found, info = merge_whole(Tsvm(alpha=(1.0, 0.5, 2.0)), base, models.copy())
    expected = base + reference(models - base, alpha=(1.0, 0.5, 2.0))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert info == {
        "matrices": 1,
        "full_rank": 10.0,
        "ranks": [3.0, 3.0, 3.0],
        "weights": [1.0, 1.0, 1.0],
    }


def test_what_is_no_matrix_is_averaged():
    method = Tsvm(alpha=(1.0, 2.0))
    base, models = random(7).astype(np.float32), random(2, 7, seed=1).astype(np.float32)
    assert not method.takes(parameter_of(base, models, name="model.norm.weight"))
    tile = Tile(0, base.copy(), models.copy())
    deltas = models.astype(np.float64) - base
    np.testing.assert_allclose(
        method.merge_tile(tile, None), base + (deltas[0] + 2 * deltas[1]) / 2, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
        ("transformer.wte.weight", False),
        ("gpt_neox.embed_out.weight", False),
        ("output.weight", False),
        ("model.layers.3.self_attn.q_proj.weight", True),
        ("encoder.layer.0.attention.output.dense.weight", True),
    ],
)
def test_embeddings_and_heads_are_left_out_by_default(name, taken):
    base = np.zeros((4, 4), np.float32)
    assert Tsvm().takes(parameter_of(base, [base], name=name)) is taken
    assert Tsvm(exclude=()).takes(parameter_of(base, [base], name=name))
    assert not Tsvm(exclude=("*.weight",)).takes(parameter_of(base, [base], name=name))


def test_biases_of_stacked_experts_are_no_matrix():
    base = np.zeros((4, 6), np.float32)
    assert not Tsvm().takes(parameter_of(base, [base], name="layers.0.mlp.experts.gate_up_proj_bias"))


def test_a_stack_of_experts_is_merged_expert_by_expert():
    base, models = random(4, 8, 10).astype(np.float32), random(2, 4, 8, 10, seed=1).astype(np.float32)
    found, info = merge_whole(Tsvm(), base, models.copy(), name="layers.1.experts.down_proj")
    assert info["matrices"] == 4
    for expert in range(4):
        alone, _ = merge_whole(Tsvm(), base[expert], models[:, expert].copy())
        assert found[expert].tobytes() == alone.tobytes()


@pytest.mark.parametrize(
    ("name", "shape"), [("conv.weight", (6, 3, 2, 2)), ("mixer.conv1d.weight", (8, 1, 4))]
)
def test_a_convolution_is_a_matrix_of_its_filters(name, shape):
    base, models = random(*shape).astype(np.float32), random(2, *shape, seed=1).astype(np.float32)
    found, _ = merge_whole(Tsvm(), base, models.copy(), name=name)
    flat, _ = merge_whole(Tsvm(), base.reshape(shape[0], -1), models.reshape(2, shape[0], -1).copy())
    assert found.tobytes() == flat.tobytes()


@pytest.mark.parametrize("method", [Tsvm(), Resm(), Resm(granularity="row")])
@pytest.mark.parametrize("shape", [(4, 128, 40), (3, 7, 9)])
def test_results_do_not_depend_on_where_the_arrays_lie_in_memory(shape, method):
    base, models = random(*shape).astype(np.float32)[0], random(*shape, seed=1).astype(np.float32)
    parameter = parameter_of(base, models)
    results = set()
    for offset in range(0, 64, 4):
        room = np.empty(models.nbytes + 128, np.uint8)
        start = -room.ctypes.data % 64 + offset
        moved = room[start : start + models.nbytes].view(np.float32).reshape(models.shape)
        moved[:] = models
        results.add(method.merge_whole(base, moved, parameter, "cpu")[0].tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("options", [{"rank": 0.0}, {"rank": 1.5}, {"alpha": float("nan")}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        Tsvm(**options)


@pytest.mark.gpu
def test_a_gpu_gives_the_same_merge():
    deltas = random(3, 96, 128).astype(np.float32)
    found = tsvm(torch.from_numpy(deltas).cuda()).cpu().numpy()
    assert np.linalg.norm(found - merged(deltas)) < 1e-4 * np.linalg.norm(found)
