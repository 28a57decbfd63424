"""The controller: who takes part, when it looks, what it does to each optimiser's step, and going on after a
stop."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_lines
from weightsmith.tensors.esd import alpha_hill
from weightsmith.training import AlphaDecay

WIDTH, HIDDEN = 12, 20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(self.norm(self.q_proj(x)))))


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embed = nn.Embedding(16, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, 16, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)

    def get_output_embeddings(self):
        return self.lm_head


def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)


def loss_of(model, step):
    ids = torch.randint(0, 16, (4, 6), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten().roll(1))


class OtherAdamW(torch.optim.AdamW):
    """Stands for an optimiser that may keep something by group: its groups stay whole during a step."""


def adamw(model, kind=torch.optim.AdamW, **options):
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    return kind(groups, **{"lr": 1e-2, "foreach": False, **options})


def train(model, optimizer, steps, scheduler=None, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [p.detach().clone() for p in model.parameters()]


def decay_for(model, optimizer, **options):
    return AlphaDecay(model, optimizer, **{"min_dim": 8, "interval": 3, **options})


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)


PROJECTIONS = [f"layers.{i}.{p}.weight" for i in range(2) for p in ("q_proj", "up_proj", "down_proj")]


def test_the_projections_of_the_blocks_take_part_and_nothing_else():
    model = net()
    decay = decay_for(model, adamw(model))
    assert [matrix.name for matrix in decay.matrices] == PROJECTIONS
    assert decay.skipped == {"embed.weight": "an embedding", "lm_head.weight": "the output head"}


def test_a_head_tied_to_the_embedding_is_left_alone():
    model = net(tied=True)
    decay = decay_for(model, adamw(model))
    assert [matrix.name for matrix in decay.matrices] == PROJECTIONS
    assert decay.skipped == {"embed.weight": "an embedding"}


def test_a_pattern_that_fits_no_parameter_names_the_nearest():
    model = net()
    for key, value in (("include", ["up_prj"]), ("exclude", ["up_prj"]), ("split", {"up_prj": (0, 2)})):
        said = rf"{key}: `up_prj` matches no parameter; the nearest is `layers\.0\.up_proj\.\w+`"
        with pytest.raises(InputError, match=said):
            decay_for(model, adamw(model), **{key: value})
    with pytest.raises(InputError, match=r"exclude: `\*norm` is no regular expression"):
        decay_for(model, adamw(model), exclude=["*norm"])


def test_small_frozen_adapter_and_excluded_matrices_are_named_with_the_reason():
    model = net()
    model.layers[0].q_proj.weight.requires_grad_(False)
    model.layers[0].lora_A = nn.Linear(WIDTH, WIDTH, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    decay = decay_for(model, optimizer, exclude=["layers.1.up"], min_dim=8)
    assert decay.skipped["layers.0.q_proj.weight"] == "frozen"
    assert decay.skipped["layers.0.lora_A.weight"] == "part of an adapter"
    assert decay.skipped["layers.1.up_proj.weight"] == "excluded"
    with pytest.raises(InputError, match=r"no matrix .*its smaller side is 12, below min_dim 50"):
        AlphaDecay(model, optimizer)


def test_the_authors_choice_drops_the_first_and_the_last_linear_layer():
    model = net()
    decay = decay_for(model, adamw(model), compat="author")
    assert [matrix.name for matrix in decay.matrices] == PROJECTIONS[1:]


def author_decays(model, base, low, high, threshold):
    """The released procedure in plain steps: every linear layer, svdvals, median, drop first and last,
    interpolate."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            eigenvalues = torch.linalg.svdvals(module.weight.data.float()).square().sort().values
            start = int(len(eigenvalues) / 2)
            count = float(len(eigenvalues) - start)
            logs = eigenvalues.log()
            alpha = 1 + count / (logs[start:].sum() - count * logs[start])
            rows.append((name, alpha.item(), len(eigenvalues)))
    rows = [row for row in rows[1:-1] if row[2] >= threshold]
    alphas = np.array([row[1] for row in rows])
    decays = np.interp(alphas, [alphas.min(), alphas.max()], [low * base, high * base])
    return {f"{row[0]}.weight": decay for row, decay in zip(rows, decays, strict=True)}


def test_decays_equal_those_of_the_released_procedure():
    model = net()
    decay = decay_for(model, adamw(model), compat="author", scale_range=(0.6666, 3.0))
    decay.refresh()
    expected = author_decays(model, 0.3, 0.6666, 3.0, threshold=8)
    assert decay.weight_decays().keys() == expected.keys()
    np.testing.assert_allclose(list(decay.weight_decays().values()), list(expected.values()), rtol=1e-4)


def reference_adamw(model, steps, interval, low, high, base=0.3, lr=1e-2, betas=(0.9, 0.999), eps=1e-8):
    """AdamW with a decay for each matrix, written from the equations in fp64, exponents by svdvals."""
    model = model.double()
    names = dict(model.named_parameters())
    first = {name: torch.zeros_like(p) for name, p in names.items()}
    second = {name: torch.zeros_like(p) for name, p in names.items()}
    decays = {}
    for step in range(steps):
        if step % interval == 0:
            alphas = {}
            for name in PROJECTIONS:
                values = torch.linalg.svdvals(names[name].detach()).square().flip(0)
                tail = values[len(values) // 2 :]
                alphas[name] = 1 + len(tail) / (tail / tail[0]).log().sum().item()
            small, large = min(alphas.values()), max(alphas.values())
            decays = {
                n: base * ((a - small) / (large - small) * (high - low) + low) for n, a in alphas.items()
            }
        model.zero_grad()
        loss_of(model, step).backward()
        with torch.no_grad():
            for name, p in names.items():
                if p.ndim == 2:
                    p -= lr * decays.get(name, base) * p
                first[name] = betas[0] * first[name] + (1 - betas[0]) * p.grad
                second[name] = betas[1] * second[name] + (1 - betas[1]) * p.grad**2
                mean = first[name] / (1 - betas[0] ** (step + 1))
                square = second[name] / (1 - betas[1] ** (step + 1))
                p -= lr * mean / (square.sqrt() + eps)
    return list(model.parameters()), decays


@pytest.mark.parametrize("mode", ["decoupled", "groups"])
def test_fifty_steps_follow_a_reference_written_from_the_equations(mode):
    model, twin = net(), net()
    decay = decay_for(model.double(), adamw(model), mode=mode, interval=7)
    found = train(model, decay._optimizer, 50)
    expected, decays = reference_adamw(twin, 50, 7, 0.67, 3.0)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        [decay.weight_decays()[n] for n in PROJECTIONS], [decays[n] for n in PROJECTIONS], rtol=1e-3
    )


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True, "foreach": None}])
def test_both_modes_take_the_same_steps_under_a_learning_rate_schedule(backend):
    results = []
    for mode in ("groups", "decoupled"):
        model = net()
        optimizer = adamw(model, **backend)
        decay_for(model, optimizer, mode=mode, interval=5)
        results.append(train(model, optimizer, 50, cosine(optimizer)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-2)}], ids=str
)
@pytest.mark.parametrize("closure", [False, True])
def test_the_fused_kernel_called_from_the_hook_takes_torchs_own_steps(options, closure, monkeypatch):
    calls, kernel = [], torch._fused_adamw_

    def counted(*arguments, **keywords):
        calls.append(len(arguments[0]))
        kernel(*arguments, **keywords)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    results, steps = [], []
    for mode in ("groups", "decoupled"):
        model = net()
        optimizer = adamw(model, fused=True, foreach=None, **options)
        decay_for(model, optimizer, mode=mode, interval=5)
        calls.clear()
        for step in range(20):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if step == 9:
                model.layers[0].q_proj.weight.grad = None  # stays behind the others by a step from here on
            optimizer.step((lambda: 1.0) if closure else None)
        assert sum(calls) == 20 * len(list(model.parameters())) - 1
        results.append(list(model.parameters()))
        steps.append(sorted(float(state["step"]) for state in optimizer.state.values()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert steps[0] == steps[1]


@pytest.mark.parametrize("backend", [{"foreach": False}, {"fused": True, "foreach": None}])
def test_an_optimiser_that_keeps_its_groups_whole_takes_the_same_steps_as_adamw(backend):
    model, twin = net(), net()
    optimizer, other = adamw(model, **backend), adamw(twin, OtherAdamW, **backend)
    decay_for(model, optimizer)
    decay_for(twin, other)
    seen = []
    other.register_step_pre_hook(lambda o, *_: seen.append([len(g["params"]) for g in o.param_groups]))
    for ours, theirs in zip(train(model, optimizer, 10), train(twin, other, 10), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert seen == [[len(group["params"]) for group in other.param_groups]] * 10


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True, "foreach": None}])
def test_a_hook_that_comes_later_still_changes_the_gradients_of_the_step(backend):
    def reverse(optimizer, *_):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad.neg_()

    results = []
    for mode in ("groups", "decoupled"):
        model = net()
        optimizer = adamw(model, **backend)
        decay_for(model, optimizer, mode=mode)
        optimizer.register_step_pre_hook(reverse)
        results.append(train(model, optimizer, 5))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [{"foreach": False}, {"fused": True, "foreach": None}])
def test_mode_decoupled_decouples_what_adam_would_add_to_the_gradient(backend):
    model, twin = net(), net()
    adam, wanted = adamw(model, torch.optim.Adam, **backend), adamw(twin, **backend)
    decay_for(model, adam, mode="decoupled")
    decay_for(twin, wanted)
    for ours, theirs in zip(train(model, adam, 10), train(twin, wanted, 10), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}])
@pytest.mark.parametrize("mode", ["decoupled", "groups"])
def test_equal_ends_of_the_range_train_bit_for_bit_as_uniform_decay(mode, backend, caplog):
    model, plain = net(), net()
    optimizer, uniform = adamw(model, **backend), adamw(plain, **backend)
    decay_for(model, optimizer, mode=mode, scale_range=(1.0, 1.0))
    for ours, theirs in zip(train(model, optimizer, 10), train(plain, uniform, 10), strict=True):
        assert torch.equal(ours, theirs)
    assert "exponents are equal" not in caplog.text


def test_equal_exponents_give_the_base_decay_and_a_warning(caplog):
    model = net()
    for matrix in (layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)):
        nn.init.zeros_(matrix)
    decay = decay_for(model, adamw(model))
    decay.refresh()
    assert len(set(decay.weight_decays().values())) == 1
    assert "exponents are equal" in caplog.text


def test_no_decay_stays_no_decay():
    model, plain = net(), net()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, foreach=False)
    uniform = torch.optim.AdamW(plain.parameters(), weight_decay=0.0, foreach=False)
    decay_for(model, optimizer)
    for ours, theirs in zip(train(model, optimizer, 5), train(plain, uniform, 5), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=1e-2, weight_decay=0.1, momentum=0.9),
        lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    ],
    ids=["adam", "sgd", "nadam"],
)
def test_other_optimisers_equal_themselves_with_the_groups_made_by_hand(make):
    model, twin = net(), net()
    decay = decay_for(model, make(model.parameters()), interval=100, mode="groups")
    train(model, decay._optimizer, 6)
    decays = decay.weight_decays()
    by_hand = make([{"params": [p], "weight_decay": decays.get(n, 0.1)} for n, p in twin.named_parameters()])
    for ours, theirs in zip(model.parameters(), train(twin, by_hand, 6), strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-6, atol=1e-7)


def test_the_mode_follows_how_the_optimiser_decays():
    model = net()
    for optimizer, mode in [
        (torch.optim.AdamW(model.parameters()), "decoupled"),
        (torch.optim.Adam(model.parameters(), weight_decay=0.1), "groups"),
        (torch.optim.SGD(model.parameters(), weight_decay=0.1), "groups"),
        (torch.optim.NAdam(model.parameters(), decoupled_weight_decay=True), "decoupled"),
    ]:
        decay = decay_for(model, optimizer)
        assert decay.mode == mode
        decay.detach()


def test_decoupled_leaves_the_groups_as_they_were():
    model = net()
    optimizer = adamw(model)
    before = [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    decay_for(model, optimizer)
    train(model, optimizer, 4)
    assert [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups] == before


def test_groups_keep_every_option_and_all_state():
    model = net()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.layers[0].named_parameters()), "lr": 3e-3, "betas": (0.8, 0.9)},
            {"params": [(n, p) for n, p in model.named_parameters() if not n.startswith("layers.0")]},
        ],
        lr=1e-2,
        weight_decay=0.3,
    )
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict()["state"])
    decay_for(model, optimizer, mode="groups")
    homes = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert len(homes) == len(list(model.parameters()))
    assert homes["q_proj.weight"]["lr"] == 3e-3
    assert homes["q_proj.weight"]["betas"] == (0.8, 0.9)
    assert homes["layers.1.q_proj.weight"]["lr"] == 1e-2
    # State is keyed by parameter; its numbering in the saved form follows the groups.
    assert len(optimizer.state_dict()["state"]) == len(state)
    train(model, optimizer, 1)


def test_the_closure_form_equals_the_plain_one():
    model, twin = net(), net()
    optimizer, plain = adamw(model), adamw(twin)
    decay_for(model, optimizer)
    decay_for(twin, plain)
    for step in range(5):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    for ours, theirs in zip(model.parameters(), train(twin, plain, 5), strict=True):
        assert torch.equal(ours.detach(), theirs)


def test_it_looks_before_steps_0_interval_and_twice_the_interval():
    model = net()
    optimizer = adamw(model)
    decay = decay_for(model, optimizer, interval=4)
    train(model, optimizer, 10)
    assert [record["step"] for record in decay.history] == [0, 4, 8]


@pytest.mark.parametrize("mode", ["decoupled", "groups"])
def test_a_run_that_goes_on_equals_an_undisturbed_one_bit_for_bit(mode, tmp_path):
    def make(log_file):
        model = net()
        optimizer = adamw(model)
        decay = decay_for(model, optimizer, interval=4, mode=mode, log_file=log_file)
        return model, optimizer, decay, cosine(optimizer)

    whole_model, whole, _, schedule = make(tmp_path / "whole.jsonl")
    expected = train(whole_model, whole, 20, schedule)

    model, optimizer, decay, schedule = make(tmp_path / "log.jsonl")
    train(model, optimizer, 7, schedule)
    kept = copy.deepcopy([x.state_dict() for x in (model, optimizer, decay, schedule)])
    train(model, optimizer, 4, schedule, start=7)  # lost, its record in the log with it
    again = make(tmp_path / "log.jsonl")
    for part, state in zip(again, kept, strict=True):
        part.load_state_dict(state)
    for ours, theirs in zip(train(again[0], again[1], 13, again[3], start=7), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert read_lines(tmp_path / "log.jsonl") == read_lines(tmp_path / "whole.jsonl")


def test_a_state_of_other_matrices_is_refused():
    model = net()
    optimizer = adamw(model)
    decay = decay_for(model, optimizer)
    decay.refresh()
    state = decay.state_dict()
    state["factor"].pop("layers.0.q_proj.weight")
    state["factor"]["layers.9.q_proj.weight"] = 1.0
    with pytest.raises(InputError, match=r"missing \['layers.0.q_proj.weight'\].*unexpected \['layers.9"):
        decay.load_state_dict(state)


def test_the_order_of_modules_and_parameters_does_not_matter():
    model = net()
    decays = []
    for order in (1, -1):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.AdamW([{"params": list(twin.parameters())[::order], "weight_decay": 0.3}])
        if order == -1:
            twin.layers = nn.ModuleList(twin.layers)
            twin.layers[0]._modules = dict(reversed(twin.layers[0]._modules.items()))
        decay = decay_for(twin, optimizer)
        decay.refresh()
        decays.append(decay.weight_decays())
    assert decays[0] == decays[1]


def test_each_matrix_scales_the_decay_of_its_own_group():
    model = net()
    groups = [
        {"params": list(model.layers[0].parameters()), "weight_decay": 0.1},
        {
            "params": [p for n, p in model.named_parameters() if not n.startswith("layers.0")],
            "weight_decay": 1.0,
        },
    ]
    decay = decay_for(model, torch.optim.AdamW(groups))
    decay.refresh()
    factors = dict(zip(PROJECTIONS, decay._factors, strict=True))
    for name, value in decay.weight_decays().items():
        assert value == pytest.approx(factors[name] * (0.1 if "layers.0" in name else 1.0))


def test_the_given_base_decay_replaces_that_of_the_groups():
    model, twin = net(), net()
    decay = decay_for(model, adamw(model), base_weight_decay=0.05)
    train(model, decay._optimizer, 3)
    assert max(decay.weight_decays().values()) == pytest.approx(0.15)
    optimizer = adamw(twin)
    outside = [twin.embed.weight, twin.lm_head.weight]
    optimizer.param_groups[0]["weight_decay"] = 0.05
    blocks = [p for p in optimizer.param_groups[0]["params"] if not any(p is other for other in outside)]
    optimizer.param_groups[0]["params"] = blocks
    optimizer.add_param_group({"params": outside, "weight_decay": 0.3})
    decay_for(twin, optimizer)
    train(twin, optimizer, 3)
    torch.testing.assert_close(model.layers[0].q_proj.weight, twin.layers[0].q_proj.weight)


@pytest.mark.parametrize("mode", ["decoupled", "groups"])
def test_the_rest_can_get_the_base_decay_as_in_the_released_code(mode):
    model, twin = net(), net()
    decay = decay_for(model, adamw(model), decay_rest="base", mode=mode)
    train(model, decay._optimizer, 2)
    alone = decay_for(twin, torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.3, foreach=False))
    train(twin, alone._optimizer, 2)
    torch.testing.assert_close(model.layers[0].norm.weight, twin.layers[0].norm.weight)
    torch.testing.assert_close(model.layers[0].up_proj.bias, twin.layers[0].up_proj.bias)


def test_pieces_of_a_fused_projection_are_measured_apart():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    model = nn.ModuleList([Fused()])
    with torch.no_grad():
        model[0].qkv_proj.weight[WIDTH : 2 * WIDTH] *= 100  # a scale that would swamp the others' spectrum
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    decay = decay_for(model, optimizer, split={"qkv_proj": (0, 3)})
    decay.refresh()
    alphas = [alpha_hill(piece).item() for piece in model[0].qkv_proj.weight.detach().split(WIDTH)]
    own = alpha_hill(model[0].out.weight.detach()).item()
    assert decay.alphas()["0.qkv_proj.weight"] == pytest.approx(sum(alphas) / 3)
    low, high = min(*alphas, own), max(*alphas, own)
    factors = [(alpha - low) / (high - low) * 2.33 + 0.67 for alpha in alphas]
    assert decay.weight_decays()["0.qkv_proj.weight"] == pytest.approx(0.1 * sum(factors) / 3, rel=1e-5)


def test_experts_in_one_parameter_are_measured_one_by_one():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, WIDTH, 16))
            self.router = nn.Linear(WIDTH, 4)

    torch.manual_seed(0)
    model = nn.ModuleDict({"layers": nn.ModuleList([Experts(), Experts()])})
    decay = decay_for(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    assert [matrix.name for matrix in decay.matrices] == ["layers.0.up", "layers.1.up"]
    decay.refresh()
    expected = alpha_hill(model["layers"][0].up.detach()).mean().item()
    assert decay.alphas()["layers.0.up"] == pytest.approx(expected)


def test_fused_attention_of_pytorch_is_split_by_itself():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    decay = decay_for(model, torch.optim.AdamW(model.parameters(), weight_decay=0.1))
    matrix = next(m for m in decay.matrices if m.name.endswith("in_proj_weight"))
    assert matrix.split == (0, (WIDTH, WIDTH, WIDTH))


def test_a_rule_of_ones_own_replaces_the_assignment():
    model = net()
    decay = decay_for(model, adamw(model), rule=lambda alphas: np.full_like(alphas, 0.5))
    decay.refresh()
    assert set(decay.weight_decays().values()) == {0.15}


def test_gradient_norms_decide_under_the_sigmoid_rule():
    model = net()
    optimizer = adamw(model)
    decay = decay_for(model, optimizer, assign="sigmoid_gradnorm")
    train(model, optimizer, 1)
    loss_of(model, 0).backward()
    assert all(0 < value < 0.6 for value in decay.weight_decays().values())
    assert len(set(decay.weight_decays().values())) == len(PROJECTIONS)


def test_a_zero_matrix_gets_the_base_decay():
    model = net()
    with torch.no_grad():
        model.layers[0].q_proj.weight.zero_()
    decay = decay_for(model, adamw(model))
    decay.refresh()
    assert math.isnan(decay.alphas()["layers.0.q_proj.weight"])
    assert decay.weight_decays()["layers.0.q_proj.weight"] == pytest.approx(0.3)
    assert decay.history[0]["alpha"]["layers.0.q_proj.weight"] is None


def test_a_broken_matrix_stops_the_run_by_name_and_step():
    model = net()
    optimizer = adamw(model)
    decay_for(model, optimizer)
    train(model, optimizer, 3)
    with torch.no_grad():
        model.layers[1].up_proj.weight[0, 0] = math.nan
    loss_of(model, 0).backward()
    with pytest.raises(InputError, match=r"step 3: layers.1.up_proj.weight holds NaN"):
        optimizer.step()


def test_a_broken_matrix_keeps_its_decay_when_asked(caplog):
    model = net()
    decay = decay_for(model, adamw(model), on_nonfinite="keep")
    decay.refresh()
    before = decay.weight_decays()["layers.1.up_proj.weight"]
    with torch.no_grad():
        model.layers[1].up_proj.weight[0, 0] = math.inf
    decay.refresh()
    assert decay.weight_decays()["layers.1.up_proj.weight"] == before
    assert "layers.1.up_proj.weight" in caplog.text


def test_a_step_that_raises_leaves_the_groups_decay_in_place():
    model = net()
    optimizer = adamw(model)
    decay_for(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.state_dict()
    broken = model.layers[0].q_proj.weight
    broken.grad = broken.grad.to_sparse()
    with pytest.raises(RuntimeError):
        optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["weight_decay"] == 0.3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, OtherAdamW])
def test_a_step_that_a_gradient_scaler_voids_leaves_the_weights_alone(kind, fused):
    model = net()
    optimizer = adamw(model, kind, fused=fused, foreach=None)
    decay_for(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            model.embed.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(p.detach(), old) for p, old in zip(model.parameters(), before, strict=True)]
        assert all(same) if step == 1 else not any(same)


def test_a_learning_rate_kept_in_a_tensor_is_read_at_each_step():
    model, twin = net(), net()
    optimizer, plain = adamw(model, lr=torch.tensor(1e-2)), adamw(twin)
    decay_for(model, optimizer)
    decay_for(twin, plain)
    ours, theirs = train(model, optimizer, 3), train(twin, plain, 3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_groups_after_a_scheduler_are_refused():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(InputError, match="make AlphaDecay before the scheduler"):
        decay_for(model, optimizer)


def test_an_optimiser_without_the_matrix_or_without_decay_is_refused():
    model = net()
    with pytest.raises(InputError, match=r"layers.0.q_proj.weight is not among"):
        decay_for(model, torch.optim.AdamW(model.embed.parameters()))
    optimizer = torch.optim.AdamW(model.parameters())
    del optimizer.param_groups[0]["weight_decay"]
    with pytest.raises(InputError, match="set `weight_decay` on the optimiser"):
        decay_for(model, optimizer)


def test_weights_that_are_not_there_are_refused():
    with torch.device("meta"):
        model = Net()
    with pytest.raises(InputError, match="meta device"):
        decay_for(model, torch.optim.AdamW(model.parameters()))
    model = net()
    model.layers[0].q_proj.weight.data = torch.empty(0, 0)
    with pytest.raises(InputError, match="ZeRO-3"):
        decay_for(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize("split", [{"q_proj": (0, 5)}, {"q_proj": (2, 2)}, {"q_proj": (0, (5, 5))}])
def test_a_split_that_does_not_divide_is_refused(split):
    model = net()
    with pytest.raises(InputError, match=r"does not divide layers.0.q_proj.weight"):
        decay_for(model, adamw(model), split=split)


def test_detaching_gives_uniform_decay_back():
    model, plain = net(), net()
    optimizer, uniform = adamw(model), adamw(plain)
    decay_for(model, optimizer).detach()
    for ours, theirs in zip(train(model, optimizer, 3), train(plain, uniform, 3), strict=True):
        assert torch.equal(ours, theirs)


def test_each_look_at_the_spectra_is_a_line_of_the_log_and_a_record_of_the_history(tmp_path):
    model = net()
    optimizer = adamw(model)
    decay = decay_for(model, optimizer, log_file=tmp_path / "log.jsonl")
    train(model, optimizer, 7)
    assert [record["step"] for record in decay.history] == [0, 3, 6]
    assert all(set(record["alpha"]) == set(PROJECTIONS) for record in decay.history)
    assert read_lines(tmp_path / "log.jsonl") == decay.history


def test_a_two_pass_optimizer_is_decayed_through_its_groups_only():
    from weightsmith.training import SAM

    model = net()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    assert decay_for(model, optimizer).mode == "groups"
    with pytest.raises(InputError, match=r"begins its step at other weights.*take mode `groups`"):
        decay_for(model, optimizer, mode="decoupled")


def test_the_report_names_every_matrix_of_the_model():
    model = net()
    decay = decay_for(model, adamw(model))
    decay.refresh()
    rows = {row["name"]: row for row in decay.report()}
    assert set(rows) == {*PROJECTIONS, "embed.weight", "lm_head.weight"}
    assert rows["layers.0.up_proj.weight"]["shape"] == (HIDDEN, WIDTH)
    assert rows["embed.weight"]["skipped"] == "an embedding"
