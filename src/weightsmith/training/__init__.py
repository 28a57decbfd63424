"""Parts that work inside a training loop: clipping, weight decay, sharpness, averaging.

Names load on first use: importing the room costs nothing, importing a part costs torch.
"""

from __future__ import annotations

import importlib
from typing import Any

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
    "FolderBank": "averaging.folders",
    "LightSAM": "lightsam.optimizer",
    "LightSAMOptions": "lightsam.options",
    "MemoryBank": "averaging.bank",
    "RunningAverage": "averaging.running",
    "SAM": "lightsam.sam",
    "SAMOptions": "lightsam.options",
    "SAMTrainer": "lightsam.trainer",
    "SAMTrainerMixin": "lightsam.trainer",
    "average_run": "averaging.run",
    "sewa_select": "averaging.sewa",
    "spike_score": "adagc.spikes",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
