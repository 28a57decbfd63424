"""AdaGC on two processes: norms of whole tensors, the weights of one process, one collective a step."""

import pytest
import torch

from weightsmith.training.adagc.clipper import AdaGC


@pytest.fixture(scope="module")
def ranks(run_ranks):
    return run_ranks("adagc.py")


def test_norms_are_those_of_the_whole_tensors_however_they_are_placed(ranks):
    for results in ranks:
        placed = results["placed"]
        for name in ("rows", "columns", "hsdp", "both", "two meshes"):
            torch.testing.assert_close(placed[name], placed["whole"], rtol=1e-6, atol=0, msg=name)


def test_gradients_that_wait_for_their_sum_are_summed_first(ranks):
    for results in ranks:
        assert results["placed"]["partial norm"].item() == pytest.approx(3 * 8**0.5)
        assert torch.equal(results["placed"]["partial gradient"], torch.full((4, 2), 3.0))


def test_a_shard_that_is_not_finite_empties_the_tensor_everywhere(ranks):
    for results in ranks:
        assert torch.equal(results["placed"]["poisoned"], torch.zeros(4, 2))
        assert results["placed"]["gamma"].item() == pytest.approx(3 * 8**0.5)
        assert results["placed"]["nobody"].item() == 0


def test_shard_wise_norms_are_each_ranks_own(ranks):
    assert [r["placed"]["shard norm"].item() for r in ranks] == pytest.approx([2.0, 6.0])


@pytest.mark.parametrize("inside", ["attached", "inside"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_twenty_steps_on_two_ranks_are_twenty_steps_in_one_process(ranks, kind, inside):
    alone = ranks[0][f"alone {inside}"]
    for results in ranks:
        ours = results[f"{kind} {inside}"]
        # Halves of a batch sum in another order: 1e-5 on weights of about 0.3 and norms up to 1e3.
        torch.testing.assert_close(ours["coefficients"], alone["coefficients"], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours["norms"], alone["norms"], rtol=1e-5, atol=1e-6)
        for name, weight in ours["weights"].items():
            torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-4, atol=1e-5, msg=name)
            assert torch.equal(weight, ranks[0][f"{kind} {inside}"]["weights"][name])
    assert (alone["coefficients"] < 1).any()
    assert (alone["coefficients"] == 1).any()


@pytest.mark.parametrize(("kind", "collectives"), [("alone", 0), ("ddp", 0), ("fsdp", 1), ("hsdp", 1)])
def test_a_step_needs_one_collective_at_most(ranks, kind, collectives):
    assert set(ranks[0][f"{kind} attached"]["collectives"]) == {collectives}


def test_a_state_saved_by_two_ranks_loads_into_one_process(ranks):
    state = ranks[0]["fsdp attached"]["state"]
    assert state == ranks[1]["fsdp attached"]["state"]
    named = [("experts", (3, 5, 4)), ("head.weight", (1, 4)), ("head.bias", (1,)), ("body.weight", (5, 6))]
    params = [(name, torch.nn.Parameter(torch.zeros(shape))) for name, shape in [*named, ("body.bias", (5,))]]
    clip = AdaGC(params, stacked={"experts": 0})
    clip.load_state_dict(state)
    assert clip.steps == 20
    saved = dict(zip(state["names"], state["gamma"], strict=True))
    assert clip.gamma[:3].tolist() == saved["experts"]
    assert clip.gamma[-1].item() == saved["body.bias"]


@pytest.mark.parametrize("inside", ["attached", "inside"])
def test_a_run_resumed_from_a_distributed_checkpoint_equals_an_undisturbed_one_bit_for_bit(ranks, inside):
    for results in ranks:
        for name, weight in results[f"resumed {inside}"].items():
            assert torch.equal(weight, results[f"undisturbed {inside}"][name])


def test_a_sharded_state_dict_counts_no_step(ranks):
    assert [results["steps after a state dict"] for results in ranks] == [0, 0]
