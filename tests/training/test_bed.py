"""Beds: made once, kept by what decides them, safe when two want the same one."""

import json

import pytest

from weightsmith.errors import InputError
from weightsmith.testbed import DOMAINS, FINETUNES
from weightsmith.training import bed as room
from weightsmith.training.bed import bed, cache_folder, configs, finetune_of

STEPS = {"base_steps": 1, "finetune_steps": 1}


@pytest.fixture
def made(monkeypatch):
    """The models that are made, in order; made here, without processes."""
    found = []

    def in_turn(jobs, progress):
        for job in jobs:
            found.append(job.out.name)
            room._make(job)

    monkeypatch.setattr(room, "_make_all", in_turn)
    return found


def test_a_bed_is_made_once_and_then_found(made, tmp_path):
    first = bed("xs", 0, which=["D_docs"], cache=tmp_path, **STEPS)
    assert made == ["base", "D_docs-mild-1"]
    assert bed("xs", 0, which=["D_docs"], cache=tmp_path, **STEPS) == first
    assert made == ["base", "D_docs-mild-1"]
    bed("xs", 0, "hard", which=["D_docs"], cache=tmp_path, **STEPS)
    assert made == ["base", "D_docs-mild-1", "D_docs-hard-1"]
    assert bed("xs", 1, which=["D_docs"], cache=tmp_path, **STEPS).base != first.base
    assert made[3:] == ["base", "D_docs-mild-1"]


def test_a_fine_tune_descends_from_the_base_and_replays_its_mixture(made, tmp_path):
    from weightsmith.checkpoints import Checkpoint

    built = bed("xs", 0, which=["D_docs"], cache=tmp_path, **STEPS)
    with Checkpoint.open(built.base) as base, Checkpoint.open(built.finetunes["D_docs"]) as tuned:
        assert tuned.lineage.inputs[0].fingerprint == base.fingerprint()
        parameters = tuned.lineage.parameters
    assert [entry["source"] for entry in parameters["data"]] == ["docs"]
    assert [entry["source"] for entry in parameters["replay_data"]] == list(DOMAINS)
    assert parameters["replay"] == 0.25


def test_changed_code_makes_another_bed(made, tmp_path, monkeypatch):
    first = bed("xs", 0, which=[], cache=tmp_path, **STEPS)
    monkeypatch.setattr(room, "fingerprint", lambda: "another")
    assert bed("xs", 0, which=[], cache=tmp_path, **STEPS).base != first.base


def test_a_build_that_was_killed_goes_on_where_it_was(made, tmp_path, monkeypatch):
    from weightsmith.training import loop

    def die(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "finetune", die)
        with pytest.raises(KeyboardInterrupt):
            bed("xs", 0, which=["D_docs"], cache=tmp_path, **STEPS)
    bed("xs", 0, which=["D_docs"], cache=tmp_path, **STEPS)
    assert made == ["base", "D_docs-mild-1", "D_docs-mild-1"]


def test_a_model_that_another_process_made_meanwhile_is_not_made_again(made, tmp_path, monkeypatch):
    from weightsmith.training import loop

    built = bed("xs", 0, which=[], cache=tmp_path, **STEPS)
    monkeypatch.setattr(loop, "train", None)
    room._make(room._Job(configs("xs", "domains")[0], "testbed/xs", built.base, 0))


def test_the_joint_control_trains_as_long_as_all_domains_together():
    base, config = configs("xs", "domains")
    joint = finetune_of("joint", config, "mild", base)
    assert joint.steps == sum(finetune_of(f"D_{domain}", config, "mild", base).steps for domain in DOMAINS)
    assert tuple(joint.data) == DOMAINS
    assert joint.replay == 0


def test_hard_fine_tunes_see_their_own_data_only():
    base, config = configs("s", "all")
    assert finetune_of("S_strings", config, "hard", base).replay == 0
    assert {finetune_of(name, config, "mild", base).replay for name in FINETUNES} == {0.25}
    assert config.layer_drop == base.layer_drop == 0.1


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "weightsmith" / "testbed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sx", 0), "no size `sx`; known: xs, s, m"),
        (("xs", 0, "milde"), "no flavour `milde`; did you mean `mild`"),
        (("xs", 0, "mild", ["D_doc"]), "no fine-tune `D_doc`; did you mean `D_docs`"),
        (("xs", 0, "mild", ["S_strings"]), "no fine-tune `S_strings`"),
    ],
)
def test_unknown_names_are_told(arguments, message, tmp_path):
    with pytest.raises(InputError, match=message):
        bed(*arguments, cache=tmp_path)


@pytest.mark.slow
def test_a_bed_made_in_two_processes_is_the_one_made_in_one(made, tmp_path, monkeypatch):
    names = ["D_docs", "D_names"]
    alone = bed("xs", 0, which=names, cache=tmp_path / "alone", **STEPS)
    monkeypatch.undo()
    pair = bed("xs", 0, which=names, cache=tmp_path / "pair", **STEPS)
    for name in names:
        for file in ("model.safetensors", "weightsmith.json"):
            assert (pair.finetunes[name] / file).read_bytes() == (alone.finetunes[name] / file).read_bytes()
    lineage = json.loads((pair.base / "weightsmith.json").read_text())
    assert lineage["parameters"]["steps"] == 1
