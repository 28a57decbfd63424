"""A search for a tailored model in one process and in several that share each trial. See `run_ranks`."""

import json
from unittest import mock

import torch
import torch.distributed as dist
from meeting import meet
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.compression import TailorSearch
from weightsmith.compression.tailoring import ranks
from weightsmith.compression.tailoring.scoring import FunctionTask
from weightsmith.errors import InputError, WeightsmithError

TOKENS, EXAMPLES = 32, 13
ROWS = torch.randint(3, TOKENS, (EXAMPLES, 10), generator=torch.Generator().manual_seed(7))


def models():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4,
        initializer_range=0.2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    made = [LlamaForCausalLM(config).eval() for _ in range(2)]
    with torch.no_grad():
        for value, own in zip(made[1].parameters(), made[0].parameters(), strict=True):
            value.copy_(own + 0.05 * value)
    return made


class Last:
    """The probability of each row's last token; remembers what this rank was asked for."""

    def __init__(self, fails=None):
        self.asked, self.fails = set(), fails

    def __call__(self, model, indices):
        self.asked |= set(indices)
        if self.fails is not None and dist.get_rank() == self.fails:
            return [2.0] * len(indices)
        with torch.inference_mode():
            chances = model(ROWS[indices, :-1], use_cache=False).logits[:, -1].softmax(-1)
        return chances.gather(1, ROWS[indices, -1:])[:, 0].tolist()


def search(function, **changes):
    base, tuned = models()
    given = {"n_trials": 12, "min_budget": 3, "max_budget": EXAMPLES, "sparsity": 0.25} | changes
    return TailorSearch(base, [tuned], tasks=FunctionTask("last", function, EXAMPLES), device="cpu", **given)


def told(error, function, **changes):
    try:
        search(function, **changes).run()
    except error as problem:
        return str(problem)
    return None


def summary(search, plan):
    trials = [(one.configuration.key, one.budget, one.costs["last"]) for one in search.trials]
    return {"plan": json.dumps(plan.configuration.to_json()), "trials": json.dumps(trials)}


def measure(rank, world, folder):
    work = folder / "work"
    function = Last()
    shared = search(function, work=work)
    plan = shared.run()
    found = {"shared": summary(shared, plan), "built": plan.build().num_parameters()}
    dist.barrier()
    found["lines"] = len((work / "trials.jsonl").read_text().splitlines())
    found["asked"] = sorted(function.asked)
    dist.barrier()

    longer = search(Last(), work=work, n_trials=18)  # goes on
    found["longer"] = summary(longer, longer.run())["trials"]
    found["refused"] = told((InputError, WeightsmithError), Last(), work=work, seed=1)
    found["outside"] = told((InputError, WeightsmithError), Last(fails=1))
    found["workers"] = told((InputError, WeightsmithError), Last(), num_workers=2)
    with mock.patch.object(ranks, "place", return_value=(0, 1)):
        alone = search(Last())
        found["alone"] = summary(alone, alone.run())
    return found


meet(measure)
