"""What models are called, and where their files are."""

import os
import shutil

import pytest
import torch

from weightsmith.checkpoints import Checkpoint
from weightsmith.compression.tailoring.sources import holds, known_folder, members, open_pool
from weightsmith.errors import InputError

from .made import family, llama, near
from .test_plan import stored


def names(*sources):
    return [member.name for member in members(sources[0], sources[1:])]


def moved(folder, *parts):
    made = folder.parent.joinpath(*parts)
    made.parent.mkdir(parents=True, exist_ok=True)
    return folder.rename(made)


def test_folders_of_one_name_are_called_by_their_parents_too(tmp_path):
    base, one, two = stored(tmp_path)
    assert names(base, one, two) == ["base", "one", "two"]
    one, two = moved(one, "math", "last"), moved(two, "code", "last")
    assert names(base, one, two) == ["base", "math/last", "code/last"]
    one, two = moved(one, "..", "a", "run", "last"), moved(two, "..", "b", "run", "last")
    assert names(base, one, two) == ["base", "a/run/last", "b/run/last"]
    shutil.move(base, tmp_path / "a" / "run" / "checkpoint")  # a stage's, called by the stage
    assert names(tmp_path / "a" / "run" / "checkpoint", one) == ["run", "last"]


def test_names_do_not_depend_on_the_way_a_folder_is_written(tmp_path, monkeypatch):
    base, one, two = stored(tmp_path)
    one, two = moved(one, "math", "last"), moved(two, "code", "last")
    monkeypatch.chdir(one)
    assert names(base, ".", os.path.relpath(two)) == ["base", "math/last", "code/last"]


def test_a_folder_is_told_from_a_loaded_model(tmp_path):
    base, *_ = stored(tmp_path)
    assert names(llama(), base) == ["base", f"{tmp_path.name}/base"]


def test_a_model_given_twice_is_refused(tmp_path):
    base, one, _ = stored(tmp_path)
    with pytest.raises(InputError, match="two models are called `one`: give each model once"):
        members(base, [one, str(one)])


@pytest.mark.parametrize("dtype", ["int8", "float33"])
def test_a_type_that_weights_cannot_have_is_refused_before_anything_is_loaded(dtype):
    with pytest.raises(InputError, match=f"dtype `{dtype}` is not one of float32, bfloat16"):
        open_pool("no/such/folder", dtype=dtype)


def test_the_folder_of_a_loaded_model_is_the_one_it_names_while_it_is_there(tmp_path):
    folder = stored(tmp_path)[0]
    model = type(llama()).from_pretrained(folder)
    assert known_folder(model) == str(folder)
    assert known_folder(llama()) is None
    assert known_folder(folder) == folder
    (folder / "model.safetensors").write_bytes(b"torn")
    assert known_folder(model) is None
    shutil.rmtree(folder)
    assert known_folder(model) is None


def test_a_folder_holds_a_model_until_it_is_trained(tmp_path):
    base, _ = family()
    folder = stored(tmp_path)[0]
    with Checkpoint.open(folder) as checkpoint:
        assert holds(checkpoint, base)
        assert holds(checkpoint, near(base, 1, size=0).bfloat16())  # loaded as another type
        assert not holds(checkpoint, near(base, 1))
        changed = near(base, 1, size=0)
        with torch.no_grad():
            changed.model.layers[2].mlp.up_proj.weight[-1, -1] += 1
        assert not holds(checkpoint, changed)
        assert not holds(checkpoint, torch.nn.Linear(2, 2))  # nothing in common
