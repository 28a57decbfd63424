"""How a page writes the parts of a training: `optimizer`, `clip`, `decay`, `sharpness`, `average`,
`objective`, `architecture`, `adapter`; and how to average.

    optimizer: adamw | {tezo: {variant: adam, rank: 64}} | {mezo: {...}} | {lozo: {...}}
    clip: off | {global: 1.0} | {adagc: {init: ema}}
    decay: uniform | {alphadecay: {interval: 200}}
    sharpness: off | sam | {asam: {rho: 0.3}} | {lightsam: {variant: adagrad}}
    average: off | {keep: {every: 20}} | {sewa: {num_select: 5, held_out: more.txt}} | ema | lawa | ...
    objective: ntp | meap | {meap: {mask_ratio: 0.1}}
    architecture: plain | bc | htc | {ztt: {num_cycles: 3}}
    adapter: none | {lora: {rank: 16, init: pissa}} | {hrp: {rank: 16}}

A part is its name, or a mapping of its name to its options; the options are the fields of the part's own
dataclass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from weightsmith.errors import InputError, nearest
from weightsmith.recipes.stages.contract import Problem, plain
from weightsmith.recipes.validation import validate
from weightsmith.training import DataSource
from weightsmith.training.adagc.options import AdaGCOptions
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.averaging.options import LEARNED, RUNNING, AveragingOptions, SeWAOptions
from weightsmith.training.hrp.options import HRPAdapterOptions, LoRAOptions
from weightsmith.training.lightsam.options import LightSAMOptions, SAMOptions
from weightsmith.training.meap.options import MEAPOptions
from weightsmith.training.parts import StateAverage
from weightsmith.training.tezo.options import KINDS, without_effect
from weightsmith.training.zero_token.options import MANY_LAYERS, PRESETS, ZTTOptions, check


@dataclass(frozen=True, kw_only=True)
class Source(DataSource):
    """A source of data as a page writes it: unknown keys are errors."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}


PageData = str | Source | tuple[str | Source, ...]


@dataclass(frozen=True, kw_only=True)
class GlobalNorm:
    """`clip: {global: 1.0}`."""

    value: float = 1.0


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The option of averaging that is no field of `AveragingOptions`."""

    held_out: PageData | None = None
    """What losses are measured on; by default the calibration pools of the test-bed tasks that are trained
    on."""


METHODS = ("sewa", "uniform", "lawa", "every", "random", "best", "greedy", *RUNNING)
NAMES: Mapping[str, tuple[str, ...]] = {
    "optimizer": ("adamw", *KINDS),
    "clip": ("off", "global", "adagc"),
    "decay": ("uniform", "alphadecay"),
    "sharpness": ("off", "sam", "asam", "lightsam"),
    "average": ("off", "keep", *METHODS),
    "objective": ("ntp", "meap"),
    "architecture": ("plain", *PRESETS),
    "adapter": ("none", "lora", "hrp"),
}
# Names that mean nothing is switched on.
_USUAL = (
    ("decay", "uniform"),
    ("objective", "ntp"),
    ("optimizer", "adamw"),
    ("architecture", "plain"),
    ("adapter", "none"),
)
_SEWA = tuple(field.name for field in dataclasses.fields(SeWAOptions) if field.name != "seed")


def read_parts(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The values of the keys that a stage's body has, as `TrainConfig` takes them; and what is wrong."""
    values, problems = {}, []
    for key in NAMES:
        if key in body:
            values[key], found = _part(key, body[key])
            problems += found
    return values, problems


def _part(key: str, value: Any) -> tuple[Any, list[Problem]]:
    name, options, problems = choice(key, value, NAMES[key])
    if problems:
        return None, problems
    if name == "off" or (key, name) in _USUAL:
        if options:
            return None, [Problem((key, name), "takes no options")]
        return (0.0 if key == "clip" else None), []
    if name == "global":
        made, problems = validate(GlobalNorm, {"value": options} if options != {} else {})
        return (made.value if made else None), [Problem((key, name), p.text) for p in problems]
    if not isinstance(options, Mapping):
        return None, [Problem((key, name), f"expected a mapping of options, found {options!r}")]
    if key == "average":
        made, problems = read_averaging(name, options)
    else:
        made, problems = _READERS[name](options)
    return made, [Problem((key, name, *problem.keys), problem.text) for problem in problems]


def choice(key: str, value: Any, names: Sequence[str]) -> tuple[str, Any, list[Problem]]:
    """Name and options of a value that is a name, or one name with its options."""
    name, options = value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, options),) = value.items()
        options = {} if options is None else options
    if name in names and isinstance(name, str):
        return name, options, []
    known = f"expected {', '.join(names[:-1])} or {names[-1]}"
    if isinstance(name, str):
        keys = (key,) if isinstance(value, str) else (key, name)
        return "", {}, [Problem(keys, f"{known}, found {name!r}{nearest(name, names)}")]
    return "", {}, [Problem((key,), f"{known}, with options as a mapping below the name; found {value!r}")]


def read_averaging(method: str, body: Mapping[str, Any]) -> tuple[StateAverage | None, list[Problem]]:
    """What becomes of states, from a method's name and its options; only those that it heeds exist."""
    keep = method == "keep"
    taken = ["start", "every", *([] if method in RUNNING else ["num_candidates"])]
    return _averaging("uniform" if keep else method, body, [*taken, *heeded(method)], keep=keep)


def read_method(method: str, body: Any) -> tuple[StateAverage | None, list[Problem]]:
    """How a stage `average` chooses among states that are there already, as `read_averaging`."""
    if not isinstance(body, Mapping):
        return None, [Problem((), f"expected a mapping of options, found {body!r}")]
    return _averaging(method, body, [key for key in heeded(method) if key != "objective"], keep=False)


def heeded(method: str) -> list[str]:
    """Options of a method of averaging beside those that say which states are taken."""
    if method in LEARNED:
        select = [] if method == "greedy" else ["num_select"]
        return [*select, "objective", "batches", "held_out", *(_SEWA if method == "sewa" else ())]
    return {"ema": ["decay"]}.get(method) or (["num_select"] if method in ("lawa", "every", "random") else [])


def _averaging(
    method: str, body: Mapping[str, Any], allowed: Sequence[str], *, keep: bool
) -> tuple[StateAverage | None, list[Problem]]:
    problems = _unknown(body, allowed)
    known = {key: value for key, value in body.items() if key in allowed}
    held_out, found = validate(HeldOut, _among(known, ["held_out"]))
    problems += found
    sewa, found = validate(SeWAOptions, _among(known, _SEWA))
    problems += found
    own = [key for key in known if key not in (*_SEWA, "held_out")]
    options, found = validate(AveragingOptions, {"method": method, **_among(known, own)})
    problems += found
    if not (held_out and sewa and options) or problems:
        return None, problems
    if held_out.held_out is not None and options.objective == "train":
        return None, [Problem(("held_out",), "has no use with `objective: train`")]
    options = dataclasses.replace(options, sewa=sewa)
    return StateAverage(options=options, keep=keep, held_out=held_out.held_out), []


def _sam(body: Mapping[str, Any], *, adaptive: bool) -> tuple[Any, list[Problem]]:
    problems = _unknown(body, ["rho", "replay_rng", *(["eta"] if adaptive else [])])
    if problems:
        return None, problems
    made, problems = validate(SAMOptions, body)
    return (dataclasses.replace(made, adaptive=adaptive) if made else None), problems


def _zeroth_order(kind: str, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    fields = [field.name for field in dataclasses.fields(KINDS[kind]) if field.name != "seed"]
    problems = _unknown(body, fields)
    if problems:
        return None, problems
    made, problems = validate(KINDS[kind], body)
    if made is not None:
        problems = [Problem((key,), why) for key, why in without_effect(made, body).items()]
    return (None if problems else made), problems


def _hrp(body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    """The seed follows from the run's; the start is HRP's."""
    fields = [field.name for field in dataclasses.fields(HRPAdapterOptions)]
    problems = _unknown(body, [name for name in fields if name not in ("seed", "init", "init_batches")])
    return (None, problems) if problems else validate(HRPAdapterOptions, body)


def _cycled(name: str, body: Mapping[str, Any]) -> tuple[Any, list[Problem]]:
    options, problems = validate(ZTTOptions, {**PRESETS[name], **body})
    if options is not None:
        try:
            check({**plain(options), "cycle_gate": options.cycle_gate or "off"}, MANY_LAYERS)
        except InputError as wrong:
            key, _, text = str(wrong).partition(": ")
            return None, [Problem((key,), text)]
    return options, problems


_READERS: Mapping[str, Any] = {
    **{kind: partial(_zeroth_order, kind) for kind in KINDS},
    "adagc": lambda body: validate(AdaGCOptions, body),
    "alphadecay": lambda body: validate(AlphaDecayOptions, body),
    "lightsam": lambda body: validate(LightSAMOptions, body),
    "meap": lambda body: validate(MEAPOptions, body),
    "lora": lambda body: validate(LoRAOptions, body),
    "hrp": lambda body: _hrp(body),
    "sam": lambda body: _sam(body, adaptive=False),
    "asam": lambda body: _sam(body, adaptive=True),
    **{name: partial(_cycled, name) for name in PRESETS},
}


def _unknown(body: Mapping[str, Any], allowed: Sequence[str]) -> list[Problem]:
    free = [key for key in allowed if key not in body]
    return [Problem((key,), f"no such key{nearest(key, free)}") for key in body if key not in allowed]


def _among(body: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if key in keys}
