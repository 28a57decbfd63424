"""Zeroth-order steps on two processes: the weights of one process, for a handful of numbers a step."""

import pytest
import torch

METHODS = ["TeZO", "TeZO-m", "TeZO-Adam", "MeZO-Adam", "LOZO"]
STEPS = 12


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks("tezo.py")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_with_parts_of_a_batch_get_the_weights_of_one_with_the_whole(ranks, method):
    alone = ranks[0][f"alone {method}"]
    for results in ranks:
        for name, weight in results[f"ddp {method}"].items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-7, atol=1e-8)
            assert torch.equal(weight, ranks[0][f"ddp {method}"][name])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_sends_one_row_of_numbers_and_nothing_else(ranks, method):
    for results in ranks:
        assert results[f"sent {method}"] == [("all_gather", 4)] * STEPS


def test_processes_with_different_seeds_are_told_before_anything_changes(ranks):
    for results in ranks:
        assert results["odd"] == "TeZO: processes differ in seed, step or parameters; nothing was changed"
        assert results["untouched"] < 1e-12
