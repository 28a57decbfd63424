"""A run folder of one training done in several ways."""

from __future__ import annotations

import json
from pathlib import Path

from .made_runs import RunFolder, bits, loss_curve

WAYS = """\
name: ways
stages:
  plain: {train: {model: testbed/xs, data: docs, average: {keep: {every: 10}}}}
  adagc: {train: {model: testbed/xs, data: docs, clip: {adagc: {init: ema}}}}
  decay: {train: {model: testbed/xs, data: docs, decay: {alphadecay: {interval: 20}}}}
  flat:  {train: {model: testbed/xs, data: docs, sharpness: sam, average: {ema: {decay: 0.9}}}}
  other: {train: {model: testbed/s, data: docs}}
  best:  {average: {states: plain, method: {sewa: {num_select: 2}}}}
  scores: {evaluate: {models: [plain, adagc, decay, flat, best], tasks: all}}
"""


def ways(folder: Path) -> RunFolder:
    """One training in several ways, and an average of the plain one's states."""
    run = RunFolder(folder, WAYS)
    same = {
        "model": "testbed/xs",
        "data": ["docs"],
        "steps": 100,
        "clip": {"global": 1.0},
        "decay": "uniform",
    }
    same |= {"sharpness": "off", "average": "off", "learning_rate": 2e-3}
    parts = {
        "plain": {"average": {"keep": {"every": 10}}},
        "adagc": {"clip": {"adagc": {"init": "ema"}}},
        "decay": {"decay": {"alphadecay": {"interval": 20}}, "learning_rate": 1e-3},
        "flat": {"sharpness": {"sam": {}}, "average": {"ema": {"decay": 0.9}}},
        "other": {"model": "testbed/s"},
    }
    for number, (name, own) in enumerate(parts.items()):
        run.finish(name, "train", same | own, seconds=10.0 * (1 + (name == "flat")))
        lines = []
        for index, loss in enumerate(loss_curve(100, 4.5, 2.0 + 0.02 * number, number)):
            line = {"step": index + 1, "loss": loss, "grad_norm": 1.0 + 3.0 / (index + 1)}
            if name == "adagc":
                line |= {"clipped": 0.4, "smallest_factor": 0.2, "nonfinite": 0.0}
            if name == "flat":
                line["sharpness"] = 0.1
            lines.append(json.dumps(line) + "\n")
        (run.folder / "stages" / name / "metrics.jsonl").write_text("".join(lines))
    names = [
        f"model.layers.{i}.{kind}.weight" for i in range(4) for kind in ("mlp.up_proj", "self_attn.q_proj")
    ]
    with (run.folder / "stages" / "decay" / "alphadecay.jsonl").open("w") as file:
        for step in range(0, 100, 20):
            alpha = {name: 2.0 + index + step / 50 for index, name in enumerate(names)} | {names[0]: None}
            decays = dict.fromkeys(names, 0.1 + step / 1000)
            file.write(json.dumps({"step": step, "alpha": alpha, "weight_decay": decays}) + "\n")
    run.finish("best", "average", {"states": "plain", "method": {"sewa": {"num_select": 2}}})
    chosen = {"method": "sewa", "steps": [80, 90, 100], "weights": [0.5, 0.0, 0.5], "chosen_steps": [80, 100]}
    chosen |= {"losses": {"top 2": 2.1}, "scores": [0.9, 0.1, 0.9], "history": [2.2, 2.1], "cost": {}}
    run.write("best", "checkpoint/weightsmith/selection.json", chosen)
    models = ("plain", "adagc", "decay", "flat", "best")
    run.finish("scores", "evaluate", {"models": models})
    values = zip(models, (2.6, 2.5, 2.55, 2.7, 2.4), strict=True)
    run.scores("scores", {name: bits((value,), ("docs",)) for name, value in values})
    return run
