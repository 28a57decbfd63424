import pytest
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard


@pytest.fixture
def shard():
    """Shards a model as FSDP2 does, over a group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield lambda model: fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()
