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


@pytest.mark.parametrize("odd", ["seed", "rank", "rank of one matrix", "variant", "rho", "lr", "method"])
def test_processes_that_would_go_apart_are_told_before_anything_changes(ranks, odd):
    for results in ranks:
        said = results["odd"].get(odd, "")
        assert "processes differ in method, options, rates, step or parameters; nothing was changed" in said
        assert results["untouched"] < 1e-12


CASES = ["sgd", "momentum", "adam", "lion", "snapshot", "refreshed"]


@pytest.fixture(scope="module")
def shards(run_ranks):
    return run_ranks("tezo_sharded.py")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", ["fsdp", "hsdp"])
def test_sharded_weights_take_the_steps_of_whole_ones(shards, place, case):
    alone = shards[0][f"alone {case}"]
    for results in shards:
        for name, weight in results[f"{place} {case}"].items():
            torch.testing.assert_close(weight, alone[name], rtol=1e-7, atol=1e-8, msg=name)
            assert torch.equal(weight, shards[0][f"{place} {case}"][name])
    start, end = alone["body.weight"], shards[0]["alone sgd"]["body.weight"]
    assert case == "sgd" or not torch.equal(start, end)


def test_a_sharded_state_goes_on_in_one_process(shards):
    for name, weight in shards[1]["gone on"].items():
        torch.testing.assert_close(weight, shards[1]["alone adam"][name], rtol=1e-7, atol=1e-8, msg=name)


def test_what_needs_more_than_rows_is_refused_with_one_line(shards):
    said = shards[0]["refused"]
    assert said == shards[1]["refused"]
    for name, words in {
        "no model": "TeZO: body.weight: is sharded; give it `model=model`, whose gathered copies",
        "branch": "is sharded, and `restore: branch` needs it whole; take inplace or snapshot",
        "auto": "is sharded, and `rank: auto` needs it whole; take a number",
        "factors": "is sharded, and `save_factors` would save the rows of one process",
        "columns": "w: is placed as S(1); expected rows, Shard(0), or replicas",
        "stacked": "w: is sharded and stacked; take it out of `stacked`",
        "MeZO": "MeZO: body.weight: is sharded; MeZO and LOZO need whole parameters (DDP)",
        "LOZO": "LOZO: body.weight: is sharded; MeZO and LOZO need whole parameters (DDP)",
        "export": "body.weight: is sharded, and an adapter needs all rows",
    }.items():
        assert words in said[name], name
