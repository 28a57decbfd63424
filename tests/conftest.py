"""Settings of the whole suite, and scripts in several gloo processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

RANKS = Path(__file__).parent / "ranks"

# A shell that runs the suite in the background ignores Ctrl-C for it, and all its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine must not fail a test, and a failure must come back on the next run.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="module")
def run_ranks(tmp_path_factory):
    """`run_ranks("alphadecay.py")` -> what each of two processes of `ranks/alphadecay.py` found."""

    def run(script, world=2):
        import torch

        out = tmp_path_factory.mktemp(Path(script).stem)
        # Files: of two pipes the one that is not read yet could fill up.
        logs = [out / f"rank{rank}.log" for rank in range(world)]
        processes = []
        for rank, log in enumerate(logs):
            ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            with log.open("w") as output:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(RANKS / script), str(out)],
                        env={**os.environ, **ranks},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            for process in processes:
                process.wait(timeout=240)
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
        statuses = [process.wait() for process in processes]
        said = "\n".join(log.read_text(errors="replace")[-4000:] for log in logs)
        assert statuses == [0] * world, f"{statuses}\n{said}"
        return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(world)]

    return run
