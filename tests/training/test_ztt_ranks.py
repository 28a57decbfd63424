"""A Zero-Token Transformer on two processes: its middle layers run several times a pass, its weights are
those of one process.
"""

import pytest
import torch

KINDS = ["ztt", "gated", "sampled", "supervised", "checkpointed"]
PLACES = ["ddp", "fsdp", "resharding"]


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks("ztt.py")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_steps_on_two_ranks_are_steps_in_one_process(ranks, place, kind):
    alone = ranks[0][f"alone {kind}"]
    for results in ranks:
        assert results[f"{place} {kind}"].keys() == alone.keys()
        for name, (weight, gradient) in results[f"{place} {kind}"].items():
            # float64; attention to the zero token and normalisation compute in float32.
            torch.testing.assert_close(gradient, alone[name][1], rtol=1e-4, atol=1e-6, msg=name)
            torch.testing.assert_close(weight, alone[name][0], rtol=1e-3, atol=1e-5, msg=name)
            assert torch.equal(weight, ranks[0][f"{place} {kind}"][name][0])


def test_zero_keys_learn_in_every_cycle_however_they_are_placed(ranks):
    for place in ("alone", *PLACES):
        gradient = ranks[0][f"{place} ztt"]["model.zero_token.bias_k"][1]
        assert gradient.shape[0] == 3
        assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("policy", ["propagate", "copy"])
@pytest.mark.parametrize("place", ["fsdp", "resharding"])
def test_tokens_leave_a_sharded_model_as_a_whole_one(ranks, place, policy):
    for results in ranks:
        found, wanted = results[f"exit {place} {policy}"], results[f"exit alone {policy}"]
        assert (wanted["cycles"] == 1).all()
        assert torch.equal(found["cycles"], wanted["cycles"])
        torch.testing.assert_close(found["logits"], wanted["logits"], rtol=1e-4, atol=1e-5)
        assert torch.equal(found["text"], wanted["text"])
