"""MEAP's two costs on a CPU: masking a batch, and preparing pairs for fine-tuning.

    python benchmarks/meap.py [--rounds 9] [--pairs 10000] [--out benchmarks/results/meap.json]

mask     64 rows of 4,096 ids: `meap_mask_inputs`, and the collator's whole work on a batch that is there
         already, against a plain formulation of the usual loop, `random.sample` for each row. Target: 5 ms,
         5 times.
prepare  pairs of a prompt and an answer of about 200 tokens to rows and masked copies: `encode_pairs`, on all
         cores, and `meap_sft_map`, against a plain formulation of the authors' preprocessing, which tokenises
         each pair twice and looks the mask token up for each place. Target: 5 times. For comparison, what it
         takes to tokenise each text once, in batches, and to do no more: by transformers' call, and by that
         of the tokenizers library which ours makes. The second bounds what any preparation with it reaches.

Contestants run in turns; medians over rounds. What they computed is compared first: the same number of masked
places in each row and nothing else changed, and the same rows but for which places are masked.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from weightsmith.runs.environment import environment
from weightsmith.testbed import text
from weightsmith.training import DataCollatorForMEAP, encode_pairs, meap_mask_inputs, meap_sft_map

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH, VOCABULARY, MASK = 64, 4096, 32_000, 32_000
MASK_MILLISECONDS, TIMES_FASTER = 5.0, 5.0


def loop_over_rows(ids: torch.Tensor, draws: random.Random) -> torch.Tensor:
    """Plain formulation: a sample of places for each row."""
    masked = ids.clone()
    count = max(1, int(0.15 * (ids.shape[1] - 1)))
    for row in range(len(ids)):
        masked[row, draws.sample(range(ids.shape[1] - 1), count)] = MASK
    return masked


def mask_contestants() -> dict[str, Callable[[], torch.Tensor]]:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    collator = DataCollatorForMEAP(lambda features: features, mask_token_id=MASK)
    batch, draws = {"input_ids": ids, "labels": ids}, random.Random(0)
    return {
        "meap_mask_inputs": lambda: meap_mask_inputs(ids, MASK, seed=draws.getrandbits(63)),
        "DataCollatorForMEAP": lambda: collator(batch)["input_ids"],
        "a sample for each row": lambda: loop_over_rows(ids, draws),
    }


def agree_on_masks(contestants: dict[str, Callable[[], torch.Tensor]]) -> str:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    for name, call in contestants.items():
        masked = call()
        hidden = masked == MASK
        assert hidden.sum(1).tolist() == [614] * ROWS, name
        assert torch.equal(masked[~hidden], ids[~hidden]), name
        assert not hidden[:, -1].any(), name
    return "614 of 4,096 places in each row, never the last; everything else unchanged"


def make_tokenizer() -> Any:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text("docs", "train")[:400_000]], vocab_size=4000, special_tokens=["<end>", "[MASK]"]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", mask_token="[MASK]")


def make_pairs(count: int) -> list[tuple[str, str]]:
    whole, draws = text("docs", "train"), random.Random(0)
    places = [draws.randrange(len(whole) - 1000) for _ in range(count)]
    return [(whole[at : at + 120], whole[at + 120 : at + 820]) for at in places]


def batches(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[list[str], list[str]]]:
    """Prompts and answers, 1,000 each, as `datasets.Dataset.map(batched=True)` gives them."""
    for begin in range(0, len(pairs), 1000):
        prompts, answers = zip(*pairs[begin : begin + 1000], strict=True)
        yield list(prompts), list(answers)


def tokenise(call: Callable[[list[str]], Any], pairs: Sequence[tuple[str, str]]) -> None:
    """Each text once and nothing else; the ids are not even read."""
    for texts in itertools.chain.from_iterable(batches(pairs)):
        call(texts)


def prepare(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[Any, Any]]:
    """Ours: tokenised once, copies of a batch in one call."""
    for number, (prompts, answers) in enumerate(batches(pairs)):
        columns = meap_sft_map(
            encode_pairs(tokenizer, prompts, answers),
            mask_token_id=tokenizer.mask_token_id,
            protected_ids=[tokenizer.eos_token_id],
            seed=number,
        )
        yield from zip(columns["input_ids"], columns["labels"], strict=True)


def prepare_one_by_one(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], draws: random.Random
) -> Iterator[tuple[list[int], list[int]]]:
    """Plain formulation of the authors' preprocessing; that of 1,000 pairs at a time."""
    for begin in range(0, len(pairs), 1000):
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer in pairs[begin : begin + 1000]:
            for masked in (False, True):
                p = tokenizer.encode(text=prompt, add_special_tokens=False)
                a = tokenizer.encode(text=answer, add_special_tokens=False)
                ids = [*p, *a, tokenizer.eos_token_id]
                labels = [-100] * len(p) + ids[len(p) :]
                if masked:
                    if len(a) <= 50:
                        continue
                    clean, labels = list(ids), [-100] * len(ids)
                    for place in draws.sample(range(len(p), len(p) + len(a)), max(1, int(0.1 * len(a)))):
                        ids[place] = tokenizer.convert_tokens_to_ids("[MASK]")
                        labels[place] = clean[place]
                columns["input_ids"].append(ids)
                columns["attention_mask"].append([1] * len(ids))
                columns["labels"].append(labels)
        yield from zip(columns["input_ids"], columns["labels"], strict=True)


def consume(rows: Iterator[Any]) -> None:
    """Let go of each row, as a data set that is written does."""
    collections.deque(rows, maxlen=0)


def agree_on_rows(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> str:
    ours = [(ids.tolist(), labels.tolist()) for ids, labels in prepare(tokenizer, pairs)]
    theirs = list(prepare_one_by_one(tokenizer, pairs, random.Random(0)))
    assert len(ours) == len(theirs)
    mask = tokenizer.mask_token_id
    for (ids, labels), (other, wanted) in zip(ours, theirs, strict=True):
        assert ids.count(mask) == other.count(mask)
        assert len(labels) == len(wanted)
        same = zip(ids, other, strict=True)
        assert all(a == b or mask in (a, b) for a, b in same)
    return f"{len(ours)} rows, equal but for which places of an answer are masked"


def in_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; every round begins with another."""
    named = list(contestants.items())
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-1, rounds):
        turn = number % len(named)
        for name, call in named[turn:] + named[:turn]:
            begun = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def table(results: dict[str, Any]) -> str:
    lines = ["# MEAP on a CPU", ""]
    for section in ("mask", "prepare"):
        found = results[section]
        lines += [
            f"{found['title']}. Same result: {found['agreement']}.",
            "",
            "| | ms | faster |",
            "|---|---|---|",
        ]
        slow = statistics.median(found["seconds"][found["peer"]])
        for name, seconds in found["seconds"].items():
            middle = statistics.median(seconds)
            lines.append(f"| {name} | {1000 * middle:.2f} | {slow / middle:.1f}x |")
        lines.append("")
    lines += [
        f"- {'holds' if held else '**missed**'}: {target}" for target, held in results["targets"].items()
    ]
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "meap.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # a batch uses all cores; one text at a time can't
    masks = mask_contestants()
    agreement = agree_on_masks(masks)
    tokenizer, pairs, draws = make_tokenizer(), make_pairs(options.pairs), random.Random(1)
    rows = agree_on_rows(tokenizer, pairs[:200])
    by_transformers = partial(tokenizer, add_special_tokens=False, return_attention_mask=False)
    by_library = partial(tokenizer.backend_tokenizer.encode_batch_fast, add_special_tokens=False)
    preparing = {
        "encode_pairs and meap_sft_map": lambda: consume(prepare(tokenizer, pairs)),
        "transformers' call alone": lambda: tokenise(by_transformers, pairs),
        "the library's call alone": lambda: tokenise(by_library, pairs),
        "one by one": lambda: consume(prepare_one_by_one(tokenizer, pairs, draws)),
    }
    found: dict[str, Any] = {
        "mask": {
            "title": f"{ROWS} rows of {LENGTH} ids",
            "peer": "a sample for each row",
            "agreement": agreement,
            "seconds": in_turns(masks, 5 * options.rounds),
        },
        "prepare": {
            "title": f"{options.pairs} pairs",
            "peer": "one by one",
            "agreement": rows,
            "seconds": in_turns(preparing, options.rounds),
        },
    }
    middle = {
        name: statistics.median(times) for part in found.values() for name, times in part["seconds"].items()
    }
    found["targets"] = {
        "a batch is masked in 5 ms": 1000 * middle["DataCollatorForMEAP"] <= MASK_MILLISECONDS,
        "masking is 5 times faster than a loop": middle["a sample for each row"]
        >= TIMES_FASTER * middle["meap_mask_inputs"],
        "pairs are prepared 5 times faster": middle["one by one"]
        >= TIMES_FASTER * middle["encode_pairs and meap_sft_map"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": environment(), **found}, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
