"""What every merge method must do, whatever its rule: found through the registry, so none is forgotten."""

import dataclasses
import typing

import numpy as np
import pytest
import torch

from weightsmith.errors import InputError
from weightsmith.merging import memory
from weightsmith.merging import merge_state_dicts as merge_in_memory
from weightsmith.registry import cards, load

METHODS = {card.id: load(card.id) for card in cards("merging")}
SHAPES = {
    "model.embed_tokens.weight": (12, 8),
    "model.layers.0.mlp.weight": (8, 16),
    "model.norm.weight": (8,),
}


def random_weights(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def num_models(method):
    """How many models are merged: three, or the most the method takes."""
    return METHODS[method].max_models or 3


def family(method, change=0.1):
    """A base and as many fine-tunes of it as the method takes; no base for methods that know none."""
    base = random_weights(0)
    models = [
        {name: base[name] + delta for name, delta in random_weights(1 + index, change).items()}
        for index in range(num_models(method))
    ]
    return (base if METHODS[method].base == "required" else None), models


def merge_state_dicts(base, models, method, **options):
    """`merge_state_dicts`, with statistics made up from the models for methods that need some."""
    if hasattr(METHODS[method], "per_task"):
        options = {"task": 1} | options
    kind = getattr(METHODS[method], "statistics", None)
    if kind is None:
        return merge_in_memory(base, models, method, **options)
    statistics = [
        {
            name: made_up(kind, np.asarray(torch.as_tensor(values).float()))
            for name, values in model.items()
            if kind == "fisher" or "mlp" in name
        }
        for model in models
    ]
    return merge_in_memory(base, models, method, statistics=statistics, **options)


def made_up(kind, values):
    values = np.nan_to_num(values)
    if kind == "fisher":
        return 0.1 + values**2
    return (values.T @ values + np.eye(values.shape[1])).astype(np.float32)


def deterministic_options(method):
    """Options under which a method that drops changes at random keeps them all."""
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    return {"density": 1.0} if "density" in fields else {}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def test_every_option_has_a_default_and_a_type(method):
    hints = typing.get_type_hints(METHODS[method])
    for field in dataclasses.fields(METHODS[method]):
        assert field.kw_only
        assert field.name in hints
        assert field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def test_an_unknown_option_is_an_error_that_names_it(method):
    base, models = family(method)
    with pytest.raises(InputError, match="wieght"):
        merge_state_dicts(base, models, method, wieght=1.0)


def test_fine_tunes_equal_to_the_base_give_the_base(method):
    base = random_weights(0)
    models = [base] * num_models(method)
    merged = merge_state_dicts(base if METHODS[method].base == "required" else None, models, method)
    for name, values in base.items():
        np.testing.assert_allclose(merged[name], values, rtol=1e-6, atol=1e-7)


def test_the_same_call_gives_the_same_bits(method):
    base, models = family(method)
    first = merge_state_dicts(base, models, method)
    again = merge_state_dicts(base, models, method)
    for name in SHAPES:
        np.testing.assert_array_equal(first[name], again[name])


def test_the_order_of_the_names_does_not_matter(method):
    fields = {field.name for field in dataclasses.fields(METHODS[method])}
    options = {"density": 0.3, "trim_scope": "global"}
    options = {key: value for key, value in options.items() if key in fields}
    base, models = family(method)
    # Equal magnitudes everywhere: which of them are kept is a matter of order alone.
    models = [{name: np.round(values, 1) for name, values in model.items()} for model in models]
    base = base and {name: np.round(values, 1) for name, values in base.items()}
    merged = merge_state_dicts(base, models, method, **options)
    turned = [dict(reversed(model.items())) for model in models]
    again = merge_state_dicts(base and dict(reversed(base.items())), turned, method, **options)
    assert list(again) == list(reversed(merged))
    for name in SHAPES:
        np.testing.assert_array_equal(merged[name], again[name])


def test_bits_do_not_depend_on_where_tiles_begin(method, monkeypatch):
    rng = np.random.default_rng(3)
    shapes = {"model.layers.0.mlp.weight": (40, 24), "model.norm.weight": (9000,)}
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # Coarse changes: many are equal or nothing, and order decides among them.
    models = [
        {name: v + np.round(rng.standard_normal(v.shape), 1).astype(np.float32) for name, v in base.items()}
        for _ in range(num_models(method))
    ]
    whole = merge_state_dicts(base if METHODS[method].base == "required" else None, models, method)
    monkeypatch.setattr(memory, "TILE_ELEMENTS", 50)
    tiled = merge_state_dicts(base if METHODS[method].base == "required" else None, models, method)
    for name in shapes:
        np.testing.assert_array_equal(whole[name], tiled[name])


def test_inputs_are_left_untouched(method):
    base, models = family(method)
    before = [{name: values.copy() for name, values in model.items()} for model in models]
    merge_state_dicts(base, models, method)
    for model, kept in zip(models, before, strict=True):
        for name in SHAPES:
            np.testing.assert_array_equal(model[name], kept[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_keep_type_shape_and_dtype(method, dtype):
    base, models = family(method)
    cast = [{name: torch.from_numpy(values).to(dtype) for name, values in model.items()} for model in models]
    cast_base = base and {name: torch.from_numpy(values).to(dtype) for name, values in base.items()}
    merged = merge_state_dicts(cast_base, cast, method)
    for name, shape in SHAPES.items():
        assert merged[name].dtype == dtype
        assert tuple(merged[name].shape) == shape
        assert torch.isfinite(merged[name]).all()


def test_the_order_of_models_does_not_matter(method):
    base, models = family(method)
    options = deterministic_options(method)
    forward = merge_state_dicts(base, models, method, **options)
    if hasattr(METHODS[method], "per_task"):
        options["task"] = len(models)  # the same model as before
    backward = merge_state_dicts(base, models[::-1], method, **options)
    for name in SHAPES:
        np.testing.assert_allclose(forward[name], backward[name], rtol=1e-4, atol=1e-5)


def test_a_nan_names_the_tensor_and_the_model(method):
    base, models = family(method)
    models[-1]["model.norm.weight"][3] = np.nan
    with pytest.raises(InputError, match=r"model\.norm\.weight"):
        merge_state_dicts(base, models, method)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"passthrough"}))
def test_shapes_that_differ_name_the_tensor_and_both_shapes(method):
    base, models = family(method)
    models[-1]["model.norm.weight"] = np.zeros(9, np.float32)
    with pytest.raises(InputError, match=r"model\.norm\.weight is \[9\].*\[8\]"):
        merge_state_dicts(base, models, method)
