"""The key `adapter` behind the stage `finetune`: trained beside the weights, merged into them at the end."""

import contextlib
import dataclasses
import json

import pytest
import torch

from weightsmith.checkpoints import Checkpoint
from weightsmith.errors import InputError
from weightsmith.training import (
    AlphaDecayOptions,
    AveragingOptions,
    FinetuneConfig,
    HRPAdapterOptions,
    LoRAOptions,
    MEAPFinetuneConfig,
    MEAPOptions,
    MeZOOptions,
    StateAverage,
    TrainConfig,
    finetune,
    plan,
    train,
)
from weightsmith.training.bed import configs

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

SMALL = {"batch_size": 2, "sequence_length": 24, "threads": 1, "steps": 8, "log_every": 1, "warmup_steps": 0}
HRP = HRPAdapterOptions(rank=2, preheat_steps=2)


def weights(folder):
    with Checkpoint.open(folder) as checkpoint:
        return {name: checkpoint.read_raw(name).tobytes() for name in checkpoint.tensors}


@pytest.fixture(scope="module")
def base(config_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = TrainConfig(data="docs", **SMALL)
    return train(config, config_folder, folder / "model", workdir=folder / "work", seed=1).checkpoint


@pytest.fixture
def read(monkeypatch):
    """Every batch that the model is given."""
    from transformers import LlamaForCausalLM

    seen, forward = [], LlamaForCausalLM.forward

    def watching(self, input_ids=None, **more):
        seen.append(input_ids.clone())
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(LlamaForCausalLM, "forward", watching)
    return seen


def go(config, model, folder, **more):
    return finetune(config, model, folder / "model", workdir=folder / "work", seed=3, **more)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(torch.arange(20)[None] + 4).logits


@pytest.mark.parametrize("adapter", [HRP, LoRAOptions(rank=2, alpha=8), LoRAOptions(rank=2, rslora=True)])
def test_the_result_is_a_whole_checkpoint_and_the_adapter_beside_it_is_the_same_model(
    base, tmp_path, adapter
):
    from transformers import AutoModelForCausalLM

    go(FinetuneConfig(data="docs", adapter=adapter, learning_rate=0.05, **SMALL), base, tmp_path)
    with Checkpoint.open(base) as before, Checkpoint.open(tmp_path / "model") as after:
        assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in after.tensors.items()
        }
        changed = {n for n in before.tensors if (before.read(n) != after.read(n)).any()}
    assert changed
    assert all("proj" in name for name in changed)  # neither norms nor embeddings
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    started = logits(plain)
    adapted = logits(peft.PeftModel.from_pretrained(plain, tmp_path / "work" / "adapter"))
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, started, atol=1e-2)
    with Checkpoint.open(tmp_path / "work" / "adapter", base=base) as opened:
        assert opened.changed == changed
    config = json.loads((tmp_path / "work" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name  # no path of this machine


def test_a_model_in_sixteen_bits_with_other_layers_stays_one(gpt2, tmp_path):
    go(FinetuneConfig(data="docs", adapter=HRP, **SMALL), gpt2, tmp_path)
    with Checkpoint.open(gpt2) as before, Checkpoint.open(tmp_path / "model") as after:
        assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in after.tensors.items()
        }


@contextlib.contextmanager
def interrupted_after(monkeypatch, step):
    from weightsmith.training.callbacks import Metrics

    usual = Metrics.on_step_end

    def press(self, args, state, control, **kwargs):
        usual(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_step_end", press)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize(
    "adapter",
    [
        HRP,
        dataclasses.replace(HRP, rank_energy=2.0),
        LoRAOptions(rank=2, init="pissa", dropout=0.2),
        LoRAOptions(rank=2, init="eva", rslora=True, alpha=3, init_batches=3),
        LoRAOptions(rank=2, init="gaussian"),
    ],
    ids=["hrp", "hrp with shared ranks", "pissa", "eva, which shares ranks", "gaussian"],
)
@pytest.mark.parametrize("step", [2, 5])  # before and after the first durable checkpoint
def test_a_stopped_run_ends_with_the_bytes_of_an_undisturbed_one(
    base, tmp_path, monkeypatch, adapter, step, read
):
    config = FinetuneConfig(data="docs", adapter=adapter, save_every=3, **SMALL)
    go(config, base, tmp_path / "whole")
    with interrupted_after(monkeypatch, step):
        go(config, base, tmp_path / "other")
    read.clear()
    resumed = go(config, base, tmp_path / "other")
    left = resumed.steps - resumed.resumed_from
    assert resumed.resumed_from == (0 if step == 2 else 3)
    if adapter.init != "eva" or resumed.resumed_from:
        assert len(read) == left  # the preheat is not done again
    names = ["model"] + (["work/adapter"] if adapter.keeps_base else [])
    if isinstance(adapter, HRPAdapterOptions):
        names.append("work/hrp.json")
    for name in names:
        one, other = tmp_path / "whole" / name, tmp_path / "other" / name
        files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file()) if one.is_dir() else [""]
        assert files
        for file in files:
            assert (one / file).read_bytes() == (other / file).read_bytes(), file
    assert not list((tmp_path / "other" / "work").glob("hrp-*"))


def test_a_run_that_was_stopped_while_it_wrote_its_result_still_knows_its_ranks(base, tmp_path, monkeypatch):
    adapter = dataclasses.replace(HRP, rank_energy=2.0)
    config = FinetuneConfig(data="docs", adapter=adapter, save_every=3, **SMALL)
    go(config, base, tmp_path / "whole")
    with monkeypatch.context() as patch:

        def stop(*_, **__):
            raise KeyboardInterrupt

        patch.setattr("weightsmith.training.weights.write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            go(config, base, tmp_path / "other")
    assert go(config, base, tmp_path / "other").resumed_from == 6
    assert weights(tmp_path / "other" / "model") == weights(tmp_path / "whole" / "model")


def test_the_preheat_reads_other_text_and_is_part_of_the_steps(base, tmp_path, read):
    plain = go(FinetuneConfig(data="docs", adapter=LoRAOptions(rank=2), **SMALL), base, tmp_path / "plain")
    own, read[:] = list(read), []
    result = go(FinetuneConfig(data="docs", adapter=HRP, **SMALL), base, tmp_path / "hrp")
    assert (plain.steps, result.steps) == (8, 6)
    assert len(read) == 8
    # The run reads what it would have read; the preheat has what the plain run's last steps read.
    for ids, wanted in zip(read, own[6:] + own[:6], strict=True):
        assert torch.equal(ids, wanted)
    beyond = dataclasses.replace(HRP, count_preheat=False)
    read.clear()
    result = go(FinetuneConfig(data="docs", adapter=beyond, **SMALL), base, tmp_path / "beyond")
    assert (result.steps, len(read)) == (8, 10)


def test_the_steps_of_the_preheat_are_told_before_those_of_the_training(base, tmp_path):
    told = []

    class Told:
        def start(self, label, total, unit):
            told.append([label, total, 0])

        def advance(self, amount):
            told[-1][2] += amount

        def done(self):
            pass

    go(FinetuneConfig(data="docs", adapter=HRP, **SMALL), base, tmp_path, progress=Told())
    assert told == [["preheating", 2, 2], ["training", 6, 6]]


def test_micro_batches_of_the_preheat_add_up(base, tmp_path):
    losses = []
    for folder, sizes in (("whole", {"batch_size": 4}), ("parts", {"gradient_accumulation": 2})):
        config = FinetuneConfig(data="docs", adapter=HRP, **{**SMALL, **sizes})
        go(config, base, tmp_path / folder)
        losses.append(json.loads((tmp_path / folder / "work" / "hrp.json").read_text())["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa_niter_2", "olora", "eva"])
def test_other_starts_are_pefts_own(base, tmp_path, init):
    adapter = LoRAOptions(rank=2, init=init, init_batches=3)
    go(FinetuneConfig(data="docs", adapter=adapter, **SMALL), base, tmp_path)
    assert weights(tmp_path / "model") != weights(base)
    # Where the start takes its part out of the weights, the adapter stands on no base that anyone has.
    assert (tmp_path / "work" / "adapter").exists() == (init in ("gaussian", "orthogonal", "eva"))


def test_what_the_preheat_reads_is_masked_as_training_is(base, tmp_path, read):
    config = MEAPFinetuneConfig(data="docs", adapter=HRP, objective=MEAPOptions(mask_ratio=0.3), **SMALL)
    go(config, base, tmp_path)
    from weightsmith.testbed.alphabet import VOCABULARY

    assert len(read) == 8
    assert {int((ids == VOCABULARY["<mask>"]).sum()) for ids in read} == {2 * 6}  # 30 % of 23


def test_a_running_mean_of_the_adapter_is_what_is_merged(base, tmp_path):
    mean = StateAverage(options=AveragingOptions(method="swa", start=0.2, every=1))
    go(FinetuneConfig(data="docs", adapter=HRP, **SMALL), base, tmp_path / "last")
    go(FinetuneConfig(data="docs", adapter=HRP, average=mean, **SMALL), base, tmp_path / "mean")
    assert weights(tmp_path / "last" / "model") != weights(tmp_path / "mean" / "model")


def test_a_run_with_another_adapter_leaves_nothing_of_the_first(base, tmp_path):
    go(FinetuneConfig(data="docs", adapter=HRP, **SMALL), base, tmp_path)
    assert (tmp_path / "work" / "hrp.json").exists()
    other = LoRAOptions(rank=2, init="olora")
    go(FinetuneConfig(data="docs", adapter=other, **SMALL), base, tmp_path, overwrite=True)
    assert not (tmp_path / "work" / "hrp.json").exists()
    assert not (tmp_path / "work" / "adapter").exists()


def test_the_plan_says_what_the_adapter_is_and_costs(base):
    plain = plan(FinetuneConfig(data="docs", **SMALL), base, seed=0)
    small = plan(FinetuneConfig(data="docs", adapter=LoRAOptions(rank=2), **SMALL), base, seed=0)
    large = plan(FinetuneConfig(data="docs", adapter=HRPAdapterOptions(rank=2), **SMALL), base, seed=0)
    assert "adapter" not in plain.lineage.parameters
    assert small.lineage.parameters["adapter"] == {"lora": {"rank": 2}}
    assert large.lineage.parameters["adapter"] == {"hrp": {"rank": 2, "preheat_steps": 1}}
    assert (small.config.steps, large.config.steps) == (8, 7)
    assert small.config.learning_rate > plain.config.learning_rate
    assert large.prediction.memory_bytes >= small.prediction.memory_bytes


def test_a_config_without_an_adapter_is_the_one_that_beds_are_known_by():
    base_config, finetune_config = configs("xs", "domains")
    assert "adapter" not in dataclasses.asdict(base_config)
    assert "adapter" not in dataclasses.asdict(finetune_config)
    assert dataclasses.replace(finetune_config, adapter=HRP).adapter == HRP
    assert dataclasses.replace(dataclasses.replace(finetune_config, adapter=HRP), steps=3).adapter == HRP


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"decay": AlphaDecayOptions()}, "decay: alphadecay looks at whole matrices"),
        (
            {"average": StateAverage(options=AveragingOptions(method="uniform"), keep=True)},
            "average: kept states",
        ),
        ({"optimizer": MeZOOptions(), "learning_rate": 1e-3}, "adapter: hrp's preheat needs gradients"),
        (
            {"adapter": HRPAdapterOptions(rank=2, preheat_steps=8)},
            "adapter: hrp's 8 preheat_steps leave none of 8 steps",
        ),
    ],
    ids=["alphadecay", "keep", "mezo", "steps"],
)
def test_what_an_adapter_cant_stand_beside_is_told(base, more, message):
    with pytest.raises(InputError, match=message):
        plan(FinetuneConfig(**{"data": "docs", "adapter": HRP, **SMALL, **more}), base, seed=0)


@pytest.mark.parametrize("energy", [None, 2.0])
def test_a_pattern_of_modules_is_stored_as_one_and_goes_on(base, tmp_path, monkeypatch, energy):
    adapter = dataclasses.replace(HRP, target=r".*\.[qv]_proj", rank_energy=energy)
    config = FinetuneConfig(data="docs", adapter=adapter, save_every=3, **SMALL)
    with interrupted_after(monkeypatch, 4):
        go(config, base, tmp_path)
    assert go(config, base, tmp_path).resumed_from == 3
    stored = json.loads((tmp_path / "work" / "adapter" / "adapter_config.json").read_text())
    assert stored["target_modules"] == r".*\.[qv]_proj"
    assert bool(stored["rank_pattern"]) == (energy is not None)


def test_modules_that_arent_there_are_told(base, tmp_path):
    adapter = LoRAOptions(rank=2, target=("c_attn",))
    with pytest.raises(InputError, match=r"adapter: Target modules .*c_attn"):
        go(FinetuneConfig(data="docs", adapter=adapter, **SMALL), base, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"init": "pisa"}, "init must be one of .* did you mean `pissa`"),
        ({"init": "orthogonal", "rank": 3}, "init: orthogonal needs an even rank, got 3"),
        ({"dropout": 1.0}, "dropout must be in 0..1"),
        ({"alpha": -1.0}, "alpha must be above 0"),
        ({"alpha": "8"}, "alpha must be above 0 and finite, got '8'"),
        ({"dropout": None}, "dropout must be in 0..1, below 1, got None"),
        ({"target": (3,)}, "target must be `all-linear` or names of modules"),
        ({"init": None}, "init must be one of .* got None"),
        ({"rslora": "yes"}, "rslora must be true or false"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_option_of_an_adapter_names_itself(options, message):
    with pytest.raises(InputError, match=message):
        LoRAOptions(**options)


def test_hrp_takes_no_other_start_and_no_smaller_rank():
    with pytest.raises(InputError, match="init: HRP is the start; found 'olora'"):
        HRPAdapterOptions(init="olora")
    with pytest.raises(InputError, match="preheat_rank must be above rank, which is 16, got 8"):
        HRPAdapterOptions(preheat_rank=8)
    with pytest.raises(InputError, match="preheat_rank must be above rank, which is 128, the default is 128"):
        HRPAdapterOptions(rank=128)
    HRPAdapterOptions(rank=128, preheat_rank=256)
