"""Two ranks and one process: the same choice, the same means, replicated or sharded."""

import pytest
import torch


def test_two_ranks_choose_and_average_as_one_process(run_ranks):
    first, second = run_ranks("averaging.py")
    for kind in ("ddp", "fsdp"):
        ours, theirs, whole = first[kind], second[kind], first["whole"]
        # Every rank has the same mask, bit for bit.
        assert ours["scores"] == theirs["scores"]
        assert ours["history"] == theirs["history"]
        assert ours["steps"] == theirs["steps"] == whole["steps"]
        # The mean over ranks of half batches is the loss of the whole batch up to rounding in fp32, and 30
        # steps of Adam on the mask carry it along.
        assert ours["scores"] == pytest.approx(whole["scores"], abs=1e-4)
        assert ours["history"] == pytest.approx(whole["history"], rel=1e-5)
        assert ours["scores from files"] == pytest.approx(whole["scores from files"], abs=1e-4)
        for key in ("mean", "folders", "ema"):
            for name, value in ours[key].items():
                assert torch.equal(value, theirs[key][name])
                torch.testing.assert_close(value, whole[key][name], rtol=0, atol=1e-6)
