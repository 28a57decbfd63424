"""`weightsmith prune`."""

import json

import pytest
from tests.recipes.conftest import small_model
from typer.testing import CliRunner

from weightsmith.cli.main import Interrupted, app
from weightsmith.compression import read_masks
from weightsmith.compression.nm.steps import Steps
from weightsmith.errors import CheckpointError, InputError


@pytest.fixture
def model(tmp_path):
    small_model(tmp_path)
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, ["prune", *map(str, words)])


def test_a_model_is_pruned_by_a_method_and_its_options(model):
    options = ["--option", "init=magnitude", "--option", "steps=4", "--option", "init_scale=3"]
    data = ["--data", model / "a.txt", "--samples", "4", "--batch-size", "2", "--length", "16"]
    made = run(
        model / "model", model / "out", "--method", "maskpro", "--pattern", "1:4", *options, *data, "--json"
    )
    assert made.exit_code == 0, made.exception
    record = json.loads(made.stdout)
    assert (record["method"], record["pattern"], record["learning"]["steps"]) == ("maskpro", "1:4", 4)
    assert {mask.pattern.n for mask in read_masks(model / "out").values()} == {1}
    again = run(model / "model", model / "out", "--method", "magnitude")
    assert isinstance(again.exception, CheckpointError)
    assert "exists already" in str(again.exception)
    assert run(model / "model", model / "out", "--method", "magnitude", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method", "wanda"], "data: wanda needs text to calibrate on"),
        (["--method", "wnda"], "method: expected .*did you mean `wanda`"),
        (["--pattern", "4:2"], "pattern: .*must keep"),
        (["--method", "ria", "--option", "powr=1"], "method.ria.powr: no such key; did you mean `power`"),
        (
            ["--method", "maskpro", "--option", "lr=auto", "--option", "steps=100"],
            r"^warmup must be below steps \(100\), got 200",
        ),
        (["--option", "damp"], "--option: expected KEY=VALUE, got 'damp'"),
        (["--pattern", "1:4", "--option", "pattern=2:4"], "method.sparsegpt.pattern: is given twice"),
        (["--method", "magnitude", "--data", "docs"], "data: magnitude looks at weights alone; leave it out"),
        (["--method", "magnitude", "--work", "w"], "--work: is for MaskPro's state, and magnitude has none"),
        (["--data", "docs", "--length", "999"], "length: 999 tokens, and model was made for 384 positions"),
        (
            ["--method", "maskpro", "--data", "docs", "--option", "init=wnda"],
            "method.maskpro.init: expected .* or the folder or file of masks; .*did you mean `wanda`",
        ),
    ],
)
def test_wrong_words_are_one_line(model, words, said):
    made = run(model / "model", model / "out", *words)
    assert isinstance(made.exception, InputError)
    with pytest.raises(InputError, match=said):
        raise made.exception
    assert not (model / "out").exists()


def test_an_option_of_the_method_is_not_overruled_by_a_default(model):
    made = run(model / "model", model / "out", "--method", "magnitude", "--option", "pattern=1:4")
    assert made.exit_code == 0, made.exception
    assert {mask.pattern.n for mask in read_masks(model / "out").values()} == {1}


def test_a_killed_maskpro_goes_on_without_being_told_where_its_state_lies(model, monkeypatch):
    words = [model / "model", model / "out", "--method", "maskpro", "--data", model / "a.txt"]
    words += ["--option", "init=magnitude", "--option", "steps=4", "--samples", "3", "--length", "16"]
    usual, steps = Steps.take, []

    def take(self, turn):
        if len(steps) == 2:
            steps.append(None)
            raise KeyboardInterrupt
        steps.append(self._state.step)
        usual(self, turn)

    monkeypatch.setattr(Steps, "take", take)
    assert isinstance(run(*words).exception, Interrupted)
    assert (model / "out.work").is_dir()
    assert run(*words).exit_code == 0
    assert steps == [0, 1, None, 2, 3]
    assert not (model / "out.work").exists()


def test_packing_without_a_gpu_is_one_line_and_writes_nothing(model, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    made = run(model / "model", model / "out", "--method", "magnitude", "--export", "semi-structured")
    assert isinstance(made.exception, InputError)
    assert str(made.exception).startswith("semi-structured matrices need a CUDA device")
    assert "\n" not in str(made.exception)
    assert not (model / "out").exists()
