"""Averaging in the Hugging Face Trainer: collect states in the tail of a run, choose at its end, write the
mean.

    trainer = Trainer(..., callbacks=[AveragingCallback(method="sewa", num_select=10)])

Candidates are written to `<output_dir>/averaging/step-<n>` as they come, trained weights only, and deleted at
the end; a running mean (swa, ema) is written there whenever the Trainer saves a checkpoint. A run that
continues from a checkpoint finds what it had at that step and ends with the same bits. The mean goes to
`<output_dir>/averaged`.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weightsmith.checkpoints import Ancestor, Lineage
from weightsmith.errors import InputError
from weightsmith.runs.atomic import read_json, write_json
from weightsmith.training.averaging.choice import Selection
from weightsmith.training.averaging.folders import FolderBank
from weightsmith.training.averaging.norms import has_norm_statistics, update_norms
from weightsmith.training.averaging.objective import Bank, Loss, drop_broken, model_loss
from weightsmith.training.averaging.options import LEARNED, RUNNING, AveragingOptions
from weightsmith.training.averaging.run import SELECTION_FILE, lineage_of, selection_bytes
from weightsmith.training.averaging.running import RunningAverage
from weightsmith.training.averaging.saving import (
    read_tensors,
    write_candidate,
    write_model_folder,
    write_tensors,
)
from weightsmith.training.averaging.search import select
from weightsmith.training.averaging.slots import ranks, slots_of, sum_over_ranks

log = logging.getLogger(__name__)

MEMORY_SHARE = 0.5
"""Share of the free memory that candidates may take while one is chosen from them; else they stay in
files."""


class AveragingCallback(TrainerCallback):
    """Average the states of a Trainer's run.

    Args:
        options: Settings; keywords of `AveragingOptions` may be given instead.
        held_out: Batches that losses are measured on, readable again and again (a list, a DataLoader): not
            the data that is reported on. The Trainer's evaluation data when left out and used during the run,
            else its training data.
        loss: Of the model on a batch; the one that the model returns by default.
        folder: Where candidates are kept meanwhile; `averaging` in the output folder by default.
        out: Where the mean is written; `averaged` in the output folder by default.
        write: Whether to write it.
        load: Leave the mean in the Trainer's model, so that what is saved or evaluated afterwards is the
            mean.
        keep_candidates: Leave the candidates where they are.

    Attributes:
        selection: What was chosen; None before the end of training.
    """

    def __init__(
        self,
        options: AveragingOptions | None = None,
        *,
        held_out: Iterable[Any] | None = None,
        loss: Loss = model_loss,
        folder: str | Path | None = None,
        out: str | Path | None = None,
        write: bool = True,
        load: bool = False,
        keep_candidates: bool = False,
        **keywords: Any,
    ) -> None:
        if options is not None and keywords:
            raise InputError(f"give `options` or keywords, not both: {', '.join(keywords)}")
        self.options = options if options is not None else AveragingOptions(**keywords)
        if self.options.method in LEARNED and self.options.objective == "val" and held_out is None:
            raise InputError("objective `val` needs `held_out`, the batches to measure losses on")
        self.held_out, self.loss = held_out, loss
        self.selection: Selection | None = None
        self._given_folder, self._given_out = folder, out
        self._write, self._load, self._keep = write, load, keep_candidates
        self._folder = Path()
        self._running: RunningAverage | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what belongs to steps that will be done again; take up a running mean."""
        self._folder = Path(self._given_folder or Path(args.output_dir or ".") / "averaging")
        self.selection = None
        if ranks()[0] == 0:
            for step, path in (*self._states("step").items(), *self._states("running").items()):
                if step > state.global_step or state.global_step == 0:
                    shutil.rmtree(path)
        if self.options.method in RUNNING:
            kind = "ema" if self.options.method == "ema" else "swa"
            self._running = RunningAverage(kwargs["model"], kind=kind, decay=self.options.decay)
            self._resume_running(state)
        if any("lora_" in slot.name for slot in slots_of(kwargs["model"])):
            log.warning(
                "averaging the factors of adapters is not averaging their products; merge adapters into the "
                "weights first where that matters"
            )
        _wait()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the state in when its turn has come."""
        if not self.options.collects(state.global_step, state.max_steps):
            return
        if self._running is not None:
            self._running.update()
            return
        write_candidate(kwargs["model"], self._folder / f"step-{state.global_step}", state.global_step)
        if ranks()[0] == 0:
            for path in list(self._states("step").values())[: -self.options.num_candidates]:
                shutil.rmtree(path)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the running mean beside the Trainer's checkpoint of the same step."""
        if self._running is None:
            return
        here = self._folder / f"running-{state.global_step}"
        if (here / "count.json").is_file():
            return  # written by who makes checkpoints appear only when all of their parts are there
        saved = self._running.state_dict()
        if saved["num_updates"]:
            slots = {slot.name: slot for slot in slots_of(kwargs["model"])}
            means = {name: _like(slots[name].tensor, value) for name, value in saved["means"].items()}
            write_tensors(here, means, Lineage("running mean", {"num_updates": saved["num_updates"]}), {})
        if ranks()[0] == 0:
            write_json(here / "count.json", {"num_updates": saved["num_updates"]})
            output = Path(args.output_dir or ".")
            for step, path in list(self._states("running").items())[:-2]:
                if not (output / f"checkpoint-{step}").is_dir():
                    shutil.rmtree(path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose, average, write; the Trainer's model keeps its own weights unless `load`."""
        _wait()
        model = kwargs["model"]
        slots = slots_of(model)
        own = [slot.values.clone() for slot in slots]
        lineage = self._average(model, kwargs)
        if lineage is None:
            return
        assert self.selection is not None
        if self._write:
            out = Path(self._given_out or Path(args.output_dir or ".") / "averaged")
            files = {SELECTION_FILE: selection_bytes(self.selection)}
            write_model_folder(model, out, lineage, files, kwargs.get("processing_class"))
        if not self._load:
            with torch.no_grad():
                for slot, values in zip(slots, own, strict=True):
                    slot.values.copy_(values)
        _wait()
        if not self._keep and ranks()[0] == 0:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _average(self, model: nn.Module, kwargs: dict[str, Any]) -> Lineage | None:
        """Give the model the mean; returns what made it, or None when there was nothing to average."""
        options = self.options
        if self._running is not None:
            if self._running.num_updates == 0:
                log.warning("no state was averaged: the run ended before `start` (%s)", options.start)
                return None
            self._running.load_into_model()
            self.selection = Selection(options.method, (), ())
            parameters: dict[str, Any] = {"method": options.method, "num_updates": self._running.num_updates}
            if options.method == "ema":
                parameters["decay"] = options.decay
            self._recompute_norms(model, kwargs)
            return Lineage("average", parameters)
        folders = list(self._states("step").values())
        if not folders:
            log.warning("no state was averaged: the run ended before `start` (%s)", options.start)
            return None
        bank = FolderBank(folders)
        try:
            self.selection = self._select(bank, model, kwargs)
            chosen = dict(zip(self.selection.steps, self.selection.weights, strict=True))
            weights = [chosen.get(step, 0.0) for step in bank.steps]
            bank.mix(weights, model)
            self._recompute_norms(model, kwargs)
            used = [c for c, weight in zip(bank.checkpoints, weights, strict=True) if weight > 0]
            made = lineage_of(options, self.selection)
            inputs = tuple(Ancestor.of(checkpoint, "candidate") for checkpoint in used)
            return Lineage(made.method, made.parameters, made.seed, inputs)
        finally:
            bank.close()

    def _select(self, bank: FolderBank, model: nn.Module, kwargs: dict[str, Any]) -> Selection:
        options = self.options
        if broken := drop_broken(bank, 1):
            log.warning("left out candidates that hold NaN or infinity: steps %s", broken)
        number = options.num_select
        if options.method not in ("uniform", "greedy") and number != "auto" and number >= len(bank):
            if number > len(bank):
                log.warning("only %d candidates for num_select %d: all are averaged", len(bank), number)
            return select(AveragingOptions(method="uniform"), bank)
        if options.method not in LEARNED:
            return select(options, bank)
        batches = self.held_out
        if batches is None and options.objective != "train":
            batches = kwargs.get("eval_dataloader")
        if batches is None:
            log.info(
                "the criterion of %s is the training loss: no held-out batches were given", options.method
            )
            batches = kwargs["train_dataloader"]
        # Files are closed by our caller; a copy in memory lives until the choice is made.
        source: Bank = (
            bank.in_memory(model) if _fits(len(bank), model) else FolderBank(bank.checkpoints, bank.steps)
        )
        return select(options, source, model, batches, self.loss)

    def _recompute_norms(self, model: nn.Module, kwargs: dict[str, Any]) -> None:
        if self.options.norm_statistics == "recompute" and has_norm_statistics(model):
            update_norms(model, kwargs["train_dataloader"], self.loss)

    def _states(self, kind: str) -> dict[int, Path]:
        """Step -> folder of what is kept, oldest first."""
        found = {int(path.name.rpartition("-")[2]): path for path in self._folder.glob(f"{kind}-*")}
        return dict(sorted(found.items()))

    def _resume_running(self, state: TrainerState) -> None:
        assert self._running is not None
        if state.global_step == 0:
            return
        here = self._folder / f"running-{state.global_step}"
        if not (here / "count.json").is_file():
            first, _ = self.options.schedule(state.max_steps)
            if state.global_step > first:
                raise InputError(
                    f"{here}: the running mean of step {state.global_step} is not there, so this run "
                    "can't go on with it"
                )
            return
        count = read_json(here / "count.json")["num_updates"]
        if count:
            means = read_tensors(here)
            slots = slots_of(self._running.model)
            local = {slot.name: means[slot.name].reshape(-1)[slice(*slot.span())] for slot in slots}
            shaped = {slot.name: local[slot.name].reshape(slot.values.shape) for slot in slots}
            self._running.load_state_dict({"num_updates": count, "means": shaped})


def _fits(number: int, model: nn.Module) -> bool:
    """Whether all candidates may be kept in memory; the same answer on every rank."""
    needed = number * 4 * sum(slot.values.numel() for slot in slots_of(model))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fits = needed <= MEMORY_SHARE * free / ranks()[1]
    if ranks()[1] == 1:
        return fits
    votes = sum_over_ranks(torch.tensor([float(fits)], dtype=torch.float64), next(model.parameters()).device)
    return int(votes[0]) == ranks()[1]


def _like(parameter: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """This process's share `local` as a tensor sharded like `parameter`."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _wait() -> None:
    """Ranks meet here, so that none reads what another still writes."""
    if ranks()[1] > 1:
        dist.barrier()
