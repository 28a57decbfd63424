"""RESM and TSV-M against the other merges, and merging against mixing data.

    domains   D_source, D_docs, D_tables, D_names -> one model; metric: retained gain, (base bits - merged
              bits) / (base bits - own fine-tune's bits), mean over domains
    padded    the same, after noise of 30 % of its own size was added to the change of D_source: what RESM's
              weights and ranks are for
    skills    S_numbers, S_strings, S_lookup -> one model; metric: score over the own fine-tune's
    3H        A_help, A_honest, A_harmless -> one model; against models trained on mixtures of their data, for
              as many steps as the three took together, and for as many as each; metrics: answers that are
              right, `?` where the key is absent less `?` where it is not, `#` where the key is flagged less
              `#` where it is not; their mean and minimum. Mediator is one more arm.

Twelve merges and RESM with its reconstructed choices. Every method gets five strengths, s in base + s (merge
- base); rewarded soup, whose free choice is another, gets five weightings. The choice is by the metric on the
calibration pools, numbers are of the test pools. Fine-tunes are of the mild flavour.

Reproduced if, on the mean of three seeds: (i) the better of TSV-M and RESM keeps 2 points more of the
domains' gain than the best of average, task arithmetic and TIES, and is below the average in no seed; (ii)
RESM is at most 0.5 points below TSV-M; (iii) RESM is above TSV-M in the padded case. Weaker claim: (i) alone.
All else is reported and judged by the reader: that merging beats mixing is not asserted.

    python evidence/resm.py                    writes evidence/results/resm.json, resm.md and resm.svg
    python evidence/resm.py --quick            a few steps, to see that everything runs; writes to --out only
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from script import parser_of, publish

import weightsmith
from weightsmith.alignment import armorm_mixture, heuristic_mixture, hummer_mixture, hummer_weights
from weightsmith.evaluation import evaluate, load_model, prompts
from weightsmith.evaluation.likelihood import answers, start_token
from weightsmith.evaluation.prompting import token_ids
from weightsmith.merging import merge_state_dicts
from weightsmith.merging.mediator import Mediator, build_mediator
from weightsmith.reports.comparison import draw_figures
from weightsmith.runs.atomic import read_json, write_json, write_text
from weightsmith.runs.environment import environment
from weightsmith.runs.seeds import derive
from weightsmith.testbed import DOMAINS, SIZES, SKILL_GROUPS, items
from weightsmith.training import DataSource, FinetuneConfig, finetune
from weightsmith.training.bed import Bed, Mixture, bed, configs, finetune_of

State = dict[str, torch.Tensor]
Scores = dict[str, float]

STRENGTHS = (0.3, 0.5, 0.7, 1.0, 1.3)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("linear", {}),
    "rewarded soup": ("linear", {}),
    "model stock": ("model_stock", {}),
    "task arithmetic": ("task_arithmetic", {}),
    "TIES": ("ties", {}),
    "DARE": ("dare_linear", {}),
    "DARE-TIES": ("dare_ties", {}),
    "DELLA": ("della_linear", {}),
    "DELLA-TIES": ("della", {}),
    "Breadcrumbs": ("breadcrumbs", {}),
    "Breadcrumbs-TIES": ("breadcrumbs_ties", {}),
    "TSV-M": ("tsvm", {}),
    "RESM": ("resm", {}),
    "RESM, outliers suppressed": ("resm", {"mode": "suppress"}),
    "RESM, weights by layer": ("resm", {"granularity": "layer"}),
    "RESM, weights only": ("resm", {"eta": 0.0}),
    "RESM, ranks only": ("resm", {"g": 0.0}),
}
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
SPECTRAL = [name for name, (method, _) in METHODS.items() if method in ("tsvm", "resm")]
PLAIN = ("average", "task arithmetic", "TIES")
PADDED, PADDING = "D_source", 0.3
TRIPLE = {"help": "A_help", "honest": "A_honest", "harmless": "A_harmless"}
MIXTURES = ("Heuristic", "ArmoRM", "Hummer")
ROUNDS, KEEP = 5, 0.5
OWN_DOMAIN, OWN_SKILL, OWN_TRIPLE = 0.07, 0.10, 0.20  # what a fine-tune has to gain on its own tasks
MARGIN, NOT_BELOW = 0.02, 0.005
TINY = 1e-3  # least gain or score that is divided by: below, the gate has failed anyway


@dataclasses.dataclass(frozen=True, kw_only=True)
class Amount:
    """How much everything reads.

    Attributes:
        items: Test questions of each skill; half as many of calibration.
        characters: Test characters of each domain; a quarter as many of calibration.
        pool: Training questions of each objective, for mixtures.
        prompts: Prompts of each task that the router of Mediator sees.
        steps: Of each alignment fine-tune. The bed's own 250 leave `?` and `#` half learnt; seen on seed 90.
    """

    items: int = 400
    characters: int = 20_000
    pool: int = 12_000
    prompts: int = 256
    steps: int = 600


QUICK = Amount(items=6, characters=400, pool=40, prompts=24, steps=5)


class Bench:
    """One base and its fine-tunes in memory, and a model to try weights in.

    Attributes:
        base: The base's weights.
        states: Each fine-tune's.
        own: Raw scores of the base ("base") and of each fine-tune, by split.
    """

    def __init__(self, made: Bed, names: Sequence[str], tasks: Sequence[str], amount: Amount) -> None:
        self.tasks, self.amount = tuple(tasks), amount
        self.model, self.tokenizer = load_model(made.base)
        self.base = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.states: dict[str, State] = {
            name: load_model(made.finetunes[name])[0].state_dict() for name in names
        }
        self.own = {
            split: {
                name: self.raw(state, split) for name, state in {"base": self.base, **self.states}.items()
            }
            for split in ("calibration", "test")
        }

    def raw(self, state: State | None, split: str, model: Any = None) -> Scores:
        """Score of each task as its scorer gives it; of weights, or of another model."""
        if state is not None:
            self.model.load_state_dict(state)
        test = split == "test"
        found = evaluate(
            model or self.model,
            list(self.tasks),
            split,
            tokenizer=self.tokenizer,
            items=self.amount.items if test else self.amount.items // 2,
            characters=self.amount.characters if test else self.amount.characters // 4,
        )
        return {name: score.value for name, score in found.items()}


Metric = Callable[[Bench, Scores, str], Scores]
"""(bench, raw scores, split) -> what a model is judged by, for each task; higher is better."""


def retained_gain(bench: Bench, raw: Scores, split: str) -> Scores:
    base, own = bench.own[split]["base"], bench.own[split]
    return {
        domain: (base[domain] - raw[domain]) / max(base[domain] - own[f"D_{domain}"][domain], TINY)
        for domain in DOMAINS
    }


def retained_score(bench: Bench, raw: Scores, split: str) -> Scores:
    own = bench.own[split]
    return {
        skill: raw[skill] / max(own[f"S_{group}"][skill], TINY)
        for group, skills in SKILL_GROUPS.items()
        for skill in skills
    }


def as_it_is(bench: Bench, raw: Scores, split: str) -> Scores:
    return raw


# ---- merging


def soups(count: int) -> list[tuple[float, ...]]:
    """Five weightings of so many models: even, towards each, and (where that is less than five) away."""
    even = (1 / count,) * count
    towards = [tuple(0.4 if m == n else 0.6 / (count - 1) for m in range(count)) for n in range(count)]
    away = [tuple(0.1 if m == n else 0.9 / (count - 1) for m in range(count)) for n in range(count)]
    return [even, *towards, *away][: len(STRENGTHS)]


def candidates(bench: Bench, states: Sequence[State], name: str, seed: int) -> dict[str, State]:
    """The models that a method may choose from on calibration, by what was varied."""
    method, options = METHODS[name]
    if method in RANDOM:
        options = {**options, "seed": seed}
    if name == "rewarded soup":
        return {
            " ".join(f"{weight:.2g}" for weight in weights): merge_state_dicts(
                None, states, method, weight=list(weights)
            )
            for weights in soups(len(states))
        }
    base = None if method == "linear" else bench.base
    merged = merge_state_dicts(base, states, method, **options)
    return {
        f"{strength:g}": {key: start + strength * (merged[key] - start) for key, start in bench.base.items()}
        for strength in STRENGTHS
    }


def judged(bench: Bench, state: State | None, metric: Metric, split: str, model: Any = None) -> Scores:
    """What a model is judged by, and the mean of it."""
    tasks = metric(bench, bench.raw(state, split, model), split)
    return {**tasks, "mean": statistics.fmean(tasks.values())}


def merges(
    bench: Bench, states: Sequence[State], metric: Metric, seed: int, names: Sequence[str] = tuple(METHODS)
) -> dict[str, dict[str, Any]]:
    """Each method's chosen model on the test pools, and all that it chose from."""
    found = {}
    for name in names:
        tried = candidates(bench, states, name, seed)
        search = {
            words: judged(bench, state, metric, "calibration")["mean"] for words, state in tried.items()
        }
        best = max(search, key=lambda words: search[words])
        found[name] = {
            "test": judged(bench, tried[best], metric, "test"),
            "chosen": best,
            "calibration": search,
        }
    return found


def padded(bench: Bench, seed: int) -> list[State]:
    """The fine-tunes' weights with noise added to each matrix of one of them: Gaussian, its root mean square
    30 % of the change's own.
    """
    generator = torch.Generator().manual_seed(derive(seed, "padding"))
    found = []
    for name, state in bench.states.items():
        if name == PADDED:
            state = dict(state)
            for key, start in bench.base.items():
                if start.ndim == 2:
                    size = PADDING * (state[key] - start).square().mean().sqrt()
                    state[key] = state[key] + size * torch.randn(start.shape, generator=generator)
        found.append(state)
    return found


# ---- mixing


def margins(
    bench: Bench, triple: Mapping[str, State], rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, float]]:
    """How far each objective is for a row: log p(answer) under the model tuned for it, less under the base.

    There is no reward model here: these are reference classifiers, and they know more than a mixture would.
    """
    start, end = start_token(bench.tokenizer), bench.tokenizer.eos_token_id
    pairs = [
        (
            [start, *token_ids(bench.tokenizer, row["prompt"])],
            [*token_ids(bench.tokenizer, row["answer"]), end],
        )
        for row in rows
    ]

    def likelihoods(state: State) -> list[float]:
        bench.model.load_state_dict(state)
        found = [0.0] * len(pairs)
        for batch in answers(bench.model, pairs, batch_size=256):
            for index, answer in batch:
                found[index] = answer.log_likelihood
        return found

    before = likelihoods(bench.base)
    after = {objective: likelihoods(state) for objective, state in triple.items()}
    return [
        {objective: after[objective][index] - before[index] for objective in triple}
        for index in range(len(rows))
    ]


class Mixer:
    """Trains on mixtures as the bed's fine-tunes are trained: same replay, same schedule."""

    def __init__(self, bench: Bench, made: Bed, size: str, seed: int, **steps: Any) -> None:
        base, plain = configs(size, "all", **steps)
        self.config = finetune_of("A_help", plain, "mild", base)
        self.rate = 0.144 / SIZES[size].hidden  # the default of a fine-tune, which rounds lower by hand
        self.bench, self.base, self.seed = bench, made.base, seed
        self.folder = made.base.parent / "mixtures"
        self.pool: dict[str, list[dict[str, str]]] = {
            objective: [
                {"prompt": item.question, "answer": item.answer}
                for item in items(objective, "train", bench.amount.pool, seed)
            ]
            for objective in TRIPLE
        }

    def mixtures(self) -> dict[str, dict[str, list[Any]]]:
        """Rows of each objective, by mixture."""
        triple = {objective: self.bench.states[name] for objective, name in TRIPLE.items()}
        known: dict[str, dict[str, float]] = {}
        everything = [row for rows in self.pool.values() for row in rows]
        for row, scores in zip(everything, margins(self.bench, triple, everything), strict=True):
            known[row["prompt"] + row["answer"]] = scores

        def scorer(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
            return [known[row["prompt"] + row["answer"]] for row in rows]

        made = {
            "Heuristic": heuristic_mixture(self.pool, seed=self.seed),
            "ArmoRM": armorm_mixture(self.pool, scorer, keep=KEEP, seed=self.seed),
            "Hummer": hummer_mixture(self.pool, scorer, keep=KEEP, seed=self.seed),
        }
        return {
            name: {objective: mixture.of(objective) for objective in TRIPLE} for name, mixture in made.items()
        }

    def train(self, name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], steps: int) -> Path:
        """A model trained on a mixture for so many steps; an earlier one is used again."""
        sources = {objective: self._file(name, objective, listed) for objective, listed in rows.items()}
        if name != "Hummer":
            return self._finetune(name, sources, dict.fromkeys(TRIPLE, 1.0), self.base, steps)
        weights, before, model = dict.fromkeys(TRIPLE, 1.0), None, self.base
        ends = [round(steps * number / ROUNDS) for number in range(ROUNDS + 1)]
        for number, (begin, end) in enumerate(itertools.pairwise(ends)):
            # The cosine of a whole run in steps: a round begins with a short warm-up of its own.
            rate = self.rate * 0.5 * (1 + math.cos(math.pi * (number + 0.5) / ROUNDS))
            model = self._finetune(
                f"{name}-{steps}-{number}",
                sources,
                weights,
                model,
                end - begin,
                learning_rate=rate,
                schedule="constant",
                warmup_steps=min(5, end - begin),
            )
            now = self.bench.raw(load_model(model)[0].state_dict(), "calibration")
            weights, before = hummer_weights(weights, now, before), now
        return model

    def _file(self, name: str, objective: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        digest = hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
        path = self.folder / f"{name}-{objective}-{digest}.jsonl"
        if not path.exists():
            write_text(path, text)
        return path

    def _finetune(
        self,
        name: str,
        sources: Mapping[str, Path],
        weights: Mapping[str, float],
        model: Path,
        steps: int,
        **options: Any,
    ) -> Path:
        data = tuple(
            DataSource(source=str(path), prompt="prompt", column="answer", weight=weights[objective])
            for objective, path in sources.items()
        )
        config: FinetuneConfig = dataclasses.replace(self.config, data=data, steps=steps, **options)
        facts = json.dumps([dataclasses.asdict(config), model.name], sort_keys=True, default=str)
        out = self.folder / f"{name}-{hashlib.blake2b(facts.encode(), digest_size=6).hexdigest()}"
        if not out.exists():
            work = self.folder / ".work" / out.name
            finetune(config, model, out, workdir=work, seed=derive(self.seed, "mixture", name))
        return out


def mediated(bench: Bench, made: Bed, seed: int) -> dict[str, Any]:
    """Mediator with its router in charge, which learns the three kinds of questions from calibration."""
    with tempfile.TemporaryDirectory() as folder:
        experts = {objective: made.finetunes[name] for objective, name in TRIPLE.items()}
        report = build_mediator(made.base, experts, Path(folder) / "mediator")
        model = Mediator.from_pretrained(report.path)
        known = {
            objective: prompts([objective], bench.tokenizer, bench.amount.prompts) for objective in TRIPLE
        }
        router = model.fit_router(known, seed=seed)
        copies = sum(file.stat().st_size for path in experts.values() for file in path.glob("*.safetensors"))
        return {
            "test": judged(bench, None, as_it_is, "test", model),
            "accuracy": router.report["accuracy"],
            "bytes": report.bytes / copies,
        }


# ---- cases


def kept(case: str, made: Bed, amount: Amount, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case gave before, from beside its bed: a run that was stopped goes on where it was. Any change
    of this script or of the package measures anew.
    """
    digest = hashlib.blake2b(repr(amount).encode(), digest_size=8)
    for file in (Path(__file__), *sorted(Path(weightsmith.__file__).parent.rglob("*.py"))):
        digest.update(file.read_bytes())
    file = made.base.parent / "evidence" / f"resm-{case}-{digest.hexdigest()}.json"
    if not file.exists():
        write_json(file, make())
    return read_json(file)


def measure_domains(made: Bed, seed: int, amount: Amount) -> dict[str, Any]:
    """The domain merge and its padded variant."""
    bench = Bench(made, list(made.finetunes), DOMAINS, amount)
    own = bench.own["test"]
    gains = {domain: 1 - own[f"D_{domain}"][domain] / own["base"][domain] for domain in DOMAINS}
    return {
        "base": own["base"],
        "gate": {"gains": gains, "holds": min(gains.values()) >= OWN_DOMAIN},
        "arms": merges(bench, list(bench.states.values()), retained_gain, seed),
        "padded": merges(bench, padded(bench, seed), retained_gain, seed, [*PLAIN, *SPECTRAL]),
    }


def measure_skills(made: Bed, seed: int, amount: Amount) -> dict[str, Any]:
    """The merge of the skill groups."""
    skills = [skill for members in SKILL_GROUPS.values() for skill in members]
    bench = Bench(made, list(made.finetunes), skills, amount)
    own = bench.own["test"]
    gains = {
        group: statistics.fmean(own[f"S_{group}"][skill] - own["base"][skill] for skill in members)
        for group, members in SKILL_GROUPS.items()
    }
    return {
        "base": judged(bench, bench.base, retained_score, "test"),
        "gate": {"gains": gains, "holds": min(gains.values()) >= OWN_SKILL},
        "arms": merges(bench, list(bench.states.values()), retained_score, seed),
    }


def measure_triple(
    made: Bed, seed: int, amount: Amount, size: str, steps: Mapping[str, int]
) -> dict[str, Any]:
    """Helpful, honest, harmless: merged, mixed, mediated."""
    bench = Bench(made, list(made.finetunes), tuple(TRIPLE), amount)
    own = bench.own["test"]
    gains = {objective: own[name][objective] - own["base"][objective] for objective, name in TRIPLE.items()}
    mixer = Mixer(bench, made, size, seed, **steps)
    each = mixer.config.steps
    mixed = {
        f"{name}, {words}": {
            "test": judged(
                bench, load_model(mixer.train(name, rows, count))[0].state_dict(), as_it_is, "test"
            )
        }
        for name, rows in mixer.mixtures().items()
        for words, count in (("total steps", len(TRIPLE) * each), ("steps of one", each))
    }
    return {
        "steps": each,
        "gate": {"gains": gains, "holds": min(gains.values()) >= OWN_TRIPLE},
        "models": {
            name: {**scores, "mean": statistics.fmean(scores.values())} for name, scores in own.items()
        },
        "arms": merges(bench, list(bench.states.values()), as_it_is, seed),
        "mixtures": mixed,
        "mediator": mediated(bench, made, seed),
    }


def measure(seed: int, size: str, amount: Amount, cache: str | None = None, **steps: int) -> dict[str, Any]:
    """Everything for one seed; `steps` as the bed takes them."""

    def made(names: Sequence[str], mixture: Mixture, **own: int) -> Bed:
        return bed(size, seed, which=names, mixture=mixture, cache=cache, **steps | own)

    domains = made([f"D_{domain}" for domain in DOMAINS], "domains")
    skills = made([f"S_{group}" for group in SKILL_GROUPS], "all")
    triple = made(list(TRIPLE.values()), "all", finetune_steps=amount.steps)
    longer = {**steps, "finetune_steps": amount.steps}
    return {
        "domains": kept("domains", domains, amount, lambda: measure_domains(domains, seed, amount)),
        "skills": kept("skills", skills, amount, lambda: measure_skills(skills, seed, amount)),
        "3H": kept("3H", triple, amount, lambda: measure_triple(triple, seed, amount, size, longer)),
    }


# ---- judgement


def column(
    runs: Sequence[Mapping[str, Any]], case: str, arms: str, name: str, key: str = "mean"
) -> list[float]:
    """A number of one arm, seed by seed."""
    return [run[case][arms][name]["test"][key] for run in runs]


def judge(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What was asked for, one by one."""

    def mean(name: str, arms: str = "arms") -> float:
        return statistics.fmean(column(runs, "domains", arms, name))

    ours = max(("TSV-M", "RESM"), key=mean)
    best = max(PLAIN, key=mean)
    average = column(runs, "domains", "arms", "average")
    checks = {
        "every domain fine-tune gains 7 % on its own domain (gate)": all(
            run["domains"]["gate"]["holds"] for run in runs
        ),
        f"the better of TSV-M and RESM keeps {100 * MARGIN:.0f} points more of the domains' gain than the "
        "best of average, task arithmetic and TIES": mean(ours) >= mean(best) + MARGIN,
        "it is below the average in no seed": all(
            value >= other
            for value, other in zip(column(runs, "domains", "arms", ours), average, strict=True)
        ),
        f"RESM is at most {100 * NOT_BELOW:.1f} points below TSV-M": mean("RESM")
        >= mean("TSV-M") - NOT_BELOW,
        "RESM is above TSV-M in the padded case": mean("RESM", "padded") > mean("TSV-M", "padded"),
    }
    held = list(checks.values())
    verdict = "reproduced" if all(held) else "weaker claim" if all(held[:3]) else "not shown"
    return {"checks": checks, "verdict": verdict}


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and range over seeds, in points."""
    scaled = [100 * value for value in values]
    return f"{statistics.fmean(scaled):.{digits}f} ({min(scaled):.{digits}f} .. {max(scaled):.{digits}f})"


def gate_words(runs: Sequence[Mapping[str, Any]], case: str) -> str:
    held = sum(run[case]["gate"]["holds"] for run in runs)
    gains = ", ".join(
        f"{name} {spread([run[case]['gate']['gains'][name] for run in runs])}"
        for name in runs[0][case]["gate"]["gains"]
    )
    return f"Gain of the own fine-tune: {gains}; the gate holds in {held} of {len(runs)} seeds."


def merge_table(runs: Sequence[Mapping[str, Any]], case: str, arms: str, keys: Sequence[str]) -> list[str]:
    """Rows of merges, the best first."""
    names = sorted(runs[0][case][arms], key=lambda name: -statistics.fmean(column(runs, case, arms, name)))
    lines = [f"| method | mean | {' | '.join(keys)} | chosen |", "|---" * (3 + len(keys)) + "|"]
    for name in names:
        cells = [spread(column(runs, case, arms, name))]
        cells += [f"{100 * statistics.fmean(column(runs, case, arms, name, key)):.1f}" for key in keys]
        chosen = "; ".join(run[case][arms][name]["chosen"] for run in runs)
        label = f"**{name}**" if name in ("TSV-M", "RESM") else name
        lines.append(f"| {label} | {' | '.join(cells)} | {chosen} |")
    return lines


def three_h(runs: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Test scores of every model of the 3H case, seed by seed."""
    found = {name: [run["3H"]["models"][name] for run in runs] for name in runs[0]["3H"]["models"]}
    for part in ("arms", "mixtures"):
        for name in runs[0]["3H"][part]:
            found[name] = [run["3H"][part][name]["test"] for run in runs]
    found["Mediator"] = [run["3H"]["mediator"]["test"] for run in runs]
    return found


def three_h_words(runs: Sequence[Mapping[str, Any]]) -> str:
    mediator = [run["3H"]["mediator"] for run in runs]
    sure = spread([one["accuracy"] for one in mediator])
    size = 100 * statistics.fmean(one["bytes"] for one in mediator)
    return (
        f"{gate_words(runs, '3H')} Each was tuned for {runs[0]['3H']['steps']} steps; a mixture is trained "
        "for as many as the three together (`total steps`) or for as many as one (`steps of one`). Rewards "
        "for ArmoRM and Hummer are margins of the three fine-tunes over the base, for want of a reward "
        f"model. Mediator's router tells the three kinds of questions apart with {sure} % accuracy; its "
        f"folder has {size:.0f} % of the bytes of the three."
    )


def three_h_table(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    found = three_h(runs)
    order = sorted(found, key=lambda name: -statistics.fmean(scores["mean"] for scores in found[name]))
    lines = ["| model | helpful | honest | harmless | mean | minimum |", "|---|---|---|---|---|---|"]
    for name in order:
        seeds = found[name]
        cells = [spread([scores[key] for scores in seeds]) for key in (*TRIPLE, "mean")]
        cells.append(spread([min(scores[key] for key in TRIPLE) for scores in seeds]))
        label = f"**{name}**" if name in ("TSV-M", "RESM") else name
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    runs, seeds = results["runs"], ", ".join(map(str, results["seeds"]))
    bases = spread([run["skills"]["base"]["mean"] for run in runs])
    lines = [
        "# RESM and TSV-M: what merging keeps",
        "",
        f"Size {results['size']}, seeds {seeds}, mild flavour, test pools, in points: mean (range) over "
        "seeds. Strengths (weightings of rewarded soup), five for every method, are chosen on calibration. "
        f"Made by `python evidence/resm.py` in {results['seconds'] / 60:.0f} minutes, without what the cache "
        "of beds held already.",
        "",
        "## Domains: retained gain",
        "",
        gate_words(runs, "domains"),
        "",
        *merge_table(runs, "domains", "arms", DOMAINS),
        "",
        f"## Padded: {100 * PADDING:.0f} % noise on the change of {PADDED}",
        "",
        *merge_table(runs, "domains", "padded", DOMAINS),
        "",
        "## Skills: score over the own fine-tune's",
        "",
        gate_words(runs, "skills") + f" The base itself: {bases}.",
        "",
        *merge_table(runs, "skills", "arms", [skill for group in SKILL_GROUPS.values() for skill in group]),
        "",
        "## Helpful, honest, harmless: merging and mixing",
        "",
        three_h_words(runs),
        "",
        *three_h_table(runs),
        "",
        "| asked for | |",
        "|---|---|",
        *(
            f"| {name} | {'holds' if held else '**does not hold**'} |"
            for name, held in results["judgement"]["checks"].items()
        ),
        "",
        f"**Verdict: {results['verdict']}.**",
        "",
    ]
    return "\n".join(lines)


def figures(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the report page draws: retained gains, and the balance of the 3H case."""

    def group(name: str) -> str:
        if name in SPECTRAL:
            return "spectral merge"
        if name in METHODS:
            return "merge"
        return "mixture" if name.split(",")[0] in MIXTURES else "other"

    found = three_h(runs)
    return [
        {
            "kind": "dots",
            "title": "Retained gain",
            "axes": ["domains", "padded", "skills"],
            "order": "domains",
            "rows": [
                {
                    "name": name,
                    "group": group(name),
                    "values": [
                        column(runs, case, arms, name) if name in runs[0][case][arms] else []
                        for case, arms in (("domains", "arms"), ("domains", "padded"), ("skills", "arms"))
                    ],
                }
                for name in METHODS
            ],
        },
        {
            "kind": "dots",
            "title": "Helpful, honest, harmless",
            "axes": ["helpful", "honest", "harmless", "mean"],
            "order": "mean",
            "rows": [
                {
                    "name": name,
                    "group": group(name),
                    "values": [[scores[key] for scores in seeds] for key in (*TRIPLE, "mean")],
                }
                for name, seeds in found.items()
            ],
        },
        {
            "kind": "scatter",
            "title": "Helpfulness against safety",
            "x": "helpful",
            "y": "mean of honest and harmless",
            "points": [
                {
                    "name": name,
                    "group": group(name),
                    "x": statistics.fmean(scores["help"] for scores in seeds),
                    "y": statistics.fmean((scores["honest"] + scores["harmless"]) / 2 for scores in seeds),
                }
                for name, seeds in found.items()
            ],
        },
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, judge, write."""
    parser = parser_of(__doc__, "one seed, a few steps")
    parser.add_argument("--size", default="xs")
    chosen = parser.parse_args(arguments)
    begun = time.perf_counter()
    seeds, size = ([0], "xs") if chosen.quick else (chosen.seeds, chosen.size)
    if chosen.quick:
        with tempfile.TemporaryDirectory() as cache:
            runs = [measure(0, "xs", QUICK, cache=cache, base_steps=4, finetune_steps=4)]
    else:
        runs = [measure(seed, size, Amount()) for seed in seeds]
    judgement = judge(runs)
    results = {
        "size": size,
        "seeds": seeds,
        "seconds": time.perf_counter() - begun,
        "environment": environment(),
        "runs": runs,
        "judgement": judgement,
        "verdict": judgement["verdict"],
        "figures": figures(runs),
    }
    publish("resm", chosen, results, table(results), draw_figures(results["figures"]))


if __name__ == "__main__":
    main()
