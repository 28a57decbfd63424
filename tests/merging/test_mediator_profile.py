"""Conflict between fine-tunes, and which blocks it sends to the router."""

import itertools
import json

import numpy as np
import pytest

from weightsmith.errors import InputError
from weightsmith.merging.mediator import (
    MediatorConfig,
    MediatorPlan,
    conflict_profile,
    plan_mediator,
    split_blocks,
)
from weightsmith.merging.mediator.conflict import Counts, measure, ones, sign_planes
from weightsmith.merging.mediator.options import RouterConfig, parse_bytes
from weightsmith.merging.mediator.plan import by_conflict, planned_bytes
from weightsmith.merging.mediator.profile import BlockConflict, Profile
from weightsmith.merging.parameter import Parameter, Tile

from .made import random_model, save

NO_TRIM = MediatorConfig(denoise_density=1.0)


def parameter_of(base, models, shape=None, tile_elements=1 << 16):
    def reader(array):
        return lambda start, stop, out: np.copyto(out, array.reshape(-1)[start:stop])

    return Parameter(
        "w",
        shape or base.shape,
        models=[f"m{index}" for index in range(len(models))],
        readers=[reader(np.float32(model)) for model in models],
        base_reader=reader(np.float32(base)),
        tile_elements=tile_elements,
    )


def counts_of(changes, config=NO_TRIM, **kwargs):
    base = np.zeros_like(changes[0])
    return measure(parameter_of(base, changes, **kwargs), config)


def slow_counts(changes, density):
    """Trimmed by a sort, counted entry by entry."""
    kept = []
    for change in changes:
        flat = change.reshape(-1).astype(np.float64)
        order = sorted(range(flat.size), key=lambda at: (-abs(flat[at]), at))
        trimmed = np.zeros_like(flat)
        trimmed[order[: int(density * flat.size)]] = flat[order[: int(density * flat.size)]]
        kept.append(trimmed)
    opposite = shared = any_opposite = any_shared = 0
    for entry in zip(*kept, strict=True):
        for a, b in itertools.combinations(entry, 2):
            opposite += a * b < 0
            shared += a * b != 0
        any_opposite += min(entry) < 0 < max(entry)
        any_shared += sum(value != 0 for value in entry) >= 2
    return opposite, shared, any_opposite, any_shared


def gaussian(seed, number, shape=(64, 64)):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for _ in range(number)]


@pytest.mark.parametrize("density", [0.2, 0.35, 1.0])
@pytest.mark.parametrize("number", [2, 3, 5])
def test_counts_are_those_of_a_loop_over_entries(number, density):
    changes = [np.round(change, 1) for change in gaussian(number, number, (13, 17))]
    found = counts_of(changes, MediatorConfig(denoise_density=density), tile_elements=64)
    assert (
        found.opposite,
        found.shared,
        found.any_opposite,
        found.any_shared,
    ) == slow_counts(changes, density)


def test_bit_planes_a_gram_matrix_and_three_loops_agree_on_ternary_data():
    rng = np.random.default_rng(0)
    signs = rng.integers(-1, 2, (4, 333)).astype(np.float32)
    up, down = sign_planes(signs, Tile(0, None, signs))
    gram, both = signs @ signs.T, np.abs(signs) @ np.abs(signs).T
    for a, b in itertools.combinations(range(4), 2):
        loop = sum(x * y < 0 for x, y in zip(signs[a], signs[b], strict=True))
        assert ones((up[a] & down[b]) | (down[a] & up[b])) == loop == (both[a, b] - gram[a, b]) / 2
    found = counts_of(list(signs))
    pairs = list(itertools.combinations(range(4), 2))
    assert found.shared == sum(both[a, b] for a, b in pairs)
    assert found.opposite == sum((both[a, b] - gram[a, b]) / 2 for a, b in pairs)


@pytest.mark.parametrize("measure_name", ["pairwise_sign", "any_sign", "signed_mass", "cosine"])
def test_equal_changes_do_not_conflict_and_opposite_ones_do_wholly(measure_name):
    config = MediatorConfig(conflict=measure_name)
    (change,) = gaussian(0, 1)
    assert counts_of([change, change, change], config).conflict(config) == pytest.approx(0, abs=1e-6)
    assert counts_of([change, -change], config).conflict(config) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("number", [2, 3, 5])
def test_unrelated_changes_conflict_in_half_of_what_they_share_however_many(number):
    found = counts_of(gaussian(7, number, (400, 400)), MediatorConfig())
    error = 0.5 / np.sqrt(found.shared)
    assert abs(found.conflict(MediatorConfig()) - 0.5) < 3 * error


def test_the_level_by_chance_of_any_sign_grows_with_the_number():
    config = MediatorConfig(conflict="any_sign", denoise_density=1.0)
    levels = [counts_of(gaussian(1, number, (200, 200)), config).conflict(config) for number in (2, 3, 4)]
    np.testing.assert_allclose(levels, [0.5, 0.75, 0.875], atol=0.01)


@pytest.mark.parametrize("measure_name", ["pairwise_sign", "any_sign", "cosine"])
def test_order_and_scale_of_the_models_do_not_matter(measure_name):
    config = MediatorConfig(conflict=measure_name)
    changes = gaussian(3, 3)
    first = counts_of(changes, config).conflict(config)
    turned = counts_of([4 * changes[2], 0.5 * changes[0], changes[1]], config).conflict(config)
    assert turned == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("config", [MediatorConfig(), MediatorConfig(conflict="cosine"), NO_TRIM])
def test_the_counts_do_not_depend_on_tiles(config):
    changes = gaussian(5, 3, (64, 33))
    whole = counts_of(changes, config)
    tiled = counts_of(changes, config, tile_elements=100)
    assert whole.conflict(config) == tiled.conflict(config)
    assert whole.overlap == tiled.overlap


def test_the_two_denominators_differ_by_what_is_shared():
    changes = gaussian(2, 2)
    found = counts_of(changes, MediatorConfig())
    everything = found.conflict(MediatorConfig(denominator="all"))
    assert everything == pytest.approx(found.conflict(MediatorConfig()) * found.overlap)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Four layers; in layer 2 the fine-tunes are opposite, elsewhere equal in their larger changes."""
    root = tmp_path_factory.mktemp("deep")
    base = random_model(0, layers=4)
    save(root / "base", base)
    change = random_model(1, layers=4)
    for name, sign in (("one", 1.0), ("two", -1.0)):
        tuned = {
            key: values + (sign if ".layers.2." in key else 1.0) * change[key] for key, values in base.items()
        }
        save(root / name, tuned)
    return root


def test_a_profile_finds_the_block_that_conflicts(deep):
    profile = conflict_profile(deep / "base", [deep / "one", deep / "two"])
    assert [block.name for block in profile.blocks] == [f"model.layers.{layer}" for layer in range(4)]
    conflicts = [block.conflict for block in profile.blocks]
    assert conflicts[2] > 0.95
    assert max(conflicts[:2] + conflicts[3:]) < 0.05
    assert profile.tasks == ("one", "two")
    plan = split_blocks(profile, MediatorConfig())
    assert plan.routed == ("model.layers.2",)


def test_workers_do_not_change_the_profile(deep):
    experts = {"a": deep / "one", "b": deep / "two"}
    assert conflict_profile(deep / "base", experts, threads=1) == conflict_profile(
        deep / "base", experts, threads=2
    )


def test_equal_fine_tunes_route_nothing(deep):
    plan = plan_mediator(deep / "base", {"a": deep / "one", "b": deep / "one"})
    assert plan.routed == ()
    assert all(block.conflict == 0 for block in plan.blocks)


def test_a_plan_survives_its_file_and_can_be_changed_there(deep, tmp_path):
    plan = plan_mediator(deep / "base", [deep / "one", deep / "two"])
    plan.save(tmp_path / "plan.json")
    assert MediatorPlan.load(tmp_path / "plan.json") == plan
    body = json.loads((tmp_path / "plan.json").read_text())
    body["blocks"][0]["decision"] = "routed"
    (tmp_path / "plan.json").write_text(json.dumps(body))
    assert MediatorPlan.load(tmp_path / "plan.json").routed == ("model.layers.0", "model.layers.2")
    body["blocks"][0]["decision"] = "rooted"
    (tmp_path / "plan.json").write_text(json.dumps(body))
    with pytest.raises(InputError, match=r"plan\.json: block model\.layers\.0: decision `rooted`"):
        MediatorPlan.load(tmp_path / "plan.json")


def made_profile(conflicts, averaged=100, routed=150, outside=1000):
    blocks = tuple(
        BlockConflict(
            name=f"b.{index}",
            conflict=conflict,
            overlap=0.1,
            low_support=False,
            vectors_only=False,
            averaged_bytes=averaged,
            routed_bytes=routed + index,
        )
        for index, conflict in enumerate(conflicts)
    )
    return Profile(
        base="base", tasks=("a", "b"), blocks=blocks, outside_bytes=outside, head=None, fingerprints={}
    )


@pytest.mark.parametrize(
    ("config", "routed"),
    [
        (MediatorConfig(), ("b.1", "b.3")),
        (MediatorConfig(z=1.5), ("b.1",)),
        (MediatorConfig(max_routed=1), ("b.1",)),
        (MediatorConfig(n_routed=0), ()),
        (MediatorConfig(n_routed=3), ("b.0", "b.1", "b.3")),
        (MediatorConfig(threshold=0.39), ("b.0", "b.1", "b.2", "b.3")),
        (MediatorConfig(threshold=0.6), ()),
        (MediatorConfig(z=9.0), ("b.1",)),  # nothing is above, but there is conflict
    ],
)
def test_each_rule_routes_what_it_says(config, routed):
    plan = split_blocks(made_profile([0.4, 0.6, 0.4, 0.5, 0.3]), config)
    assert plan.routed == routed


def test_blocks_of_equal_conflict_route_the_lowest():
    assert by_conflict(made_profile([0.5, 0.5, 0.5])) == ["b.0", "b.1", "b.2"]
    assert split_blocks(made_profile([0.5, 0.5, 0.5]), MediatorConfig()).routed == ("b.0",)


@pytest.mark.parametrize("budget", [1500, 1549, 1551, 1603, 1650, 10_000])
def test_a_budget_is_kept_and_one_more_block_would_break_it(budget):
    profile = made_profile([0.4, 0.6, 0.4, 0.5, 0.3])
    plan = split_blocks(profile, MediatorConfig(memory_budget=budget))
    assert plan.bytes <= budget
    ranked = by_conflict(profile)
    assert set(plan.routed) == set(ranked[: len(plan.routed)])
    if len(plan.routed) < len(ranked):
        assert planned_bytes(profile, tuple(ranked[: len(plan.routed) + 1])) > budget


def test_a_budget_below_the_averaged_model_says_the_least():
    with pytest.raises(InputError, match="averaged model alone takes 1500"):
        split_blocks(made_profile([0.1] * 5), MediatorConfig(memory_budget=1499))


@pytest.mark.parametrize(
    ("words", "size"), [("10GB", 10**10), ("1.5 MiB", 3 << 19), ("7", 7), (12, 12), ("2k", 2000)]
)
def test_sizes_are_read_as_people_write_them(words, size):
    assert parse_bytes(words) == size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"denoise_density": 0.0}, r"denoise_density: expected a number in \(0, 1\], got 0"),
        ({"expert_density": 1.5}, r"expert_density: .* got 1\.5"),
        ({"n_routed": 2, "memory_budget": "1GB"}, "memory_budget: `n_routed` chooses"),
        ({"memory_budget": "ten"}, "memory_budget: expected bytes such as `10GB`"),
        ({"n_routed": -1}, "n_routed: expected 0 or more"),
        ({"select": "random", "rescale": "l1"}, "rescale: `select: random`"),
    ],
)
def test_an_option_out_of_range_is_named(options, said):
    with pytest.raises(InputError, match=said):
        MediatorConfig(**options)


def test_an_option_of_the_router_out_of_range_is_named():
    with pytest.raises(InputError, match="u_lo"):
        RouterConfig(u_lo=2.0)


def test_more_blocks_than_there_are_say_how_many_there_are():
    with pytest.raises(InputError, match=r"n_routed: 6 blocks asked for, the model has 5; expected 0\.\.5"):
        split_blocks(made_profile([0.1] * 5), MediatorConfig(n_routed=6))


def test_a_block_whose_matrices_did_not_change_is_measured_on_its_vectors(deep, tmp_path):
    base = random_model(0, layers=1)
    save(tmp_path / "base", base)
    for name, sign in (("one", 1.0), ("two", -1.0)):
        tuned = dict(base)
        key = "model.layers.0.input_layernorm.weight"
        tuned[key] = base[key] + sign * np.arange(16, dtype=np.float32)
        save(tmp_path / name, tuned)
    (block,) = conflict_profile(tmp_path / "base", [tmp_path / "one", tmp_path / "two"]).blocks
    assert block.vectors_only
    assert block.conflict == 1.0


def test_a_profile_on_next_to_nothing_is_marked(tmp_path):
    base = random_model(0, layers=1, hidden=128, inner=128)
    save(tmp_path / "base", base, "F32")
    for index in range(2):
        tuned = {name: values.copy() for name, values in base.items()}
        tuned["model.layers.0.mlp.up_proj.weight"][0, index] += 1.0
        tuned["model.layers.0.mlp.up_proj.weight"][1, 0] += 1.0
        save(tmp_path / f"m{index}", tuned, "F32")
    (block,) = conflict_profile(tmp_path / "base", [tmp_path / "m0", tmp_path / "m1"]).blocks
    assert block.low_support
    assert block.conflict == 0.0


def test_fewer_than_two_experts_and_the_base_itself_are_refused(deep):
    with pytest.raises(InputError, match="at least 2 fine-tunes of one base, found 1"):
        conflict_profile(deep / "base", [deep / "one"])
    with pytest.raises(InputError, match=r"expert `b`: .* is the base itself"):
        conflict_profile(deep / "base", {"a": deep / "one", "b": deep / "base"})
    with pytest.raises(InputError, match="`a b` is no name for a task"):
        conflict_profile(deep / "base", {"a b": deep / "one", "c": deep / "two"})


def test_another_vocabulary_names_the_tensor_and_both_shapes(deep, tmp_path):
    save(tmp_path / "wide", random_model(0, layers=4, vocabulary=41))
    with pytest.raises(InputError, match=r"wide.*embed_tokens.*41.*40|lm_head.*41.*40"):
        conflict_profile(deep / "base", {"a": deep / "one", "b": tmp_path / "wide"})


def test_a_nan_names_model_and_tensor(deep, tmp_path):
    broken = random_model(0, layers=4)
    broken["model.layers.1.mlp.up_proj.weight"][0, 0] = np.nan
    save(tmp_path / "broken", broken)
    with pytest.raises(InputError, match=r"broken: model\.layers\.1\.mlp\.up_proj\.weight holds nan"):
        conflict_profile(deep / "base", {"a": deep / "one", "b": tmp_path / "broken"})


def test_adding_counts_is_measuring_both():
    changes, more = gaussian(1, 3, (8, 9)), gaussian(2, 3, (7, 9))
    both = [np.concatenate([x, y]) for x, y in zip(changes, more, strict=True)]
    total = Counts()
    total += counts_of(changes)
    total += counts_of(more)
    assert total == counts_of(both)
