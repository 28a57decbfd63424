"""Checkpoints made into models with cycles, thresholds from held-out data, cycles of training steps."""

import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
)

from weightsmith.checkpoints import Checkpoint, trace
from weightsmith.errors import CheckpointError, InputError
from weightsmith.merging import merge, plan_merge
from weightsmith.training import (
    CycleSchedule,
    FinetuneConfig,
    HRPAdapterOptions,
    LoRAOptions,
    TrainConfig,
    ZTTConfig,
    ZTTForCausalLM,
    ZTTOptions,
    calibrate_exit,
    convert,
    convert_to_ztt,
    finetune,
    resize_cycles,
    train,
)
from weightsmith.training.zero_token.calibrate import worth_trying
from weightsmith.training.zero_token.cycles import cycles_of_step
from weightsmith.training.zero_token.options import CYCLES, KEYS, SCORES, cache_slots, shapes_of

SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama with biases, tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, attention_bias=True, tie_word_embeddings=True)
    ),
    "mistral with a window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=3, head_dim=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen2 with windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8)),
}


def base_of(kind):
    torch.manual_seed(0)
    made = BASES[kind]().eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias") or "norm" in name:  # values that a slip would show
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture
def ids():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


def resize(model):
    return resize_cycles(model, 3)


def write_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_a_converted_checkpoint_begins_as_its_base(kind, tmp_path, ids):
    base = base_of(kind)
    base.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "same", ZTTOptions(num_cycles=2, zero_token=False))
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert isinstance(same, ZTTForCausalLM)
    torch.testing.assert_close(same(ids).logits, base(ids).logits, rtol=1e-4, atol=1e-5)
    convert(tmp_path / "base", tmp_path / "near", ZTTOptions(num_cycles=3))
    near = AutoModelForCausalLM.from_pretrained(tmp_path / "near")
    difference = (near(ids).logits - base(ids).logits).norm() / base(ids).logits.norm()
    assert 0 < difference < 2e-2  # nine tokens, and weights far larger than trained ones
    text = [each.generate(ids, max_new_tokens=4, do_sample=False) for each in (same, base)]
    assert torch.equal(*text)


@pytest.mark.parametrize("kind", BASES)
def test_in_memory_and_on_disk_are_the_same(kind, tmp_path):
    base = base_of(kind).bfloat16()
    base.save_pretrained(tmp_path / "base")
    options = ZTTOptions(num_cycles=3, zero_token_scope="layer")
    convert(tmp_path / "base", tmp_path / "out", options, seed=4)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    made = convert_to_ztt(base, options, seed=4)
    state = made.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert written.state_dict().keys() == state.keys()
    for name, tensor in written.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for key in ("num_hidden_layers", "num_physical_layers", "layer_types", "attention_bias", "qk_norm"):
        assert getattr(written.config, key) == getattr(made.config, key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sixteen_bits_leave_the_rotary_frequencies_alone(tmp_path, dtype):
    base_of("llama").save_pretrained(tmp_path)
    base = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    made = convert_to_ztt(base, ZTTOptions(num_cycles=2, zero_token=False))
    ids = torch.randint(3, 40, (1, 1024), generator=torch.Generator().manual_seed(0))
    for net in (made, resize_cycles(made, 3)):
        assert net.dtype == dtype
        for name, frequencies in base.model.rotary_emb.named_buffers():
            assert torch.equal(net.model.rotary_emb.get_buffer(name), frequencies)
        torch.testing.assert_close(net(ids).logits, base(ids).logits, rtol=1e-2, atol=1e-2)


def test_the_attention_is_kept_and_generation_settings_are_a_copy():
    base = base_of("llama")
    base.set_attn_implementation("eager")
    base.generation_config.max_new_tokens = 5
    made = convert_to_ztt(base, ZTTOptions(num_cycles=2))
    for net, source in ((made, base), (resize_cycles(made, 3), made)):
        assert net.config._attn_implementation == "eager"
        assert net.generation_config.to_dict() == source.generation_config.to_dict()
        assert net.generation_config is not source.generation_config


@pytest.mark.parametrize("kind", BASES)
def test_shapes_are_known_without_the_model(kind):
    made = convert_to_ztt(base_of(kind), ZTTOptions(num_cycles=2))
    values = made.config.to_dict()
    tied = set(made.all_tied_weights_keys) if values["tie_word_embeddings"] else set()
    stored = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items() if name not in tied}
    assert shapes_of(values) == stored
    assert cache_slots(values) == made.config.num_hidden_layers == 6


@torch.no_grad()
def test_a_model_of_one_cycle_has_no_options_of_later_ones(ids):
    base = base_of("llama")
    once = convert_to_ztt(base, ZTTOptions(num_cycles=1, zero_token=False))
    assert once.config.cycle_gate == "off"
    cycled = convert_to_ztt(base, ZTTOptions(num_cycles=3, training_cycles="grow", deep_supervision=0.1))
    again = resize_cycles(cycled, 1)
    assert (again.config.cycle_gate, again.config.deep_supervision) == ("off", 0.0)
    torch.testing.assert_close(again(ids).logits, cycled(ids, num_cycles=1).logits)


def test_the_output_says_where_it_comes_from_and_holds_the_bases_bytes(tmp_path):
    base_of("llama").save_pretrained(tmp_path / "base")
    out = convert(tmp_path / "base", tmp_path / "out", ZTTOptions(num_cycles=2), seed=1)
    assert {file.name for file in out.iterdir()} >= {
        "config.json",
        "generation_config.json",
        "weightsmith.json",
    }
    with Checkpoint.open(tmp_path / "base") as before, Checkpoint.open(out) as after:
        for name in before.tensors:
            assert np.array_equal(before.read_raw(name), after.read_raw(name))
        assert after.lineage.method == "ztt"
        assert (after.read(SCORES) == -6).all()
        assert 0.01 < after.read(KEYS).std() < 0.03
    assert trace(out)
    again = convert(tmp_path / "base", tmp_path / "again", ZTTOptions(num_cycles=2), seed=1)
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_what_can_not_be_cycled_is_named(tmp_path):
    sizes = {key: value for key, value in SMALL.items() if "token" not in key}
    Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0)).save_pretrained(tmp_path / "phi")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=3, vocab_size=9))
    gpt2.save_pretrained(tmp_path / "gpt2")
    for folder, message in (("phi", "phi3 can't be cycled.*qkv_proj.*k_proj"), ("gpt2", "gpt2 .*c_attn")):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / folder, tmp_path / "out")
    with pytest.raises(InputError, match=r"model_type gpt2 can't be cycled.*h\.0\.attn\.c_attn"):
        convert_to_ztt(gpt2)
    assert not (tmp_path / "out").exists()


def test_options_and_files_that_do_not_fit_are_named_before_anything_is_written(tmp_path):
    base_of("llama").save_pretrained(tmp_path / "base")
    out = tmp_path / "out"
    with pytest.raises(InputError, match="5 of 4 layers leave no middle"):
        convert(tmp_path / "base", out, ZTTOptions(num_head_layers=3, num_tail_layers=2))
    with pytest.raises(InputError, match=r"zero_bias: expected true, found false: .* begin as its base"):
        convert(tmp_path / "base", out, ZTTOptions(zero_bias=False))
    convert(tmp_path / "base", tmp_path / "ztt")
    with pytest.raises(InputError, match="ztt already; `resize_cycles`"):
        convert(tmp_path / "ztt", out)
    write_config(tmp_path / "base", num_hidden_layers=5)
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.4\."):
        convert(tmp_path / "base", out)
    write_config(tmp_path / "base", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.\S+ has no place"):
        convert(tmp_path / "base", out)
    write_config(tmp_path / "base", num_hidden_layers=4, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is \(32, 48\), its config.json"):
        convert(tmp_path / "base", out)
    assert not out.exists()


# --- calibration ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    """A model that has learnt to count, and batches to measure it on."""
    torch.manual_seed(0)
    config = ZTTConfig(**{**SMALL, "initializer_range": 0.05}, num_cycles=3, exit_level="token")
    model = ZTTForCausalLM(config)
    rows = torch.stack([3 + (start + torch.arange(16)) % 37 for start in range(37)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    mask = torch.ones_like(rows[:4])
    mask[0, 10:] = 0
    return model.eval(), [{"input_ids": rows[:4], "attention_mask": mask}, {"input_ids": rows[4:8]}]


@pytest.mark.parametrize("criterion", ["zero_attention", "latent_diff", "entropy", "kl"])
def test_the_threshold_is_the_cheapest_within_the_loss_allowed(trained, criterion):
    model, batches = trained
    model.config.exit_criterion, model.config.exit_threshold = criterion, None
    found = calibrate_exit(model, batches, max_loss_increase=0.05, points=6)
    full, *others = found.curve
    assert (full.threshold, full.cycles) == (None, 3)
    assert others == sorted(others, key=lambda point: point.threshold)
    allowed = [point for point in found.curve if point.loss <= 1.05 * full.loss]
    assert found.chosen.cycles == min(point.cycles for point in allowed)
    assert model.config.exit_threshold == found.chosen.threshold
    assert [point["loss"] for point in model.config.exit_curve] == [point.loss for point in found.curve]
    cycles = sorted(others, key=lambda point: point.threshold, reverse=criterion != "zero_attention")
    assert all(a.cycles <= b.cycles + 0.05 for a, b in itertools.pairwise(cycles))
    assert found.spread > 0


def test_a_calibrated_threshold_is_saved_and_heeded(trained, tmp_path):
    model, batches = trained
    model.config.exit_criterion = "zero_attention"
    calibrate_exit(model, batches, max_loss_increase=10.0, points=3)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.exit_threshold == model.config.exit_threshold
    ids = batches[1]["input_ids"]
    used = again(ids).num_cycles_used
    assert used.float().mean() < 3
    assert torch.equal(used, again(ids, exit_threshold=model.config.exit_threshold).num_cycles_used)


def test_thresholds_to_try_tell_small_signals_apart():
    signals = 1e-6 + 1e-7 * torch.rand(999, generator=torch.Generator().manual_seed(0))
    tried = worth_trying(signals, 9)
    assert tried == sorted(set(tried))
    below = [float((signals < threshold).float().mean()) for threshold in tried]
    np.testing.assert_allclose(below, np.arange(0.1, 1, 0.1), atol=2e-3)
    assert worth_trying(torch.ones(5), 9) == [1.0]


def test_signals_of_many_tokens_have_quantiles():
    assert worth_trying(torch.arange(17_000_000).flip(0).float(), 3) == [4.25e6, 8.5e6, 12.75e6]


def test_calibration_says_what_it_lacks(trained):
    model, batches = trained
    for given, options, message in (
        ([], {}, "batches: expected held-out data"),
        (batches, {"max_loss_increase": -1.0}, "max_loss_increase: expected at least 0"),
        (batches, {"points": 0}, "points: expected at least 1"),
        ([{"input_ids": batches[1]["input_ids"][:, :1]}], {}, "no token to predict"),
        ([batches[1]["input_ids"]], {}, "expected mappings with `input_ids`, found Tensor at 0"),
        ([*batches, {"labels": None}], {}, "expected mappings with `input_ids`, found dict at 2"),
        ([{"input_ids": [[3, 4]]}], {}, "expected input_ids of batch 0 to be a tensor .*, found list"),
        ([{"input_ids": torch.tensor([3, 4])}], {}, r"expected input_ids of batch 0 .*, found \(2,\)"),
        ([batches[0] | {"labels": torch.ones(4, 3)}], {}, r"expected labels of batch 0 .*, found \(4, 3\)"),
    ):
        with pytest.raises(InputError, match=message):
            calibrate_exit(model, given, **options)
    with pytest.raises(InputError, match="min_cycles: 1 of 1 cycles leave none to skip"):
        calibrate_exit(ZTTForCausalLM(ZTTConfig(**SMALL, num_cycles=1)), batches)
    with pytest.raises(InputError, match="exit_criterion: zero_attention, and the model has no zero tokens"):
        calibrate_exit(ZTTForCausalLM(ZTTConfig(**SMALL, zero_token=False)), batches)
    for other in (base_of("llama"), model.model):
        with pytest.raises(InputError, match=f"expected a ZTTForCausalLM, found {type(other).__name__}"):
            calibrate_exit(other, batches)


# --- training -------------------------------------------------------------------------------------------


def test_cycles_grow_over_the_first_fifth_and_are_drawn_alike_everywhere():
    grown = [cycles_of_step("grow", step, 100, 4, 0) for step in range(100)]
    assert grown == [1] * 5 + [2] * 5 + [3] * 5 + [4] * 85
    drawn = [cycles_of_step("sample", step, 100, 3, seed=7) for step in range(300)]
    assert drawn == [cycles_of_step("sample", step, 100, 3, seed=7) for step in range(300)]
    assert all(70 < drawn.count(number) < 130 for number in (1, 2, 3))
    assert cycles_of_step("all", 0, 10, 3, 0) == 3


def test_the_trainer_trains_it_keeps_zero_tokens_from_decay_and_draws_cycles(tmp_path):
    torch.manual_seed(0)
    model = ZTTForCausalLM(
        ZTTConfig(**SMALL, num_cycles=3, cycle_gate="zero_init", training_cycles="sample", use_cache=False)
    )
    seen = []
    model.model.register_forward_pre_hook(lambda module, inputs: seen.append(module.cycles_now))
    rows = [{"input_ids": torch.arange(12) + 3, "labels": torch.arange(12) + 3} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=2,
        weight_decay=0.5,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        activation_checkpointing=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[CycleSchedule(model, seed=1)])
    trainer.train()
    assert seen == [cycles_of_step("sample", step, 8, 3, 1) for step in range(8)]
    assert model.model.cycles_now is None
    decayed = trainer.get_decay_parameter_names(model)
    plain = [name for name, _ in model.named_parameters() if name not in decayed]
    assert {"model.zero_token.bias_k", "model.zero_token.bias_z", "model.cycle_gate.bias"} <= set(plain)
    with pytest.raises(InputError, match="LlamaForCausalLM has no cycles"):
        CycleSchedule(LlamaForCausalLM(LlamaConfig(**SMALL)))


def test_a_schedule_that_nothing_follows_is_told_once(caplog):
    ids = torch.arange(6)[None] + 3
    model = ZTTForCausalLM(ZTTConfig(**SMALL, num_cycles=3, training_cycles="grow")).eval()
    logging.Logger.warning_once.cache_clear()
    model(ids)
    model.train()(ids, num_cycles=2)
    CycleSchedule(model).on_step_begin(None, SimpleNamespace(global_step=0, max_steps=9), None)
    assert model(ids).num_cycles_used.tolist() == [1]
    assert not caplog.messages
    model.model.cycles_now = None
    for _ in range(2):
        assert model(ids).num_cycles_used.tolist() == [3]
    (message,) = caplog.messages
    assert message.startswith("training_cycles grow: nothing sets the cycles of a step, so all run")


def test_the_trainer_measures_logits_alone(tmp_path):
    rows = [{"input_ids": torch.arange(6) + 3, "labels": torch.arange(6) + 3} for _ in range(4)]
    shapes = []

    def measure(found):
        shapes.append(found.predictions.shape)
        return {}

    arguments = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    model = ZTTForCausalLM(ZTTConfig(**SMALL, num_cycles=2))
    Trainer(model, arguments, eval_dataset=rows, compute_metrics=measure).evaluate()
    assert shapes == [(4, 6, 40)]


def test_models_that_are_not_plain_are_neither_converted_nor_resized():
    from peft import LoraConfig, get_peft_model

    for make, change in ((base_of, convert_to_ztt), (lambda kind: convert_to_ztt(base_of(kind)), resize)):
        adapted = get_peft_model(make("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(
            InputError, match=r"found PeftModel with base_model\.\S+; `merge_and_unload` an adapter"
        ):
            change(adapted)
    with pytest.raises(InputError, match="found LlamaModel with"):
        convert_to_ztt(base_of("llama").model)
    with pytest.raises(InputError, match="expected a ZTTForCausalLM, found LlamaForCausalLM"):
        resize(base_of("llama"))


def test_lora_adapts_shared_layers_in_every_cycle(ids):
    from peft import LoraConfig, get_peft_model

    model = convert_to_ztt(base_of("llama"), ZTTOptions(num_cycles=2, cycle_gate="off"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))
    adapted(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in adapted.named_parameters() if "layers.1" in n and "lora_B" in n]
    assert len(gradients) == 3
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@torch.no_grad()
def test_an_adapter_of_every_projection_computes_what_it_does_once_merged(ids, kind):
    from peft import LoraConfig, get_peft_model

    model = convert_to_ztt(base_of(kind), ZTTOptions(num_cycles=2, cycle_gate="off", zero_bias_init=0.0))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    found, plain = adapted(input_ids=ids).logits, adapted.merge_and_unload()(ids).logits
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)


SHORT = {"steps": 8, "batch_size": 2, "sequence_length": 24, "threads": 1, "warmup_steps": 0}


@pytest.fixture(scope="module")
def cycled(config_folder, tmp_path_factory):
    """A converted checkpoint, whose later cycles are behind closed gates."""
    folder = tmp_path_factory.mktemp("cycled")
    config = TrainConfig(data="docs", **SHORT)
    base = train(config, config_folder, folder / "base", workdir=folder / "work", seed=1).checkpoint
    return convert(base, folder / "cycled", ZTTOptions(num_cycles=3))


@pytest.mark.parametrize(
    "adapter",
    [LoRAOptions(rank=2), LoRAOptions(rank=2, init="pissa"), HRPAdapterOptions(rank=2, preheat_steps=2)],
    ids=["lora", "pissa", "hrp"],
)
def test_an_adapter_of_a_recipe_opens_the_gates_of_a_converted_model(cycled, tmp_path, adapter):
    config = FinetuneConfig(data="docs", adapter=adapter, learning_rate=0.05, **SHORT)
    finetune(config, cycled, tmp_path / "model", workdir=tmp_path / "work", seed=3)
    with Checkpoint.open(cycled) as before, Checkpoint.open(tmp_path / "model") as after:
        assert {n: (i.dtype, i.shape) for n, i in before.tensors.items()} == {
            n: (i.dtype, i.shape) for n, i in after.tensors.items()
        }
        changed = {n for n in before.tensors if (before.read(n) != after.read(n)).any()}
        assert (np.abs(after.read(CYCLES)) > 1e-3).all()
    assert {name for name in changed if "proj" not in name} == {KEYS, SCORES, CYCLES}
    if adapter.keeps_base:
        with Checkpoint.open(tmp_path / "work" / "adapter", base=cycled) as opened:
            assert opened.changed == changed


# --- slices of models with cycles -----------------------------------------------------------------------


def cycled_folder(folder, seed=0, **options):
    torch.manual_seed(seed)
    made = ZTTForCausalLM(ZTTConfig(**{**SMALL, "num_cycles": 3, **options}))
    made.save_pretrained(folder)
    return folder


def slices(*parts, method="passthrough"):
    entries = [
        {"sources": [{"model": str(folder), "layer_range": [first, last]} for folder in folders]}
        for folders, first, last in parts
    ]
    return {"merge_method": method, "slices": entries}


KINDS = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("options", "places"),
    [
        ({"zero_token": False}, 14),
        ({"zero_token_scope": "cycle", "physical_layer_types": KINDS, "sliding_window": 4}, 14),
        ({"zero_token": False, "exit_kv": "share"}, 6),
    ],
    ids=str,
)
def test_slices_count_layers_in_files_and_places_of_the_cache(tmp_path, ids, options, places):
    folder = cycled_folder(tmp_path / "a", **options)
    merge(slices(([folder], 0, 3), ([folder], 1, 4)), tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert (found.config.num_physical_layers, found.config.num_hidden_layers) == (6, places)
    wanted = ZTTForCausalLM.from_pretrained(folder).eval()
    kept = [0, 1, 2, 1, 2, 3]
    if "physical_layer_types" in options:
        assert found.config.physical_layer_types == [KINDS[layer] for layer in kept]
        assert len(found.config.layer_types) == places
    for place, layer in enumerate(kept):
        new, old = found.model.layers[place].state_dict(), wanted.model.layers[layer].state_dict()
        assert all(torch.equal(new[name], old[name]) for name in old)
    with torch.no_grad():
        assert found(ids, use_cache=True).logits.isfinite().all()


def test_zero_tokens_of_layers_stay_with_their_layers_or_the_merge_is_refused(tmp_path):
    a, b = cycled_folder(tmp_path / "a"), cycled_folder(tmp_path / "b", seed=1)
    in_place = slices(([a], 0, 1), ([b], 1, 4))
    merge(in_place, tmp_path / "out")
    mixed, other = (ZTTForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", b))
    assert torch.equal(mixed.model.zero_token.bias_k, other.model.zero_token.bias_k)
    merge(slices(([a, b], 0, 4), method="linear"), tmp_path / "mean")
    for parts, message in (
        ([([a], 0, 3), ([a], 1, 4)], "a: each middle layer .*layer_cycle.* expected 4 layers, found 6"),
        ([([a], 0, 2), ([b], 2, 4)], "expected at 1 layer 1 of b, found layer 1 of a"),
        ([([a], 0, 2), ([a], 1, 2), ([a], 3, 4)], "expected at 2 layer 2 of a, found layer 1 of a"),
        ([([a], 0, 2)], "2 of 2 layers leave no middle to cycle; expected slices of at least 3"),
    ):
        with pytest.raises(CheckpointError, match=message):
            plan_merge(slices(*parts))
