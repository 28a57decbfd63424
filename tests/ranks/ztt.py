"""A Zero-Token Transformer in one process, replicated (DDP) and sharded (FSDP2). See `run_ranks`."""

import torch
from meeting import meet
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from weightsmith.training import ZTTConfig, ZTTForCausalLM
from weightsmith.training.zero_token.cycles import cycles_of_step

STEPS = 6
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
KINDS = {
    "ztt": {"num_cycles": 3},
    "gated": {"num_cycles": 2, "cycle_gate": "zero_init", "zero_key_space": "hidden"},
    "sampled": {"num_cycles": 3, "cycle_gate": "zero_init", "training_cycles": "sample"},
    "supervised": {"num_cycles": 3, "deep_supervision": 0.5},
    "checkpointed": {"num_cycles": 2},
}


def model(kind):
    torch.manual_seed(0)
    made = ZTTForCausalLM(ZTTConfig(**SIZES, **KINDS[kind])).double().train()
    if kind == "checkpointed":
        made.activation_checkpointing_enable({"use_reentrant": False})
    return made


def sharded(kind, reshard):
    made = model(kind)
    for layer in made.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(made, reshard_after_forward=reshard)


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(net, kind, rank, world):
    """Weights after some steps, and the gradients of the first."""
    inner = getattr(net, "module", net).model
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    first = {}
    for step in range(STEPS):
        ids = torch.randint(0, 24, (4, 9), generator=torch.Generator().manual_seed(step))[rank::world]
        schedule = KINDS[kind].get("training_cycles", "all")
        inner.cycles_now = cycles_of_step(schedule, step, STEPS, inner.config.num_cycles, seed=0)
        optimizer.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        if not step:
            first = {name: full(p.grad) for name, p in net.named_parameters()}
        optimizer.step()
    pairs = [(name, full(p), first[name]) for name, p in net.named_parameters()]
    return {name.removeprefix("module."): (weight, gradient) for name, weight, gradient in pairs}


@torch.no_grad()
def leaving_early(net):
    """Logits, cycles and generated tokens of a model whose tokens leave after the first cycle."""
    ids = torch.arange(14).reshape(2, 7)
    out = net.eval()(input_ids=ids, exit_threshold=-1.0, use_cache=True)
    text = net.generate(ids, max_new_tokens=4, do_sample=False, exit_threshold=-1.0, eos_token_id=None)
    return {"logits": full(out.logits), "cycles": out.num_cycles_used, "text": text}


def measure(rank, world, folder):
    results = {}
    for kind in KINDS:
        results[f"alone {kind}"] = train(model(kind), kind, 0, 1)
        results[f"ddp {kind}"] = train(DistributedDataParallel(model(kind)), kind, rank, world)
        for reshard in (False, True):
            name = "resharding" if reshard else "fsdp"
            results[f"{name} {kind}"] = train(sharded(kind, reshard), kind, rank, world)
    for policy in ("propagate", "copy"):
        KINDS[policy] = {"num_cycles": 3, "exit_kv": policy}
        results[f"exit alone {policy}"] = leaving_early(model(policy))
        results[f"exit fsdp {policy}"] = leaving_early(sharded(policy, False))
        results[f"exit resharding {policy}"] = leaving_early(sharded(policy, True))
    return results


if __name__ == "__main__":
    meet(measure)
