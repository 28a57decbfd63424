"""A task of lm-evaluation-harness as a calibration task: its own metric for each question."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from weightsmith.compression.tailoring.scoring import Task
from weightsmith.errors import InputError
from weightsmith.evaluation import TaskConfig
from weightsmith.evaluation.harness import HarnessQuestions


class HarnessTask:
    """Calibration questions of a task of the harness, spread evenly over its subtasks.

    Can be pickled: another process reads the pages again.

    Args:
        config: The task.
        tokenizer: Of the base.
        examples: Questions, at most.

    Attributes:
        name: In tables and logs.
        size: Questions that there are.
        strata: The subtask of each.
        digest: Stands for prompts and metric: a log of other ones is another search's.

    Raises:
        InputError: as `HarnessQuestions`; or a metric of which the score is no mean over questions, or
            lower is better.
    """

    def __init__(self, config: TaskConfig, tokenizer: Any, examples: int) -> None:
        self.name, self._config, self._tokenizer, self._examples = config.label, config, tokenizer, examples
        self._questions: HarnessQuestions | None = self._open()
        if not self._questions.is_mean or not self._questions.higher_is_better:
            raise InputError(
                f"task `{config.task}`: metric {self._questions.metric} gives no score per question of which "
                "more is better and the mean is the task's; choose another one: "
                "lm_eval:TASK@METRIC"
            )
        self.size, self.digest = len(self._questions), self._questions.digest()
        self.strata: Sequence[Hashable] | None = tuple(self._questions.strata)

    def prepare(self, base: Any) -> Task:
        """Nothing to know of the base."""
        return self

    def token_rows(self, indices: Sequence[int]) -> list[list[int]]:
        """Token ids of the first request of each question."""
        texts = self.questions.prompts(indices)
        return [self._tokenizer(text, verbose=False)["input_ids"] for text in texts]

    def score(self, model: Any, indices: Sequence[int]) -> list[float]:
        """As `Task.score`."""
        return [float(value) for value in self.questions.values(model, self._tokenizer, indices)]

    @property
    def questions(self) -> HarnessQuestions:
        """Read again where this task came from another process."""
        if self._questions is None:
            self._questions = self._open()
        return self._questions

    def _open(self) -> HarnessQuestions:
        config = self._config
        return HarnessQuestions(
            config.task,
            "calibration",
            limit=config.limit,
            most=self._examples,
            num_fewshot=config.num_fewshot,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_questions": None}
