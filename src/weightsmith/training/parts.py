"""The keys `optimizer`, `clip`, `decay`, `sharpness`, `average`, `objective`, `adapter` of a training: what
fits together, and in which words.

A value is the part's own options object, so no option is written twice. Nothing here imports torch: a page is
checked and a run is planned with it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from weightsmith.errors import InputError
from weightsmith.training.adagc.options import SHORT_RUN, AdaGCOptions
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.averaging.options import LEARNED, RUNNING, AveragingOptions
from weightsmith.training.hrp.options import HRPAdapterOptions, LoRAOptions
from weightsmith.training.lightsam.options import LightSAMOptions, SAMOptions
from weightsmith.training.meap.options import MUCH, MEAPOptions
from weightsmith.training.sources import DataSource
from weightsmith.training.tezo.options import ZerothOrderOptions

if TYPE_CHECKING:
    from weightsmith.training.config import TrainConfig

KEYS = ("optimizer", "clip", "decay", "sharpness", "average", "objective", "adapter")
Clip = float | AdaGCOptions
Decay = AlphaDecayOptions | None
Sharpness = LightSAMOptions | SAMOptions | None
Optimizer = ZerothOrderOptions | None

CLIP = 1.0
"""The global norm that a training holds gradients down to unless told otherwise."""

Objective = MEAPOptions | None
Adapter = LoRAOptions | None


@dataclass(frozen=True, kw_only=True)
class StateAverage:
    """What becomes of the states that a run passes through.

    Attributes:
        options: Which states are taken, and how their mean is chosen.
        keep: Leave the last state as the result and keep the taken ones beside it, for a stage `average`.
        held_out: What a method that looks at losses measures them on; by default the calibration pools of the
            test-bed tasks that are trained on, else the training data.
    """

    options: AveragingOptions
    keep: bool = False
    held_out: str | DataSource | tuple[str | DataSource, ...] | None = None

    @property
    def measures(self) -> bool:
        """Whether losses on held-out data are needed."""
        return not self.keep and self.options.method in LEARNED and self.options.objective != "train"


def check(config: TrainConfig) -> None:
    """Refuse values out of range and parts that can't work together.

    Raises:
        InputError: begins with the key.
    """
    clip, decay, sharpness = config.clip, config.decay, config.sharpness
    if (steps := zeroth_order(config)) is not None:
        _check_zeroth_order(config, steps)
    if not isinstance(clip, AdaGCOptions) and not 0 <= clip < math.inf:
        raise InputError(f"clip: a global norm must be at least 0 and finite, got {clip}")
    if isinstance(sharpness, LightSAMOptions) and config.betas is not None:
        raise InputError("betas: are AdamW's; LightSAM takes its own (`sharpness: {lightsam: {betas: ...}}`)")
    if decay is not None:
        if config.weight_decay == 0 and not decay.base_weight_decay:
            raise InputError("decay: alphadecay shares out `weight_decay`, which is 0")
        if decay.mode == "decoupled" and sharpness is not None:
            raise InputError(
                "decay: mode `decoupled` multiplies weights that a two-pass step then restores; with "
                "`sharpness` take mode `groups` or `auto`"
            )
    if config.average is not None:
        _check_average(config.average, config.steps)
    if (meap := config.objective) is not None:
        if meap.copy_loss_weight != 1:
            raise InputError(
                "objective: meap.copy_loss_weight other than 1 needs MEAPTrainerMixin, found "
                f"{meap.copy_loss_weight:g}"
            )
        if meap.add_mask_token and config.average is not None and config.average.keep:
            raise InputError(
                "objective: meap.add_mask_token: kept states (`average: keep`) have the model's own shapes; "
                "name a token with `mask_token`"
            )
    if config.adapter is not None:
        _check_adapter(config, config.adapter)


def _check_adapter(config: TrainConfig, options: LoRAOptions) -> None:
    if config.decay is not None:
        raise InputError(
            "decay: alphadecay looks at whole matrices; an adapter trains factors of their changes"
        )
    if config.average is not None and config.average.keep:
        raise InputError(
            "average: kept states (`average: keep`) have the model's own tensors, and with `adapter` a run "
            "has those of its adapter"
        )
    if isinstance(options, HRPAdapterOptions):
        if (steps := zeroth_order(config)) is not None:
            raise InputError(
                f"adapter: hrp's preheat needs gradients, and `optimizer: {steps.kind}` has none; take `lora`"
            )
        taken = options.steps_of(config.steps)
        if options.count_preheat and taken >= config.steps:
            raise InputError(f"adapter: hrp's {taken} preheat_steps leave none of {config.steps} steps")


def zeroth_order(config: TrainConfig) -> Optimizer:
    """The value of the key `optimizer`, which is no field of the config (see there)."""
    return getattr(config, "optimizer", None)


def _check_zeroth_order(config: TrainConfig, options: ZerothOrderOptions) -> None:
    kind = options.kind
    if config.learning_rate is None:
        raise InputError(
            f"learning_rate: has to be given with `optimizer: {kind}`; about 1e-3 to 1e-4 for a million "
            "weights, 1e-6 for a billion"
        )
    if config.betas is not None:
        raise InputError(
            f"betas: are AdamW's; {kind} takes its own (`optimizer: {{{kind}: {{betas: ...}}}}`)"
        )
    if config.sharpness is not None:
        raise InputError(f"sharpness: needs gradients, and `optimizer: {kind}` has none")
    if config.clip not in (0, CLIP):
        raise InputError(
            f"clip: there are no gradients to clip with `optimizer: {kind}`; its own option `clip` bounds "
            "the derivative of a step"
        )


def _check_average(average: StateAverage, steps: int) -> None:
    from weightsmith.training.data import sources

    options = average.options
    if average.held_out is not None:
        try:
            sources(average.held_out)
        except InputError as wrong:
            raise InputError(f"average: held_out {str(wrong).removeprefix('data ')}") from wrong
    taken = len(taken_steps(options, steps))
    if not taken:
        raise InputError(f"average: nothing is taken: `start` is {options.start}, the run has {steps} steps")
    number = options.num_select
    if uses_select(average) and number != "auto" and number > taken:
        raise InputError(f"average: num_select is {number}, but the run takes only {taken} states")


def uses_select(average: StateAverage) -> bool:
    """Whether `num_select` counts."""
    return not average.keep and average.options.method not in ("uniform", "greedy", *RUNNING)


def taken_steps(options: AveragingOptions, steps: int) -> range:
    """Optimiser steps after which a run of `steps` takes a state, before the oldest are dropped."""
    first, every = options.schedule(steps)
    if first >= steps:
        return range(0)
    return range(steps - (steps - first - 1) // every * every, steps + 1, every)


def kept_steps(options: AveragingOptions, steps: int) -> range:
    """Those of `taken_steps` that are candidates in the end."""
    return taken_steps(options, steps)[-options.num_candidates :]


def warnings(config: TrainConfig) -> tuple[str, ...]:
    """What works and is hardly meant."""
    found = []
    if isinstance(clip := config.clip, AdaGCOptions):
        if clip.warmup_steps >= config.steps:
            found.append(
                f"clip: adagc's warm-up of {clip.warmup_steps} steps is the whole run: only the global norm "
                "is clipped"
            )
        elif clip.init == "min" and config.steps < SHORT_RUN:
            found.append(
                f"clip: {config.steps} steps are few for a mean that starts at the smallest norm; "
                "`init: ema` needs less"
            )
    if (steps := zeroth_order(config)) is not None and config.dtype == "bfloat16":
        found.append(
            f"dtype: {steps.kind} takes the difference of two close losses, which bfloat16 rounds; there is "
            "no backward pass whose memory it would save"
        )
    sharpness = config.sharpness
    if config.clip and isinstance(sharpness, LightSAMOptions) and sharpness.variant != "adam":
        found.append(
            f"clip: the running sums of lightsam's {sharpness.variant} see clipped norms; `clip: off` leaves "
            "them to the method"
        )
    if config.decay is not None and config.decay.interval >= config.steps:
        found.append(
            f"decay: alphadecay looks at the spectra once, before step 1: its interval is "
            f"{config.decay.interval} of {config.steps} steps"
        )
    if (meap := config.objective) is not None:
        if meap.ratio > MUCH:
            found.append(f"objective: meap hides more than half of the text (mask_ratio {meap.ratio:g})")
        if meap.mode == "sft" and not _has_answers(config):
            found.append("objective: meap's mode `sft` is about answers, and the data has no prompts")
    if (average := config.average) is not None and average.measures and average.held_out is None:
        found.append(
            f"average: {average.options.method} looks at the training loss; `held_out` names other data"
        )
    return tuple(found)


def _has_answers(config: TrainConfig) -> bool:
    """Whether some of the data is questions with answers."""
    from weightsmith.testbed.tasks import TASKS
    from weightsmith.training.data import sources

    return any(
        TASKS[entry.source] != "domain" if entry.kind == "testbed" else entry.prompt is not None
        for entry in sources(config.data)
    )


def described(config: TrainConfig) -> dict[str, Any]:
    """The parts as a page says them: `{"clip": {"adagc": {"init": "ema"}}, "sharpness": "off", ...}`;
    options that have their default are left out, and so are held-out data and the usual objective.
    """
    clip, sharpness, average = config.clip, config.sharpness, config.average
    words: dict[str, Any] = {"clip": {"global": clip} if clip else "off", "decay": "uniform"}
    words |= {"sharpness": "off", "average": "off"}
    if isinstance(clip, AdaGCOptions):
        words["clip"] = {"adagc": changed(clip)}
    if config.decay is not None:
        words["decay"] = {"alphadecay": changed(config.decay)}
    if isinstance(sharpness, SAMOptions):
        options = changed(sharpness)
        words["sharpness"] = {"asam" if options.pop("adaptive", False) else "sam": options}
    elif sharpness is not None:
        words["sharpness"] = {"lightsam": changed(sharpness)}
    if (steps := zeroth_order(config)) is not None:
        options = changed(steps)
        options.pop("seed", None)  # follows from the run's
        words["optimizer"] = {steps.kind: options}
    if average is not None:
        options = changed(average.options)
        options |= options.pop("sewa", {})
        method = options.pop("method", "sewa")
        words["average"] = {"keep" if average.keep else method: options}
    if config.objective is not None:
        words["objective"] = {"meap": changed(config.objective)}
    if (adapter := config.adapter) is not None:
        options = changed(adapter)
        words["adapter"] = {"hrp" if isinstance(adapter, HRPAdapterOptions) else "lora": options}
    return words


def changed(options: Any) -> dict[str, Any]:
    """Fields of an options object that don't have their default, as JSON values."""
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        factory = field.default_factory
        if value != (field.default if factory is dataclasses.MISSING else factory()):
            found[field.name] = changed(value) if dataclasses.is_dataclass(value) else _plain(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
