"""Candidates in memory and in folders: copies, rings, mixtures, dot products, what is averaged and what is
not."""

import itertools
import math

import pytest
import torch
from torch import nn

from weightsmith.checkpoints import CheckpointWriter, Lineage, TensorSpec
from weightsmith.errors import CheckpointError, InputError
from weightsmith.training import FolderBank, MemoryBank
from weightsmith.training.averaging.slots import slots_of


class Net(nn.Module):
    """A layer that is frozen, one whose weight is tied, norms with and without buffers."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.frozen = nn.Linear(4, 4)
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.frozen.requires_grad_(False)
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.norm(self.inner(self.frozen(self.embed(ids)))))


def state(seed, dtype=torch.float32, model=None):
    """A model in the state that a seed stands for."""
    torch.manual_seed(7)
    model = model or Net(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for slot in slots_of(model):
            slot.values.copy_(torch.randn(slot.values.shape, generator=generator))
        model.norm.num_batches_tracked.fill_(seed)
    return model


def bank_of(number, **options):
    bank = MemoryBank(number, **options)
    for seed in range(number):
        bank.add(state(seed), step=10 * seed)
    return bank


def tensors(model):
    return {slot.name: slot.values.clone() for slot in slots_of(model)}


def folder(path, model):
    values = {name: value for name, value in model.state_dict().items() if name != "head.weight"}
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    specs = [TensorSpec(name, kinds[value.dtype], tuple(value.shape)) for name, value in values.items()]
    with CheckpointWriter(path, specs, side_files={}, lineage=Lineage("test")) as writer:
        for name, value in values.items():
            writer.write(name, (value.float() if value.is_floating_point() else value).numpy())
        return writer.commit()


def folders(tmp_path, number):
    return [folder(tmp_path / f"checkpoint-{10 * seed}", state(seed)) for seed in range(number)]


def backward(model):
    model.zero_grad()
    ids = torch.arange(6)
    nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()


def test_what_is_averaged_are_trained_weights_once_and_saved_float_buffers():
    names = [slot.name for slot in slots_of(Net())]
    assert names == [
        "embed.weight",
        "inner.weight",
        "inner.bias",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
    ]


@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.5), (0.0, 1.0, 0.0), (0.7, 0.0, 0.3), (0.2, -1.0, 1.5)])
def test_a_mixture_is_the_weighted_sum(tmp_path, weights):
    expected = {
        name: sum(w * tensors(state(seed))[name].double() for seed, w in enumerate(weights))
        for name in tensors(Net())
    }
    for bank in (bank_of(3), FolderBank(folders(tmp_path, 3))):
        model = state(99)
        bank.mix(weights, model)
        for name, value in tensors(model).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-6, atol=1e-6)
        assert torch.equal(model.head.weight, model.embed.weight)


@pytest.mark.parametrize("some", [None, (0.5, 0.0, 0.5)])
def test_dot_products_are_those_of_the_gradient_with_each_candidate(tmp_path, some):
    model = state(99)
    backward(model)
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    expected = [
        sum(float((gradients[name] * tensors(state(seed))[name].double()).sum()) for name in gradients)
        for seed in range(3)
    ]
    if some is not None:
        expected[1] = 0.0
    for bank in (bank_of(3), FolderBank(folders(tmp_path, 3))):
        assert bank.dots(model, some).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_candidate_is_a_copy():
    model = state(0)
    bank = MemoryBank()
    bank.add(model, 0)
    before = tensors(model)
    with torch.no_grad():
        model.inner.weight.fill_(9.0)
    bank.mix([1.0], model)
    assert torch.equal(tensors(model)["inner.weight"], before["inner.weight"])


def test_the_ring_forgets_the_oldest_and_keeps_the_order():
    bank = MemoryBank(3)
    for seed in range(7):
        bank.add(state(seed), seed)
    assert bank.steps == (4, 5, 6)
    for index, seed in enumerate((4, 5, 6)):
        model = state(99)
        bank.mix([float(other == index) for other in range(3)], model)
        assert torch.equal(tensors(model)["inner.weight"], tensors(state(seed))["inner.weight"])


def test_rows_freed_by_forgetting_are_used_again_without_mixing_states_up():
    bank = bank_of(4)
    bank.keep([0, 3])
    for seed in (4, 5, 6):
        bank.add(state(seed), 10 * seed)
    assert bank.steps == (30, 40, 50, 60)
    for index, seed in enumerate((3, 4, 5, 6)):
        model = state(99)
        bank.mix([float(other == index) for other in range(4)], model)
        assert torch.equal(tensors(model)["embed.weight"], tensors(state(seed))["embed.weight"])


def test_the_mean_of_identical_states_is_that_state():
    bank = MemoryBank()
    for step in range(7):
        bank.add(state(3), step)
    model = state(99)
    bank.mix([1 / 7] * 7, model)
    for name, value in tensors(model).items():
        torch.testing.assert_close(value, tensors(state(3))[name], rtol=3e-7, atol=1e-7)


def test_the_uniform_mixture_equals_pytorchs_running_mean():
    from torch.optim.swa_utils import AveragedModel

    averaged = AveragedModel(state(0), use_buffers=False)
    bank = MemoryBank()
    for seed in range(6):
        model = state(seed)
        averaged.update_parameters(model)
        bank.add(model, seed)
    ours = state(99)
    bank.mix([1 / 6] * 6, ours)
    for name, parameter in averaged.module.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-5, atol=1e-6)


def test_a_mean_in_bfloat16_is_rounded_once():
    """PyTorch's running mean of the same states is off by more than the last place: it rounds at each
    step."""
    states = [state(seed, torch.bfloat16) for seed in range(50)]
    bank = MemoryBank(50)
    for step, model in enumerate(states):
        bank.add(model, step)
    model = state(99, torch.bfloat16)
    bank.mix([1 / 50] * 50, model)
    exact = torch.stack([one.inner.weight.double() for one in states]).mean(0)
    assert model.inner.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.inner.weight.double(), exact, rtol=2**-8, atol=1e-6)


def test_differences_in_bfloat16_give_the_mean_of_close_states():
    base, plain, short = state(0), MemoryBank(), MemoryBank(storage=torch.bfloat16)
    for step in range(20):
        model = state(0)
        with torch.no_grad():
            for slot in slots_of(model):
                generator = torch.Generator().manual_seed(step)
                slot.values.add_(0.05 * torch.randn(slot.values.shape, generator=generator))
        plain.add(model, step)
        short.add(model, step)
    weights = [1 / 20] * 20
    exact, ours = state(98), state(99)
    plain.mix(weights, exact)
    short.mix(weights, ours)
    for name, value in tensors(ours).items():
        torch.testing.assert_close(value, tensors(exact)[name], rtol=0, atol=1e-3)
        assert not torch.equal(value, tensors(base)[name])
    backward(ours)
    torch.testing.assert_close(short.dots(ours), plain.dots(ours), rtol=1e-2, atol=1e-3)


def test_integer_buffers_are_those_of_the_latest_state(tmp_path):
    for bank in (bank_of(3), FolderBank(folders(tmp_path, 3))):
        model = state(99)
        bank.mix([1 / 3] * 3, model)
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert int(model.norm.num_batches_tracked) == 2


def test_a_saved_bank_goes_on_with_the_same_bits():
    bank = bank_of(3)
    copy = MemoryBank(3)
    copy.load_state_dict(bank.state_dict())
    for one in (bank, copy):
        one.add(state(5), 50)
    models = [state(99), state(98)]
    for one, model in zip((bank, copy), models, strict=True):
        one.mix([0.2, 0.3, 0.5], model)
    assert bank.steps == copy.steps == (10, 20, 50)
    for ours, theirs in zip(tensors(models[0]).values(), tensors(models[1]).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_affine_shift_of_all_candidates_shifts_the_mean():
    plain, shifted = MemoryBank(), MemoryBank()
    for seed in range(4):
        model = state(seed)
        plain.add(model, seed)
        with torch.no_grad():
            model.inner.weight.add_(5.0)
        shifted.add(model, seed)
    models = [state(98), state(99)]
    for bank, model in zip((plain, shifted), models, strict=True):
        bank.mix([0.1, 0.2, 0.3, 0.4], model)
    torch.testing.assert_close(models[1].inner.weight, models[0].inner.weight + 5.0)


def test_broken_states_are_found(tmp_path):
    bank = MemoryBank()
    for seed in range(4):
        model = state(seed)
        if seed in (1, 3):
            with torch.no_grad():
                model.inner.bias[0] = math.nan if seed == 1 else math.inf
        bank.add(model, seed)
        folder(tmp_path / f"checkpoint-{seed}", model)
    assert bank.finite() == [True, False, True, False]
    assert FolderBank.from_run(tmp_path).finite() == [True, False, True, False]


def test_folders_are_ordered_by_step_not_by_name(tmp_path):
    for seed in (2, 10, 9):
        folder(tmp_path / f"checkpoint-{seed}", state(seed))
    assert FolderBank.from_run(tmp_path).steps == (2, 9, 10)


def test_folders_read_in_tiles_or_at_once_give_the_same_bits(tmp_path, monkeypatch):
    from weightsmith.training.averaging import folders as module

    bank = FolderBank(folders(tmp_path, 3))
    models = [state(98), state(99), state(97)]
    bank.mix([0.2, 0.3, 0.5], models[0])
    monkeypatch.setattr(module, "TILE_ELEMENTS", 3)
    bank.mix([0.2, 0.3, 0.5], models[1])
    for ours, theirs in zip(tensors(models[0]).values(), tensors(models[1]).values(), strict=True):
        assert torch.equal(ours, theirs)
    bank.in_memory(models[2]).mix([0.2, 0.3, 0.5], models[2])
    for ours, theirs in zip(tensors(models[0]).values(), tensors(models[2]).values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_candidates_of_other_shapes_are_refused_with_both(tmp_path):
    first = folder(tmp_path / "checkpoint-1", nn.Linear(3, 4))
    second = folder(tmp_path / "checkpoint-2", nn.Linear(3, 5))
    with pytest.raises(CheckpointError, match=r"bias is \[4\] in checkpoint-1, \[5\] in checkpoint-2"):
        FolderBank([first, second])
    third = folder(tmp_path / "checkpoint-3", nn.Linear(3, 5, bias=False))
    with pytest.raises(CheckpointError, match="checkpoint-2 has a tensor `bias`, checkpoint-3 has none"):
        FolderBank([second, third])


def test_a_bank_of_another_model_is_refused(tmp_path):
    bank = MemoryBank()
    bank.add(nn.Linear(3, 4), 1)
    with pytest.raises(InputError, match=r"weight has 15 elements in step 2; step 1 has 12"):
        bank.add(nn.Linear(3, 5), 2)
    with pytest.raises(InputError, match="bias is missing in the model"):
        bank.mix([1.0], nn.Linear(3, 4, bias=False))
    read = FolderBank([folder(tmp_path / "checkpoint-1", nn.Linear(3, 4))])
    with pytest.raises(
        CheckpointError, match=r"weight of the model is \[5, 3\]; checkpoint-1 has F32 \[4, 3\]"
    ):
        read.mix([1.0], nn.Linear(3, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MemoryBank(0), "max_size"),
        (lambda: MemoryBank(storage=torch.float16), "storage"),
        (lambda: bank_of(2).mix([1.0], Net()), "one weight for each of 2"),
        (lambda: MemoryBank().add(nn.Linear(2, 2).requires_grad_(False), 0), "no trained weights"),
        (lambda: FolderBank([]), "no candidates"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_run_without_checkpoints_is_refused(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    with pytest.raises(InputError, match="no folders `checkpoint-\\*` that end in a step"):
        FolderBank.from_run(tmp_path)


def test_every_pattern_of_zero_weights_is_summed_right():
    bank = bank_of(4)
    for pattern in itertools.product((0.0, 0.5), repeat=4):
        model = state(99)
        bank.mix(pattern, model)
        expected = sum(w * tensors(state(seed))["inner.bias"] for seed, w in enumerate(pattern))
        torch.testing.assert_close(tensors(model)["inner.bias"], expected + torch.zeros(4))
