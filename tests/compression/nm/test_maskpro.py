"""MaskPro: unbiased steps, the optimum of a small problem, invariances, runs that go on to the same bits."""

import itertools
import math
import warnings
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import nn

from weightsmith.compression.nm import (
    Mask,
    MaskProConfig,
    MaskProPruner,
    Pattern,
    nm_mask,
    nm_score,
    sample_nm,
    write_masks,
)
from weightsmith.compression.nm import groups as pieces
from weightsmith.compression.nm.batches import batch_key
from weightsmith.compression.nm.learner import Learner, first_logits
from weightsmith.compression.nm.masks import codes_of_mask
from weightsmith.compression.nm.state import State
from weightsmith.errors import InputError

PAIRS = [[j in chosen for j in range(4)] for chosen in combinations(range(4), 2)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def short(**options):
    """Settings of a run of seconds; masks that change."""
    return MaskProConfig(
        **(
            {"init": "magnitude", "init_scale": 3.0, "lr": 2.0, "steps": 12, "refresh_reference": False}
            | options
        )
    )


def same_state(one, other):
    """Whether two pruners are in the same state, to the bit."""
    first, second = one._state, other._state
    for part in ("logits", "first", "reference", "spread"):
        for name, value in getattr(first, part).items():
            assert torch.equal(value, getattr(second, part)[name]), (part, name)
    for part in (
        "step",
        "position",
        "tracker",
        "references",
        "lr",
        "measured",
        "means",
        "losses",
        "residuals",
    ):
        assert getattr(first, part) == getattr(second, part), part
    assert (first.skipped, first.refreshed) == (second.skipped, second.refreshed)


def regression(seed):
    """One layer of six groups on inputs of unequal size; how much each weight counts is not how large it is.

    The inputs are unrelated. Where they are not, a policy that draws each group alone has local optima.
    """
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(0.7 * torch.randn(8, generator=generator))
    x = torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q * size
    counts = torch.stack([torch.randperm(4, generator=generator) for _ in range(6)]).reshape(3, 8) + 1.0
    layer = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(counts / size * (torch.randint(0, 2, (3, 8), generator=generator) * 2 - 1))
        target = layer(x)
    return layer, x, target


def losses_of_all_masks(layer, x, target):
    pairs = torch.tensor(PAIRS)
    rows = torch.cat([pairs[:, None].expand(6, 6, 4), pairs[None].expand(6, 6, 4)], dim=2).reshape(36, 8)
    by_output = []  # outputs add up, so each row of the weight is enumerated alone
    for weight, wanted in zip(layer.weight.detach(), target.t(), strict=True):
        by_output.append((x @ (weight * rows).t() - wanted[:, None]).square().sum(0))
    return by_output, rows


def squared_error(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore:lr ")
def test_the_best_of_all_masks_is_found_in_nine_of_ten_runs():
    reached = already = 0
    for seed in range(10):
        layer, x, target = regression(seed)
        by_output, rows = losses_of_all_masks(layer, x, target)
        best = torch.stack([rows[losses.argmin()] for losses in by_output])
        config = short(init_scale=0.5, lr="auto", warmup=50, steps=800, seed=seed)
        pruner = MaskProPruner(layer.eval(), config, loss_fn=squared_error)
        pruner.fit([(x, target)])
        reached += torch.equal(pruner.masks()["weight"].kept, best)
        already += torch.equal(nm_mask(layer.weight.detach().abs()), best)
    assert reached >= 9
    assert already == 0


@pytest.mark.parametrize(("certainty", "most"), [(0.0, 1.0), (4.0, 0.01)])
def test_losses_that_know_nothing_of_masks_change_none_that_has_to_be_sure(certainty, most):
    """A thousand groups, a loss of noise: all logits walk at random."""
    layer, noises = nn.Linear(64, 64, bias=False).eval(), iter(noise(2000).tolist())
    options = {"init_scale": 0.5, "lr": 0.5, "steps": 400, "certainty": certainty}
    pruner = MaskProPruner(layer, short(**options), loss_fn=lambda model, batch: next(noises))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the last two losses are noise as well
        report = pruner.fit([torch.zeros(1)])
    assert (report.changed > 0.2) == (certainty == 0)
    assert report.changed <= most


def test_what_is_learnt_stays_where_it_has_to_be_sure():
    layer, x, target = regression(1)
    options = {"init_scale": 0.5, "lr": "auto", "warmup": 50, "steps": 800}
    masks = []
    for certainty in (0.0, 2.0):
        pruner = MaskProPruner(layer.eval(), short(**options, certainty=certainty), loss_fn=squared_error)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "lr ")
            report = pruner.fit([(x, target)])
        masks.append(pruner.masks()["weight"].kept)
        assert report.final_loss < 0.7 * report.first_loss
    assert not torch.equal(masks[1], nm_mask(layer.weight.detach().abs()))


def test_sure_is_what_came_nearer_by_more_than_its_noise():
    """Two groups that keep their first two, at logits 1; moves and their squares written out."""
    first = {"w": torch.tensor([3, 3], dtype=torch.uint8)}
    logits = {"w": torch.tensor([[1.0, 1.0], [-0.5, -0.5], [1.5, 1.5], [0.0, 0.0]])}
    moved = logits["w"] - first_logits(first, 4, 1.0)["w"]
    assert torch.equal(moved, torch.tensor([[0.0, 0.0], [-1.5, -1.5], [1.5, 1.5], [0.0, 0.0]]))
    spread = {"w": torch.tensor([[9.0, 9.0], [0.5, 1.0], [0.5, 1.5], [9.0, 9.0]])}
    learner = Learner(logits, short(), spread)
    assert learner.likeliest()["w"].tolist() == [5, 5]
    # 3 against certainty x sqrt(1) and x sqrt(2.5).
    assert learner.accepted(first, 1.0, 1.8)["w"].tolist() == [5, 5]
    assert learner.accepted(first, 1.0, 2.0)["w"].tolist() == [5, 3]
    assert learner.accepted(first, 1.0, 3.1)["w"].tolist() == [3, 3]
    learner.draw(1)
    learner.move(1, [0.5])
    change = learner.logits["w"] - torch.tensor([[1.0, 1.0], [-0.5, -0.5], [1.5, 1.5], [0.0, 0.0]])
    before = torch.tensor([[9.0, 9.0], [0.5, 1.0], [0.5, 1.5], [9.0, 9.0]])
    torch.testing.assert_close(spread["w"], before + change.square())


@pytest.mark.parametrize(("keep", "kept"), [("better", "first"), ("learnt", "learnt")])
@pytest.mark.parametrize("worse", [2.0, math.nan])
def test_of_first_and_learnt_mask_the_better_comes_out_unless_asked_otherwise(
    mlp, points, tmp_path, keep, kept, worse
):
    steps = len(points)
    first = MaskProPruner(mlp, short(steps=1, lr=1e-9, init_scale=40.0), loss_fn=lambda *_: 1.0)
    first.fit(points)

    def pruner(config):
        # Masks that are tried are better than the reference, so they are learnt.
        losses = iter(
            [1.0, 0.5] * steps + [1.0] * len(points) + [worse] * len(points) + [1.0] * 2 * len(points)
        )
        return MaskProPruner(mlp, config, loss_fn=lambda *_: next(losses))

    config = short(steps=steps, keep=keep, init_scale=0.1)
    run = pruner(config)
    with pytest.warns(UserWarning, match=f"the learnt mask has a loss of {worse:.5g}, the first one 1: "):
        report = run.fit(points, work=tmp_path)
    assert report.kept == kept
    assert (report.first_loss, report.final_loss == 1.0) == (1.0, kept == "first")
    assert report.learnt_loss == worse or math.isnan(worse)
    assert (report.changed == 0) == (kept == "first")
    same = [torch.equal(mask.kept, first.masks()[name].kept) for name, mask in run.masks().items()]
    assert all(same) == (kept == "first")
    again = pruner(config).load(tmp_path / "maskpro.safetensors")
    assert all(torch.equal(mask.kept, run.masks()[name].kept) for name, mask in again.masks().items())


def test_a_run_that_fell_back_goes_on_from_what_it_learnt(mlp, points, cross_entropy, tmp_path):
    def falls(model, batch):
        calls.append(1)
        return cross_entropy(model, batch) if len(calls) <= 7 + 2 * len(points) else 1e9

    calls = []
    with pytest.warns(UserWarning, match="the first is kept"):
        MaskProPruner(mlp, short(steps=7), loss_fn=falls).fit(points, work=tmp_path)
    longer = MaskProPruner(mlp, short(steps=15, keep="learnt"), loss_fn=cross_entropy)
    assert longer.fit(points, work=tmp_path).kept == "learnt"
    at_once = MaskProPruner(mlp, short(steps=15, keep="learnt"), loss_fn=cross_entropy)
    at_once.fit(points)
    same_state(longer, at_once)


def test_the_mean_of_a_step_is_the_gradient_of_the_mean_loss():
    """Two groups, 36 masks with a loss each: the exact gradient by all of them, the mean of random steps."""
    logits = noise(2, 4).double()
    loss_of = dict(zip(product(range(6), range(6)), noise(36, seed=1).tolist(), strict=True))
    pairs = torch.tensor(PAIRS)

    def mean_loss(values):
        w = values.softmax(-1)
        chance = [
            [
                w[g, a] * w[g, b] * (1 / (1 - w[g, a]) + 1 / (1 - w[g, b]))
                for a, b in combinations(range(4), 2)
            ]
            for g in range(2)
        ]
        return sum(loss_of[i, j] * chance[0][i] * chance[1][j] for i, j in loss_of)

    variable = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(mean_loss(variable), variable)
    count, reference, tracker = 200_000, 0.4, -0.3
    drawn = sample_nm(logits.repeat(count, 1), 2, seed=1).view(count, 2, 4)
    scores = nm_score(logits.repeat(count, 1), drawn.view(-1, 4)).view(count, 2, 4)
    number = (drawn[:, :, None] == pairs).all(-1).int().argmax(-1)
    table = torch.tensor([[loss_of[i, j] for j in range(6)] for i in range(6)], dtype=torch.float64)
    residual = table[number[:, 0], number[:, 1]] - reference - tracker
    steps = residual[:, None, None] * scores
    error = steps.std(0) / count**0.5
    assert ((steps.mean(0) - exact).abs() < 4.5 * error).all()


def test_a_step_moves_logits_by_rate_residual_and_score():
    """The update written out, from a reference loss and a tracker that is not 0."""
    layer, x, target = regression(0)
    pruner = MaskProPruner(layer.eval(), short(steps=3, alpha=0.5, lr=0.1), loss_fn=squared_error)
    pruner.fit([(x, target)])
    mask = nm_mask(layer.weight.detach().abs())
    logits, tracker = 3.0 * mask.view(-1, 4), 0.0
    dense = layer.weight.detach()

    def loss(kept):
        return float(nn.functional.mse_loss(x @ (dense * kept).t(), target))

    for step in range(1, 4):
        drawn = sample_nm(logits, 2, step=step, name="weight")
        residual = loss(drawn.view_as(mask)) - loss(mask)
        logits = (logits - 0.1 * (residual - tracker) * nm_score(logits, drawn)).clamp(-40, 40)
        tracker = 0.5 * tracker + 0.5 * residual
    torch.testing.assert_close(pruner._state.logits["weight"].t(), logits, rtol=1e-4, atol=1e-5)
    assert math.isclose(pruner._state.tracker, tracker, rel_tol=1e-5)


def test_several_samples_move_by_their_mean():
    codes = {"w": codes_of_mask("w", nm_mask(noise(4, 8)), short().nm, 1)}
    together, config = Learner(first_logits(codes, 4, 1.0), short()), short()
    start = together.logits["w"].clone()
    changes = []
    for sample, factor in enumerate((0.5, -0.25)):
        alone = Learner(first_logits(codes, 4, 1.0), config)
        drawn = alone.draw(7, sample)["w"]
        kept = torch.stack([(drawn >> j & 1).bool() for j in range(4)])
        changes.append(factor * nm_score(start.t(), kept.t()).t())
    together.draw(7, 0)
    together.move(7, [0.5, -0.25])
    torch.testing.assert_close(together.logits["w"], start + sum(changes) / 2)


def test_the_order_of_layers_does_not_change_their_masks():
    codes = {
        name: codes_of_mask(name, nm_mask(noise(8, 16, seed=k)), short().nm, 1)
        for k, name in enumerate("abc")
    }
    logits = first_logits(codes, 4, 0.5)
    forward = Learner(logits, short()).draw(3)
    backward = Learner(dict(reversed(logits.items())), short()).draw(3)
    assert all(torch.equal(forward[name], backward[name]) for name in codes)
    assert not torch.equal(forward["a"], forward["b"])


@pytest.mark.parametrize("options", [{}, {"score": "ordered"}, {"pattern": "3:8"}, {"pattern": "1:4"}])
@pytest.mark.parametrize("steepness", [[-0.3], [0.2, -0.5]])
def test_the_size_of_the_pieces_that_are_worked_on_changes_nothing(monkeypatch, options, steepness):
    config = short(**options)
    codes = {"w": codes_of_mask("w", nm_mask(noise(9, 24), config.nm.n, config.nm.m), config.nm, 1)}
    found = []
    for size in (1 << 17, 56):
        monkeypatch.setattr(pieces, "CHUNK", size)
        learner = Learner(first_logits(codes, config.nm.m, 0.7), config)
        for step in (1, 2):
            learner.draw(step, len(steepness) - 1)
            learner.move(step, steepness)
        found.append((learner.logits["w"], learner.likeliest()["w"]))
    (whole, top), (parts, same) = found
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)
    assert torch.equal(top, same)


def test_the_residual_of_the_reference_itself_is_zero(mlp, points, cross_entropy):
    pruner = MaskProPruner(mlp, short(init_scale=40.0), loss_fn=cross_entropy)
    report = pruner.fit(points)  # at 40 no group ever changes
    assert set(report.residuals) == {0.0}
    assert report.changed == 0
    assert report.first_loss == report.final_loss


@pytest.mark.filterwarnings("ignore:lr ")
@pytest.mark.parametrize("estimator", ["tracked", "residual", "baseline", "loss"])
def test_a_constant_added_to_a_batchs_loss_does_not_move_what_compares(mlp, points, cross_entropy, estimator):
    numbered = [(*batch, number) for number, batch in enumerate(points)]

    def shifted(model, batch):
        # Whole numbers, so that the sum with a float32 loss is exact in float64.
        return float(cross_entropy(model, batch)) + 8.0 * (1 + batch[2])

    config = short(estimator=estimator, lr=0.5)
    plain = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    other = MaskProPruner(mlp, config, loss_fn=shifted)
    plain.fit(numbered)
    other.fit(numbered)
    equal = all(
        torch.equal(plain._state.logits[name], other._state.logits[name]) for name in plain._state.logits
    )
    assert equal == (estimator in ("tracked", "residual"))


def test_fitting_leaves_the_model_alone_and_applying_masks_it(build, tokens):
    model = build("gpt2")
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with torch.no_grad():
        output = model(**tokens[0]).logits
    pruner = MaskProPruner(model, short(init="wanda", steps=6))
    pruner.fit(tokens)
    for name, parameter in model.named_parameters():
        pointer, values = before[name]
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, values)
    with torch.no_grad():
        assert torch.equal(model(**tokens[0]).logits, output)
    masks = pruner.masks()
    assert pruner.apply_() is model
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert (mask.kept.unflatten(0, (-1, 4)).sum(1) == 2).all()
        assert torch.equal(parameter, before[name][1] * mask.kept)


def test_a_fault_in_the_middle_gives_the_dense_weights_back(mlp, points):
    before = [p.detach().clone() for p in mlp.parameters()]
    calls = iter(range(5))

    def fails(model, batch):
        next(calls)
        return model(batch[0]).mean()

    with pytest.raises(StopIteration):
        MaskProPruner(mlp, short(), loss_fn=fails).fit(points)
    assert all(torch.equal(p, q) for p, q in zip(mlp.parameters(), before, strict=True))


@pytest.mark.parametrize("init", ["magnitude", "wanda", "ria", "sparsegpt"])
def test_it_begins_with_the_mask_of_any_method(build, tokens, init):
    from weightsmith.compression.nm import prune_
    from weightsmith.compression.nm.options import KINDS

    pruner = MaskProPruner(build("llama"), short(init=init, steps=1, init_scale=40.0))
    report = pruner.fit(tokens)
    expected = prune_(build("llama"), tokens, KINDS[init]())
    found = pruner.masks()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].kept, expected[name].kept) for name in found)
    assert report.changed == 0


RUNS = {
    "set": {},
    "rate found on the way": {"lr": "auto", "warmup": 8},
    "ordered, two samples": {"score": "ordered", "samples_per_step": 2},
    "online, init first": {"reference": "online", "first_mask": "init"},
    "4:8": {"pattern": "4:8"},
    "certain": {"certainty": 1.5},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_a_killed_run_goes_on_to_the_same_bits(mlp, points, cross_entropy, tmp_path, options):
    config = short(steps=20, **options)
    undisturbed = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    undisturbed.fit(points)
    calls = iter(range(23))

    def dies(model, batch):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    with pytest.raises(KeyboardInterrupt):
        MaskProPruner(mlp, config, loss_fn=dies).fit(points, work=tmp_path, save_every=5)
    again = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    report = again.fit(points, work=tmp_path, save_every=5)
    same_state(undisturbed, again)
    assert report.steps == 20
    loaded = MaskProPruner(mlp, config, loss_fn=cross_entropy).load(tmp_path / "maskpro.safetensors")
    same_state(undisturbed, loaded)


def test_a_run_is_saved_by_the_clock_where_no_steps_are_named(
    mlp, points, cross_entropy, tmp_path, monkeypatch
):
    clock = itertools.count(0, 20)  # seconds, each time it is asked
    monkeypatch.setattr("weightsmith.compression.nm.maskpro.time.monotonic", lambda: next(clock))
    saved = []
    keep = State.save
    monkeypatch.setattr(State, "save", lambda state, *rest: (saved.append(state.step), keep(state, *rest)))
    MaskProPruner(mlp, short(steps=50), loss_fn=cross_entropy).fit(points, work=tmp_path)
    # Due after 30 seconds, then 20 times the 20 seconds that a save took.
    assert saved == [2, 22, 42, 50]


def test_a_finished_run_may_be_made_longer(mlp, points, cross_entropy, tmp_path):
    MaskProPruner(mlp, short(steps=7), loss_fn=cross_entropy).fit(points, work=tmp_path)
    longer = MaskProPruner(mlp, short(steps=15), loss_fn=cross_entropy)
    longer.fit(points, work=tmp_path)
    at_once = MaskProPruner(mlp, short(steps=15), loss_fn=cross_entropy)
    at_once.fit(points)
    same_state(longer, at_once)


def test_an_error_or_ctrl_c_saves_the_last_whole_step(mlp, points, cross_entropy, tmp_path):
    config = short(steps=20, samples_per_step=2)
    undisturbed = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    undisturbed.fit(points)
    for number, problem in enumerate((KeyboardInterrupt, RuntimeError)):
        calls = iter(range(16))  # 3 of the reference, so the second mask of step 7 is being tried

        def dies(model, batch, calls=calls, problem=problem):
            if next(calls, None) is None:
                raise problem
            return cross_entropy(model, batch)

        work = tmp_path / str(number)
        with pytest.raises(problem):
            MaskProPruner(mlp, config, loss_fn=dies).fit(points, work=work)
        again = MaskProPruner(mlp, config, loss_fn=cross_entropy).load(work / "maskpro.safetensors")
        assert again._state.step == 6
        again.fit(points)
        same_state(undisturbed, again)


def test_an_error_in_the_first_step_leaves_no_state_that_other_options_would_meet(
    mlp, points, cross_entropy, tmp_path
):
    for options in ({"lr": 2.0}, {"lr": 3.0}):
        with pytest.raises(InputError, match="the reference mask gives a loss of nan"):
            MaskProPruner(mlp, short(**options), loss_fn=lambda model, batch: math.nan).fit(
                points, work=tmp_path
            )
    assert not list(tmp_path.iterdir())


def test_a_step_that_is_half_taken_is_not_saved(mlp, points, cross_entropy, tmp_path, monkeypatch):
    config = short(steps=8)
    undisturbed = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    undisturbed.fit(points)
    move = Learner.move

    def dies(learner, step, factors):
        move(learner, step, factors)
        if step == 5:
            raise KeyboardInterrupt

    pruner = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    monkeypatch.setattr(Learner, "move", dies)
    with pytest.raises(KeyboardInterrupt):
        pruner.fit(points, work=tmp_path, save_every=3)
    monkeypatch.setattr(Learner, "move", move)
    with pytest.raises(InputError, match="there are no masks yet"):
        pruner.masks()
    assert MaskProPruner(mlp, config).load(tmp_path / "maskpro.safetensors")._state.step == 3
    pruner.fit(points, work=tmp_path)
    same_state(undisturbed, pruner)


def test_the_state_of_a_run_on_other_data_is_refused(mlp, points, cross_entropy, tmp_path):
    def fit(batches, **options):
        return MaskProPruner(mlp, short(**options), loss_fn=cross_entropy).fit(batches, work=tmp_path)

    for options in ({}, {"reference": "online"}, {"estimator": "loss"}):
        (tmp_path / "maskpro.safetensors").unlink(missing_ok=True)
        fit(points, **options)
        with pytest.raises(InputError, match=r"other data: 3 batches \w+ then, 2 batches \w+ now; give the"):
            fit(points[:2], **options)
        other = [(inputs.clone().index_fill_(0, torch.tensor(3), 0.5), labels) for inputs, labels in points]
        for batches in (other, points[::-1]):
            with pytest.raises(InputError, match=r"maskpro\.safetensors: is of a run on other data"):
                fit(batches, **options)
        assert fit(points, **options | {"steps": 14}).steps == 14


def test_a_state_that_was_refused_leaves_the_run_free_for_another_folder(
    mlp, points, cross_entropy, tmp_path
):
    MaskProPruner(mlp, short(), loss_fn=cross_entropy).fit(points, work=tmp_path)
    pruner = MaskProPruner(mlp, short(), loss_fn=cross_entropy)
    with pytest.raises(InputError, match="other data"):
        pruner.fit(points[:2], work=tmp_path)
    assert pruner.fit(points[:2], work=tmp_path / "other").steps == 12


def test_the_state_of_a_run_with_other_first_masks_is_refused(mlp, points, cross_entropy, tmp_path):
    def fit(masks, **options):
        pruner = MaskProPruner(mlp, short(**options), loss_fn=cross_entropy, masks=masks)
        return pruner.fit(points, work=tmp_path)

    magnitude = {f"{k}.weight": nm_mask(mlp[k].weight.detach().abs()) for k in (0, 2, 4)}
    other = magnitude | {"2.weight": nm_mask(noise(16, 16))}
    fit(other)
    with pytest.raises(InputError, match=r"other first masks: \d+ of 112 groups differ .* most in 2\.weight"):
        fit(magnitude)
    with pytest.raises(InputError, match="was given its first masks, this one finds them by `init`"):
        fit(None)
    assert fit(other, steps=14).steps == 14


def test_a_file_of_first_masks_that_has_changed_is_refused(mlp, points, cross_entropy, tmp_path):
    def fit(score):
        masks = {
            f"{k}.weight": Mask(nm_mask(score(mlp[k].weight.detach())), Pattern(2, 4), 1) for k in (0, 2, 4)
        }
        write_masks(tmp_path / "masks", masks)
        config = short(init=str(tmp_path / "masks"))
        return MaskProPruner(mlp, config, loss_fn=cross_entropy).fit(points, work=tmp_path)

    fit(torch.abs)
    with pytest.raises(InputError, match="of a run with other first masks"):
        fit(torch.neg)


def test_the_state_of_a_longer_run_is_refused(mlp, points, cross_entropy, tmp_path):
    MaskProPruner(mlp, short(steps=12), loss_fn=cross_entropy).fit(points, work=tmp_path)
    with pytest.raises(InputError, match="of a run that did 12 steps, this one has 10; give as many"):
        MaskProPruner(mlp, short(steps=10), loss_fn=cross_entropy).fit(points, work=tmp_path)


def test_batches_that_come_only_once_are_refused_before_the_first_step(mlp, points, cross_entropy):
    def never(model, batch):
        raise AssertionError

    for batches in (iter(points), (batch for batch in points)):
        with pytest.raises(InputError, match=r"again and again, a \w+ gives them once; give a DataLoader"):
            MaskProPruner(mlp, short(steps=1), loss_fn=never).fit(batches)


@pytest.mark.parametrize("estimator", ["baseline", "loss", "tracked"])
def test_the_first_mask_itself_may_be_what_the_first_step_tries(mlp, points, cross_entropy, estimator):
    config = short(first_mask="init", estimator=estimator, steps=1, alpha=0.75)
    pruner = MaskProPruner(mlp, config, loss_fn=cross_entropy)
    report = pruner.fit(points[:1])
    assert report.losses == (report.first_loss,)
    assert pruner._state.tracker == (0.0 if estimator == "tracked" else 0.25 * report.first_loss)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.arange(5000.0), np.where(np.arange(5000) == 2500, -1.0, np.arange(5000.0))),
        ([1, [2]], [[1], 2]),
        ({"a": "bc"}, {"ab": "c"}),
        ({"a": None}, {"a": 0}),
        (np.float32(1), np.float64(1)),
    ],
)
def test_batches_of_other_content_have_other_keys(one, other):
    assert batch_key(one) == batch_key(one)
    assert batch_key(one) != batch_key(other)


def test_batches_whose_content_cannot_be_read_need_no_cache(mlp, points, cross_entropy):
    class Graph:
        def __init__(self, points):
            self.points = points

    def loss(model, batch):
        return cross_entropy(model, batch.points)

    graphs = [Graph(batch) for batch in points]
    with pytest.raises(InputError, match=r"that of a Graph can't be read; .* set `reference: online`"):
        MaskProPruner(mlp, short(), loss_fn=loss).fit(graphs)
    assert MaskProPruner(mlp, short(reference="online"), loss_fn=loss).fit(graphs).steps == 12


def test_a_state_of_other_options_weights_or_none_is_refused(mlp, points, cross_entropy, tmp_path):
    MaskProPruner(mlp, short(), loss_fn=cross_entropy).fit(points, work=tmp_path)
    with pytest.raises(InputError, match=r"of a run with other options: lr 2\.0 then, 3\.0 now"):
        MaskProPruner(mlp, short(lr=3.0), loss_fn=cross_entropy).fit(points, work=tmp_path)
    with torch.no_grad():
        mlp[0].weight.add_(1)
    with pytest.raises(InputError, match="other weights or targets"):
        MaskProPruner(mlp, short(), loss_fn=cross_entropy).fit(points, work=tmp_path)
    (tmp_path / "maskpro.safetensors").write_bytes(b"no state")
    with pytest.raises(InputError, match="not the state of a MaskPro run"):
        MaskProPruner(mlp, short(), loss_fn=cross_entropy).fit(points, work=tmp_path)
    with pytest.raises(InputError, match="call fit"):
        MaskProPruner(mlp, short()).masks()


class Shuffled:
    """The same batches in another order in each pass."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches if self.passes % 2 else self.batches[::-1])


def test_cached_and_online_references_agree_in_any_order_of_batches(mlp, points, cross_entropy):
    runs = []
    for reference in ("cached", "online"):
        calls = []

        def counted(model, batch, calls=calls):
            calls.append(1)
            return cross_entropy(model, batch)

        pruner = MaskProPruner(mlp, short(reference=reference, steps=18), loss_fn=counted)
        pruner.fit(Shuffled(points))
        runs.append((pruner._state, len(calls)))
    (cached, few), (online, many) = runs
    assert all(torch.equal(cached.logits[name], online.logits[name]) for name in cached.logits)
    assert cached.residuals == online.residuals
    assert many - few == 15  # three batches are met first, and need their reference either way


def test_batches_that_were_in_no_pass_before_are_refused_unless_online(mlp, points, cross_entropy):
    class Grows(Shuffled):
        def __iter__(self):
            self.passes += 1  # the first tells the data apart, the second is the first of the run
            return iter(self.batches[:2] if self.passes <= 2 else self.batches)

    with pytest.raises(InputError, match="batch 3 of this pass was in no pass before"):
        MaskProPruner(mlp, short(), loss_fn=cross_entropy).fit(Grows(points))
    MaskProPruner(mlp, short(reference="online"), loss_fn=cross_entropy).fit(Grows(points))


def kept_inputs(bad):
    """A loss that counts kept entries at the `bad` places of each group."""
    return lambda model, batch: float((model[0].weight != 0).view(-1, 4)[:, bad].sum()) + 0.5


def test_a_loss_that_halves_makes_the_likeliest_mask_the_reference():
    model = nn.Sequential(nn.Linear(8, 2, bias=False)).eval()
    nn.init.ones_(model[0].weight)
    first = torch.tensor([[True, True, False, False] * 2] * 2)
    config = short(init_scale=0.5, lr=0.5, alpha=0.8, steps=400, refresh_reference=True)
    pruner = MaskProPruner(model, config, loss_fn=kept_inputs([0, 1]), masks={"0.weight": first})
    report = pruner.fit([torch.zeros(1)])
    assert report.refreshed
    assert report.first_loss == 8.5
    assert report.final_loss == 0.5
    state = pruner._state
    assert not torch.equal(state.reference["0.weight"], state.first["0.weight"])
    assert all(loss is None or loss < 8.5 for loss in state.references.values())


def test_a_step_whose_loss_is_not_finite_changes_nothing(mlp, points, cross_entropy):
    fails = iter(())

    def sometimes(model, batch):
        return math.nan if next(fails, False) else cross_entropy(model, batch)

    pruner = MaskProPruner(mlp, short(reference="online", steps=3), loss_fn=sometimes)
    pruner.fit(points)
    before = {name: value.clone() for name, value in pruner._state.logits.items()}
    tracker = pruner._state.tracker
    fails = iter([False, True])  # of the reference, of the sample
    pruner.config = short(reference="online", steps=4)
    report = pruner.fit(points)
    assert report.skipped == (4,)
    assert pruner._state.tracker == tracker
    assert all(torch.equal(value, before[name]) for name, value in pruner._state.logits.items())


def test_many_losses_that_are_not_finite_end_the_run(mlp, points, cross_entropy):
    calls = iter(range(10_000))

    def fails_from_the_start(model, batch):
        return cross_entropy(model, batch) if next(calls) % 2 == 0 else math.inf

    config = short(reference="online", steps=100)
    with pytest.raises(InputError, match="more than 10 of the last 200 steps had a loss that is not finite"):
        MaskProPruner(mlp, config, loss_fn=fails_from_the_start).fit(points)
    with pytest.raises(InputError, match="the reference mask gives a loss of nan on batch 1"):
        MaskProPruner(mlp, short(), loss_fn=lambda model, batch: math.nan).fit(points)


def test_a_rate_that_throws_logits_about_is_warned_of_once(mlp, points, cross_entropy):
    with pytest.warns(UserWarning, match=r"lr 1e\+06 moves logits by .* `lr=\"auto\"`") as caught:
        MaskProPruner(mlp, short(lr=1e6), loss_fn=cross_entropy).fit(points)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MaskProPruner(mlp, short(lr=1e-3), loss_fn=cross_entropy).fit(points)


def test_masks_that_never_change_have_no_automatic_rate(mlp, points, cross_entropy):
    config = short(lr="auto", warmup=5, init_scale=40.0)
    with pytest.raises(InputError, match="lr: auto: no mask of 5 steps changed the loss; raise change_rate"):
        MaskProPruner(mlp, config, loss_fn=cross_entropy).fit(points)


def test_the_automatic_rate_is_a_tenth_of_the_residuals_spread(mlp, points, cross_entropy):
    pruner = MaskProPruner(mlp, short(lr="auto", warmup=10), loss_fn=cross_entropy)
    report = pruner.fit(points)
    assert math.isclose(report.lr, 0.1 / torch.tensor(report.residuals[:10]).double().std())


def test_the_automatic_scale_gives_the_wanted_rate_of_change():
    config = MaskProConfig(init_scale="auto", change_rate=0.01)
    logits = (config.scale_for(10) * torch.tensor([1.0, 0, 1, 0])).expand(100_000, 4).contiguous()
    changed = (sample_nm(logits, 2) != (logits > 0)).any(-1).float().mean()
    assert abs(changed - 0.01) < 0.001
    auto = MaskProConfig(init_scale="auto")
    scales = [auto.scale_for(groups) for groups in (100, 5_000, 10**6, 10**9, 10**12)]
    expected = [math.log(3 / rate) for rate in (0.05, 0.05, 1e-3, 1e-4, 1e-4)]
    assert scales == pytest.approx(expected)


def test_first_masks_that_do_not_fit_are_refused(mlp, points, cross_entropy):
    def fit(masks, **options):
        return MaskProPruner(mlp, short(**options), loss_fn=cross_entropy, masks=masks).fit(points)

    right = {f"{k}.weight": nm_mask(mlp[k].weight.detach().abs()) for k in (0, 2, 4)}
    fit(right)
    with pytest.raises(InputError, match=r"missing 2\.weight, 4\.weight; not pruned other\.weight"):
        fit({"0.weight": right["0.weight"], "other.weight": right["2.weight"]})
    with pytest.raises(InputError, match=r"2\.weight: mask of \[16, 8\], the parameter is \[16, 16\]"):
        fit(right | {"2.weight": right["0.weight"]})
    broken = right["2.weight"].clone()
    broken[3, 4:8] = torch.tensor([True, False, False, False])
    with pytest.raises(
        InputError, match=r"2\.weight: 1 of 64 groups don't keep exactly 2 of 4; the first is group 13"
    ):
        fit(right | {"2.weight": broken})
    assert fit(right | {"2.weight": broken}, repair=True).repaired == 1
    with pytest.raises(InputError, match=r"wand: no masks; expected a file of masks"):
        MaskProPruner(mlp, short(init="wand"), loss_fn=cross_entropy).fit(points)


def test_batches_and_models_without_a_loss_are_refused(mlp, build, tokens):
    with pytest.raises(InputError, match="takes mappings, got a list"):
        MaskProPruner(mlp, short()).fit([(torch.zeros(2, 8),)])
    with pytest.raises(InputError, match="no batches"):
        MaskProPruner(build("llama"), short()).fit([])


def test_one_of_several_processes_would_learn_masks_of_its_own_and_is_refused(mlp, points, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError, match="MaskPro runs in one process, this is one of 2"):
        MaskProPruner(mlp, short()).fit(points)


def test_the_models_own_loss_leaves_padding_out(build, tokens):
    model = build("llama")
    config = short(steps=1, init_scale=40.0)
    other = [b | {"input_ids": b["input_ids"].where(b["attention_mask"] == 1, 9)} for b in tokens]
    first, second = (MaskProPruner(model, config).fit(batches).first_loss for batches in (tokens, other))
    assert first == second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be auto, or above 0"),
        ({"init_scale": 50.0}, "init_scale must be auto, or above 0 and at most 40"),
        ({"certainty": -1}, "certainty must be at least 0 and finite, got -1"),
        ({"alpha": 1.0}, "alpha must be in 0..1, below 1, got 1.0"),
        ({"score": "sets"}, "score must be one of auto, set, ordered, got 'sets'; did you mean `set`"),
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"lr": "auto", "steps": 100}, r"warmup must be below steps \(100\), got 200"),
        ({"pattern": "4:2"}, "pattern 4:2: must keep 1..1 of 2 weights, got 4"),
        ({"change_rate": 2}, "change_rate must be in 0..1, got 2"),
        ({"ignore": "lm_head"}, "ignore must be a list of patterns, got 'lm_head'"),
        ({"experts": {"down_proj": 0}}, "experts: down_proj must be the axis of the inputs, 1 or 2, got 0"),
    ],
)
def test_a_wrong_option_names_itself(options, message):
    with pytest.raises(InputError, match=message):
        MaskProConfig(**options)
