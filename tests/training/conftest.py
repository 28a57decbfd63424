"""Runs a script in several gloo processes: what sharded and replicated training are tested with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).parent / "ranks"


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory):
    """`run_ranks("alphadecay.py", world=2)` -> what each rank saved: `ranks/<script>` gets the folder to save
    to."""

    def run(script, *arguments, world=2):
        import torch

        out = tmp_path_factory.mktemp(Path(script).stem)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(world),
            "RENDEZVOUS": str(out / "rendezvous"),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, str(RANKS / script), str(out), *map(str, arguments)],
                env={**environment, "RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output[-4000:]
        return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return run
