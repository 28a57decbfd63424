"""Choosing candidates: rules, searches and SeWA on a model, and what they refuse."""

import itertools
import logging
import math

import pytest
import torch
from torch import nn

from weightsmith.errors import InputError
from weightsmith.training import AveragingOptions, MemoryBank, SeWAOptions, sewa_select
from weightsmith.training.averaging.choice import by_rule
from weightsmith.training.averaging.objective import Objective
from weightsmith.training.averaging.search import select
from weightsmith.training.averaging.slots import slots_of

DIM = 6


def line(weight):
    model = nn.Linear(DIM, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(weight)
    return model


def error(model, batch):
    inputs, targets = batch
    return (model(inputs)[:, 0] - targets).square().mean()


def data(number=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.ones(DIM)
    batches = []
    for _ in range(number):
        inputs = torch.randn(16, DIM, generator=generator)
        batches.append((inputs, inputs @ truth))
    return batches


def candidates(number=8, bad=(), seed=1, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(number)
    for step in range(number):
        scale = 6.0 if step in bad else spread
        bank.add(line(torch.ones(DIM) + scale * torch.randn(DIM, generator=generator)), 100 + step)
    return bank


def true_loss(bank, indices, batches):
    model = line(torch.zeros(DIM))
    bank.mix([1 / len(indices) if i in indices else 0.0 for i in range(len(bank))], model)
    return float(torch.stack([error(model, batch) for batch in batches]).mean())


def weights_of(**options):
    return by_rule(AveragingOptions(num_candidates=10, **options), range(10, 110, 10)).chosen_steps


def test_rules_choose_the_candidates_their_names_say():
    assert weights_of(method="uniform") == tuple(range(10, 110, 10))
    assert weights_of(method="lawa", num_select=3) == (80, 90, 100)
    assert weights_of(method="every", num_select=5) == (20, 40, 60, 80, 100)
    assert weights_of(method="every", num_select=3) == (40, 70, 100)
    assert weights_of(method="every", num_select=10) == weights_of(method="lawa", num_select=10)
    chosen = weights_of(method="random", num_select=4, seed=1)
    assert len(set(chosen)) == 4
    assert chosen == weights_of(method="random", num_select=4, seed=1)
    assert chosen != weights_of(method="random", num_select=4, seed=2)


def test_ema_over_candidates_equals_the_running_formula():
    found = by_rule(AveragingOptions(method="ema", decay=0.7), range(5))
    values = [3.0, -1.0, 2.0, 5.0, 0.5]
    mean = values[0]
    for value in values[1:]:
        mean = 0.7 * mean + 0.3 * value
    assert sum(w * v for w, v in zip(found.weights, values, strict=True)) == pytest.approx(mean)
    assert sum(found.weights) == pytest.approx(1.0)


def test_best_takes_those_with_the_lowest_loss_alone():
    bank, batches = candidates(), data()
    found = select(
        AveragingOptions(method="best", num_select=3), bank, line(torch.zeros(DIM)), batches, error
    )
    alone = {index: true_loss(bank, [index], batches) for index in range(8)}
    assert set(found.indices) == set(sorted(alone, key=alone.get)[:3])
    assert list(found.scores) == pytest.approx([alone[index] for index in range(8)], rel=1e-5)


def test_the_greedy_soup_equals_a_plain_loop():
    bank, batches = candidates(), data()
    order = sorted(range(8), key=lambda index: true_loss(bank, [index], batches))
    soup, best = [], math.inf
    for index in order:
        value = true_loss(bank, [*soup, index], batches)
        if value <= best:
            soup, best = [*soup, index], value
    found = select(AveragingOptions(method="greedy"), bank, line(torch.zeros(DIM)), batches, error)
    assert set(found.indices) == set(soup)
    assert found.losses["soup"] == pytest.approx(best, rel=1e-5)


def test_sewa_leaves_bad_candidates_out_and_beats_the_latest():
    bank, batches = candidates(12, bad=(2, 9, 11)), data()
    found = sewa_select(line(torch.zeros(DIM)), bank, batches, error, num_select=4)
    assert not {102, 109, 111} & set(found.chosen_steps)
    assert true_loss(bank, found.indices, batches) < true_loss(bank, range(8, 12), batches)
    assert len(found.scores) == 12
    assert found.cost["forward"] == found.cost["backward"] == 200


def test_the_model_comes_back_as_it_was():
    model = nn.Sequential(nn.Linear(DIM, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
    bank = MemoryBank()
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
                )
        bank.add(model, step)
    model(torch.randn(8, DIM))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = model[0].weight.grad = torch.ones_like(model[0].weight)
    model[2].eval()
    sewa_select(model, bank, data(), error, num_select=2, options=SeWAOptions(steps=3))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model[0].weight.grad is gradient
    assert [module.training for module in model] == [True, True, False, True]
    assert model[1].track_running_stats


def test_norms_use_each_batchs_statistics_or_those_of_the_mixture():
    model = nn.Sequential(nn.Linear(DIM, 1), nn.BatchNorm1d(1, affine=False))
    bank = MemoryBank()
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
    bank.add(model, 0)
    batch = data(1)
    results = {}
    for kind in ("recompute", "average"):
        with Objective(model, bank, batch, error, norm_statistics=kind) as objective:
            results[kind] = objective.score([1.0], 1)
    model.train()
    assert results["recompute"] == pytest.approx(float(error(model, batch[0])), rel=1e-5)
    with torch.no_grad():
        model[1].running_mean.fill_(7.0)
        model[1].running_var.fill_(1.0)
    model.eval()
    assert results["average"] == pytest.approx(float(error(model, batch[0])), rel=1e-5)


def test_all_candidates_need_no_learning():
    found = sewa_select(line(torch.zeros(DIM)), candidates(4), [], error, num_select=4)
    assert found.weights == (0.25,) * 4
    assert found.cost == {}


def test_one_candidate_is_the_choice_of_one_state():
    bank, batches = candidates(6, bad=(0, 1, 2, 4, 5)), data()
    found = sewa_select(line(torch.zeros(DIM)), bank, batches, error, num_select=1)
    assert found.chosen_steps == (103,)


def test_auto_takes_the_number_whose_mean_has_the_lowest_loss():
    bank, batches = candidates(12, bad=(0, 1, 2, 3, 4)), data()
    model = line(torch.zeros(DIM))
    found = sewa_select(model, bank, batches, error, num_select="auto", held_out_batches=4)
    assert set(found.losses) == {"top 1", "top 2", "top 5", "top 10", "top 12"}
    best = min(found.losses, key=found.losses.get)
    assert len(found.indices) == int(best.split()[1])


@pytest.mark.parametrize("seed", range(4))
def test_polishing_never_ends_worse_and_can_reach_a_better_subset(seed):
    bank, batches = candidates(8, seed=seed), data()
    model, options = line(torch.zeros(DIM)), {"steps": 5, "seed": seed}
    plain = sewa_select(model, bank, batches, error, num_select=3, options=SeWAOptions(**options))
    polished = sewa_select(
        model,
        bank,
        batches,
        error,
        num_select=3,
        options=SeWAOptions(polish=10, **options),
        held_out_batches=4,
    )
    before, after = (true_loss(bank, found.indices, batches) for found in (plain, polished))
    assert after <= before + 1e-9
    assert polished.losses["after polish"] == pytest.approx(after, rel=1e-4)
    assert len(polished.indices) == 3
    worst = max(true_loss(bank, subset, batches) for subset in itertools.combinations(range(8), 3))
    assert after < worst


def test_broken_candidates_are_dropped_with_their_steps(caplog):
    bank, batches = candidates(6), data()
    broken = line(torch.full((DIM,), math.nan))
    bank.keep(range(1, 6))
    bank.add(broken, 106)
    with caplog.at_level(logging.WARNING):
        found = sewa_select(line(torch.zeros(DIM)), bank, batches, error, num_select=3)
    assert "steps [106]" in caplog.text
    assert 106 not in found.steps
    bank = candidates(2)
    bank.keep([0])
    bank.add(broken, 106)
    with pytest.raises(
        InputError, match=r"1 of 2 candidates hold NaN or infinity \(steps \[106\]\); 2 are needed"
    ):
        sewa_select(line(torch.zeros(DIM)), bank, batches, error, num_select=2)


@pytest.mark.parametrize("num_select", [0, 9])
def test_a_number_that_is_not_there_is_refused_with_both(num_select):
    with pytest.raises(InputError, match=rf"num_select must be in 1..8 \(the candidates\), got {num_select}"):
        sewa_select(line(torch.zeros(DIM)), candidates(8), data(), error, num_select=num_select)


def test_data_that_is_not_there_or_read_only_once_is_refused():
    model, bank = line(torch.zeros(DIM)), candidates(4)
    with pytest.raises(InputError, match="`batches` is empty"):
        sewa_select(model, bank, [], error, num_select=2)
    with pytest.raises(InputError, match="give a list or a DataLoader"):
        sewa_select(model, bank, iter(data()), error, num_select=2)
    with pytest.raises(InputError, match="sewa needs a model and data"):
        select(AveragingOptions(num_select=2), bank)
    with pytest.raises(InputError, match="the loss must be one number"):
        sewa_select(model, bank, data(), lambda m, b: m(b[0])[:, 0] - b[1], num_select=2)


def test_a_loss_that_is_never_finite_is_refused():
    with pytest.raises(InputError, match="not finite at any mixture"):
        sewa_select(
            line(torch.zeros(DIM)),
            candidates(4),
            data(),
            lambda m, b: error(m, b) * math.nan,
            num_select=2,
            options=SeWAOptions(steps=2),
        )


def test_batches_shorter_than_the_run_are_started_over():
    seen = []

    def counting(model, batch):
        seen.append(batch)
        return error(model, batch)

    batches = data(2)
    sewa_select(
        line(torch.zeros(DIM)), candidates(4), batches, counting, num_select=2, options=SeWAOptions(steps=5)
    )
    assert [next(i for i, b in enumerate(batches) if b[0] is s[0]) for s in seen] == [0, 1, 0, 1, 0]


def test_the_choice_does_not_depend_on_where_candidates_are_kept():
    """Rows of the ring in another order, and differences in bfloat16, choose the same states."""
    plain, batches = candidates(8, bad=(1, 6)), data()
    ring, short = MemoryBank(8), MemoryBank(8, storage=torch.bfloat16)
    for step in range(3):
        ring.add(line(torch.zeros(DIM)), step)
    for index, step in enumerate(plain.steps):
        model = line(torch.zeros(DIM))
        plain.mix([float(other == index) for other in range(8)], model)
        for bank in (ring, short):
            bank.add(model, step)
    choices = [
        sewa_select(line(torch.zeros(DIM)), bank, batches, error, num_select=3).chosen_steps
        for bank in (plain, ring, short)
    ]
    assert choices[0] == choices[1] == choices[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "sewaa"}, "method must be one of"),
        ({"num_select": 0}, "num_select must be a whole number"),
        ({"num_select": 2.5}, "num_select must be a whole number"),
        ({"num_select": 20, "num_candidates": 10}, r"num_select must be in 1..10 \(the candidates\), got 20"),
        ({"method": "lawa", "num_select": "auto"}, "num_select `auto` is for sewa"),
        ({"start": -0.1}, "start must be"),
        ({"start": 10.5}, "start must be"),
        ({"every": 0}, "every must be"),
        ({"decay": 1.0}, "decay must be"),
        ({"batches": 0}, "batches must be"),
    ],
)
def test_averaging_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        AveragingOptions(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"mc_samples": 0}, "mc_samples must be"),
        ({"temperature": (0.0, 0.1)}, "temperature must be above 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"parameterization": "logits"}, "parameterization must be one of prob, logit"),
        ({"normalize": "mean"}, "normalize must be one of sum, count"),
        ({"polish": -1}, "polish must not be negative"),
    ],
)
def test_sewa_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        SeWAOptions(**options)


def test_the_tail_is_collected_up_to_the_last_step():
    options = AveragingOptions(num_candidates=10, num_select=5)
    assert [step for step in range(1, 101) if options.collects(step, 100)] == [*range(82, 101, 2)]
    fixed = AveragingOptions(num_candidates=10, num_select=5, start=30, every=25)
    assert [step for step in range(1, 101) if fixed.collects(step, 100)] == [50, 75, 100]
    short = AveragingOptions()
    assert [step for step in range(1, 11) if short.collects(step, 10)] == [9, 10]


def test_what_has_a_gradient_is_what_is_mixed():
    model = line(torch.zeros(DIM))
    assert [slot.name for slot in slots_of(model)] == ["weight"]
