"""The same pages through mergekit: the same tensors, or for random methods the same law.

Runs where mergekit is installed in its own environment (`.venv-peers`, made for the benchmarks): it is LGPL
and drags a pinned stack along, so it is no dependency of ours.
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
from weightsmith.merging import merge
from weightsmith.registry import cards

from .made import read

PEER = Path(__file__).parents[2] / ".venv-peers" / "bin" / "python"
HIDDEN, INNER, VOCABULARY, LAYERS = 32, 48, 64, 3

# Every name in the registry of mergekit 0.1.5.
NAMES = [
    *("arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear"),
    *("karcher", "linear", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram"),
    *("ramplus_tl", "sce", "slerp", "task_arithmetic", "ties"),
]

# Entries, of some thirty thousand, whose score is the threshold but for rounding: mergekit takes logarithms
# of quotients that are nearly 1 in float32.
AT_A_THRESHOLD = {"arcee_fusion": 3}

LIST_NAMES = """
from mergekit.merge_methods.registry import registered_methods
print(*sorted(method.spec.name for method in registered_methods()))
"""

RUN_PAGES = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, page in json.load(open(sys.argv[1])).items():
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(page), f"{sys.argv[2]}/{name}", options)
"""


def llama(seed, near=None):
    """Every tensor mergekit expects of a Llama."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"{at}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes |= {f"{at}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    rng = np.random.default_rng(seed)
    noise = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    # The common part of all changes keeps Model Stock's angles away from its singularity.
    return noise if near is None else {name: near[name] + 0.05 * noise[name] + 0.1 for name in noise}


def save(folder, tensors):
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    specs = [TensorSpec(name, "F32", values.shape) for name, values in sorted(tensors.items())]
    with CheckpointWriter(
        folder, specs, side_files={"config.json": json.dumps(config).encode()}, lineage=Lineage("made")
    ) as writer:
        for name, values in tensors.items():
            writer.write(name, values)
        writer.commit()


def pages(root):
    def models(*names, **parameters):
        return [
            {
                "model": str(root / name),
                "parameters": {key: values[place] for key, values in parameters.items()},
            }
            for place, name in enumerate(names)
        ]

    def page(method, entries, base=True, **parameters):
        made = {"merge_method": method, "models": entries, "parameters": parameters, "dtype": "float32"}
        return made | ({"base_model": str(root / "base")} if base else {})

    def source(name, first, last):
        return {"model": str(root / name), "layer_range": [first, last]}

    three = ("m1", "m2", "m3")
    weights = {"weight": (0.5, 0.3, 0.4)}
    steps = [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}]
    return {
        "linear": page("linear", models(*three, **weights), base=False),
        "linear_sum": page("linear", models(*three, **weights), base=False, normalize=False),
        "task_arithmetic": page("task_arithmetic", models(*three, **weights), **{"lambda": 0.7}),
        "task_arithmetic_mean": page("task_arithmetic", models(*three, **weights), normalize=True),
        "ties": page("ties", models(*three, **weights, density=(0.2, 0.5, 0.33))),
        "ties_equal": page("ties", models(*three), weight=1.0, density=0.3, **{"lambda": 1.2}),
        "ties_sum": page("ties", models(*three, **weights), density=0.3, normalize=False, rescale=True),
        "breadcrumbs": page("breadcrumbs", models(*three, **weights, density=(0.2, 0.5, 0.9)), gamma=0.05),
        "breadcrumbs_all": page("breadcrumbs", models(*three, **weights)),
        "breadcrumbs_ties": page("breadcrumbs_ties", models(*three, **weights), density=0.5, rescale=True),
        "slerp": page("slerp", models("base", "m1"), t=steps),
        "nuslerp": page("nuslerp", models("m1", "m2", weight=(0.3, 0.9)), base=False),
        "nuslerp_changes": page("nuslerp", models("m1", "m2", weight=(0.3, 0.9))),
        "nuslerp_rows": page("nuslerp", models("m1", "m2", weight=(1, 2)), nuslerp_flatten=False),
        "nuslerp_columns": page(
            "nuslerp", models("m1", "m2", weight=(1, 2)), nuslerp_flatten=False, nuslerp_row_wise=True
        ),
        "multislerp": page("multislerp", models(*three, **weights), base=False),
        "multislerp_changes": page("multislerp", models(*three, **weights), normalize_weights=False),
        "karcher": page("karcher", models(*three), base=False),
        "karcher_with_base": page("karcher", models("m1", "m2"), max_iter=3),
        "sce": page("sce", models(*three)),
        "sce_selected": page("sce", models(*three), select_topk=0.3),
        "ram": page("ram", models(*three), epsilon=0.1),
        "ramplus_tl": page("ramplus_tl", models(*three), epsilon=0.1, r=0.5, alpha=0.8),
        "nearswap": page("nearswap", models("m1"), t=[0.02, 0.1]),
        "arcee_fusion": page("arcee_fusion", models("m1")),
        "model_stock": page("model_stock", models(*three)),
        "model_stock_rows": page("model_stock", models(*three), filter_wise=True),
        "passthrough": {
            "merge_method": "passthrough",
            "slices": [{"sources": [source("m1", 0, 2)]}, {"sources": [source("m2", 1, 3)]}],
            "dtype": "float32",
        },
        "modules": {
            "merge_method": "task_arithmetic",
            "base_model": str(root / "base"),
            "modules": {
                "default": {
                    "models": models(*three, weight=(0.5, [{"filter": "mlp", "value": 0.25}], 0.4)),
                    "parameters": {"weight": [{"filter": "_proj", "value": [0.1, 0.7]}], "lambda": 0.9},
                }
            },
            "parameters": {"weight": 0.6, "lambda": 0.2},
            "dtype": "float32",
        },
        "bases_of_slices": {
            "merge_method": "ties",
            "base_model": str(root / "base"),
            "slices": [
                {
                    "sources": [source("base", 0, 2), {**source("m1", 0, 2), "parameters": {"density": 0.4}}],
                    "parameters": {"weight": [1.0, 0.5]},
                },
                {
                    "sources": [source("m2", 1, 3), source("m3", 0, 2)],
                    "base_model": str(root / "m2"),
                    "parameters": {"weight": [{"filter": "mlp", "value": [0.3, 0.6]}, {"value": 0.8}]},
                },
            ],
            "parameters": {"density": [0.9, 0.2]},
            "dtype": "float32",
            "out_dtype": "float32",
        },
        "gradient": page("task_arithmetic", models(*three), weight=[0, 0.5, 1], **{"lambda": 0.5}),
    }


def random_pages(root):
    """Of one model, so that what was kept of its change shows."""
    return {
        method: {
            "merge_method": method,
            "base_model": str(root / "base"),
            "models": [{"model": str(root / "m1"), "parameters": {"weight": 1.0, "density": 0.4}}],
            "parameters": {"epsilon": 0.3} if method.startswith("della") else {},
            "dtype": "float32",
        }
        for method in ("dare_linear", "dare_ties", "della_linear", "della")
    }


def test_every_method_that_mergekit_names_is_one_of_ours_and_has_a_page_here():
    known = {card.id for card in cards("merging")}
    assert set(NAMES) <= known
    made = {page["merge_method"] for page in (*pages(Path()).values(), *random_pages(Path()).values())}
    assert made == set(NAMES)


def test_the_names_are_those_of_the_installed_mergekit():
    if not PEER.exists():
        pytest.skip("mergekit is not installed in .venv-peers")
    done = subprocess.run([PEER, "-c", LIST_NAMES], capture_output=True, text=True, check=True)
    assert done.stdout.split() == NAMES


@pytest.fixture(scope="module")
def merged_by_mergekit(tmp_path_factory):
    if not PEER.exists():
        pytest.skip("mergekit is not installed in .venv-peers")
    root = tmp_path_factory.mktemp("parity")
    base = llama(0)
    save(root / "base", base)
    for index in (1, 2, 3):
        save(root / f"m{index}", llama(index, base))
    (root / "pages.json").write_text(json.dumps(pages(root) | random_pages(root)))
    done = subprocess.run(
        [PEER, "-c", RUN_PAGES, root / "pages.json", root / "theirs"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.parametrize("name", pages(Path()))
def test_a_page_gives_the_tensors_mergekit_gives(name, merged_by_mergekit, tmp_path):
    merge(pages(merged_by_mergekit)[name], tmp_path / "ours")
    ours, theirs = read(tmp_path / "ours"), read(merged_by_mergekit / "theirs" / name)
    assert set(ours) == set(theirs)
    differ = 0
    for tensor, values in ours.items():
        # Both compute in float32; sums are made in another order.
        close = np.isclose(values, theirs[tensor], rtol=2e-5, atol=2e-6)
        differ += np.count_nonzero(~close)
        if name not in AT_A_THRESHOLD:
            np.testing.assert_allclose(values, theirs[tensor], rtol=2e-5, atol=2e-6, err_msg=tensor)
    assert differ <= AT_A_THRESHOLD.get(name, 0)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    peer = json.loads((merged_by_mergekit / "theirs" / name / "config.json").read_text())
    assert config["num_hidden_layers"] == peer["num_hidden_layers"]


@pytest.mark.parametrize("method", random_pages(Path()))
def test_a_random_page_follows_the_law_that_mergekits_does(method, merged_by_mergekit, tmp_path):
    merge(random_pages(merged_by_mergekit)[method], tmp_path / "ours")
    base, model = (read(merged_by_mergekit / name) for name in ("base", "m1"))
    matrices = [name for name, values in base.items() if values.ndim == 2]
    changes = {name: model[name] - base[name] for name in matrices}
    # Which entries are above the median of their row.
    large = {name: abs(c) > np.median(abs(c), axis=1, keepdims=True) for name, c in changes.items()}
    spread = 0.3 if method.startswith("della") else 0.0
    for folder in (tmp_path / "ours", merged_by_mergekit / "theirs" / method):
        merged = read(folder)
        kept = {name: abs(merged[name] - base[name]) > 1e-6 for name in matrices}
        for side, wanted in ((True, 0.4 + spread / 2), (False, 0.4 - spread / 2)):
            flags = np.concatenate([kept[name][large[name] == side] for name in matrices])
            assert abs(flags.mean() - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / flags.size) + 0.01
        for name in matrices:
            found, own = merged[name] - base[name], changes[name]
            np.testing.assert_allclose(abs(found).sum(), abs(own).sum(), rtol=1e-3)
            # One factor for all that is kept; what rounding of tiny changes may do is left out.
            factors = (found / own)[kept[name] & (abs(own) > 0.02)]
            np.testing.assert_allclose(factors, np.median(factors), rtol=1e-3)
