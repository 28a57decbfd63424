"""Lineage files and family trees."""

import json
import os
import shutil

import numpy as np
import pytest

from weightsmith.checkpoints import Ancestor, Checkpoint, CheckpointWriter, Lineage, TensorSpec, trace
from weightsmith.errors import CheckpointError

SIZE = 20_000


def make(out, value, inputs=(), method="merge", full=False):
    """A checkpoint of one tensor, made from `inputs`: (role, folder) pairs."""
    ancestors = []
    for role, folder in inputs:
        with Checkpoint.open(folder) as source:
            ancestors.append(Ancestor.of(source, role, full=full))
    lineage = Lineage(method, {"weight": [0.5, value]}, 7, tuple(ancestors), {"weightsmith": "0"})
    spec = [TensorSpec("w", "F32", (SIZE,))]
    with CheckpointWriter(out, spec, side_files={"config.json": b"{}"}, lineage=lineage) as writer:
        writer.write("w", np.full(SIZE, value, np.float32) + np.arange(SIZE, dtype=np.float32))
        return writer.commit()


@pytest.fixture
def family(tmp_path, write_model):
    """original -> base -> two fine-tunes -> merged, all side by side; `original` is no work of ours."""
    original = write_model("original", {"w": np.arange(SIZE, dtype=np.float32)}, {})
    base = make(tmp_path / "base", 1.0, [("base", original)], "finetune")
    tunes = [make(tmp_path / f"tune{i}", 2.0 + i, [("base", base)], "finetune") for i in range(2)]
    return make(tmp_path / "merged", 9.0, [("base", base), *(("model", tune) for tune in tunes)])


def rows(node, depth=0):
    """The tree as (depth, role, name, found, verified, note)."""
    found = node.found.name if node.found else None
    yield depth, node.role, node.name, found, node.verified, node.note
    for child in node.inputs:
        yield from rows(child, depth + 1)


def spoil(folder):
    """Change one byte that lies between two sampled blocks."""
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-SIZE * 4 + 8000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def test_a_lineage_survives_the_file_and_equal_inputs_give_equal_bytes(family, tmp_path):
    with Checkpoint.open(family) as checkpoint:
        lineage = checkpoint.lineage
    assert Lineage.from_json(json.loads(lineage.to_bytes())) == lineage
    assert [(a.role, a.name) for a in lineage.inputs] == [
        ("base", "base"),
        ("model", "tune0"),
        ("model", "tune1"),
    ]
    assert lineage.inputs[1].lineage.inputs[0].lineage.inputs[0].name == "original"
    inputs = [("base", tmp_path / "base"), ("model", tmp_path / "tune0"), ("model", tmp_path / "tune1")]
    again = make(tmp_path / "elsewhere" / "merged", 9.0, inputs)
    text = (again / "weightsmith.json").read_bytes()
    assert text == (family / "weightsmith.json").read_bytes()
    assert str(tmp_path).encode() not in text


def test_the_whole_tree_is_found_beside_the_checkpoint(family):
    assert list(rows(trace(family))) == [
        (0, "checkpoint", "merged", "merged", "", ""),
        (1, "base", "base", "base", "quick", ""),
        (2, "base", "original", "original", "quick", ""),
        (1, "model", "tune0", "tune0", "quick", ""),
        (2, "base", "base", "base", "quick", ""),
        (3, "base", "original", "original", "quick", ""),
        (1, "model", "tune1", "tune1", "quick", ""),
        (2, "base", "base", "base", "quick", ""),
        (3, "base", "original", "original", "quick", ""),
    ]
    root = trace(family)
    assert (root.method, root.seed, root.parameters) == ("merge", 7, {"weight": [0.5, 9.0]})
    assert json.loads(json.dumps(root.to_json()))["inputs"][0]["verified"] == "quick"


def test_verify_compares_every_byte_where_the_full_fingerprint_is_known(family):
    verified = {name: (proof, note) for _, _, name, _, proof, note in rows(trace(family, verify=True))}
    assert {name: proof for name, (proof, _) in verified.items()} == {
        "merged": "full",
        "base": "full",
        "original": "quick",
        "tune0": "full",
        "tune1": "full",
    }
    assert "only samples were compared" in verified["original"][1]


def test_an_original_taken_in_with_a_full_fingerprint_is_verified_fully(write_model, tmp_path):
    original = write_model("original", {"w": np.arange(SIZE, dtype=np.float32)}, {})
    child = make(tmp_path / "child", 1.0, [("base", original)], full=True)
    assert trace(child, verify=True).inputs[0].verified == "full"
    spoil(original)
    node = trace(child, verify=True).inputs[0]
    assert (node.verified, node.note) == ("", "its content has changed since it was used")
    assert trace(child).inputs[0].verified == "quick"  # one byte: what samples can't see, `verify` does


def test_a_changed_byte_in_the_checkpoint_itself_shows_when_verified(family):
    spoil(family)
    root = trace(family, verify=True)
    assert (root.verified, root.note) == ("", "its content has changed since it was written")


def test_missing_and_changed_ancestors_are_told_apart_and_the_tree_stays_whole(family, tmp_path):
    shutil.rmtree(tmp_path / "tune0")
    shutil.rmtree(tmp_path / "tune1")
    make(tmp_path / "tune1", 5.0)
    nodes = {child.name: child for child in trace(family).inputs}
    assert (nodes["tune0"].found, nodes["tune0"].note) == (None, "not found")
    assert nodes["tune1"].found is None
    assert nodes["tune1"].note == f"{tmp_path / 'tune1'} has its name and other content"
    assert nodes["tune0"].inputs[0].inputs[0].name == "original"
    (tmp_path / "tune1" / "model.safetensors").write_bytes(b"torn")
    assert trace(family).inputs[2].note == f"{tmp_path / 'tune1'} has its name but can't be read"


def test_renamed_ancestors_are_found_by_content(family, tmp_path):
    (tmp_path / "base").rename(tmp_path / "renamed")
    node = trace(family).inputs[0]
    assert (node.name, node.found.name, node.verified) == ("base", "renamed", "quick")


def test_ancestors_are_looked_for_in_given_folders_runs_and_sibling_stages(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    far = tmp_path / "far" / "deep"
    far.mkdir(parents=True)
    (tmp_path / "base").rename(far / "base")
    stage = tmp_path / "runs" / "demo" / "stages" / "code"
    stage.mkdir(parents=True)
    (tmp_path / "tune0").rename(stage / "checkpoint")
    nodes = trace(family).inputs
    assert [node.found is not None for node in nodes] == [False, True, True]
    assert trace(family, search=[tmp_path / "far"]).inputs[0].found == far / "base"
    merged = tmp_path / "runs" / "demo" / "stages" / "merged" / "checkpoint"
    merged.parent.mkdir()
    family.rename(merged)
    monkeypatch.chdir("/")
    root = trace(merged)
    assert root.name == "merged"
    assert root.inputs[1].found == stage / "checkpoint"


def test_damaged_neighbours_do_not_stop_the_search(family, tmp_path):
    (tmp_path / "aaa").mkdir()
    (tmp_path / "aaa" / "model.safetensors").write_bytes(b"torn")
    assert trace(family).inputs[0].found.name == "base"


def test_ancestors_from_a_hub_are_found_in_its_local_cache(tmp_path, write_model, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    values = {"w": np.arange(SIZE, dtype=np.float32)}
    snapshot = write_model("cache/models--owner--name/snapshots/abc", values, {})
    with Checkpoint.open(snapshot) as source:
        ancestor = Ancestor("base", "owner/name", source.fingerprint())
    child = make(tmp_path / "child", 1.0)
    lineage = Lineage("merge", inputs=(ancestor,))
    (child / "weightsmith.json").write_bytes(lineage.to_bytes())
    assert trace(child).inputs[0].found == snapshot


def test_a_checkpoint_without_lineage_is_a_tree_of_one(write_model, tensors):
    root = trace(write_model("plain", tensors))
    assert (root.inputs, root.method) == ((), None)
    assert "not made by weightsmith" in root.note


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "not a lineage of weightsmith: KeyError"),
        ('{"format": 99}', "format 99, this version of weightsmith reads 1"),
        ('{"format": 1, "method": 3}', "found int, expected str"),
    ],
)
def test_a_damaged_lineage_is_one_line(family, text, message):
    (family / "weightsmith.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        trace(family)
    assert str(caught.value).startswith(str(family / "weightsmith.json"))
