"""A checkpoint pruned by MaskPro: what it is compared with, and what a comparison that fails costs."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.compression import prune_checkpoint, read_masks
from weightsmith.compression.nm import MaskProConfig, folders
from weightsmith.errors import InputError
from weightsmith.runs.progress import SILENT
from weightsmith.testbed import model_config, write_model_folder


@pytest.fixture
def dense(tmp_path):
    """A small Llama."""
    folder = write_model_folder("xs", tmp_path / "dense")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(num_key_value_heads=2, head_dim=8)
    LlamaForCausalLM(LlamaConfig(**(model_config("xs") | sizes))).save_pretrained(folder)
    return folder


def batches():
    rows = torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": rows, "labels": rows}]


def short(**options):
    return MaskProConfig(**({"init": "magnitude", "init_scale": 3.0, "lr": 2.0, "steps": 4} | options))


class Told:
    """Keeps the labels and totals of what was reported."""

    def __init__(self):
        self.tasks = []

    def start(self, label, total, unit):
        self.tasks.append([label, total, 0])

    def advance(self, amount):
        self.tasks[-1][2] += amount

    def done(self):
        pass


def test_a_comparison_that_fails_is_left_out_with_its_reason_after_the_masks_are_written(
    dense, tmp_path, monkeypatch
):
    prune = folders.one_shot

    def fails(model, targets, data, options):
        assert read_masks(tmp_path / "out")
        if options.kind == "wanda":
            raise InputError("q_proj: its layer got no inputs")
        return prune(model, targets, data, options)

    monkeypatch.setattr(folders, "one_shot", fails)
    told = Told()
    report = prune_checkpoint(dense, tmp_path / "out", short(), batches(), progress=told)
    assert report.absent == {"wanda": "q_proj: its layer got no inputs"}
    assert set(report.losses) == {"dense", "magnitude", "sparseswaps", "sparsegpt", "first", "maskpro"}
    assert report.losses["magnitude"] == pytest.approx(report.losses["first"])
    assert ["comparing", 5, 5] in told.tasks


def test_stacked_experts_are_compared_with_what_can_prune_them(build, tokens):
    model = build("mixtral")
    options = short(experts={"down_proj": 2})
    data = [batch | {"labels": batch["input_ids"]} for batch in tokens]
    losses, absent = folders._losses(model, data, options, SILENT)
    assert set(losses) == {"dense", "magnitude"}
    assert set(absent) == {"wanda", "sparseswaps", "sparsegpt"}
    assert all("inputs of stacked experts pass no module" in reason for reason in absent.values())


def test_a_step_that_was_not_finite_can_be_written_down(dense, tmp_path, monkeypatch):
    from weightsmith.compression.nm import maskpro

    calls, loss = iter(range(1000)), maskpro.causal_loss

    def second_is_infinite(model, batch):  # the first is that of the reference
        return math.inf if next(calls) == 1 else loss(model, batch)

    monkeypatch.setattr(maskpro, "causal_loss", second_is_infinite)
    options = short(lr="auto", warmup=4, steps=5, samples_per_step=2)
    report = prune_checkpoint(dense, tmp_path / "out", options, batches())
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["learning"]["skipped"] == [1]
    assert record["learning"]["losses"][0] is record["learning"]["residuals"][0] is None
    assert record["learning"]["losses"][1:] == list(report.learning.losses[1:])


def test_a_rate_that_was_not_found_can_be_written_down(dense, tmp_path, monkeypatch):
    from weightsmith.compression.nm import maskpro

    calls, loss = iter(range(1000)), maskpro.causal_loss
    monkeypatch.setattr(
        maskpro,
        "causal_loss",
        lambda model, batch: math.nan if next(calls) in (2, 4) else loss(model, batch),
    )
    report = prune_checkpoint(dense, tmp_path / "out", short(lr="auto", warmup=3), batches())
    assert math.isnan(report.learning.lr)
    assert report.to_json()["learning"]["lr"] is None
