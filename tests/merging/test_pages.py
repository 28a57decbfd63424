"""Pages, ours and mergekit's: what they mean, and the line that says what is wrong."""

import textwrap

import numpy as np
import pytest

from weightsmith.errors import CheckpointError, PageError
from weightsmith.merging import merge, parse_merge, plan_merge, read_merge_page

from .made import page, random_model, read, save


def written(folder, text):
    path = folder / "merge.yml"
    path.write_text(textwrap.dedent(text))
    return path


def methods_of(config):
    """Output tensor -> the method's instance with that tensor's options."""
    with plan_merge(config) as plan:
        return {output.spec.name: output.method for output in plan.outputs}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Five layers, so that gradients have steps."""
    root = tmp_path_factory.mktemp("deep")
    base = random_model(0, layers=5)
    for index, folder in enumerate(("base", "m1", "m2")):
        save(root / folder, base if index == 0 else random_model(index, layers=5, near=base))
    return root


Q = "model.layers.{}.self_attn.q_proj.weight"
UP = "model.layers.{}.mlp.up_proj.weight"


def test_our_page_reads_as_written(family, tmp_path):
    config = read_merge_page(
        written(
            tmp_path,
            f"""\
            method: ties
            base: {family}/base
            models:
              - {family}/m1
              - {{model: {family}/m2, weight: 0.5, density: 0.1}}
            density: 0.4
            lambda: 2
            dtype: bf16
            seed: 3
            """,
        )
    )
    assert (config.method, config.dtype, config.seed) == ("ties", "BF16", 3)
    method = methods_of(config)[Q.format(0)]
    assert method.weight == (1.0, 0.5)
    assert method.density == (0.4, 0.1)
    assert (method.lambda_, method.trim_scope, method.zero_sign) == (2.0, "global", "majority")


def test_a_list_on_our_page_is_one_value_a_model_and_a_gradient_says_so(deep):
    made = page(deep, "task_arithmetic", ["m1", "m2"], weight=[0.5, 2.0])
    made["lambda"] = {"gradient": [0, 1]}
    found = methods_of(made)
    assert all(method.weight == (0.5, 2.0) for method in found.values())
    assert [found[Q.format(layer)].lambda_ for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert found["model.embed_tokens.weight"].lambda_ == 0


def test_the_base_among_the_models_is_taken_out_with_one_warning_and_needs_no_weight(family):
    made = page(family, "ties", ["base", "m1", "m2"], weight=[0.25, 0.75])
    with plan_merge(made) as plan:
        assert plan.warnings == ("the base base is listed among the models and is ignored there",)
        assert [origin.checkpoint.name for origin in plan.outputs[0].models] == ["m1", "m2"]
        assert plan.outputs[0].method.weight == (0.25, 0.75)
    longer = made | {"weight": [9.0, 0.25, 0.75]}
    assert methods_of(longer)[Q.format(0)].weight == (0.25, 0.75)


def test_a_merge_of_the_base_alone_is_refused(family):
    with pytest.raises(PageError, match="models: no model is left after the base base is taken out"):
        plan_merge(page(family, "ties", ["base"]))


MERGEKIT = """\
merge_method: ties
base_model: {root}/base
models:
  - model: {root}/base
  - model: {root}/m1
    parameters:
      weight: 0.5
      density: [0.1, 0.4, 0.8, 0.4, 0.2]
  - model: {root}/m2
    parameters:
      weight:
        - filter: mlp
          value: [1, 3]
        - value: 0.1
parameters:
  normalize: true
  int8_mask: true
  density: 0.9
dtype: float32
out_dtype: bfloat16
"""


def test_a_page_of_mergekit_means_what_it_means_there(deep, tmp_path):
    config = read_merge_page(written(tmp_path, MERGEKIT.format(root=deep)))
    assert config.dtype == "BF16"
    found = methods_of(config)
    assert found[Q.format(0)].density == (0.1, 0.9)
    assert found[Q.format(2)].density == (0.8, 0.9)
    assert found["lm_head.weight"].density == (0.1, 0.9)
    assert found[Q.format(3)].weight == (0.5, 0.1)
    assert [found[UP.format(layer)].weight[1] for layer in range(5)] == [1, 1.5, 2, 2.5, 3]
    method = found[Q.format(0)]
    assert (method.trim_scope, method.zero_sign, method.rescale) == ("tensor", "positive", "none")


@pytest.mark.parametrize(
    ("method", "given", "wanted"),
    [
        ("ties", {}, {"density": (1.0, 1.0), "normalize": True, "zero_sign": "positive", "rescale": "none"}),
        ("ties", {"rescale": True}, {"rescale": "l1"}),
        (
            "dare_ties",
            {},
            {"density": (1.0, 1.0), "normalize": False, "rescale": "l1", "zero_sign": "positive"},
        ),
        ("dare_linear", {"rescale": False}, {"rescale": "none", "normalize": False}),
        ("model_stock", {}, {"clamp": False, "filter_wise": False}),
        ("task_arithmetic", {"lambda": 0.5, "normalize": True}, {"lambda_": 0.5, "normalize": True}),
    ],
)
def test_mergekits_defaults_are_kept_on_its_pages(family, method, given, wanted):
    found = methods_of(
        {
            "merge_method": method,
            "base_model": str(family / "base"),
            "models": [{"model": str(family / name)} for name in ("m1", "m2")],
            "parameters": given,
        }
    )
    for method_of_tensor in found.values():
        assert {key: getattr(method_of_tensor, key) for key in wanted} == wanted


def test_the_most_special_place_of_a_parameter_wins(deep):
    def source(name, **parameters):
        entry = {"model": str(deep / name), "layer_range": [0, 5]}
        return entry | ({"parameters": parameters} if parameters else {})

    made = {
        "merge_method": "task_arithmetic",
        "base_model": str(deep / "base"),
        "slices": [
            {
                "sources": [
                    source("base"),
                    source("m1", weight=[{"filter": "q_proj", "value": 3}]),
                    source("m2"),
                ],
                "parameters": {"weight": [{"filter": "mlp", "value": 2}]},
            }
        ],
        "parameters": {"weight": 1},
    }
    found = methods_of(made)
    assert found[Q.format(1)].weight == (3, 1)
    assert found[UP.format(1)].weight == (2, 2)
    assert found["model.norm.weight"].weight == (1, 1)


def test_slerp_on_mergekits_page_takes_the_base_as_its_first_end(family, tmp_path):
    made = {
        "merge_method": "slerp",
        "base_model": str(family / "m2"),
        "models": [{"model": str(family / name)} for name in ("m1", "m2")],
        "parameters": {"t": 0},
        "dtype": "float32",
    }
    merge(made, tmp_path / "out")
    for name, values in read(tmp_path / "out").items():
        np.testing.assert_allclose(values, read(family / "m2")[name], rtol=1e-6)
    with pytest.raises(PageError, match=r"slerp needs `parameters: {t: ...}`"):
        plan_merge(made | {"parameters": {}})


def test_a_parameter_without_effect_is_told_and_passed_over(family):
    made = {
        "merge_method": "task_arithmetic",
        "base_model": str(family / "base"),
        "models": [{"model": str(family / "m1"), "parameters": {"density": 0.5, "normalize": True}}],
        "parameters": {"int8_mask": True},
    }
    with plan_merge(made) as plan:
        assert plan.warnings == (
            "parameter `density` has no effect on `task_arithmetic` and is ignored",
            "parameter `normalize` of one model has no effect: `task_arithmetic` has one for all",
        )


OWN = """\
method: ties
base: {root}/base
models:
  - {root}/m1
  - model: {root}/m2
    weight: 0.5
density: 0.4
"""


# What stands on the page, what it is replaced by, and what is then said: ours first, mergekit's after it.
OWN_WRONGS = [
    ("density", "densty", "7: densty: no such key for `ties`; did you mean `density`?"),
    ("weight: 0.5", "wieght: 0.5", "6: models[1].wieght: no such key of one model; did you mean"),
    ("method: ties", "method: tise", "1: method: no method `tise`; did you mean `ties`?"),
    ("method: ties\n", "", "1: expected `method: <name of a merge method>`"),
    ("- {root}/m1", "- ''", "4: models[0]: expected a path, or {model: path, ...}, found ''"),
    ("0.4", "1" + "0" * 400, "7: density: must be a number or one for each model, got 1000"),
    ("0.4", "1.4", "7: density: must be in (0, 1], got 1.4"),
    ("0.5", "half", "6: models[1].weight: must be a number or one for each model, got 'half'"),
    ("0.4", "[0.1, 0.2, 0.3]", "7: density: has 3 values for 2 models"),
    ("0.4", "[{{filter: a, value: 7}}]", "7: density[0].value: must be in (0, 1], got 7"),
    ("0.4", "[{{fliter: a, value: 1}}]", "7: density[0].fliter: no such key; did you mean `filter`"),
    ("0.4", "0.4\ndensity: 0.2", "8: density: is given twice"),
    ("0.4", "0.4\ndtype: bf17", "8: dtype: dtype `bf17` is not one of"),
    ("0.4", "0.4\nseed: -1", "8: seed: expected a whole number from 0 on, found -1"),
    ("0.4", "0.4\nlambda: [1, 2]", "8: lambda: takes one value for all models"),
    ("base: {root}/base\n", "", "1: `ties` changes a base: name the model"),
    ("models:", "models: []\nx:", "4: x: no such key for `ties`"),
    ("ties", "slerp", "7: density: no such key for `slerp`"),
    ("{root}/m1", "{root}/m1x", "4: models[0]: {root}/m1x: no such folder; did you mean `m1`"),
    ("model: {root}/m2", "model: {root}/m2x", "5: models[1]: {root}/m2x: no such folder; did you mean"),
    ("base: {root}/base", "base: {root}/bse", "2: base: {root}/bse: no such folder; did you mean `base`"),
]
MERGEKIT_WRONGS = [
    ("normalize", "normalise", "16: parameters.normalise: no such parameter; did you mean `normalize`?"),
    ("dtype: float32", "dtyp: float32", "19: dtyp: no such key; did you mean `dtype`?"),
    (
        "dtype: float32",
        "chat_template: auto",
        "19: chat_template: base has no tokenizer that it could belong",
    ),
    (
        "dtype: float32",
        "chat_template: chatlm",
        "19: chat_template: `chatlm` is no template: expected auto, al",
    ),
    ("dtype: float32", "tokenizer_source: union", "19: tokenizer_source: base has no tokenizer whose tokens"),
    (
        "dtype: float32",
        "tokenizer_source: nowhere",
        "19: tokenizer_source: base has no tokenizer whose tokens",
    ),
    ("dtype: float32", "tokenizer: {{tokens: {{a: {{b: 1}}}}}}", "19: tokenizer.tokens.a.b: no such key;"),
    (
        "dtype: float32",
        "tokenizer: {{}}\ntokenizer_source: base",
        "20: tokenizer_source: is given beside `tokenizer`",
    ),
    ("models:", "modules:", "3: modules: expected a mapping of modules, found ["),
    (
        "models:",
        "slices: [1]\nmodules: {{}}\nmodels:",
        "1: expected either `models`, `slices` or `modules`",
    ),
    (
        "{root}/m1",
        "{{model: {root}/m1, override_architecture: X}}",
        "5: models[1].model.override_architecture: is not",
    ),
    ("{root}/m1", "{{path: {root}/m1}}", "5: models[1].model.path: no such key"),
    ("{root}/m1", "{root}/m1x", "5: models[1]: {root}/m1x: no such folder; did you mean `m1`"),
    (
        "base_model: {root}/base",
        "base_model: {root}/bse",
        "2: base_model: {root}/bse: no such folder; did you mean `base`",
    ),
    ("weight: 0.5", "weight: [0.5, x]", "7: models[1].parameters.weight[1]: must be a number"),
    ("0.9", "0", "18: parameters.density: must be in (0, 1], got 0"),
]


@pytest.mark.parametrize(
    ("text", "old", "new", "message"),
    [(OWN, *wrong) for wrong in OWN_WRONGS] + [(MERGEKIT, *wrong) for wrong in MERGEKIT_WRONGS],
)
def test_what_is_wrong_with_a_page_is_told_with_file_line_and_key(family, tmp_path, text, old, new, message):
    assert old in text
    path = written(tmp_path, text.replace(old, new, 1).format(root=family))
    with pytest.raises((PageError, CheckpointError)) as error:
        plan_merge(path)
    assert f"merge.yml:{message.replace('{root}', str(family))}" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mapping_is_checked_like_a_page(family):
    with pytest.raises(PageError, match=r"^densty: no such key for `ties`"):
        parse_merge(page(family, "ties", densty=0.2))


def test_a_number_of_models_the_method_cannot_take_is_refused(family):
    with pytest.raises(PageError, match="models: `slerp` merges exactly 2 models, found 4"):
        plan_merge(page(family, "slerp"))
    with pytest.raises(PageError, match="models: `model_stock` merges at least 2 models, found 1"):
        plan_merge(page(family, "model_stock", ["m1"]))
    with pytest.raises(PageError, match="models: `passthrough` merges exactly 1 models, found 2"):
        plan_merge(page(family, "passthrough", ["m1", "m2"]))


def test_a_statistic_over_all_tensors_refuses_options_that_differ_between_them(deep, tmp_path):
    made = page(deep, "ties", ["m1", "m2"], density=[{"filter": "mlp", "value": 0.5}, {"value": 0.2}])
    with pytest.raises(ValueError, match="need the same options for every tensor"):
        merge(made, tmp_path / "out")
    merge(made | {"trim_scope": "tensor", "zero_sign": "positive"}, tmp_path / "out")
