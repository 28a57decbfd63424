"""Masking a part of the input makes a model find facts in its context, at no cost to its plain loss.

A character model (3 layers, width 96) goes through 60 kB of Python's standard library many times: plainly
(NTP), with 15 % of its input masked (MEAP), and with 15 % replaced by random characters (the control: noise
without a symbol for it). Equal steps, batches and first weights.

    text       loss on held-out text, and on those characters of it that continue six in a row which stand
               earlier in the window; over the run
    needle     then all are fine-tuned, plainly, on the same examples of a code hidden in text, each seen
               once, and asked for other codes in held-out text: the mean recall over nine looks on the way,
               since every model finds nothing at first and much in the end
    answers    NTP's model fine-tuned on long answers: plainly with twice the epochs, against MEAP's copies
    emergence  from scratch, recall of key-value pairs from a context: steps until it is there. A pilot saw
               MEAP slower: masking tears apart the pairs that recall is made from
    attention  score decay and variance increase on masked input, of MEAP's model and of NTP's with its
               untrained mask row

Reproduced if, over three seeds, needle recall is higher with MEAP by 5 points and by twice its standard
error, and held-out loss at most 2 % higher. Weaker claim: held-out loss at most 2 % higher, and attention to
masked tokens decays more than in NTP's model for each seed.

    python evidence/meap.py            writes evidence/results/meap.json, meap.md and meap.svg; a run that was
                                       stopped goes on with what is missing
    python evidence/meap.py --quick    a few steps, to see that everything runs; writes to --out only
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plots import page
from safetensors.torch import load_file, save_file
from script import Units, parser_of, publish, units
from transformers import LlamaConfig, LlamaForCausalLM

from weightsmith.reports.drawing import Scale, dot, line, number, text, ticks
from weightsmith.runs.environment import environment
from weightsmith.runs.seeds import derive
from weightsmith.testbed import VOCABULARY
from weightsmith.testbed import text as domain_text
from weightsmith.testbed.alphabet import EOS, encode
from weightsmith.training import DataCollatorForMEAP, meap_mask_inputs
from weightsmith.training.meap.attention import attention_shift

MASK, RATIO = VOCABULARY["<mask>"], 0.15
ARMS = ("NTP", "MEAP", "random tokens")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni", "po", "ru", "sa", "te", "vi", "wo", "zu")


@dataclass(frozen=True)
class Size:
    """How long everything takes."""

    characters: int = 60_000
    window: int = 128
    batch: int = 16
    steps: int = 1200
    looks: int = 6
    windows: int = 128
    needle_steps: int = 900
    needle_every: int = 100
    asked: int = 40
    answers: int = 200
    answer_epochs: int = 6
    recall_steps: int = 2500
    recall_every: int = 100


QUICK = Size(6000, 128, 2, 4, 2, 8, 2, 1, 2, 6, 1, 4, 2)


def make_model(seed: int, layers: int = 3, width: int = 96, vocabulary: int = 100) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.05,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def hide(arm: str, clean: torch.Tensor, seed: int) -> torch.Tensor:
    """What a model of this arm reads in place of clean rows."""
    if arm == "NTP":
        return clean
    masked, where = meap_mask_inputs(clean, MASK, RATIO, seed=seed, return_mask=True)
    if arm == "MEAP":
        return masked
    noise = torch.randint(0, 96, clean.shape, generator=torch.Generator().manual_seed(seed % 2**63))
    return torch.where(where, noise, clean)


def optimise(
    model: LlamaForCausalLM,
    batch_at: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    rate: float,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW, a short warm-up, a cosine down to a tenth; the same for everything here."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = max(1, steps // 20)
    model.train()
    for step in range(1, steps + 1):
        cosine = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))
        optimizer.param_groups[0]["lr"] = rate * min(step / warmup, cosine)
        ids, labels = batch_at(step)
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        look(step)


def characters(split: str, limit: int | None = None) -> torch.Tensor:
    return torch.from_numpy(encode(domain_text("source", split)[:limit]).astype(np.int64))


def windows_of(data: torch.Tensor, count: int, length: int) -> torch.Tensor:
    starts = torch.linspace(0, len(data) - length, count).long()
    return data[starts[:, None] + torch.arange(length)]


def continues(rows: torch.Tensor, before: int = 5) -> torch.Tensor:
    """Bool (rows, tokens): tokens that, with the `before` tokens in front, stand earlier in their row."""
    found = torch.zeros_like(rows, dtype=torch.bool)
    for number_, row in enumerate(rows.tolist()):
        seen: set[tuple[int, ...]] = set()
        for at in range(before, len(row)):
            piece = tuple(row[at - before : at + 1])
            found[number_, at] = piece in seen
            seen.add(piece)
    return found


@torch.no_grad()
def held_out(model: LlamaForCausalLM, rows: torch.Tensor) -> dict[str, float]:
    """Nats for each character of clean rows: of all, of those that repeat the context, of the others."""
    model.eval()
    nats = []
    for part in rows.split(16):
        logits = model(input_ids=part).logits[:, :-1].float()
        nats.append(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        )
    model.train()
    losses, again = torch.cat(nats), continues(rows)[:, 1:].flatten()
    return {
        "all": losses.mean().item(),
        "repeat": losses[again].mean().item() if again.any() else math.nan,
        "other": losses[~again].mean().item(),
    }


def pretrain(arm: str, seed: int, size: Size) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """One model on text, and its losses on the way."""
    model, data = make_model(seed), characters("train", size.characters)
    rows = {
        split: windows_of(characters(split), size.windows, size.window) for split in ("calibration", "test")
    }
    curve: list[dict[str, Any]] = []

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        draws = torch.Generator().manual_seed(derive(seed, "batch", step) % 2**63)
        starts = torch.randint(0, len(data) - size.window, (size.batch,), generator=draws)
        clean = data[starts[:, None] + torch.arange(size.window)]
        return hide(arm, clean, derive(seed, "mask", step)), clean

    def look(step: int) -> None:
        if step % max(1, size.steps // size.looks) == 0:
            epochs = step * size.batch * size.window / len(data)
            curve.append({"step": step, "epochs": epochs, **held_out(model, rows["calibration"])})

    optimise(model, batch_at, size.steps, 2e-3, look)
    return model, {"curve": curve, "test": held_out(model, rows["test"])}


def needle_rows(
    count: int, depths: Sequence[float], length: int, hay: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of `length` characters with a code hidden at a depth and asked for at the end: the labels."""
    rng = random.Random(seed)
    rows, labels = [], []
    for index in range(count):
        name = "".join(rng.choice(SYLLABLES) for _ in range(3))
        code = str(rng.randrange(10_000, 100_000))
        sentence = encode(f"\nThe code of {name} is {code}.\n").tolist()
        question = encode(f"\nThe code of {name} is ").tolist()
        room = length - len(sentence) - len(question) - len(code)
        start = rng.randrange(len(hay) - room)
        piece = hay[start : start + room].tolist()
        at = round(depths[index % len(depths)] * room)
        ids = [*piece[:at], *sentence, *piece[at:], *question, *encode(code).tolist()]
        rows.append(ids)
        labels.append([-100] * (length - len(code)) + ids[-len(code) :])
    return torch.tensor(rows), torch.tensor(labels)


def find_needles(model: LlamaForCausalLM, seed: int, size: Size) -> dict[str, Any]:
    """Learn to find needles, the same in every arm, and look for others in text never trained on."""
    hay = {"train": characters("train", size.characters), "test": characters("test")}
    rows, labels = needle_rows(
        size.needle_steps * size.batch, DEPTHS, size.window, hay["train"], derive(seed, "needles")
    )
    asked, wanted = needle_rows(
        size.asked * len(DEPTHS), DEPTHS, size.window, hay["test"], derive(seed, "asked")
    )
    looks: list[dict[str, Any]] = []

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice((step - 1) * size.batch, step * size.batch)
        return rows[part], labels[part]

    def look(step: int) -> None:
        if step % size.needle_every:
            return
        model.eval()
        with torch.no_grad():
            logits = torch.cat([model(input_ids=part).logits[:, -6:-1].float() for part in asked.split(16)])
        model.train()
        right = logits.argmax(-1) == wanted[:, -5:]
        whole = right.all(1).float()
        looks.append(
            {
                "step": step,
                "recall": whole.mean().item(),
                "digits": right.float().mean().item(),
                "nats": torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), wanted[:, -5:].flatten()
                ).item(),
                "by depth": [whole[at :: len(DEPTHS)].mean().item() for at in range(len(DEPTHS))],
            }
        )

    optimise(model, batch_at, size.needle_steps, 2e-3, look)
    means = {key: statistics.fmean(one[key] for one in looks) for key in ("recall", "digits", "nats")}
    return {"looks": looks, **means}


def long_answers(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions whose answers have more than 50 characters: count on from a number, by a step."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        start, by = rng.randrange(10, 60), rng.randrange(2, 10)
        answer = ", ".join(str(start + by * place) for place in range(16))
        pairs.append((f"\nCount from {start} by {by}: ", answer + "."))
    return pairs


def learn_answers(model: LlamaForCausalLM, arm: str, seed: int, size: Size) -> dict[str, float]:
    """Fine-tune on long answers; MEAP sees each twice, so NTP has twice the epochs."""

    def collate(features: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
        made = [([*encode(q).tolist(), *encode(a).tolist(), EOS], len(q)) for q, a in features]
        width = max(len(ids) for ids, _ in made)
        ids = torch.tensor([row + [EOS] * (width - len(row)) for row, _ in made])
        labels = ids.clone()
        for place, (row, prompt) in enumerate(made):
            labels[place, :prompt] = -100
            labels[place, len(row) :] = -100
        return {"input_ids": ids, "labels": labels}

    pairs = long_answers(size.answers, derive(seed, "answers"))
    collator = DataCollatorForMEAP(
        collate, mask_token_id=MASK, mode="sft", seed=seed, protected_ids=[EOS], protect_special=True
    )
    epochs = size.answer_epochs * (2 if arm == "NTP" else 1)
    per_epoch = max(1, len(pairs) // 8)

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, place = divmod(step - 1, per_epoch)
        order = random.Random(derive(seed, "order", epoch)).sample(range(len(pairs)), len(pairs))
        clean = collator.clean([pairs[index] for index in order[8 * place : 8 * place + 8]])
        batch = clean if arm == "NTP" else collator.mask(clean, (epoch, place))
        return batch["input_ids"], batch["labels"]

    optimise(model, batch_at, epochs * per_epoch, 1e-3)
    batch = collate(long_answers(4 * size.asked, derive(seed, "other answers")))
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float()
    wanted = batch["labels"][:, 1:]
    counted = wanted != -100
    right = (logits.argmax(-1) == wanted) | ~counted
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()).item()
    return {"exact": right.all(1).float().mean().item(), "nats": nats}


def recall_rows(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of 96: Markov filler with 8 pairs of key and value, then 8 queries; and where answers stand."""
    jumps = rng.choice([1, 2, 5], size=(count, 64), p=[0.6, 0.3, 0.1])
    rows = np.empty((count, 96), np.int64)
    for row in range(count):
        state, body = int(rng.integers(16)), []
        for at in range(64):
            body.append(state)
            state = (state + int(jumps[row, at])) % 16
        keys, values = rng.permutation(16)[:8], rng.integers(0, 16, 8)
        for place, (key, value) in zip(
            sorted(rng.permutation(32)[:8]), zip(keys, values, strict=True), strict=True
        ):
            body[2 * place : 2 * place + 2] = [16 + int(key), 32 + int(value)]
        order = rng.integers(0, 8, 16)
        tail = [token for index in order for token in (16 + int(keys[index]), 32 + int(values[index]))]
        rows[row] = [*body, *tail]
    return rows, np.arange(65, 96, 2)


def emergence(arm: str, seed: int, size: Size) -> dict[str, Any]:
    """Steps until queries are answered nine times in ten, on clean input."""
    model = make_model(seed, layers=2, width=64, vocabulary=49)
    held, places = recall_rows(64, np.random.default_rng(derive(seed, "held")))
    rows = torch.from_numpy(held)
    accuracy: list[tuple[int, float]] = []

    def batch_at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        clean = torch.from_numpy(recall_rows(32, np.random.default_rng(derive(seed, "recall", step)))[0])
        if arm == "NTP":
            return clean, clean
        return meap_mask_inputs(clean, 48, RATIO, seed=derive(seed, "recall mask", step)), clean

    def look(step: int) -> None:
        if step % size.recall_every == 0:
            with torch.no_grad():
                guesses = model(input_ids=rows).logits[:, places - 1].argmax(-1)
            accuracy.append((step, (guesses == rows[:, places]).float().mean().item()))

    optimise(model, batch_at, size.recall_steps, 2e-3, look)
    reached = next((step for step, share in accuracy if share >= 0.9), None)
    return {"accuracy": accuracy, "reached": reached}


def measure(seeds: Sequence[int], size: Size, unit: Units) -> list[dict[str, Any]]:
    """Every unit of every seed; those done before are read."""
    runs = []
    for seed in seeds:
        run: dict[str, Any] = {
            "seed": seed,
            "text": {},
            "needle": {},
            "attention": {},
            "answers": {},
            "emergence": {},
        }
        for arm in ARMS:
            weights = unit.place(f"{seed} {arm}.safetensors")

            def text_unit(arm: str = arm, weights: Path = weights, seed: int = seed) -> dict[str, Any]:
                model, found = pretrain(arm, seed, size)
                save_file(model.state_dict(), weights)
                return found

            def loaded(weights: Path = weights, seed: int = seed) -> LlamaForCausalLM:
                model = make_model(seed)
                model.load_state_dict(load_file(weights))
                return model

            def attention_unit(seed: int = seed, loaded: Callable[[], Any] = loaded) -> dict[str, Any]:
                rows = windows_of(characters("test"), min(16, size.windows), size.window)
                where = meap_mask_inputs(rows, MASK, RATIO, seed=derive(seed, "attention"), return_mask=True)[
                    1
                ]
                return asdict(attention_shift(loaded(), rows, where, MASK))

            def answers_unit(
                kind: str, seed: int = seed, loaded: Callable[[], Any] = loaded
            ) -> dict[str, Any]:
                return dict(learn_answers(loaded(), kind, seed, size))

            run["text"][arm] = unit(f"{seed} text {arm}", text_unit)
            run["needle"][arm] = unit(
                f"{seed} needle {arm}", lambda m=loaded, s=seed: find_needles(m(), s, size)
            )
            if arm != "random tokens":
                run["attention"][arm] = unit(f"{seed} attention {arm}", attention_unit)
                run["emergence"][arm] = unit(
                    f"{seed} emergence {arm}", lambda a=arm, s=seed: emergence(a, s, size)
                )
            if arm == "NTP":
                for kind in ("NTP", "MEAP"):
                    run["answers"][kind] = unit(f"{seed} answers {kind}", lambda k=kind, f=answers_unit: f(k))
        runs.append(run)
    return runs


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean difference over seeds and its standard error."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {"mean": statistics.fmean(differences), "error": error, "each": differences}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means, paired differences, and the verdict."""
    loss = {
        arm: {kind: [run["text"][arm]["test"][kind] for run in runs] for kind in ("all", "repeat", "other")}
        for arm in ARMS
    }
    needle = {
        arm: {key: [run["needle"][arm][key] for run in runs] for key in ("recall", "digits", "nats")}
        for arm in ARMS
    }
    gain = paired(needle["MEAP"]["recall"], needle["NTP"]["recall"])
    worse = statistics.fmean(loss["MEAP"]["all"]) / statistics.fmean(loss["NTP"]["all"]) - 1
    decays = [
        (run["attention"]["MEAP"]["score_decay"], run["attention"]["NTP"]["score_decay"]) for run in runs
    ]
    checks = {
        "needle recall, mean over the looks on the way, higher by 5 points": gain["mean"] >= 0.05,
        "... and by twice its standard error": bool(
            gain["error"] is not None and gain["mean"] > 2 * gain["error"]
        ),
        "held-out loss at most 2 % higher": worse <= 0.02,
        "attention to masked tokens decays more than in NTP's model, each seed": all(
            a > b for a, b in decays
        ),
    }
    held = list(checks.values())
    verdict = "reproduced" if all(held[:3]) else "weaker claim" if held[2] and held[3] else "not shown"
    return {
        "loss": loss,
        "loss_gain": {arm: paired(loss[arm]["all"], loss["NTP"]["all"]) for arm in ARMS[1:]},
        "repeat_gain": {arm: paired(loss[arm]["repeat"], loss["NTP"]["repeat"]) for arm in ARMS[1:]},
        "needle": needle,
        "needle_gain": gain,
        "checks": checks,
        "verdict": verdict,
    }


MEANINGS = {
    "reproduced": "",
    "weaker claim": ": no harm to the loss at equal steps, and masked tokens are attended to less; that "
    "facts are found better doesn't show",
    "not shown": "",
}


def spread(values: Sequence[float], digits: int = 3) -> str:
    return f"{statistics.fmean(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    found, runs, size = results["summary"], results["runs"], results["size"]
    lines = [
        "# MEAP: facts in the context, at no cost to the loss?",
        "",
        f"Seeds {', '.join(map(str, results['seeds']))}. A character model of 0.36 M weights: "
        f"{size['steps']} steps of {size['batch']} windows of {size['window']} on "
        f"{size['characters'] // 1000} kB of the test-bed's `source`, then {size['needle_steps']} steps on "
        "needles, recall being the mean over looks on the way. Mean (range) over seeds, on clean test text. "
        "Made by "
        "`python evidence/meap.py`.",
        "",
        "| trained with | held-out loss | repeats of context | elsewhere | needle recall | digits right |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        loss, needle = found["loss"][arm], found["needle"][arm]
        lines.append(
            f"| {arm} | {spread(loss['all'])} | {spread(loss['repeat'])} | {spread(loss['other'])} "
            f"| {spread(needle['recall'], 2)} | {spread(needle['digits'], 2)} |"
        )
    gain = found["needle_gain"]
    lines += [
        "",
        f"Needle recall, MEAP less NTP: {100 * gain['mean']:+.1f} points, standard error "
        + ("unknown." if gain["error"] is None else f"{100 * gain['error']:.1f}."),
        "",
        "| | NTP | MEAP |",
        "|---|---|---|",
    ]
    rows: tuple[tuple[str, str, str, int], ...] = (
        ("score decay of masked tokens", "attention", "score_decay", 2),
        ("variance increase of the others", "attention", "variance_increase", 3),
        ("long answers, loss (NTP: twice the epochs)", "answers", "nats", 3),
        ("long answers, all right", "answers", "exact", 2),
    )
    for words, part, key, digits in rows:
        cells = [spread([run[part][arm][key] for run in runs], digits) for arm in ("NTP", "MEAP")]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    cells = [
        ", ".join(str(run["emergence"][arm]["reached"] or "not") for run in runs) for arm in ("NTP", "MEAP")
    ]
    lines.append(f"| recall from scratch, steps to 90 %, each seed | {' | '.join(cells)} |")
    steps = [look["step"] for look in runs[0]["needle"]["NTP"]["looks"]]
    lines += ["", "Needle recall on the way, mean over seeds:", ""]
    lines += [f"| steps | {' | '.join(map(str, steps))} |", "|---|" + "---|" * len(steps)]
    for arm in ARMS:
        means = [
            statistics.fmean(run["needle"][arm]["looks"][at]["recall"] for run in runs)
            for at in range(len(steps))
        ]
        lines.append(f"| {arm} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    lines += ["", "Held-out loss on calibration text over the run, mean over seeds:", ""]
    looks = [look["epochs"] for look in runs[0]["text"]["NTP"]["curve"]]
    lines += [
        f"| epochs | {' | '.join(f'{epochs:.0f}' for epochs in looks)} |",
        "|---|" + "---|" * len(looks),
    ]
    for arm in ARMS:
        means = [
            statistics.fmean(run["text"][arm]["curve"][at]["all"] for run in runs) for at in range(len(looks))
        ]
        lines.append(f"| {arm} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    lines.append("")
    lines += [f"- {'holds' if held else '**fails**'}: {check}" for check, held in found["checks"].items()]
    lines += ["", f"**Verdict: {found['verdict']}{MEANINGS[found['verdict']]}.**", ""]
    return "\n".join(lines)


def draw(results: Mapping[str, Any]) -> str:
    """Held-out loss and needle recall of every seed, as SVG."""
    found = results["summary"]
    rows = {arm: 46 + 30 * row for row, arm in enumerate(ARMS)}
    foot = max(rows.values()) + 20
    body = []
    panels = (
        ("Held-out loss (nats per character)", 130, 410, {arm: found["loss"][arm]["all"] for arm in ARMS}),
        ("Needle recall", 460, 780, {arm: found["needle"][arm]["recall"] for arm in ARMS}),
    )
    for title, left, right, values in panels:
        low, high = (edge(value for listed in values.values() for value in listed) for edge in (min, max))
        scale = Scale(low, max(high, low + 0.01), left, right)
        body.append(text(left, 20, title, "title"))
        for value in ticks(low, max(high, low + 0.01)):
            body += [
                line(scale(value), 30, scale(value), foot, "grid"),
                text(scale(value), foot + 14, number(value), "small", "middle"),
            ]
        for arm, y in rows.items():
            body += [dot(scale(value), y, 4, "a") for value in values[arm]]
    body += [text(120, y + 4, arm, anchor="end") for arm, y in rows.items()]
    return page(800, foot + 28, "MEAP: held-out loss and needles found", body)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of(__doc__, "one seed, a few steps", resumes=True)
    parser.add_argument("--steps", type=int, default=Size.steps)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds, size = ([0], QUICK) if chosen.quick else (chosen.seeds, replace(Size(), steps=chosen.steps))
    with units("meap", chosen, asdict(size)) as unit:
        runs = measure(seeds, size, unit)
    summary = summarise(runs)
    results = {
        "seeds": list(seeds),
        "size": asdict(size),
        "environment": environment(),
        "summary": summary,
        "runs": runs,
        "verdict": summary["verdict"],
    }
    publish("meap", chosen, results, table(results), draw(results))


if __name__ == "__main__":
    main()
