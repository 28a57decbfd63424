"""Parts that work inside a training loop, and the loop behind the stages `train` and `finetune`.

Names load on first use: importing the room costs nothing, importing a part costs torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith.training.config import FinetuneConfig, TrainConfig
    from weightsmith.training.loop import TrainResult, finetune, train
    from weightsmith.training.planning import TrainPlan, plan
    from weightsmith.training.sources import DataSource

# One line a name, sorted: name -> module below this one.
_HOMES = {
    "ASAM": "lightsam.sam",
    "AdaGC": "adagc.clipper",
    "AdaGCAdamW": "adagc.adamw",
    "AdaGCCallback": "adagc.callback",
    "AdaGCOptions": "adagc.options",
    "AlphaDecay": "alphadecay.controller",
    "AlphaDecayCallback": "alphadecay.callback",
    "AlphaDecayOptions": "alphadecay.options",
    "AveragingCallback": "averaging.callback",
    "AveragingOptions": "averaging.options",
    "DataCollatorForMEAP": "meap.collator",
    "DataSource": "sources",
    "FinetuneConfig": "config",
    "FolderBank": "averaging.folders",
    "LOZO": "tezo.optimizer",
    "LOZOMomentum": "tezo.optimizer",
    "LOZOOptions": "tezo.options",
    "LightSAM": "lightsam.optimizer",
    "LightSAMOptions": "lightsam.options",
    "MEAPCallback": "meap.trainer",
    "MEAPFinetuneConfig": "config",
    "MEAPOptions": "meap.options",
    "MEAPTrainConfig": "config",
    "MEAPTrainer": "meap.trainer",
    "MEAPTrainerMixin": "meap.trainer",
    "MeZO": "tezo.optimizer",
    "MeZOAdam": "tezo.optimizer",
    "MeZOMomentum": "tezo.optimizer",
    "MeZOOptions": "tezo.options",
    "MemoryBank": "averaging.bank",
    "RunningAverage": "averaging.running",
    "SAM": "lightsam.sam",
    "SAMOptions": "lightsam.options",
    "SAMTrainer": "lightsam.trainer",
    "SAMTrainerMixin": "lightsam.trainer",
    "SeWAOptions": "averaging.options",
    "StateAverage": "parts",
    "TeZO": "tezo.optimizer",
    "TeZOAdam": "tezo.optimizer",
    "TeZOMomentum": "tezo.optimizer",
    "TeZOOptions": "tezo.options",
    "TrainConfig": "config",
    "TrainPlan": "planning",
    "TrainResult": "loop",
    "average_run": "averaging.run",
    "finetune": "loop",
    "meap_mask_inputs": "meap.masking",
    "memory_report": "tezo.memory",
    "plan": "planning",
    "resolve_mask_token": "meap.tokens",
    "sewa_select": "averaging.sewa",
    "spike_score": "adagc.spikes",
    "strip_mask_token": "meap.tokens",
    "train": "loop",
    "write_adapter": "tezo.export",
}

__all__ = [
    "ASAM",
    "LOZO",
    "SAM",
    "AdaGC",
    "AdaGCAdamW",
    "AdaGCCallback",
    "AdaGCOptions",
    "AlphaDecay",
    "AlphaDecayCallback",
    "AlphaDecayOptions",
    "AveragingCallback",
    "AveragingOptions",
    "DataCollatorForMEAP",
    "DataSource",
    "FinetuneConfig",
    "FolderBank",
    "LOZOMomentum",
    "LOZOOptions",
    "LightSAM",
    "LightSAMOptions",
    "MEAPCallback",
    "MEAPFinetuneConfig",
    "MEAPOptions",
    "MEAPTrainConfig",
    "MEAPTrainer",
    "MEAPTrainerMixin",
    "MeZO",
    "MeZOAdam",
    "MeZOMomentum",
    "MeZOOptions",
    "MemoryBank",
    "RunningAverage",
    "SAMOptions",
    "SAMTrainer",
    "SAMTrainerMixin",
    "SeWAOptions",
    "StateAverage",
    "TeZO",
    "TeZOAdam",
    "TeZOMomentum",
    "TeZOOptions",
    "TrainConfig",
    "TrainPlan",
    "TrainResult",
    "average_run",
    "finetune",
    "meap_mask_inputs",
    "memory_report",
    "plan",
    "resolve_mask_token",
    "sewa_select",
    "spike_score",
    "strip_mask_token",
    "train",
    "write_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
