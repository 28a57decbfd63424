"""Run folders for the tests: the files that the runner leaves, with numbers close to the bed's pilots."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.reports.folder import models_named

DOMAINS = ("source", "docs", "tables", "names")
BITS = {
    "base": (2.803, 2.631, 1.219, 1.701),
    "code": (2.561, 2.702, 1.288, 1.752),
    "english": (2.871, 2.290, 1.301, 1.760),
    "codecs": (2.842, 2.688, 0.951, 1.741),
    "unicode": (2.866, 2.694, 1.266, 1.439),
    "uniform": (2.695, 2.487, 1.102, 1.612),
    "arithmetic": (2.671, 2.462, 1.071, 1.640),
    "ties": (2.701, 2.498, 1.123, 1.604),
    "tsvm": (2.668, 2.449, 1.060, 1.588),
    "resm": (2.664, 2.447, 1.066, 1.585),
    "joint": (2.421, 2.166, 0.914, 1.543),
}
RECIPE = """\
# One base, four fine-tunes, five ways to merge them.
name: quickstart
seed: 0
stages:
  base:       {train:    {model: testbed/xs, data: [source, docs, tables, names], steps: 500}}
  code:       {finetune: {model: base, data: source, replay: 0.25, steps: 150}}
  english:    {finetune: {model: base, data: docs,   replay: 0.25, steps: 150}}
  codecs:     {finetune: {model: base, data: tables, replay: 0.25, steps: 150}}
  unicode:    {finetune: {model: base, data: names,  replay: 0.25, steps: 150}}
  joint:      {finetune: {model: base, data: [source, docs, tables, names], steps: 600}}  # the control
  uniform:    {average:  {models: [code, english, codecs, unicode]}}
  arithmetic:
    merge:
      method: task_arithmetic
      base: base
      models: [code, english, codecs, unicode]
      search: {weight: [0.15, 0.25, 0.4, 0.6, 1.0]}
  ties:       {merge:    {method: ties, base: base, models: [code, english, codecs, unicode], density: 0.2}}
  tsvm:       {merge:    {method: tsvm, base: base, models: [code, english, codecs, unicode]}}
  resm:       {merge:    {method: resm, base: base, models: [code, english, codecs, unicode]}}
  scores:
    evaluate:
      models: [base, code, english, codecs, unicode, joint, uniform, arithmetic, ties, tsvm, resm]
      tasks: all
"""


class RunFolder:
    """Writes the files of a run one stage at a time."""

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")

    def log(self, event: str, stage: str, kind: str = "", **more: Any) -> None:
        line = {"event": event, "stage": stage, "kind": kind, "time": 1795295045.5, **more}
        with (self.folder / "ledger.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def finish(
        self,
        stage: str,
        kind: str,
        config: Mapping[str, Any],
        seconds: float = 3.0,
        peak: int = 600_000_000,
        **more: Any,
    ) -> Path:
        self.log("started", stage, kind)
        inputs = dict.fromkeys(models_named(config), "0" * 32)
        record = {"stage": stage, "kind": kind, "config": config, "inputs": inputs, "fingerprint": "00ff" * 8}
        record |= {"outputs": {}, "seconds": seconds, "peak_bytes": peak, **more}
        folder = self.write(stage, "stage.json", record)
        self.log("finished", stage, kind, seconds=seconds, peak_bytes=peak)
        return folder

    def write(self, stage: str, name: str, value: Any) -> Path:
        file = self.folder / "stages" / stage / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")
        return file.parent

    def metrics(self, stage: str, losses: Sequence[float], every: int = 1) -> None:
        lines = [
            {"step": every * (i + 1), "loss": loss, "tokens": 2304 * (i + 1)} for i, loss in enumerate(losses)
        ]
        file = self.folder / "stages" / stage / "metrics.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def scores(self, stage: str, models: Mapping[str, Mapping[str, Any]], split: str = "test") -> None:
        tasks = list(dict.fromkeys(task for scores in models.values() for task in scores))
        self.write(stage, "scores.json", {"split": split, "models": models, "tasks": tasks})

    def lineage(
        self, stage: str, method: str, parents: Mapping[str, str], parameters: Mapping[str, Any] | None = None
    ) -> None:
        inputs = []
        for parent, role in parents.items():
            file = self.folder / "stages" / parent / "checkpoint" / "weightsmith.json"
            known = json.loads(file.read_text()) if file.is_file() else None
            digest = random.Random(parent).randbytes(16).hex()
            content = f"full:{digest}"
            inputs.append(
                {
                    "role": role,
                    "name": parent,
                    "fingerprint": f"quick:{digest}",
                    "content": content,
                    "lineage": known,
                }
            )
        value = {
            "format": 1,
            "content": f"full:{random.Random(stage).randbytes(16).hex()}",
            "method": method,
            "parameters": dict(parameters or {}),
            "seed": 0,
            "inputs": inputs,
            "versions": {"numpy": "2.4.6"},
        }
        self.write(stage, "checkpoint/weightsmith.json", value)


def bits(values: Sequence[float], tasks: Sequence[str] = DOMAINS) -> dict[str, Any]:
    """Scores of one model in bits per character."""
    return {
        task: {"metric": "bits_per_character", "value": value, "higher_is_better": False, "n": 40_000}
        for task, value in zip(tasks, values, strict=True)
    }


def diagnostics(
    models: Sequence[str], layers: int, *, spectral: bool, reference: str = "base"
) -> dict[str, Any]:
    """What the merging room measures of `models`; ranks and weights where a spectral method merged them."""
    count = len(models)

    def measures(layer: int, parameters: int) -> dict[str, Any]:
        rng = random.Random(layer)
        cosine = [[1.0] * count for _ in models]
        for s in range(count):
            for t in range(s):
                cosine[s][t] = cosine[t][s] = rng.uniform(-0.02, 0.3)
        found: dict[str, Any] = {
            "parameters": parameters,
            "relative_norm": [rng.uniform(0.04, 0.3) for _ in models],
            "sign_conflict": rng.uniform(0.7, 0.85),
            "weighted_sign_conflict": rng.uniform(0.3, 0.5),
            "cosine": cosine,
        }
        if spectral and layer != layers:
            found |= {
                "full_rank": 96.0,
                "ranks": [24.0] * count,
                "weights": [rng.uniform(0.8, 1.2) for _ in models],
            }
        return found

    per_layer = [{"layer": layer, **measures(layer, 98_496)} for layer in range(layers)]
    per_layer.append({"layer": None, **measures(layers, 19_296)})
    return {
        "models": list(models),
        "reference": reference,
        "layers": per_layer,
        "model": measures(layers + 1, 413_280),
    }


def loss_curve(steps: int, start: float, end: float, seed: int) -> list[float]:
    """A training loss that falls like 1 / (1 + t), with noise."""
    rng = random.Random(seed)
    return [
        end
        + (start - end) * math.exp(-6 * i / steps) * (1 if i else 1.0)
        + 0.5 * (start - end) / (4 + i / 3)
        + rng.gauss(0, 0.06)
        for i in range(steps)
    ]


def quickstart(folder: Path) -> RunFolder:
    """The quickstart as it ends: every stage done."""
    run = RunFolder(folder, RECIPE)
    versions = {
        "weightsmith": "0.1.0",
        "numpy": "2.4.6",
        "safetensors": "0.8.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
    }
    environment = {
        "python": "3.11.2",
        "system": "Linux x86_64",
        "cores": 2,
        "threads": "1",
        "memory_bytes": 8_000_000_000,
    }
    (folder / "environment.json").write_text(json.dumps(environment | {"versions": versions}))
    tunes = {"code": "source", "english": "docs", "codecs": "tables", "unicode": "names"}
    models = list(tunes)
    run.finish(
        "base",
        "train",
        {"model": "testbed/xs", "data": list(DOMAINS), "steps": 500},
        71.2,
        812_000_000,
        predicted={"seconds": 80.0, "memory_bytes": 850_000_000, "disk_bytes": 1_900_000},
    )
    run.metrics("base", loss_curve(500, 4.62, 1.45, 0))
    run.lineage("base", "train", {}, {"model": "testbed/xs", "steps": 500, "lr": 0.002})
    for seed, (name, domain) in enumerate(tunes.items()):
        run.finish(
            name,
            "finetune",
            {"model": "base", "data": domain, "replay": 0.25, "steps": 150},
            22.4 + seed,
            790_000_000,
            predicted={"seconds": 25.0, "memory_bytes": 850_000_000, "disk_bytes": 1_900_000},
        )
        start = BITS["base"][seed] * math.log(2)
        run.metrics(name, loss_curve(150, start, BITS[name][seed] * math.log(2), seed + 1))
        run.lineage(name, "finetune", {"base": "base"}, {"data": domain, "replay": 0.25, "steps": 150})
    run.finish("joint", "finetune", {"model": "base", "data": list(DOMAINS), "steps": 600}, 88.0, 800_000_000)
    run.metrics("joint", loss_curve(600, 1.45, 1.22, 9))
    run.lineage("joint", "finetune", {"base": "base"}, {"steps": 600})
    run.finish(
        "uniform",
        "average",
        {"models": models},
        0.3,
        61_000_000,
        predicted={"seconds": 0.4, "memory_bytes": 64_000_000, "disk_bytes": 1_900_000},
    )
    run.lineage("uniform", "linear", dict.fromkeys(models, "model"))
    for name, method, options, seconds, peak in (
        ("arithmetic", "task_arithmetic", {"weight": 0.4}, 9.1, 640_000_000),
        ("ties", "ties", {"density": 0.2, "weight": 1.0}, 0.6, 66_000_000),
        ("tsvm", "tsvm", {"alpha": 1.0}, 4.8, 410_000_000),
        ("resm", "resm", {"alpha": 1.0}, 5.2, 430_000_000),
    ):
        run.finish(
            name, "merge", {"method": method, "base": "base", "models": models, **options}, seconds, peak
        )
        run.lineage(name, method, {"base": "base", **dict.fromkeys(models, "model")}, options)
        run.write(
            name, "diagnostics.json", diagnostics(models, layers=4, spectral=method in ("tsvm", "resm"))
        )
    trials = zip((0.15, 0.25, 0.4, 0.6, 1.0), (2.010, 1.977, 1.962, 2.048, 2.900), strict=True)
    run.write(
        "arithmetic",
        "search.json",
        [
            {
                "options": {"weight": w},
                "score": score,
                "metric": "bits_per_character",
                "higher_is_better": False,
                "tasks": {},
            }
            for w, score in trials
        ],
    )
    run.finish("scores", "evaluate", {"models": list(BITS), "tasks": list(DOMAINS)}, 31.0, 702_000_000)
    run.scores("scores", {name: bits(values) for name, values in BITS.items()})
    return run


def skills_of_a_users_models(folder: Path) -> RunFolder:
    """No training here: a user's own models, two metrics, one model without all scores, odd names."""
    recipe = """\
name: own models
stages:
  merged: {merge: {method: slerp, models: ["/data/llamas/Llama <3> & co", org/other-7b], t: 0.4}}
  scores:
    evaluate:
      models: [merged, "/data/llamas/Llama <3> & co", org/other-7b]
      tasks: [add, sort, docs]
"""
    run = RunFolder(folder, recipe)
    models = ["/data/llamas/Llama <3> & co", "org/other-7b"]
    run.finish("merged", "merge", {"method": "slerp", "models": models, "t": 0.4}, 14_000.0, 31_000_000_000)
    run.lineage("merged", "slerp", dict.fromkeys(models, "model"), {"t": 0.4})
    run.finish("scores", "evaluate", {"models": ["merged", *models]}, 420.0)
    values = {"merged": (0.52, 0.61, 2.1), models[0]: (0.31, 0.70, 2.0), models[1]: (0.50, 0.12, None)}
    scores = {}
    for name, (add, order, docs) in values.items():
        scores[name] = {
            task: {"metric": "exact_match", "value": value, "higher_is_better": True, "n": 400}
            for task, value in (("add", add), ("sort", order))
        }
        if docs is not None:
            scores[name]["docs"] = bits([docs], ["docs"])["docs"]
    run.scores("scores", scores)
    return run


def half_done(folder: Path) -> RunFolder:
    """The base is trained, one fine-tune failed, one was killed, the rest never started."""
    run = RunFolder(folder, RECIPE)
    run.finish("base", "train", {"model": "testbed/xs", "data": list(DOMAINS), "steps": 500}, 71.2)
    run.metrics("base", loss_curve(500, 4.62, 1.45, 0))
    run.log("started", "code", "finetune")
    run.log("failed", "code", "finetune", message="stages/code/work: no space left on device")
    run.log("started", "english", "finetune")
    run.metrics("english", loss_curve(60, 1.8, 1.6, 1))
    return run


def many_stages(folder: Path, count: int = 30) -> RunFolder:
    """A chain of fine-tunes and merges with `count` stages and long names, in blocks of three."""
    lines = ["name: many", "stages:", "  start: {train: {model: testbed/xs, data: [source, docs]}}"]
    models = ["start"]
    for index in range(count - 2):
        name = f"a-rather-long-name-for-stage-{index}"
        if index % 3 == 2:
            base, first, second = models[-3:]
            merged = f"{{method: ties, base: {base}, models: [{first}, {second}]}}"
            lines.append(f"  {name}: {{merge: {merged}}}")
        else:
            source = models[-1 - index % 3]
            lines.append(f"  {name}: {{finetune: {{model: {source}, data: docs}}}}")
        models.append(name)
    lines.append(f"  scores: {{evaluate: {{models: [{', '.join(models)}], tasks: all}}}}")
    run = RunFolder(folder, "\n".join(lines) + "\n")
    rng = random.Random(0)
    for index, name in enumerate(models):
        kind = "train" if not index else "merge" if index % 3 == 0 else "finetune"
        config = {"data": "docs"} if kind != "merge" else {"method": "ties", "base": "start"}
        run.finish(name, kind, config, rng.uniform(1, 100), rng.randrange(10**8, 10**9))
        if kind != "merge":
            run.metrics(name, loss_curve(3000, 4.0, 1.0 + rng.random(), index))
    run.finish("scores", "evaluate", {})
    run.scores("scores", {name: bits([rng.uniform(1, 3) for _ in DOMAINS]) for name in models})
    return run
