"""Two processes and one: the same decays on every rank, the same weights as in one process."""

import torch


def test_two_ranks_equal_one_process(run_ranks):
    first, second = run_ranks("alphadecay.py")
    for kind in ("ddp", "fsdp"):
        for mode in ("decoupled", "groups"):
            ours, theirs, alone = first[f"{kind} {mode}"], second[f"{kind} {mode}"], first[f"alone {mode}"]
            # Every rank has the same numbers, bit for bit.
            assert ours["decays"] == theirs["decays"]
            assert ours["alphas"] == theirs["alphas"]
            for name, weight in ours["weights"].items():
                assert torch.equal(weight, theirs["weights"][name])
                # Sums of gradients in another order: 1e-5 of weights that are about 0.1 after 20 steps.
                torch.testing.assert_close(weight, alone["weights"][name], rtol=0, atol=1e-5)
            # The first look is at equal weights: gathered, not summed from parts, so equal bit for bit.
            assert ours["alphas"][0] == alone["alphas"][0]
            assert [record["step"] for record in ours["alphas"]] == [0, 6, 12, 18]
    for rank in (first, second):
        assert "step 0: 1.q_proj.weight holds NaN" in rank["broken"]
        assert "pass `group`" in rank["different"]
