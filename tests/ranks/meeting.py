"""How one of the processes that `run_ranks` starts meets the others, and leaves them."""

import faulthandler
import gc
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def meet(measure):
    """Save what `measure(rank, world, folder)` finds among these processes as `folder/rankN.pt`."""
    faulthandler.dump_traceback_later(200)  # where it hung, before `run_ranks` gives up
    folder, rank, world = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world
    )
    torch.save(measure(rank, world, folder), folder / f"rank{rank}.pt")
    dist.barrier()
    # A DDP model that outlives its group ends gloo's threads from within its destructor, which holds the GIL
    # they may be waiting for. `measure` has returned; what it left in cycles must be gone too.
    gc.collect()
    dist.destroy_process_group()
