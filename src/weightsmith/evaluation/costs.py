"""What scoring costs, told without torch: from headers, and from how fast this machine multiplies."""

from __future__ import annotations

from pathlib import Path

from weightsmith.checkpoints import Checkpoint
from weightsmith.evaluation.tasks import Tasks, check_tasks
from weightsmith.runs.prediction import Prediction
from weightsmith.runs.speed import matmul_flops

TORCH_BYTES = 405_000_000
"""Resident set of a process forked from one that has imported torch and transformers, after one pass."""

LOAD_SECONDS = 0.3
# Tokens are read twice where windows overlap by half; tokens of a test-bed question, and of a context in
# which a fact is looked for; characters of a token.
_OVERLAP, _QUESTION_TOKENS, _CONTEXT_TOKENS, _TOKEN_CHARACTERS = 2.0, 24, 128, 4
_HARNESS_TOKENS = 512  # of a question with its choices, about
# Small products, attention and the softmax reach this part of the speed of large products.
_EFFICIENCY = 0.35


def predict_scoring(model: Path, tasks: Tasks, characters: int, items: int) -> Prediction:
    """Cost of scoring one checkpoint on `tasks`, loading included; arguments as `evaluate`."""
    from weightsmith.testbed import TASKS

    with Checkpoint.open(model) as checkpoint:
        parameters = sum(info.numel for info in checkpoint.tensors.values())
        vocabulary = int((checkpoint.config.get("text_config") or checkpoint.config).get("vocab_size") or 0)
    per_token = 1 if vocabulary <= 256 else _TOKEN_CHARACTERS
    tokens = 0.0
    for task in check_tasks(tasks):
        if task.is_retrieval:
            tokens += items * _CONTEXT_TOKENS
        elif task.is_harness:
            tokens += (task.limit or items) * _HARNESS_TOKENS
        elif not task.is_bed:
            size = Path(task.task).stat().st_size if Path(task.task).is_file() else 0
            tokens += _OVERLAP * size / per_token
        elif TASKS[task.task] == "domain":
            tokens += _OVERLAP * characters / per_token
        else:
            tokens += items * _QUESTION_TOKENS
    seconds = 2.0 * parameters * tokens / (matmul_flops() * _EFFICIENCY)
    return Prediction(TORCH_BYTES + 4 * parameters, 0, LOAD_SECONDS + seconds)
