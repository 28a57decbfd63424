"""AlphaDecay for the Hugging Face Trainer: `Trainer(..., callbacks=[AlphaDecayCallback()])`.

The base decay is `TrainingArguments.weight_decay`; norms and biases stay in the Trainer's group without
decay. Each look at the spectra adds a line to `alphadecay.jsonl` in the output folder. A run that continues
from a checkpoint takes its state from there (`trainer_state.json`), whatever
`restore_callback_states_from_checkpoint` says.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from weightsmith.errors import InputError
from weightsmith.training.alphadecay.controller import AlphaDecay
from weightsmith.training.alphadecay.options import AlphaDecayOptions

LOG_FILE = "alphadecay.jsonl"


class AlphaDecayCallback(TrainerCallback, ExportableState):
    """Weight decay by matrix in a Trainer.

    Mode `auto` and `decoupled` need an AdamW-like optimiser, since the Trainer has built its learning rate
    scheduler when callbacks begin. For others make the groups in `create_optimizer` with
    `AlphaDecay(mode="groups")`.

    Args:
        options: Settings; keywords of `AlphaDecayOptions` may be given instead.
        log_file: Where the exponents and decays go; `alphadecay.jsonl` in the output folder when left out.

    Attributes:
        decay: The `AlphaDecay` at work; None before training.
    """

    def __init__(
        self,
        options: AlphaDecayOptions | dict[str, Any] | None = None,
        *,
        log_file: str | None = None,
        **keywords: Any,
    ) -> None:
        if options is not None and keywords:
            raise InputError(f"give `options` or keywords, not both: {', '.join(keywords)}")
        given = options if isinstance(options, AlphaDecayOptions) else _from_json(options or keywords)
        self.options = given
        self.log_file = log_file
        self.decay: AlphaDecay | None = None
        self.saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps of this callback."""
        return {
            "args": {"options": dataclasses.asdict(self.options), "log_file": self.log_file},
            "attributes": {"saved": self.saved if self.decay is None else self.decay.state_dict()},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hook into the Trainer's optimiser; go on from the checkpoint when there is one."""
        if self.decay is not None:
            self.decay.detach()
        log_file = Path(self.log_file) if self.log_file else Path(args.output_dir or ".") / LOG_FILE
        self.decay = AlphaDecay(kwargs["model"], kwargs["optimizer"], self.options, log_file=log_file)
        begin: dict[str, Any] = {"step": state.global_step, "alpha": None, "factor": None, "base": None}
        if state.global_step > 0:
            kept = cast(dict, state.stateful_callbacks or {}).get(type(self).__name__) or {}
            begin = self.saved or kept.get("attributes", {}).get("saved") or begin
        self.decay.load_state_dict(begin)
        self.saved = None
        # The Trainer saves only into entries that are there: a checkpoint of a run without this callback has
        # none.
        if isinstance(state.stateful_callbacks, dict):
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the optimiser as it was."""
        if self.decay is not None:
            self.decay.detach()


def _from_json(fields: dict[str, Any]) -> AlphaDecayOptions:
    """Options from keywords or from JSON, which knows no tuples."""
    known = {field.name for field in dataclasses.fields(AlphaDecayOptions)}
    if unknown := set(fields) - known:
        raise InputError(
            f"no such option of AlphaDecay: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}"
        )
    return AlphaDecayOptions(**{key: _tuples(value) for key, value in fields.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
