"""HRP on PEFT models: closed forms, every kind of layer, a model that is as it was but for its adapter."""

import copy
import gc
import hashlib
import json
import logging
import weakref

import pytest
import torch
from torch import nn

from weightsmith.errors import InputError
from weightsmith.training import HRPOptions, get_hrp_state_dict, initialize_lora_hrp_weights
from weightsmith.training.hrp import preheat
from weightsmith.training.hrp.layers import find_layers
from weightsmith.training.hrp.preheat import PREHEAT

peft = pytest.importorskip("peft")

ROWS, COLUMNS = 10, 14


class Matrix(nn.Module):
    """Half the squared distance of a linear layer from a target; the layer is 0."""

    def __init__(self, target):
        super().__init__()
        self.target = target
        self.layer = nn.Linear(target.shape[1], target.shape[0], bias=False, dtype=target.dtype)
        nn.init.zeros_(self.layer.weight)

    def forward(self):
        outputs = self.layer(torch.eye(self.target.shape[1], dtype=self.target.dtype))
        return (outputs.mT - self.target).square().sum() / 2


def target(rows=ROWS, columns=COLUMNS, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=random, dtype=dtype))[0] for n in (rows, columns))
    few = min(rows, columns)
    return (u[:, :few] * 0.8 ** torch.arange(few, dtype=dtype)) @ v[:, :few].mT


def adapted(model, rank=2, **more):
    more = {"target_modules": ["layer"], "lora_alpha": rank, **more}
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, **more), autocast_adapter_dtype=False)


def matrix_model(rank=2, **more):
    return adapted(Matrix(target()), rank, **more)


def initialize(model, **more):
    return initialize_lora_hrp_weights(
        model, train_step=lambda model, step: model(), **{"show_progress_bar": False, **more}
    )


def factors(model, name="layer", adapter="default"):
    layer = model.get_submodule(f"base_model.model.{name}")
    return layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter].weight.detach()


def span(rows):
    return rows.mT @ rows


class Text(nn.Module):
    """Every kind of layer that an adapter can have, on tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(2, 6, (2, 1), padding=(1, 0))
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.drop = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(8)
        self.inner = nn.Linear(12, 8)
        self.head = nn.Linear(8, 11)

    def forward(self, ids, labels=None):
        hidden = self.embed(ids)
        hidden = self.grouped(hidden.mT).mT
        wide = self.conv(hidden.unflatten(-1, (2, 4)).permute(0, 2, 1, 3))[:, :, : ids.shape[1]]
        hidden = self.inner(wide.permute(0, 2, 1, 3).flatten(2)[..., :12])
        hidden = self.norm(self.drop(hidden).mT).mT
        logits = self.head(hidden)
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


ALL = ["embed", "conv", "inner", "head"]


def text_model(rank=2, **more):
    return adapted(Text(), rank, **{"target_modules": ALL, **more})


def batches(count=3):
    random = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 11, (4, 6), generator=random) for _ in range(count)]
    return [{"ids": one, "labels": one.roll(1, 1)} for one in ids]


def digest(model):
    state = {n: p for n, p in [*model.named_parameters(), *model.named_buffers()] if "lora_" not in n}
    return hashlib.sha256(b"".join(state[n].detach().numpy().tobytes() for n in sorted(state))).hexdigest()


# What the model is before and after


DORA = {"use_dora": True, "target_modules": ["inner", "head"]}


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, DORA], ids=["lora", "rslora", "dora"])
def test_the_model_is_the_base_still_and_rows_are_orthonormal(more):
    model = text_model(**more).eval()
    ids = batches()[0]["ids"]
    before, weights = model(ids), digest(model)
    report = initialize_lora_hrp_weights(model, batches(), preheat_steps=5, show_progress_bar=False)
    assert torch.equal(model(ids), before)
    assert digest(model) == weights
    for name in report.layers:
        if name != "embed":
            rows, columns = factors(model, name)
            flat = rows.flatten(1)
            torch.testing.assert_close(flat @ flat.mT, torch.eye(2), rtol=0, atol=1e-5)
            assert not columns.any()
    if "embed" in report.layers:
        embedding = model.base_model.model.embed
        assert not embedding.lora_embedding_A["default"].any()
        learnt = embedding.lora_embedding_B["default"].detach()
        torch.testing.assert_close(learnt.mT @ learnt, torch.eye(2), rtol=0, atol=1e-5)


def test_everything_but_the_adapter_is_as_it_was():
    model = text_model(bias="all", modules_to_save=["norm"])
    model.base_model.model.inner.lora_A["default"].weight.requires_grad_(False)
    model.drop.eval()

    def found():
        return (
            {name: parameter.requires_grad for name, parameter in model.named_parameters()},
            {name: module.training for name, module in model.named_modules()},
            list(model.peft_config),
            list(model.active_adapters),
        )

    before, weights, random = found(), digest(model), torch.get_rng_state()
    initialize_lora_hrp_weights(model, batches(), preheat_steps=4, show_progress_bar=False)
    assert found() == before
    assert digest(model) == weights  # biases, statistics of the norm, and its copy that is trained
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_of_the_large_adapter_is_left_in_memory():
    model, alive = text_model(), []

    def optimizer(parameters):
        made = torch.optim.AdamW(parameters, 1e-3)
        alive.extend(weakref.ref(one) for one in [made, *parameters])
        return made

    initialize_lora_hrp_weights(
        model, batches(), preheat_steps=2, preheat_optimizer=optimizer, show_progress_bar=False
    )
    gc.collect()
    assert len(alive) > 4
    assert [one() for one in alive if one() is not None] == []
    assert not any(PREHEAT in name for name, _ in model.named_parameters())
    main = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    assert max(min(p.shape) for group in main.param_groups for p in group["params"]) <= 2


def test_an_adapter_that_isnt_active_can_be_initialised():
    model = text_model()
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["inner"]))
    initialize_lora_hrp_weights(
        model, batches(), adapter_name="other", preheat_steps=3, show_progress_bar=False
    )
    assert model.active_adapters == ["default"]
    rows, _ = factors(model, "inner", "other")
    torch.testing.assert_close(rows @ rows.mT, torch.eye(3), rtol=0, atol=1e-5)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any(".other." in name for name in trained)


# Closed forms


def test_a_preheat_of_the_same_rank_with_a_fixed_space_adds_nothing():
    model, spaces = matrix_model(), []

    def step(model, number):
        spaces.append(factors(model, adapter=PREHEAT)[0].clone())
        return model()

    initialize_lora_hrp_weights(
        model,
        train_step=step,
        trainable="B",
        preheat_rank=2,
        force=True,
        preheat_steps=5,
        show_progress_bar=False,
    )
    assert all(torch.equal(space, spaces[0]) for space in spaces)
    torch.testing.assert_close(span(factors(model)[0]), span(spaces[0]), rtol=0, atol=1e-5)


def test_one_plain_step_of_full_rank_gives_the_directions_of_the_gradient():
    wide = adapted(Matrix(target(COLUMNS, COLUMNS)), 3)
    initialize(wide, trainable="B", preheat_rank=COLUMNS, preheat_optimizer="sgd", preheat_steps=1)
    gradient = -target(COLUMNS, COLUMNS)  # of the layer, which is 0
    directions = torch.linalg.svd(gradient)[2][:3]
    torch.testing.assert_close(span(factors(wide)[0]), span(directions), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [4, 8, COLUMNS])
def test_a_converged_preheat_in_a_fixed_space_is_the_target_projected_onto_it(rank):
    goal = target(COLUMNS, COLUMNS)
    model, spaces = adapted(Matrix(goal), 2), []

    def step(model, number):
        spaces.append(factors(model, adapter=PREHEAT)[0].double().mT.clone())
        return model()

    report = initialize_lora_hrp_weights(
        model,
        train_step=step,
        trainable="B",
        preheat_rank=rank,
        preheat_scale="same",
        preheat_optimizer="sgd",
        preheat_lr=1.0,  # the curvature is 1: one step is there
        preheat_steps=2,
        show_progress_bar=False,
    )
    space = spaces[0]
    projected = goal @ space @ space.mT
    values = torch.linalg.svdvals(projected)
    found = torch.tensor(report.layers["layer"].singular_values, dtype=torch.float64)
    torch.testing.assert_close(found, values[:rank], rtol=1e-4, atol=1e-5)
    rows = factors(model)[0].double()
    torch.testing.assert_close(span(rows), span(torch.linalg.svd(projected)[2][:2]), rtol=0, atol=1e-4)
    # What the main stage can reach with A as it is: all but what lies outside the rows.
    left = (goal - goal @ span(rows)).square().sum()
    if rank == COLUMNS:  # Eckart and Young
        torch.testing.assert_close(left, torch.linalg.svdvals(goal)[2:].square().sum(), rtol=1e-4, atol=0)
    else:
        assert left > 1.05 * torch.linalg.svdvals(goal)[2:].square().sum()


def test_a_few_steps_of_both_factors_leave_the_random_space_that_b_alone_is_held_in():
    goal = target(48, 48)
    best = span(torch.linalg.svd(goal)[2][:3])
    overlaps = {}
    for trainable in ("B", "both"):
        model = adapted(Matrix(goal), 3)
        initialize(model, trainable=trainable, preheat_rank=16, preheat_lr=0.05, preheat_steps=15)
        overlaps[trainable] = float((span(factors(model)[0].double()) * best).sum()) / 3
    assert overlaps["both"] > 0.9
    assert overlaps["B"] < 0.6


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("scale", ["rank_stabilized", "same", 24.0])
def test_both_factors_begin_as_the_best_approximation_of_what_the_preheat_learnt(rslora, scale):
    model, kept, scales = matrix_model(use_rslora=rslora, lora_alpha=6), [], []

    def optimizer(parameters):
        kept.extend(parameters)
        return torch.optim.SGD(parameters, lr=0.05)

    def step(model, number):
        scales.append(model.base_model.model.layer.scaling[PREHEAT])
        return model()

    initialize_lora_hrp_weights(
        model,
        train_step=step,
        assign="both",
        preheat_scale=scale,
        preheat_rank=8,
        preheat_optimizer=optimizer,
        preheat_steps=6,
        show_progress_bar=False,
    )
    columns, rows = (parameter.detach() for parameter in kept)
    u, s, vh = torch.linalg.svd(scales[0] * columns @ rows, full_matrices=False)
    own = model.base_model.model.layer.get_delta_weight("default").detach()
    torch.testing.assert_close(own, (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-6)


def test_the_truncation_is_that_of_pefts_own_adapter_surgery():
    model, kept = matrix_model(rank=2), []

    def optimizer(parameters):
        kept.extend(parameters)
        return torch.optim.SGD(parameters, lr=0.2)

    initialize(model, assign="both", preheat_rank=8, preheat_steps=8, preheat_optimizer=optimizer)
    own = model.base_model.model.layer.get_delta_weight("default").detach()
    large = matrix_model(rank=8)
    columns, rows = (parameter.detach() for parameter in kept)
    layer = large.base_model.model.layer
    layer.lora_B["default"].weight.data.copy_(columns * (2 / 8) ** 0.5)  # the preheat's scale
    layer.lora_A["default"].weight.data.copy_(rows)
    # With one adapter PEFT falls back to a plain copy; the same one twice is truncated.
    large.add_weighted_adapter(["default"] * 2, [0.5, 0.5], "cut", combination_type="svd", svd_rank=2)
    torch.testing.assert_close(own, layer.get_delta_weight("cut").detach().to(own), rtol=1e-4, atol=1e-6)


def test_assigned_to_b_the_columns_are_those_of_the_transposed_problem():
    # One plain step of full rank: the product is the target, from either side.
    plain = {"trainable": "B", "preheat_steps": 1, "preheat_optimizer": "sgd"}
    goal = target(COLUMNS, COLUMNS)
    model, other = adapted(Matrix(goal)), adapted(Matrix(goal.mT.contiguous()))
    initialize(model, assign="B", preheat_rank=COLUMNS, **plain)
    initialize(other, preheat_rank=COLUMNS, **plain)
    rows, columns = factors(model)
    assert not rows.any()
    torch.testing.assert_close(span(columns.mT), span(factors(other)[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("scale", "length"), [("orthonormal", 1.0), ("kaiming", 3**-0.5), (0.25, 0.25)])
def test_rows_have_the_length_that_is_asked_for(scale, length):
    model = matrix_model()
    initialize(model, a_scale=scale, preheat_steps=2)
    torch.testing.assert_close(
        factors(model)[0].norm(dim=1), torch.full((2,), length, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_with_both_factors_assigned_rows_have_that_length_and_the_product_is_the_same():
    unit, long = matrix_model(), matrix_model()
    for model, scale in ((unit, "orthonormal"), (long, 4.0)):
        initialize(model, assign="both", a_scale=scale, preheat_steps=3)
    (rows, columns), (long_rows, long_columns) = factors(unit), factors(long)
    torch.testing.assert_close(long_rows, 4 * rows)
    torch.testing.assert_close(long_columns @ long_rows, columns @ rows)


# Kinds of layers


def test_ranks_by_layer_are_respected_and_the_large_rank_fits_the_layer():
    model = text_model(rank_pattern={"inner": 4, "head": 1})
    report = initialize_lora_hrp_weights(
        model, batches(), preheat_rank={"inner": 6}, preheat_steps=2, show_progress_bar=False
    )
    ranks = {name: (layer.rank, layer.preheat_rank) for name, layer in report.layers.items()}
    # 16 times the rank, cut to the smaller side: 8 of the embedding, 4 inputs of the convolution.
    assert ranks == {"embed": (2, 8), "conv": (2, 4), "inner": (4, 6), "head": (1, 8)}


def test_a_layer_whose_smaller_side_the_rank_fills_is_told(caplog):
    model = text_model(rank_pattern={"conv": 4})
    with caplog.at_level(logging.WARNING):
        initialize_lora_hrp_weights(model, batches(), preheat_steps=2, show_progress_bar=False)
    assert "cut to the smaller side of a layer, which the adapter's own rank fills: conv (4)" in caplog.text


class Experts(nn.Module):
    """Two experts as one parameter, of which a batch uses the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.up)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)[:, :2].square().mean()


def test_each_expert_has_directions_of_its_own_and_one_that_isnt_used_is_told(caplog):
    model = peft.get_peft_model(
        Mixture(), peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"])
    )
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    report = initialize_lora_hrp_weights(
        model, train_step=lambda model, step: model(x), preheat_steps=4, show_progress_bar=False
    )
    (name,) = report.layers
    layer = model.get_submodule(f"base_model.model.{name}")
    rows = layer.lora_A["default"].weight.detach().reshape(3, 2, 5)
    for expert in rows:
        torch.testing.assert_close(expert @ expert.mT, torch.eye(2), rtol=0, atol=1e-5)
    assert not torch.allclose(span(rows[0]), span(rows[1]), atol=1e-2)
    assert report.layers[name].known == 0
    assert "no gradient reached it" in caplog.text


def test_a_branch_that_no_gradient_reaches_keeps_its_first_directions(caplog):
    model = text_model()
    model.base_model.model.inner.forward = lambda x: torch.arange(8.0).expand(*x.shape[:-1], 8)
    with caplog.at_level(logging.WARNING):
        report = initialize_lora_hrp_weights(model, batches(), preheat_steps=2, show_progress_bar=False)
    assert report.layers["inner"].fallback == "no gradient reached it"
    assert report.layers["head"].fallback is None
    assert "inner keeps a random direction" in caplog.text
    rows, _ = factors(model, "inner")
    torch.testing.assert_close(rows @ rows.mT, torch.eye(2), rtol=0, atol=1e-5)


class Packed(nn.Linear):
    """A layer whose weight is stored as bytes: all that can be done with it is to run it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)
        del self.weight
        random = torch.Generator().manual_seed(0)
        stored = torch.randint(-127, 127, (outputs, inputs), dtype=torch.int8, generator=random)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.float() / 1000).mT


class PackedModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Packed(8, 6)

    def forward(self, x):
        return self.layer(x)


def test_weights_that_can_only_be_run_will_do():
    model = peft.get_peft_model(PackedModel(), peft.LoraConfig(r=2, target_modules=["layer"]))
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    before = model(x)
    report = initialize_lora_hrp_weights(
        model,
        train_step=lambda model, step: (model(x) - 1).square().mean(),
        preheat_steps=20,
        preheat_lr=0.01,
        show_progress_bar=False,
    )
    assert report.losses[-1] < report.losses[0]
    assert torch.equal(model(x), before)


def test_gpt2s_transposed_layers_and_tied_embeddings_work(gpt2):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, config)
    ids = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model.eval()(ids).logits
    report = initialize_lora_hrp_weights(
        model, [{"input_ids": ids, "labels": ids}] * 8, preheat_steps=8, show_progress_bar=False
    )
    assert report.losses[-1] < report.losses[0]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    names = {name.rpartition(".")[2] for name in report.layers}
    assert names == {"c_attn", "c_fc", "wte"}


def test_a_large_adapter_that_peft_breaks_off_leaves_nothing(monkeypatch):
    model = text_model()
    names = [name for name, _ in model.named_parameters()]
    add = preheat._add

    def break_off(model, named):
        add(model, named)
        del model.peft_config[named[0]]
        raise RuntimeError("out of memory")

    monkeypatch.setattr(preheat, "_add", break_off)
    with pytest.raises(RuntimeError, match="out of memory"):
        initialize_lora_hrp_weights(
            model, train_step=lambda *_: 1.0, preheat_steps=2, show_progress_bar=False
        )
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize(
    ("targets", "saved"),
    [(["embed_tokens", "q_proj"], None), (["q_proj", "lm_head"], None), (["q_proj"], ["embed_tokens"])],
)
def test_adapters_that_peft_ties_are_one_layer(targets, saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True))
    config = peft.LoraConfig(r=4, target_modules=targets, modules_to_save=saved, ensure_weight_tying=True)
    model = peft.get_peft_model(base, config)
    ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    before, names = model(ids).logits, [name for name, _ in model.named_parameters()]
    report = initialize_lora_hrp_weights(
        model, [{"input_ids": ids, "labels": ids}] * 3, preheat_steps=3, show_progress_bar=False
    )
    assert torch.equal(model(ids).logits, before)
    assert [name for name, _ in model.named_parameters()] == names
    embedding, head = model.base_model.model.model.embed_tokens, model.base_model.model.lm_head
    assert ("model.embed_tokens" in report.layers) == (saved is None)
    assert "lm_head" not in report.layers
    for rank in (4, 3) if saved is None else ():
        right, left = embedding.lora_embedding_B["default"], embedding.lora_embedding_A["default"]
        assert right.shape == (16, rank)
        for own, factor in ((head.lora_A["default"].weight, right), (head.lora_B["default"].weight, left)):
            assert torch.equal(own, factor.T)
            assert own.data_ptr() == factor.data_ptr()
        assert head.scaling["default"] == embedding.scaling["default"]
        preheat.replace_adapter(model, "default", {"model.embed_tokens": 3}, find_layers(model, "default")[0])


def test_a_model_of_transformers_with_an_adapter_of_its_own_works(gpt2):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    ids = torch.arange(24).reshape(2, 12)
    report = initialize_lora_hrp_weights(
        model, [{"input_ids": ids, "labels": ids}] * 3, preheat_steps=3, show_progress_bar=False
    )
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters() == ["default"]
    assert all(layer.fallback is None for layer in report.layers.values())
    rows = model.transformer.h[0].mlp.c_fc.lora_A["default"].weight
    assert rows.requires_grad
    torch.testing.assert_close(rows @ rows.mT, torch.eye(2), rtol=0, atol=1e-5)


def test_gradient_checkpointing_goes_on_without_dropout(gpt2):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True))
    model.eval()
    ids, modes = torch.arange(24).reshape(2, 12), []

    def step(model, number):
        modes.append({type(m).__name__: m.training for m in model.modules()})
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    report = initialize_lora_hrp_weights(model, train_step=step, preheat_steps=2, show_progress_bar=False)
    assert modes[0]["GPT2Block"]
    assert not modes[0]["Dropout"]
    assert all(layer.fallback is None for layer in report.layers.values())
    assert not model.training


def small_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_dropout=0.5))


def small_opt():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    positions = {"max_position_embeddings": 32, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes, **positions, num_attention_heads=4, dropout=0.5))


@pytest.mark.parametrize("make", [small_llama, small_opt], ids=["in the attention", "in the layer"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_by_function_is_off_where_checkpointing_is_on(make, reentrant):
    torch.manual_seed(0)
    base = make()
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    base.enable_input_require_grads()
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["v_proj"])).train()
    ids, runs = torch.arange(24).reshape(2, 12), []
    inner = [module for name, module in model.named_modules() if name.endswith("self_attn")]
    for module in inner:
        module.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))

    def losses(model, count):
        return [model(input_ids=ids, labels=ids, use_cache=False).loss for _ in range(count)]

    def step(model, number):
        first, second = losses(model, 2)
        assert torch.equal(first, second)
        runs.clear()
        return losses(model, 1)[0]

    initialize_lora_hrp_weights(model, train_step=step, preheat_steps=2, show_progress_bar=False)
    assert len(runs) == 2 * len(inner)  # of the last step: once forward, and again in its backward pass
    first, second = losses(model, 2)
    assert not torch.equal(first, second)  # training has its dropout again


def test_ranks_shared_out_by_energy_keep_their_sum_and_the_adapters_scale():
    model = text_model(use_rslora=True, lora_alpha=5, rank_pattern={"head": 4})
    scales = {n: m.scaling["default"] for n, m in model.named_modules() if hasattr(m, "scaling")}
    before = model.eval()(batches()[0]["ids"])
    report = initialize_lora_hrp_weights(
        model, batches(), rank_energy=2.0, preheat_steps=5, preheat_lr=0.01, show_progress_bar=False
    )
    ranks = {name: layer.rank for name, layer in report.layers.items()}
    assert sum(ranks.values()) == 2 + 2 + 2 + 4
    assert ranks != {"embed": 2, "conv": 2, "inner": 2, "head": 4}
    for name, rank in ranks.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(scales[f"base_model.model.{name}"])
        assert all(p.requires_grad for key, p in layer.named_parameters() if "lora_" in key)
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(batches()[0]["ids"]), before)


def test_ranks_shared_out_leave_whatever_else_an_adapter_has():
    model = text_model(modules_to_save=["norm"], target_modules=[*ALL, "grouped"])
    norm = model.base_model.model.norm.modules_to_save["default"]
    norm.weight.data.fill_(3.0)
    norm.running_mean.fill_(0.5)
    grouped = model.base_model.model.grouped.lora_A["default"].weight.detach().clone()
    report = initialize_lora_hrp_weights(
        model, batches(), rank_energy=2.0, preheat_steps=5, preheat_lr=0.01, show_progress_bar=False
    )
    assert {layer.rank for layer in report.layers.values()} != {2}
    norm = model.base_model.model.norm.modules_to_save["default"]
    assert norm.weight.eq(3.0).all()
    assert norm.weight.requires_grad
    assert norm.running_mean.eq(0.5).all()
    assert torch.equal(model.base_model.model.grouped.lora_A["default"].weight, grouped)


# The same again


def test_the_same_seed_gives_the_same_bits_and_another_other_directions():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))  # the model's own numbers don't matter
        model = matrix_model()
        initialize(model, seed=seed, preheat_steps=3, preheat_rank=4)
        made.append(factors(model)[0])
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2], atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"assign": "both"}, {"assign": "B"}, {"rank_energy": 2.0}])
def test_directions_found_before_are_those_of_a_new_preheat(tmp_path, more):
    from safetensors.torch import load_file, save_file

    options = HRPOptions(preheat_steps=3, preheat_lr=0.01, **more)
    once = text_model()
    initialize_lora_hrp_weights(once, batches(), options=options, show_progress_bar=False)
    again = text_model()
    untouched = {name: parameter.clone() for name, parameter in again.named_parameters()}
    found = get_hrp_state_dict(again, batches(), options=options, show_progress_bar=False)
    assert all(torch.equal(parameter, untouched[name]) for name, parameter in again.named_parameters())
    save_file(found, tmp_path / "hrp.safetensors")
    report = initialize_lora_hrp_weights(
        again, hrp_state_dict=load_file(tmp_path / "hrp.safetensors"), options=options
    )
    assert report.steps == 0
    wanted = dict(once.named_parameters())
    assert {name for name, _ in again.named_parameters()} == set(wanted)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert parameter.requires_grad == wanted[name].requires_grad


def test_a_kept_file_stands_for_a_preheat_and_for_no_other(tmp_path):
    file, counted = tmp_path / "kept.safetensors", []

    def go(**more):
        rank = more.pop("rank", 2)
        model = more.pop("model", None) or matrix_model(rank=rank, lora_alpha=more.pop("alpha", rank))
        report = initialize_lora_hrp_weights(
            model,
            train_step=lambda model, step: counted.append(step) or model(),
            cache_file=file,
            preheat_steps=3,
            show_progress_bar=False,
            **more,
        )
        return factors(model)[0], report

    rows, report = go()
    again, told = go()
    assert len(counted) == 3
    assert torch.equal(rows, again)
    assert json.dumps(told.to_json()) == json.dumps(report.to_json())
    with pytest.raises(InputError, match=r"kept\.safetensors: found with seed 0, now 1; remove it"):
        go(seed=1)
    with pytest.raises(InputError, match=r"with layer layer r=2 R=10 scale=1\.0, now r=1 R=10 scale=1\.0;"):
        go(rank=1)
    with pytest.raises(InputError, match=r"with layer layer r=2 R=10 scale=1\.0, now r=2 R=10 scale=3\.0;"):
        go(alpha=6)
    with pytest.raises(InputError, match=r"found with base [0-9a-f]{16}, now [0-9a-f]{16}; remove it"):
        go(model=adapted(nn.ModuleDict({"layer": nn.Linear(COLUMNS, ROWS), "more": nn.Linear(2, 2)})))
    file.write_bytes(b"no such file")
    with pytest.raises(InputError, match=r"can't be read as safetensors"):
        go()


def test_a_saved_adapter_gives_the_logits_back(tmp_path):
    model = text_model()
    initialize_lora_hrp_weights(model, batches(), preheat_steps=3, show_progress_bar=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.eval()
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(Text(), tmp_path / "adapter").eval()
    ids = batches()[0]["ids"]
    torch.testing.assert_close(loaded(ids), model(ids), rtol=0, atol=1e-6)


def test_the_report_tells_what_a_layer_kept(tmp_path):
    model = text_model()
    report = initialize_lora_hrp_weights(model, batches(), preheat_steps=4, show_progress_bar=False)
    record = json.loads(report.save(tmp_path).read_text())
    layer = record["layers"]["inner"]
    values = torch.tensor(layer["singular_values"]).square()
    assert layer["captured"] == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-4)
    assert layer["gap"] == pytest.approx(layer["singular_values"][1] / layer["singular_values"][2], rel=1e-4)
    assert record["steps"] == 4
    assert record["first_loss"] == report.losses[0]
    assert layer["defect"] < 1e-5


def test_rows_in_sixteen_bits_tell_how_far_they_are_from_orthonormal():
    model = adapted(Text().bfloat16(), target_modules=["inner", "head"])
    report = initialize_lora_hrp_weights(
        model,
        [{"ids": b["ids"], "labels": b["labels"]} for b in batches()],
        preheat_steps=2,
        show_progress_bar=False,
    )
    assert factors(model, "inner")[0].dtype == torch.bfloat16
    assert 1e-4 < max(layer.defect for layer in report.layers.values()) < 0.05


# Bad input


def test_what_is_no_fresh_lora_model_is_refused():
    with pytest.raises(ValueError, match="model must be a PeftModel; call get_peft_model first"):
        initialize(Matrix(target()))
    model = text_model()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["inner"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(InputError, match="one active adapter, found default, other"):
        initialize(model)
    with pytest.raises(InputError, match="no adapter `mine`, found default"):
        initialize(matrix_model(), adapter_name="mine")
    other = peft.get_peft_model(Matrix(target()), peft.LoHaConfig(r=2, target_modules=["layer"]))
    with pytest.raises(InputError, match="adapter `default` is a LoHaConfig; HRP needs LoRA"):
        initialize(other)
    mixed = peft.get_peft_model(Matrix(target()), peft.LoraConfig(r=2, target_modules=["layer"]), mixed=True)
    with pytest.raises(InputError, match=r"HRP needs get_peft_model\(mixed=False\)"):
        initialize(mixed)


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "lora_ga", "loftq", "mica"])
def test_a_start_that_changed_the_weights_is_refused(start):
    model = adapted(Matrix(target(dtype=torch.float32)))
    model.peft_config["default"].init_lora_weights = start  # some need more libraries to begin so
    with pytest.raises(InputError, match=f"init_lora_weights='{start}' has begun the adapter"):
        initialize(model)


def test_a_trained_adapter_is_not_thrown_away_unless_told():
    model = matrix_model()
    model.base_model.model.layer.lora_B["default"].weight.data.fill_(1.0)
    with pytest.raises(
        InputError, match=r"layer: B of adapter `default` is not 0: it is trained.*overwrite="
    ):
        initialize(model)
    initialize(model, overwrite=True, preheat_steps=2)
    assert not factors(model)[1].any()


def test_a_start_whose_b_is_not_0_is_named():
    model = adapted(Matrix(target(dtype=torch.float32)), init_lora_weights="orthogonal")
    with pytest.raises(InputError, match=r"or begun so \(init_lora_weights='orthogonal'\)"):
        initialize(model)


def test_merged_adapters_are_refused():
    model = matrix_model()
    model.merge_adapter()
    with pytest.raises(InputError, match="layer: adapters are merged"):
        initialize(model)


def test_a_rank_that_cant_lead_anywhere_names_both_and_the_layer():
    with pytest.raises(InputError, match=r"layer has r=2, found 2 \(force=True"):
        initialize(matrix_model(), preheat_rank=2)
    with pytest.raises(InputError, match=r"layer has r=128, the default is 128 \(force=True"):
        initialize(matrix_model(rank=128))
    initialize(matrix_model(rank=128), force=True, preheat_steps=1)
    with pytest.raises(InputError, match=r"preheat_rank: 'nowhere' matches no layer; names are like layer"):
        initialize(matrix_model(), preheat_rank={"nowhere": 8})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preheat_steps": 0}, "preheat_steps must be a whole number of at least 1, got 0"),
        ({"preheat_rank": -1}, "preheat_rank must be a whole number"),
        ({"preheat_rank": {"[": 3}}, "is no regular expression"),
        ({"preheat_lr": 0.0}, "preheat_lr must be above 0"),
        ({"assign": "C"}, "assign must be one of A, B, both, got 'C'"),
        ({"a_scale": "long"}, "a_scale must be one of orthonormal, kaiming or a number"),
        ({"a_scale": -1.0}, "a_scale must be a number above 0"),
        ({"rank_energy": 0.5}, "rank_energy must be at least 1"),
        ({"preheat_optimizer": "sdg"}, "did you mean `sgd`"),
        ({"preheat_lr": "1e-3"}, "preheat_lr must be above 0 and finite, got '1e-3'"),
        ({"rank_energy": "2"}, "rank_energy must be at least 1 and finite, got '2'"),
        ({"preheat_rank": {3: 8}}, "preheat_rank must be a mapping of patterns of names, got 3"),
        ({"force": "no"}, "force must be true or false, got 'no'"),
        ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
        (
            {"preheat_optimizer": torch.optim.SGD, "preheat_lr": 0.1},
            "preheat_lr has no effect on a preheat_op",
        ),
        ({"options": {"preheat_steps": 3}}, "options must be HRPOptions, got dict; single fields may be"),
        ({"preheat_step": 3}, "no option `preheat_step`; did you mean `preheat_steps`"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_an_option_out_of_range_names_itself(options, message):
    with pytest.raises(InputError, match=message):
        initialize(matrix_model(), **options)


def test_the_three_ways_to_find_directions_exclude_each_other():
    with pytest.raises(InputError, match="one of dataloader, train_step and hrp_state_dict, found none"):
        initialize_lora_hrp_weights(matrix_model())
    with pytest.raises(InputError, match="found both"):
        initialize_lora_hrp_weights(text_model(), batches(), train_step=lambda model, step: model())
    with pytest.raises(InputError, match="with hrp_state_dict nothing is trained"):
        initialize_lora_hrp_weights(text_model(), batches(), hrp_state_dict={})


def test_data_that_ends_is_read_again_with_a_warning_if_it_can_be(caplog):
    initialize_lora_hrp_weights(text_model(), batches(2), preheat_steps=7, show_progress_bar=False)
    assert caplog.text.count("the data ended after 2 of the preheat's 7 batches") == 1
    with pytest.raises(InputError, match="ended after 2 of the preheat's 7 batches and can't be read again"):
        initialize_lora_hrp_weights(text_model(), iter(batches(2)), preheat_steps=7, show_progress_bar=False)
    with pytest.raises(InputError, match="dataloader is empty"):
        initialize_lora_hrp_weights(text_model(), [], preheat_steps=7, show_progress_bar=False)


def test_a_model_that_tells_no_loss_is_told_what_is_missing():
    clean = [{"ids": batch["ids"]} for batch in batches()]
    model = text_model()
    model.base_model.model.forward = lambda ids: {"logits": ids}
    with pytest.raises(InputError, match="tells no loss of a batch with ids: expected labels, or a forw"):
        initialize_lora_hrp_weights(model, clean, show_progress_bar=False)


def test_batches_without_names_need_a_function_that_takes_them():
    pairs = [(batch["ids"], batch["labels"]) for batch in batches()]
    with pytest.raises(InputError, match=r"dataloader: a batch is a tuple, expected a mapping .* forward_fn"):
        initialize_lora_hrp_weights(text_model(), pairs, show_progress_bar=False)
    initialize_lora_hrp_weights(
        text_model(),
        pairs,
        forward_fn=lambda model, batch: model(*batch),
        preheat_steps=1,
        show_progress_bar=False,
    )


def backward_itself(model, step):
    model().backward()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda: None, r"train_step takes \(\), expected \(model, step\)"),
        (lambda model: model(), r"train_step takes \(model\), expected \(model, step\)"),
        (
            backward_itself,
            "train_step gave None, expected the loss as a tensor; HRP itself runs its backward",
        ),
        (lambda model, step: model().item(), "train_step gave float, expected the loss as a tensor"),
        (lambda model, step: model().expand(4), r"gave a loss of shape \(4,\), expected one number"),
        (lambda model, step: model().detach(), "gave a loss without a gradient, expected one that depends"),
    ],
    ids=["of nothing", "of the model", "backward itself", "float", "vector", "detached"],
)
def test_a_step_that_gives_no_loss_to_go_down_is_refused_and_the_model_as_it_was(step, message):
    model = matrix_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=message):
        initialize_lora_hrp_weights(model, train_step=step, show_progress_bar=False)
    assert list(model.peft_config) == ["default"]
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_loss_that_is_no_number_stops_and_leaves_the_model_as_it_was():
    model = matrix_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    def step(model, number):
        return model() * (float("nan") if number == 2 else 1.0)

    with pytest.raises(
        InputError, match=r"the loss is nan in step 3 of 5; lower its learning rate \(now 0\.25\)"
    ):
        initialize_lora_hrp_weights(
            model, train_step=step, preheat_steps=5, preheat_lr=0.25, show_progress_bar=False
        )
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert list(model.peft_config) == model.active_adapters == ["default"]


def test_factors_that_overflow_in_one_layer_cost_that_layers_direction_and_in_most_stop(caplog):
    def breaking(names):
        def optimizer(parameters):
            made = torch.optim.SGD(parameters, lr=0.01)
            broken = [p for p in parameters if tuple(p.shape) in names]
            assert broken
            made.register_step_post_hook(lambda *_: [p.data.fill_(float("inf")) for p in broken])
            return made

        return optimizer

    model = text_model(target_modules=["conv", "inner", "head"])
    report = initialize_lora_hrp_weights(
        model, batches(), preheat_steps=1, preheat_optimizer=breaking({(11, 8)}), show_progress_bar=False
    )
    assert report.layers["head"].fallback == "not finite"
    assert "head keeps a random direction: not finite" in caplog.text
    rows, _ = factors(model, "head")
    torch.testing.assert_close(rows @ rows.mT, torch.eye(2), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="2 of 3 layers have NaN or infinite factors; lower the preheat's"):
        initialize_lora_hrp_weights(
            model,
            batches(),
            preheat_steps=1,
            preheat_optimizer=breaking({(11, 8), (8, 8)}),
            show_progress_bar=False,
        )


def test_a_preheat_that_goes_up_is_told(caplog):
    initialize(matrix_model(), preheat_optimizer="sgd", preheat_lr=100.0, preheat_steps=3, trainable="B")
    assert "the preheat raised the loss" in caplog.text


def test_directions_of_another_model_are_refused_with_names_and_shapes():
    found = get_hrp_state_dict(
        matrix_model(), train_step=lambda model, step: model(), preheat_steps=2, show_progress_bar=False
    )
    with pytest.raises(InputError, match=r"4 missing \(conv\), 1 unexpected \(layer\)"):
        initialize_lora_hrp_weights(text_model(), hrp_state_dict=found)
    with pytest.raises(InputError, match=r"layer is \(2, 14\), the adapter needs \(3, 14\)"):
        initialize_lora_hrp_weights(matrix_model(rank=3), hrp_state_dict=found)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(14), r"layer is \(14,\), the adapter needs \(2, 14\)"),
        (torch.ones(3, 2, 14), r"layer is \(3, 2, 14\), the adapter needs \(2, 14\)"),
        (torch.ones(0, 14), r"layer is \(0, 14\), the adapter needs"),
        ([[1.0] * 14] * 2, r"layer is list, the adapter needs \(2, 14\)"),
        (torch.full((2, 14), float("nan")), "layer has NaN or infinite values"),
    ],
    ids=["vector", "stack", "no rank", "list", "NaN"],
)
@pytest.mark.parametrize("more", [{}, {"rank_energy": 2.0}], ids=["same ranks", "shared ranks"])
def test_directions_that_cant_be_an_adapters_are_refused_before_anything_is_replaced(value, message, more):
    model = matrix_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(InputError, match=f"hrp_state_dict: {message}"):
        initialize_lora_hrp_weights(model, hrp_state_dict={"layer": value}, **more)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_directions_of_experts_are_as_many_as_the_experts():
    model = peft.get_peft_model(
        Mixture(), peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.up"])
    )
    found = get_hrp_state_dict(
        model,
        train_step=lambda model, step: model(torch.ones(4, 5)),
        preheat_steps=1,
        show_progress_bar=False,
    )
    ((name, value),) = found.items()
    with pytest.raises(InputError, match=r"is \(2, 5\), the adapter needs \(3, 2, 5\)"):
        initialize_lora_hrp_weights(model, hrp_state_dict={name: value[0]})
    initialize_lora_hrp_weights(model, hrp_state_dict=found)


def test_layers_of_other_kinds_are_named_once_and_alone_are_no_model(caplog):
    model = text_model(target_modules=["grouped", "head"])
    report = initialize_lora_hrp_weights(model, batches(), preheat_steps=2, show_progress_bar=False)
    assert report.skipped == ("grouped",)
    assert "no direction for grouped" in caplog.text
    with pytest.raises(InputError, match="adapter `default` has no layer that HRP knows"):
        initialize(text_model(target_modules=["grouped"]))


def test_adapters_without_memory_are_refused():
    model = copy.deepcopy(matrix_model()).to("meta")
    with pytest.raises(InputError, match="layer: its adapter has no memory yet"):
        initialize(model)
