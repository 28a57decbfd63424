"""One page, every method that applies: the checkpoints single merges make, measured, scored, resumed."""

import json

import numpy as np
import pytest

from weightsmith.errors import CheckpointError, InputError, PageError
from weightsmith.merging import merge
from weightsmith.merging.comparison import apart, compare, judging, predict_comparison, run, with_method
from weightsmith.merging.comparison.scores import gain
from weightsmith.registry import cards
from weightsmith.testbed import model_config, model_files, parameter_shapes

from .made import random_model, read, save, weight_bytes

FEW = ("linear", "task_arithmetic", "ties")


@pytest.fixture
def page(family):
    return {
        "base": str(family / "base"),
        "models": [str(family / "m1"), {"model": str(family / "m2"), "weight": 0.5}],
        "density": 0.4,
        "by_method": {"ties": {"density": 0.2, "lambda": 0.7}},
    }


@pytest.fixture
def in_this_process(monkeypatch):
    """Merges here and not in processes of their own, which take a second each; what was merged, in order."""
    done = []

    def merge_here(body, out, *, device, threads, progress):
        done.append(body["method"])
        report = merge(body, out, device=device, threads=1, overwrite=True)
        return {**report.summary(), "tensors": report.tensors}

    monkeypatch.setattr(apart, "merge_apart", merge_here)
    return done


def test_every_method_makes_what_it_makes_alone_or_tells_why_not(page, family, tmp_path, in_this_process):
    found = compare(page, tmp_path / "all").content
    known = {card.id for card in cards("merging")}
    done = {entry["method"] for entry in found["methods"]}
    assert done | set(found["refused"]) == known
    assert not found["failed"]
    assert not done & set(found["refused"])
    assert {"slerp", "passthrough", "fisher", "regmean", "emr"} <= set(found["refused"])
    assert "statistics" in found["refused"]["fisher"]
    assert "task" in found["refused"]["emr"]
    alone = {
        "ties": {"density": 0.2, "lambda": 0.7},
        "dare_ties": {"density": 0.4},
        "linear": {},
        "tsvm": {},
    }
    for method, options in alone.items():
        base = {"base": page["base"]} if method != "linear" else {}
        takes_weight = method not in ("tsvm",)
        models = [page["models"][0], page["models"][1] if takes_weight else page["models"][1]["model"]]
        merge({"method": method, **base, "models": models, **options}, tmp_path / method)
        assert weight_bytes(tmp_path / "all" / method) == weight_bytes(tmp_path / method)
    spectral = [entry["spectral"] for entry in found["methods"]]
    assert spectral == sorted(spectral), "methods without torch come first"


def test_measures_are_those_of_their_definitions(page, family, tmp_path, in_this_process):
    found = compare(page, tmp_path / "out", methods=FEW).content
    base = read(family / "base")
    names = sorted(base)

    def change(folder):
        values = read(folder)
        return np.concatenate([(values[name].astype(np.float64) - base[name]).ravel() for name in names])

    norm = np.sqrt(sum((base[name].astype(np.float64) ** 2).sum() for name in names))
    models = [change(family / "m1"), change(family / "m2")]
    results = [change(tmp_path / "out" / method) for method in FEW]
    for entry, result in zip(found["methods"], results, strict=True):
        one = entry["measures"]
        assert one["relative_norm"] == pytest.approx(np.linalg.norm(result) / norm, rel=1e-5)
        for place, model in enumerate(models):
            assert one["distances"][place] == pytest.approx(np.linalg.norm(result - model) / norm, rel=1e-5)
            cosine = result @ model / np.linalg.norm(result) / np.linalg.norm(model)
            assert one["cosine"][place] == pytest.approx(cosine, abs=1e-5)
            both = (result != 0) & (model != 0)
            against = (np.sign(result) == -np.sign(model)) & both
            assert one["against"][place] == pytest.approx(against.sum() / both.sum())
        layer = [name for name in names if name.startswith("model.layers.1.")]
        part = np.concatenate(
            [(read(tmp_path / "out" / entry["method"])[name] - base[name]).ravel() for name in layer]
        )
        size = np.concatenate([base[name].ravel() for name in layer])
        told = next(each for each in one["layers"] if each["layer"] == 1)
        assert told["relative_norm"] == pytest.approx(np.linalg.norm(part) / np.linalg.norm(size), rel=1e-4)
    for i, one in enumerate(results):
        for j, other in enumerate(results):
            cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
            assert found["cosine"][i][j] == pytest.approx(cosine, abs=1e-5)


def test_without_a_base_changes_are_those_from_the_mean_of_the_models(family, tmp_path, in_this_process):
    page = {"models": [str(family / "m1"), str(family / "m2")]}
    found = compare(page, tmp_path / "out").content
    assert "linear" in [entry["method"] for entry in found["methods"]]
    assert "base" in found["refused"]["ties"]
    linear = next(entry for entry in found["methods"] if entry["method"] == "linear")
    assert linear["measures"]["relative_norm"] < 2e-3, "the mean itself, rounded to bfloat16"
    assert linear["measures"]["distances"][0] == pytest.approx(linear["measures"]["distances"][1], rel=1e-2)


@pytest.mark.parametrize("tile", [64, 1 << 17])
def test_the_sample_is_the_same_entries_whatever_the_tiles(page, family, tmp_path, monkeypatch, tile):
    merge({"method": "linear", "models": [str(family / "m1"), str(family / "m2")]}, tmp_path / "mean")
    from weightsmith.merging.comparison.variants import read_variants
    from weightsmith.merging.plan import Output

    plain = Output.parameter
    monkeypatch.setattr(
        Output, "parameter", lambda self, config, policy="raise", _=0: plain(self, config, policy, tile)
    )
    reference = read_variants(page).reference
    _, everything = judging.judge(reference, tmp_path / "mean")
    _, some = judging.judge(reference, tmp_path / "mean", sampled=100)
    step = judging._step(everything.size, 100)
    np.testing.assert_array_equal(some, everything[::step])
    assert 0 < some.size <= 100
    assert all(step % divisor for divisor in range(2, step))
    base, mean = read(family / "base"), read(tmp_path / "mean")
    wanted = np.concatenate([(mean[name] - base[name]).ravel() for name in sorted(base)])
    np.testing.assert_array_equal(everything, wanted)


def test_a_killed_comparison_goes_on_with_the_methods_that_are_not_done(
    page, tmp_path, monkeypatch, in_this_process
):
    merge_here = apart.merge_apart

    def killed_at_third(body, out, **how):
        if body["method"] == "ties":
            raise KeyboardInterrupt
        return merge_here(body, out, **how)

    monkeypatch.setattr(apart, "merge_apart", killed_at_third)
    with pytest.raises(KeyboardInterrupt):
        compare(page, tmp_path / "out", methods=FEW)
    half = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert not half["finished"]
    assert half["waiting"] == ["ties"]
    monkeypatch.setattr(apart, "merge_apart", merge_here)
    in_this_process.clear()
    resumed = compare(page, tmp_path / "out", methods=FEW).content
    assert in_this_process == ["ties"]
    compare(page, tmp_path / "whole", methods=FEW)
    for method in FEW:
        assert weight_bytes(tmp_path / "out" / method) == weight_bytes(tmp_path / "whole" / method)
    whole = json.loads((tmp_path / "whole" / "comparison.json").read_text())
    told = ("measures", "bytes", "scores")
    assert [[one[key] for key in told] for one in resumed["methods"]] == [
        [one[key] for key in told] for one in whole["methods"]
    ]


def test_a_changed_page_merges_again_only_what_it_changes_and_only_when_told(page, tmp_path, in_this_process):
    compare(page, tmp_path / "out", methods=FEW)
    in_this_process.clear()
    other = {**page, "by_method": {"ties": {"density": 0.3}}}
    with pytest.raises(CheckpointError, match=r"ties: was merged from another page.*--overwrite"):
        compare(other, tmp_path / "out", methods=FEW)
    compare(other, tmp_path / "out", methods=FEW, overwrite=True)
    assert in_this_process == ["ties"]


def test_a_merge_that_fails_is_told_and_the_others_go_on(page, tmp_path, monkeypatch, in_this_process):
    merge_here = apart.merge_apart

    def out_of_memory(body, out, **how):
        if body["method"] == "task_arithmetic":
            raise apart.EndedEarlyError("ended early")
        return merge_here(body, out, **how)

    monkeypatch.setattr(apart, "merge_apart", out_of_memory)
    found = compare(page, tmp_path / "out", methods=FEW)
    assert found.failed == {"task_arithmetic": "ended early"}
    assert [entry["method"] for entry in found.content["methods"]] == ["linear", "ties"]
    with pytest.raises(InputError, match="task_arithmetic failed: ended early"):
        found.check()


def test_a_process_of_its_own_gives_the_same_bytes_and_the_same_error(page, family, tmp_path):
    from weightsmith.runs.progress import SILENT

    how = {"device": "auto", "threads": 1, "progress": SILENT}
    body = {"method": "linear", "models": [str(family / "m1"), str(family / "m2")]}
    told = apart.merge_apart(body, tmp_path / "apart", **how)
    merge(body, tmp_path / "here")
    assert weight_bytes(tmp_path / "apart") == weight_bytes(tmp_path / "here")
    assert told["bytes"] > 0
    assert 1e6 < told["memory_bytes"] < 3e8
    broken = random_model(1)
    broken["model.norm.weight"][3] = np.nan
    save(tmp_path / "broken", broken)
    with pytest.raises(CheckpointError, match=r"broken: model\.norm\.weight holds nan"):
        apart.merge_apart({**body, "models": [str(tmp_path / "broken")]}, tmp_path / "no", **how)
    assert not (tmp_path / "no").exists()


def test_keep_none_leaves_the_report_alone(page, tmp_path, in_this_process):
    found = compare(page, tmp_path / "out", methods=FEW, keep="none").content
    assert not any((tmp_path / "out" / method).exists() for method in FEW)
    assert [entry["kept"] for entry in found["methods"]] == [False] * 3
    assert found["cosine"][0][0] == pytest.approx(1.0)


@pytest.fixture
def scored_page(tmp_path):
    """A base and two fine-tunes that can be loaded and scored."""
    config = {name: content.encode() for name, content in model_files("xs").items()}
    shapes = parameter_shapes(model_config("xs"))
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in shapes.items()}
    for index, name in enumerate(("base", "a", "b")):
        noise = np.random.default_rng(index)
        model = {
            key: v + np.float32(0.01 * index) * noise.standard_normal(v.shape).astype(np.float32)
            for key, v in base.items()
        }
        save(tmp_path / name, model, "F32", json.loads(config["config.json"]), config)
    (tmp_path / "text.txt").write_text("The parties agree.\n")
    return {"base": str(tmp_path / "base"), "models": [str(tmp_path / "a"), str(tmp_path / "b")]}


def test_scores_choose_the_checkpoint_that_stays(scored_page, tmp_path, in_this_process):
    from weightsmith.evaluation import evaluate

    task = str(tmp_path / "text.txt")
    compared = compare(scored_page, tmp_path / "out", methods=FEW, tasks=task, keep="best").content
    assert set(compared["scores"]) == {"base", "a", "b"}
    bits = {entry["method"]: entry["scores"]["text"]["value"] for entry in compared["methods"]}
    best = min(bits, key=bits.get)
    assert compared["best"] == best
    assert [method for method in FEW if (tmp_path / "out" / method).is_dir()] == [best]
    assert evaluate(tmp_path / "out" / best, task)["text"].value == bits[best]
    base = compared["scores"]["base"]["text"]["value"]
    for entry in compared["methods"]:
        assert entry["gain"] == pytest.approx((base - bits[entry["method"]]) / base)

    # Other tasks need no new merge of what is there, and one of what is not.
    in_this_process.clear()
    (tmp_path / "text.txt").write_text("The parties disagree.\n")
    compare(scored_page, tmp_path / "out", methods=FEW, tasks=task)
    assert sorted(in_this_process) == sorted(method for method in FEW if method != best)
    assert all((tmp_path / "out" / method).is_dir() for method in FEW)


def test_a_gain_counts_points_of_shares_and_parts_of_everything_else():
    def score(metric, value, higher):
        return {"metric": metric, "value": value, "higher_is_better": higher}

    before = {"a": score("accuracy", 0.25, True), "b": score("bits_per_byte", 2.0, False)}
    after = {"a": score("accuracy", 0.35, True), "b": score("bits_per_byte", 1.5, False)}
    assert gain(after, before) == pytest.approx((0.10 + 0.25) / 2)
    assert gain(before, before) == 0


def test_the_cost_of_all_is_the_largest_memory_and_the_sum_of_disk(page, tmp_path):
    cost = predict_comparison(page, tmp_path / "out", methods=FEW)
    assert set(cost.methods) == set(FEW)
    assert cost.whole.disk_bytes == sum(one.disk_bytes for one in cost.methods.values())
    assert cost.whole.memory_bytes == max(one.memory_bytes for one in cost.methods.values())
    assert cost.whole.seconds > sum(one.seconds for one in cost.methods.values())
    assert cost.models[1]["ancestry"]["relative_norm"] > 0
    none = predict_comparison(page, tmp_path / "out", methods=FEW, keep="none").whole
    assert (none.disk_bytes, none.scratch_bytes) == (0, max(c.disk_bytes for c in cost.methods.values()))
    assert list(tmp_path.iterdir()) == []


def test_a_page_of_mergekit_is_compared_by_mergekits_rules(family, tmp_path, in_this_process, monkeypatch):
    monkeypatch.setattr(
        apart,
        "merge_apart",
        lambda body, out, **how: merge(body, out, overwrite=True).summary(),
    )
    page = {
        "merge_method": "ties",
        "base_model": str(family / "base"),
        "models": [
            {"model": str(family / name), "parameters": {"weight": 0.5, "density": 0.5}}
            for name in ("m1", "m2")
        ],
        "dtype": "float32",
    }
    compare(page, tmp_path / "out", methods=("ties", "della"))
    for method in ("ties", "della"):
        merge({**page, "merge_method": method}, tmp_path / method)
        assert weight_bytes(tmp_path / "out" / method) == weight_bytes(tmp_path / method)


def test_another_method_may_take_a_page(page, family, tmp_path):
    config = with_method({"method": "ties", **page}, "linear")
    assert config.method == "linear"
    assert config.warnings == ("option `density` has no effect on `linear` and is ignored",)
    merge(config, tmp_path / "mean")
    merge({"method": "linear", "models": page["models"]}, tmp_path / "same")
    assert weight_bytes(tmp_path / "mean") == weight_bytes(tmp_path / "same")
    assert with_method(page, "ties").options["density"] == 0.2


@pytest.mark.parametrize(
    ("change", "how", "problem"),
    [
        ({"densty": 0.3}, {}, "densty: no merge method has such an option; did you mean `density`?"),
        ({"by_method": {"tis": {}}}, {}, "no merge method `tis`; did you mean `ties`?"),
        ({"by_method": {"ties": {"densty": 1}}}, {}, "`ties` has no such option; did you mean `density`?"),
        ({"by_method": {"ties": {"density": 7}}}, {}, r"density: must be in \(0, 1\], got 7"),
        ({"by_method": {"ties": 3}}, {}, "expected a mapping of options, found 3"),
        ({"by_method": [1]}, {}, "expected a mapping of methods"),
        ({"models": []}, {}, "models: expected a list of at least one entry"),
        ({}, {"methods": ("tis", "linear")}, "no merge method `tis`; did you mean `ties`?"),
        ({}, {"methods": ("ties", "ties")}, "`ties` is named twice"),
        ({}, {"methods": ("slerp", "ties")}, "`slerp` merges exactly 2 models"),
        ({}, {"keep": "best"}, "`best` needs tasks"),
        ({}, {"tasks": "nothing"}, "no task `nothing`"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(page, tmp_path, change, how, problem):
    with pytest.raises(InputError, match=problem) as told:
        compare({**page, **change}, tmp_path / "out", **how)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_option_of_one_method_is_told_with_its_line(page, tmp_path):
    file = tmp_path / "page.yml"
    file.write_text(
        f"base: {page['base']}\nmodels: [{page['models'][0]}]\nby_method:\n  linear: {{}}\n"
        "  ties:\n    lambda: 1\n    density: x\n"
    )
    with pytest.raises(
        PageError, match=r"page\.yml:7: density: must be a number or one for each model, got 'x'"
    ):
        compare(file, tmp_path / "out")


def test_a_folder_of_something_else_is_left_alone(page, family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files but no comparison"):
        compare(page, tmp_path / "out", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file"):
        compare(page, tmp_path / "out" / "notes.txt")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_no_room_on_the_disk_is_known_before_the_first_merge(page, tmp_path, monkeypatch, in_this_process):
    from weightsmith.errors import SystemFault

    monkeypatch.setattr(run.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(SystemFault, match="GB are free"):
        compare(page, tmp_path / "out", methods=FEW)
    assert in_this_process == []
