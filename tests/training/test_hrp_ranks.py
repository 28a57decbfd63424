"""HRP on two processes: one adapter, that of the joint batch."""

import pytest
import torch

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks("hrp.py")


def test_processes_with_parts_of_a_batch_find_the_directions_of_the_whole(ranks):
    alone = ranks[0]["alone"]
    for results in ranks:
        for kind in ("parts", "sharded"):  # replicas, and FSDP2
            for name, value in results[kind].items():
                torch.testing.assert_close(value, alone[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["parts", "sharded", "branches", "same"])
def test_all_processes_have_the_same_bits(ranks, kind):
    for name, value in ranks[0][kind].items():
        assert torch.equal(value, ranks[1][kind][name]), name


def test_processes_that_read_the_same_need_no_exchange(ranks):
    for name, value in ranks[0]["same"].items():
        torch.testing.assert_close(value, ranks[0]["alone"][name], rtol=0, atol=1e-9)


def test_a_branch_that_one_process_takes_counts_for_all(ranks):
    rows = ranks[0]["branches"]
    assert not torch.allclose(
        rows["base_model.model.unused.lora_A.default.weight"],
        ranks[0]["alone"]["base_model.model.unused.lora_A.default.weight"],
        atol=1e-3,
    )


def test_ranks_of_a_sharded_adapter_are_not_shared_out_anew(ranks):
    for results in ranks:
        assert results["shared ranks"].startswith("rank_energy: body is sharded")
