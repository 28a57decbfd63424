"""A merge as data: which models, which options where. Read from a page of YAML, ours or mergekit's.

    method: ties                        any merge method
    base: models/base                   folder, hub id, or `model+adapter`
    models:
      - models/code                     a plain model, or one with options of its own
      - {model: models/math, weight: 0.5}
    density: 0.3                        options of the method (see `settings` for values by tensor or depth)
    weight: [1.0, 0.5]                  a list is one value a model
    dtype: bfloat16                     of the output; arithmetic is always float32
    seed: 0

Everything a page alone can tell is checked here, with file, line and key; what takes the checkpoints' headers
is checked by `plan`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from weightsmith.errors import InputError, PageError, nearest
from weightsmith.merging import settings
from weightsmith.merging.chat import BUILT_IN
from weightsmith.merging.options import OptionError, build, is_per_model, page_key, schema
from weightsmith.merging.parameter import NanPolicy
from weightsmith.merging.settings import EachModel, Setting, SettingError
from weightsmith.merging.tokenizer_rule import TokenizerRule, parse_rule
from weightsmith.registry import load
from weightsmith.runs.pages import Source as Page
from weightsmith.runs.pages import parse as parse_page
from weightsmith.tensors.floats import parse_dtype

Keys = tuple[str | int, ...]

OWN_KEYS = (
    "method",
    "base",
    "models",
    "dtype",
    "out_dtype",
    "seed",
    "nan_policy",
    "tokenizer",
    "chat_template",
)


@dataclass(frozen=True)
class Input:
    """One model of a merge.

    Attributes:
        model: Folder, hub id, or `model+adapter`.
        options: Options of this model alone.
        layers: The layers [first, last) it gives to its slice; None for all.
        statistics: Folder that `weightsmith stats` made of it, for methods that need one.
        keys: Where it stands on the page.
    """

    model: str
    options: Mapping[str, Setting] = field(default_factory=dict)
    layers: tuple[int, int] | None = None
    keys: Keys = ()
    statistics: str | None = None


@dataclass(frozen=True)
class OutputSlice:
    """Consecutive layers of the output; a merge without slices has one that holds everything.

    Attributes:
        inputs: The models, the base among them if the page lists it.
        base: The base of this slice, if it isn't the merge's.
        options: Options of this slice.
        keys: Where it stands on the page.
        module: The part of the model it belongs to (a vision tower, a decoder); None for all of it.
        module_options: Options of that part, for where the slice has none.
        module_keys: Where the part stands on the page.
    """

    inputs: tuple[Input, ...]
    base: str | None = None
    options: Mapping[str, Setting] = field(default_factory=dict)
    keys: Keys = ()
    module: str | None = None
    module_options: Mapping[str, Setting] = field(default_factory=dict)
    module_keys: Keys = ()

    @property
    def stacked(self) -> bool:
        """Whether it is a range of layers."""
        return any(source.layers is not None for source in self.inputs)


@dataclass(frozen=True)
class MergeConfig:
    """A checked merge.

    Attributes:
        method: Id of the method.
        slices: Output slices in order.
        base: The base model, None where the method needs none.
        options: Options for all models and tensors.
        dtype: Safetensors dtype of the output; None keeps each tensor's own.
        tokenizer: Whose tokens the output has; None for the base's (or first model's), which the others must
            then have too.
        chat_template: `auto` (the one most models have), the name of a built-in one, or the text of one; None
            keeps that of the output's tokenizer.
        nan_policy: What NaN and infinities in weights are: an error, or 0.
        seed: The page's seed; only random methods use it.
        dialect: Whose keys the page has; error messages speak it.
        warnings: What a user should know about the page.
        page: Where it was read; None for a mapping.
    """

    method: str
    slices: tuple[OutputSlice, ...]
    base: str | None = None
    options: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    nan_policy: NanPolicy = "raise"
    seed: int = 0
    dialect: Literal["own", "mergekit"] = "own"
    warnings: tuple[str, ...] = ()
    page: Page | None = field(default=None, repr=False, compare=False)

    @property
    def stacked(self) -> bool:
        """Whether the output is put together from layer ranges."""
        return any(part.stacked for part in self.slices)

    def fail(self, keys: Keys, problem: str) -> NoReturn:
        """Raise the error of one key of the page."""
        fail(self.page, keys, problem)


def read_merge_page(path: str | Path) -> MergeConfig:
    """Read and check a page.

    Raises:
        PageError: what is wrong, as `file:line: key: problem`.
    """
    page = parse_page(path)
    if not isinstance(page.value, dict):
        fail(page, (), "expected keys and values, `method:` first")
    return parse_merge(page.value, page)


def parse_merge(body: Mapping[str, Any], page: Page | None = None) -> MergeConfig:
    """Check a merge given as plain values: our own keys, or mergekit's where `merge_method` is among them.

    Raises:
        PageError: what is wrong; with file and line where `page` is given.
    """
    if "merge_method" in body:
        from weightsmith.merging.mergekit import parse_mergekit

        return parse_mergekit(body, page)
    method = method_of(body, "method", page)
    for key in body:
        if key not in OWN_KEYS and page_key(key) not in schema(method):
            known = [*OWN_KEYS, *schema(method)]
            fail(
                page,
                (key,),
                f"no such key for `{body['method']}`{nearest(key, known) or ';'} known: {', '.join(known)}",
            )
    models = listed(body, "models", page)
    inputs = tuple(_input(entry, ("models", index), method, page) for index, entry in enumerate(models))
    options = {key: value for key, value in body.items() if key not in OWN_KEYS or key in schema(method)}
    parsed = parse_options(options, (), method, page, lists_are_gradients=False)
    base = text(body, "base", page)
    count = sum(source.model != base for source in inputs)
    for key, value in parsed.items():
        if isinstance(value, EachModel) and len(value.values) not in (count, len(inputs)):
            fail(page, (key,), f"has {len(value.values)} values for {count} models")
    return MergeConfig(
        method=body["method"],
        slices=(OutputSlice(inputs, keys=("models",)),),
        base=base,
        options=parsed,
        dtype=output_dtype(body, page),
        tokenizer=parse_rule(
            body,
            "tokenizer",
            "base",
            lambda keys, problem: fail(page, keys, problem),
            lambda entry, key, keys: text(entry, key, page, keys),
        ),
        chat_template=chat_template(body, page),
        nan_policy=choice(body, "nan_policy", ("raise", "zero"), page) or "raise",
        seed=_seed(body, page),
        page=page,
    )


def fail(page: Page | None, keys: Keys, problem: str) -> NoReturn:
    """Raise the error of one key."""
    shown = show(keys)
    if page is None:
        raise PageError(f"{shown}: {problem}" if shown else problem)
    raise PageError.at(page.path, page.line(keys), shown, problem)


def show(keys: Keys) -> str:
    """`models[1].weight` for ("models", 1, "weight")."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".")


def method_of(body: Mapping[str, Any], key: str, page: Page | None) -> type:
    """The class of the method that `key` names."""
    name = body.get(key)
    if not isinstance(name, str):
        fail(
            page, (key,) if key in body else (), f"expected `{key}: <name of a merge method>`, found {name!r}"
        )
    try:
        return load(name, "merging")
    except InputError as unknown:
        fail(page, (key,), str(unknown))


def parse_options(
    body: Mapping[str, Any], keys: Keys, method: type, page: Page | None, *, lists_are_gradients: bool
) -> dict[str, Setting]:
    """Options of one place of a page: every value in it has its type and lies in its range."""
    parsed: dict[str, Setting] = {}
    for key, value in body.items():
        at = (*keys, key)
        if _is_structured(schema(method)[page_key(key)]):
            _check_leaf(method, key, value, at, page)
            parsed[key] = value
            continue
        try:
            setting = settings.parse(value, lists_are_gradients=lists_are_gradients)
        except SettingError as wrong:
            fail(page, (*at, *wrong.keys), wrong.problem)
        if isinstance(setting, EachModel) and not is_per_model(method, page_key(key)):
            fail(
                page,
                at,
                f"takes one value for all models, got {value!r}; over the depth: {{gradient: [...]}}",
            )
        for inner, leaf in settings.leaves(setting):
            _check_leaf(method, key, leaf, (*at, *inner), page)
        parsed[key] = setting
    return parsed


def listed(body: Mapping[str, Any], key: str, page: Page | None, keys: Keys = ()) -> Sequence[Any]:
    """A list that is not empty."""
    value = body.get(key)
    if not isinstance(value, list | tuple) or not value:
        fail(page, (*keys, key), f"expected a list of at least one entry, found {value!r}")
    return value


def text(body: Mapping[str, Any], key: str, page: Page | None, keys: Keys = ()) -> str | None:
    """A text, or None where the key is absent or null."""
    value = body.get(key)
    if isinstance(value, Path):
        return str(value)
    if value is not None and not isinstance(value, str):
        fail(page, (*keys, key), f"expected text, found {value!r}")
    return value


def choice(body: Mapping[str, Any], key: str, allowed: tuple[str, ...], page: Page | None) -> Any:
    """One of `allowed`, or None where the key is absent."""
    value = body.get(key)
    if value is not None and value not in allowed:
        fail(page, (key,), f"expected {' or '.join(allowed)}, found {value!r}")
    return value


def chat_template(body: Mapping[str, Any], page: Page | None) -> str | None:
    """`auto`, the name of a template we have, or the text of one (it holds a `{`)."""
    asked = text(body, "chat_template", page)
    if asked is not None and asked != "auto" and asked not in BUILT_IN and "{" not in asked:
        known = ", ".join(BUILT_IN)
        fail(
            page,
            ("chat_template",),
            f"`{asked}` is no template: expected auto, {known}, or the text of a Jinja template"
            f"{nearest(asked, ['auto', *BUILT_IN])}",
        )
    return asked


def output_dtype(body: Mapping[str, Any], page: Page | None) -> str | None:
    """`out_dtype`, else `dtype`: arithmetic is float32 whatever they say."""
    found = None
    for key in ("dtype", "out_dtype"):
        name = text(body, key, page)
        if name is not None:
            try:
                found = parse_dtype(name)
            except InputError as wrong:
                fail(page, (key,), str(wrong))
    return found


def _input(entry: Any, keys: Keys, method: type, page: Page | None) -> Input:
    model = entry.get("model") if isinstance(entry, Mapping) else entry
    if not isinstance(model, str | Path) or not str(model).strip():
        fail(page, keys, f"expected a path, or {{model: path, ...}}, found {entry!r}")
    measured = getattr(method, "statistics", None)
    if measured and (not isinstance(entry, Mapping) or entry.get("statistics") is None):
        wanted = "{model: ..., statistics: <folder that `weightsmith stats` made of this model>}"
        fail(page, keys, f"needs statistics ({measured}): {wanted}")
    if not isinstance(entry, Mapping):
        return Input(str(model), keys=keys)
    own = ("model", "statistics") if measured else ("model",)
    known = [*own, *(key for key in schema(method) if is_per_model(method, key))]
    for key in entry:
        if key not in own and page_key(key) not in known:
            hint = nearest(key, known) or ";"
            fail(page, (*keys, key), f"no such key of one model{hint} known: {', '.join(known)}")
    options = {key: value for key, value in entry.items() if key not in own}
    parsed = parse_options(options, keys, method, page, lists_are_gradients=False)
    for key, value in parsed.items():
        if isinstance(value, EachModel):
            fail(page, (*keys, key), "takes one value here; over the depth: {gradient: [...]}")
    statistics = text(entry, "statistics", page, keys) if measured else None
    return Input(str(model), parsed, keys=keys, statistics=statistics)


def _seed(body: Mapping[str, Any], page: Page | None) -> int:
    seed = body.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        fail(page, ("seed",), f"expected a whole number from 0 on, found {seed!r}")
    return seed


def _is_structured(kind: Any) -> bool:
    """Options that are lists or mappings themselves, and so the same for every tensor."""
    parts = typing.get_args(kind) or (kind,)
    if kind == float | tuple[float, ...] or float in parts:
        return False
    return typing.get_origin(kind) is tuple or any(
        typing.get_origin(part) is tuple or dataclasses.is_dataclass(part) for part in parts
    )


def _check_leaf(method: type, key: str, value: Any, keys: Keys, page: Page | None) -> None:
    try:
        build(method, {key: value}, 1)
    except OptionError as wrong:
        # What depends on other options (weights that cancel) is not this value's fault; `plan` looks at that.
        if page_key(wrong.key.partition(".")[0]) == page_key(key):
            fail(page, keys, wrong.problem)
