"""What masking does to attention, against a plain loop over layers, heads, queries and keys."""

import statistics

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.errors import InputError
from weightsmith.training.meap.attention import attention_shift

MASK = 20


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=21,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).train()


def by_hand(model, ids, mask, real):
    """Lists of attention to masked and to other tokens, clean and masked."""
    model.eval().set_attn_implementation("eager")
    found = {}
    for state, shown in (("clean", ids), ("masked", torch.where(mask, MASK, ids))):
        with torch.no_grad():
            layers = model(input_ids=shown, attention_mask=real.long(), output_attentions=True).attentions
        hidden, others = [], []
        for layer in layers:
            for row in range(len(ids)):
                for head in layer[row]:
                    for query in range(ids.shape[1]):
                        for key in range(query + 1):
                            if real[row, query] and real[row, key]:
                                (hidden if mask[row, key] else others).append(float(head[query, key]))
        found[state] = hidden, others
    return found


def test_shift_is_that_of_a_plain_loop(model):
    ids = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, [1, 4]], mask[1, 2] = True, True  # nothing is masked in the last row, which is left out
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 5:] = False
    shift = attention_shift(model, ids, mask, MASK, real)
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    found = by_hand(model, ids[:2], mask[:2], real[:2])
    (clean, calm), (masked, uneven) = found["clean"], found["masked"]
    decay = 1 - statistics.fmean(masked) / statistics.fmean(clean)
    increase = statistics.pvariance(uneven) / statistics.pvariance(calm) - 1
    assert shift.score_decay == pytest.approx(decay, rel=1e-5, abs=1e-7)
    assert shift.variance_increase == pytest.approx(increase, rel=1e-5, abs=1e-7)


def test_a_mask_that_hides_nothing_changes_nothing(model):
    ids = torch.full((1, 6), MASK)
    mask = torch.tensor([[False, True, False, True, False, False]])
    shift = attention_shift(model, ids, mask, MASK)
    assert (shift.score_decay, shift.variance_increase) == (0.0, 0.0)


@pytest.mark.parametrize("hidden", [False, True])
def test_rows_in_which_nothing_can_be_compared_are_named(model, hidden):
    ids = torch.randint(0, 20, (2, 6), generator=torch.Generator().manual_seed(1))
    with pytest.raises(InputError, match="none of the 2 rows has both a masked and a visible token"):
        attention_shift(model, ids, torch.full((2, 6), hidden), MASK)
