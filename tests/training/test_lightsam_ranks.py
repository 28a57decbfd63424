"""Two-pass optimisers on two processes: the weights of one process after twenty steps, sharded resuming."""

import pytest
import torch

METHODS = ["I", "II", "III", "III foreach", "SAM", "ASAM"]


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks("lightsam.py")


RUNS = [(kind, method) for kind in ("ddp", "fsdp") for method in METHODS] + [("hsdp", "I"), ("hsdp", "ASAM")]


@pytest.mark.parametrize(("kind", "method"), RUNS)
def test_twenty_steps_on_two_ranks_are_twenty_steps_in_one_process(ranks, kind, method):
    alone = ranks[0][f"alone {method}"]
    for results in ranks:
        for name, weight in results[f"{kind} {method}"].items():
            # Halves of a batch sum in another order; Adam's quotients of small gradients magnify that.
            torch.testing.assert_close(weight, alone[name], rtol=1e-4, atol=1e-4, msg=name)
            assert torch.equal(weight, ranks[0][f"{kind} {method}"][name])


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_run_resumes_bit_for_bit(ranks, method):
    for results in ranks:
        for name, weight in results[f"resumed {method}"].items():
            assert torch.equal(weight, results[f"undisturbed {method}"][name])
