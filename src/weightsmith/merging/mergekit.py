"""mergekit's pages: the same keys, the same meaning, so that a page in use runs as it is.

    merge_method, base_model, dtype, out_dtype, parameters, chat_template, tokenizer | tokenizer_source
    models:  [{model, parameters}]
    slices:  [{sources: [{model, layer_range, parameters}], base_model, parameters}]
    modules: {text_decoder: {models | slices, parameters}, vision_tower: ...}

A parameter is a number, a gradient (list over the depth) or a list of {filter, value}; the value of a source
wins over its slice's, that over its module's, that over the page's. Options mean what they mean there: trims
count in each tensor, `rescale` restores L1 norms, Model Stock's ratio isn't clamped (the paper's rules are
the default of our own pages). Differences: arithmetic is float32 whatever `dtype` says (mergekit computes in
`dtype`), and among equal magnitudes the lower index is kept. What mergekit knows and this doesn't honour is
refused by name, never passed over.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weightsmith.errors import nearest
from weightsmith.merging.config import (
    Input,
    Keys,
    MergeConfig,
    OutputSlice,
    chat_template,
    fail,
    listed,
    method_of,
    output_dtype,
    parse_options,
)
from weightsmith.merging.options import is_per_model, page_key, schema
from weightsmith.merging.settings import Setting
from weightsmith.merging.tokenizer_rule import TokenizerRule, parse_rule
from weightsmith.runs.pages import Source as Page

_INPUTS = ("models", "slices", "modules")
KEYS = {
    "page": (
        "merge_method",
        "base_model",
        *_INPUTS,
        "parameters",
        "dtype",
        "out_dtype",
        "tokenizer_source",
        "tokenizer",
        "chat_template",
    ),
    "module": ("models", "slices", "parameters"),
    "slice": ("sources", "base_model", "parameters", "residual_weight"),
    "source": ("model", "layer_range", "parameters"),
    "model": ("model", "parameters"),
    "reference": ("model", "lora"),
    "path": ("path", "revision"),
}
"""The keys of each place of a page that are honoured."""
REFUSED = {"override_architecture"}
"""Keys of mergekit that are refused: tensors go by their names here, whatever the architecture is called."""

# mergekit's parameters of one method or another; pages carry them along where they have no effect.
_PARAMETERS = (
    "weight",
    "density",
    "lambda",
    "normalize",
    "rescale",
    "int8_mask",
    "gamma",
    "epsilon",
    "t",
    "scale",
    "filter_wise",
    "select_topk",
    "tolerance",
    "max_iter",
    "tol",
    "eps",
    "normalize_weights",
    "nuslerp_row_wise",
    "nuslerp_flatten",
    "r",
    "alpha",
)
_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}
# Where mergekit's defaults are not ours.
_DEFAULTS: dict[str, dict[str, Setting]] = {
    "ties": {"density": 1.0, "trim_scope": "tensor", "zero_sign": "positive"},
    "dare_linear": {"density": 1.0, "rescale": "l1"},
    "dare_ties": {"density": 1.0, "rescale": "l1", "normalize": False, "zero_sign": "positive"},
    "della_linear": {"density": 1.0, "rescale": "l1"},
    "della": {"density": 1.0, "rescale": "l1", "zero_sign": "positive"},
    "breadcrumbs": {"density": 1.0},
    "breadcrumbs_ties": {"density": 1.0, "normalize": False, "zero_sign": "positive"},
    "model_stock": {"clamp": False},
    "sce": {"weight_floor": 1e-6},
}


def parse_mergekit(body: Mapping[str, Any], page: Page | None = None) -> MergeConfig:
    """Check a page of mergekit given as plain values.

    Raises:
        PageError: what is wrong; with file and line where `page` is given.
    """
    method = method_of(body, "merge_method", page)
    reader = _Reader(body["merge_method"], method, page)
    reader.check_keys(body, (), KEYS["page"])
    reader.one_of(body, (), _INPUTS)
    options = reader.options(body, ())
    if body["merge_method"] == "slerp" and not any("t" in place for place in _parameters(body)):
        fail(page, (), "slerp needs `parameters: {t: ...}`: 0 is the base, 1 the other model")
    return MergeConfig(
        method=body["merge_method"],
        slices=tuple(reader.modules(body) if body.get("modules") else reader.slices(body, ())),
        base=reader.reference(body, "base_model", ()),
        options={**_DEFAULTS.get(body["merge_method"], {}), **options},
        dtype=output_dtype(body, page),
        tokenizer=reader.tokenizer(body),
        chat_template=chat_template(body, page),
        dialect="mergekit",
        warnings=tuple(reader.warnings),
        page=page,
    )


class _Reader:
    """Reads modules, slices, models and parameters; notes what has no effect once each."""

    def __init__(self, name: str, method: type, page: Page | None) -> None:
        self.name, self.method, self.page = name, method, page
        self.warnings: list[str] = []

    def one_of(self, body: Mapping[str, Any], keys: Keys, choices: tuple[str, ...]) -> None:
        """Refuse a place with none of these keys, or several; those that are null or empty don't count."""
        if sum(bool(body.get(key)) for key in choices) != 1:
            words = ", ".join(f"`{key}`" for key in choices[:-1])
            fail(self.page, keys, f"expected either {words} or `{choices[-1]}`")

    def modules(self, body: Mapping[str, Any]) -> Iterator[OutputSlice]:
        """The slices of all modules, each with its module's parameters."""
        if not isinstance(body["modules"], Mapping):
            fail(self.page, ("modules",), f"expected a mapping of modules, found {body['modules']!r}")
        for name, entry in body["modules"].items():
            keys = ("modules", name)
            self.check_keys(entry, keys, KEYS["module"])
            self.one_of(entry, keys, ("models", "slices"))
            options = self.options(entry, keys)
            yield from self.slices(entry, keys, name, options)

    def slices(
        self,
        body: Mapping[str, Any],
        keys: Keys,
        module: str | None = None,
        options: Mapping[str, Setting] | None = None,
    ) -> Iterator[OutputSlice]:
        """The slices of a page or module; `models` are one that holds everything."""
        of_module = (module, options or {}, keys if module else ())
        if body.get("models"):
            inputs = tuple(
                self.input(entry, (*keys, "models", index), "model")
                for index, entry in enumerate(listed(body, "models", self.page, keys))
            )
            yield OutputSlice(inputs, None, {}, (*keys, "models"), *of_module)
            return
        for index, entry in enumerate(listed(body, "slices", self.page, keys)):
            yield self.slice(entry, (*keys, "slices", index), of_module)

    def slice(self, entry: Any, keys: Keys, of_module: tuple[Any, Any, Any]) -> OutputSlice:
        self.check_keys(entry, keys, KEYS["slice"])
        if entry.get("residual_weight") is not None:
            self._note("`residual_weight` has no effect, as it has none in mergekit")
        sources = [
            self.input(source, (*keys, "sources", index), "source")
            for index, source in enumerate(listed(entry, "sources", self.page, keys))
        ]
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            ranges = ", ".join(str(list(source.layers or ())) for source in sources)
            fail(self.page, (*keys, "sources"), f"all sources of a slice need as many layers, found {ranges}")
        base = self.reference(entry, "base_model", keys)
        return OutputSlice(tuple(sources), base, self.options(entry, keys), keys, *of_module)

    def input(self, entry: Any, keys: Keys, place: str) -> Input:
        self.check_keys(entry, keys, KEYS[place])
        model = self.reference(entry, "model", keys)
        if not model:
            fail(self.page, keys, "expected `model: <path>`")
        layers = None
        if place == "source":
            layers = entry.get("layer_range")
            if (
                not isinstance(layers, list | tuple)
                or len(layers) != 2
                or any(not isinstance(end, int) or isinstance(end, bool) for end in layers)
                or not 0 <= layers[0] < layers[1]
            ):
                fail(
                    self.page,
                    (*keys, "layer_range"),
                    f"expected [first, last], the last not included, found {layers!r}",
                )
            layers = (layers[0], layers[1])
        return Input(model, self.options(entry, keys, of_one_model=True), layers, keys)

    def tokenizer(self, body: Mapping[str, Any]) -> TokenizerRule | None:
        """`tokenizer`, or `tokenizer_source` of older pages."""
        keys = [key for key in ("tokenizer", "tokenizer_source") if body.get(key) is not None]
        if len(keys) > 1:
            fail(self.page, (keys[1],), "is given beside `tokenizer`; expected one of them")
        for key in keys:
            return parse_rule(body, key, "union", functools.partial(fail, self.page), self.reference)
        return None

    def reference(self, body: Mapping[str, Any], key: str, keys: Keys) -> str | None:
        """A model: text, or the same in parts (`{model: {path, revision}, lora: ...}`); None where absent."""
        value, keys = body.get(key), (*keys, key)
        if not isinstance(value, Mapping):
            return self._path(value, keys)
        if value.get("override_architecture") is not None:
            what = "is not supported: tensors are merged by name, whatever the architecture is called"
            fail(self.page, (*keys, "override_architecture"), what)
        self.check_keys(value, keys, (*KEYS["reference"], *REFUSED))
        model, lora = (self._path(value.get(part), (*keys, part)) for part in KEYS["reference"])
        if not model:
            fail(self.page, keys, f"expected `model: <path>`, found {dict(value)!r}")
        return f"{model}+{lora}" if lora else model

    def _path(self, value: Any, keys: Keys) -> str | None:
        if isinstance(value, Mapping):
            self.check_keys(value, keys, KEYS["path"])
            path, revision = (self._path(value.get(part), (*keys, part)) for part in KEYS["path"])
            return f"{path}@{revision}" if path and revision else path
        if isinstance(value, Path):
            return str(value)
        if value is not None and not isinstance(value, str):
            fail(self.page, keys, f"expected text, found {value!r}")
        return value

    def options(
        self, entry: Mapping[str, Any], keys: Keys, *, of_one_model: bool = False
    ) -> dict[str, Setting]:
        body = entry.get("parameters")
        keys = (*keys, "parameters")
        if body is None:
            return {}
        if not isinstance(body, Mapping):
            fail(self.page, keys, f"expected a mapping of parameters, found {body!r}")
        known = schema(self.method)
        kept = {}
        for key, value in body.items():
            if key in known and (is_per_model(self.method, key) or not of_one_model):
                kept[key] = self._translated(key, value)
            elif key in known:
                self._note(f"parameter `{key}` of one model has no effect: `{self.name}` has one for all")
            elif key in _PARAMETERS:
                if key != "int8_mask":  # how mergekit holds its masks; no result depends on it
                    self._note(f"parameter `{key}` has no effect on `{self.name}` and is ignored")
            else:
                hint = nearest(key, [*known, *_PARAMETERS]) or ";"
                fail(self.page, (*keys, key), f"no such parameter{hint} `{self.name}` has {', '.join(known)}")
        return parse_options(kept, keys, self.method, self.page, lists_are_gradients=True)

    def _note(self, note: str) -> None:
        if note not in self.warnings:
            self.warnings.append(note)

    def _translated(self, key: str, value: Any) -> Any:
        """The value as mergekit takes it: numbers and switches may be quoted, or YAML 1.1's words."""
        if isinstance(value, list):
            return [self._translated(key, item) for item in value]
        if isinstance(value, Mapping):
            if "value" not in value:
                return value
            return {**value, "value": self._translated(key, value["value"])}
        kind = schema(self.method)[page_key(key)]
        if isinstance(value, str) and value.lower() in _WORDS and (kind is bool or key == "rescale"):
            value = _WORDS[value.lower()]
        elif kind is bool and value in (0, 1):
            value = bool(value)
        elif isinstance(value, str) and str not in typing.get_args(kind):
            value = _number(value)
        return ("l1" if value else "none") if key == "rescale" and isinstance(value, bool) else value

    def check_keys(self, entry: Any, keys: Keys, known: tuple[str, ...]) -> None:
        if not isinstance(entry, Mapping):
            fail(self.page, keys, f"expected a mapping of {', '.join(known)}, found {entry!r}")
        for key in entry:
            if key not in known:
                fail(
                    self.page,
                    (*keys, key),
                    f"no such key{nearest(key, known) or ';'} known: {', '.join(known)}",
                )


def _number(text: str) -> Any:
    """The number that a text spells, or the text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parameters(body: Any) -> Iterator[Mapping[str, Any]]:
    """All mappings under a key `parameters`, wherever they stand on the page."""
    if isinstance(body, Mapping):
        for key, value in body.items():
            if key == "parameters" and isinstance(value, Mapping):
                yield value
            else:
                yield from _parameters(value)
    elif isinstance(body, list):
        for entry in body:
            yield from _parameters(entry)
