"""A merge spread over a cluster of two machines gives the bytes of one machine's."""

import builtins
import os
import sys
from pathlib import Path

import numpy as np
import pytest

import weightsmith
from weightsmith.checkpoints import Checkpoint, CheckpointWriter, Lineage, TensorSpec
from weightsmith.checkpoints.writer import JoinedFiles
from weightsmith.errors import CheckpointError, InputError, MissingExtraError, SystemFault
from weightsmith.merging import merge

from .made import page, random_model, read, save

try:
    import ray
except ImportError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="ray is not installed")


@pytest.fixture(scope="module")
def cluster():
    """Two machines of one core each, as Ray's own tests make them."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    size = {"num_cpus": 1, "object_store_memory": 80_000_000}
    made = Cluster(initialize_head=True, head_node_args={**size, "include_dashboard": False})
    made.add_node(**size)
    path = [str(Path(weightsmith.__file__).parents[1]), *sys.path]
    ray.init(
        made.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(path)}}
    )
    yield made.address
    ray.shutdown()
    made.shutdown()


def every_byte(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def pages(root):
    return {
        "linear": page(root, "linear"),
        "ties over the whole model": page(root, "ties", density=0.3, trim_scope="global"),
        "dare_ties": page(root, "dare_ties", density=0.5, seed=3),
        "tsvm": page(root, "tsvm"),
        "resm over layers": page(root, "resm"),
        "passthrough": page(root, "passthrough", models=("m1",)),
        "emr": page(root, "emr", task=2),
    }


@needs_ray
@pytest.mark.parametrize("name", pages(Path()))
def test_two_machines_write_what_one_writes_byte_for_byte(cluster, family, tmp_path, name):
    config = pages(family)[name]
    here = merge(config, tmp_path / "here", threads=1)
    there = merge(config, tmp_path / "there", ray="auto")
    assert every_byte(tmp_path / "there") == every_byte(tmp_path / "here")
    assert here.machines == 1
    assert there.machines == 2
    assert there.tensors == here.tensors


@needs_ray
def test_relative_paths_and_tokens_that_move_mean_the_same_on_every_machine(
    cluster, family, tmp_path, monkeypatch
):
    monkeypatch.chdir(family)
    config = {"method": "linear", "models": ["m1", "m2"], "base": "base"}
    merge(config, tmp_path / "here")
    merge(config, tmp_path / "there", ray="auto")
    assert every_byte(tmp_path / "there") == every_byte(tmp_path / "here")


@needs_ray
def test_an_error_on_a_machine_is_the_one_line_it_is_at_home(cluster, family, tmp_path):
    broken = random_model(1)
    broken["model.norm.weight"][3] = np.nan
    save(tmp_path / "broken", broken)
    config = {"method": "linear", "models": [str(family / "m1"), str(tmp_path / "broken")]}
    with pytest.raises(CheckpointError, match=r"broken: model\.norm\.weight holds nan") as told:
        merge(config, tmp_path / "out", ray="auto")
    assert "\n" not in str(told.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@needs_ray
def test_a_machine_with_another_version_is_named(cluster, family, tmp_path, monkeypatch):
    from weightsmith.merging import machines

    monkeypatch.setattr(machines, "versions", lambda names: {"weightsmith": "0.0.0", "numpy": "1"})
    with pytest.raises(InputError, match=r"has weightsmith .*, the machine that began has 0\.0\.0"):
        merge(page(family, "linear"), tmp_path / "out", ray="auto")
    assert list(tmp_path.iterdir()) == []


def test_without_ray_the_install_command_is_told_and_nothing_is_written(family, tmp_path, monkeypatch):
    plain = builtins.__import__

    def without(name, *args, **more):
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return plain(name, *args, **more)

    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r'pip install "weightsmith\[ray\]"'):
        merge(page(family, "linear"), tmp_path / "out", ray="local")
    assert list(tmp_path.iterdir()) == []


def test_files_joined_from_elsewhere_are_one_checkpoint_when_all_receipts_are_in(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(50).astype(np.float32) for name in ("a", "b", "c")}
    specs = [TensorSpec(name, "BF16", (50,)) for name in tensors]

    def write(folder, joined):
        with CheckpointWriter(
            folder, specs, side_files={}, lineage=Lineage("made"), max_shard_bytes=150
        ) as writer:
            for name in tensors:
                if name in joined:
                    with JoinedFiles(writer.joint()) as files:
                        files.write(name, tensors[name][:20])
                        files.write(name, tensors[name][20:], 20)
                        writer.receive(name, files.receipt(name))
                else:
                    writer.write(name, tensors[name])
            writer.commit()
        return every_byte(folder)

    assert write(tmp_path / "joined", "ac") == write(tmp_path / "plain", "")
    assert read(tmp_path / "joined").keys() == tensors.keys()
    with Checkpoint.open(tmp_path / "joined") as checkpoint:
        assert checkpoint.lineage.content == checkpoint.fingerprint(full=True)
    with CheckpointWriter(tmp_path / "out", specs, side_files={}, lineage=Lineage("made")) as writer:
        joint = writer.joint()
        with JoinedFiles(joint) as files:
            files.write("a", tensors["a"])
        with pytest.raises(ValueError, match="a: only elements"):
            writer.commit()
    with pytest.raises(SystemFault, match="no such file"):
        JoinedFiles(joint)
