"""mergekit's pages: the same keys, the same meaning, so that a page in use runs as it is.

    merge_method, base_model, dtype, out_dtype, parameters
    models:  [{model, parameters}]
    slices:  [{sources: [{model, layer_range, parameters}], base_model, parameters}]

A parameter is a number, a gradient (list over the depth) or a list of {filter, value}; the value of a source
wins over its slice's, that over the page's. Options mean what they mean there: trims count in each tensor,
`rescale` restores L1 norms, Model Stock's ratio isn't clamped (the paper's rules are the default of our own
pages). Differences: arithmetic is float32 whatever `dtype` says (mergekit computes in `dtype`), and among
equal magnitudes the lower index is kept. Keys that are not built are refused by name, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weightsmith.errors import nearest
from weightsmith.merging.config import (
    Input,
    Keys,
    MergeConfig,
    OutputSlice,
    fail,
    listed,
    method_of,
    output_dtype,
    parse_options,
    text,
)
from weightsmith.merging.options import is_per_model, schema
from weightsmith.merging.settings import Setting
from weightsmith.runs.pages import Source as Page

_KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
_NOT_BUILT = {
    "modules": "merging by modules",
    "chat_template": "setting a chat template",
}
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
)
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
}


def parse_mergekit(body: Mapping[str, Any], page: Page | None = None) -> MergeConfig:
    """Check a page of mergekit given as plain values.

    Raises:
        PageError: what is wrong; with file and line where `page` is given.
    """
    for key in body:
        if key in _NOT_BUILT:
            fail(page, (key,), f"{_NOT_BUILT[key]} is not supported")
        if key not in _KEYS:
            fail(page, (key,), f"no such key{nearest(key, _KEYS) or ';'} known: {', '.join(_KEYS)}")
    method = method_of(body, "merge_method", page)
    reader = _Reader(body["merge_method"], method, page)
    if ("models" in body) == ("slices" in body):
        fail(page, (), "expected either `models` or `slices`")
    options = reader.options(body, ())
    if body["merge_method"] == "slerp" and not _sets(body, "t"):
        fail(page, (), "slerp needs `parameters: {t: ...}`: 0 is the base, 1 the other model")
    if "models" in body:
        inputs = [
            reader.input(entry, ("models", index), ("model", "parameters"))
            for index, entry in enumerate(listed(body, "models", page))
        ]
        slices: Sequence[OutputSlice] = [OutputSlice(tuple(inputs), keys=("models",))]
    else:
        slices = [
            reader.slice(entry, ("slices", index)) for index, entry in enumerate(listed(body, "slices", page))
        ]
    return MergeConfig(
        method=body["merge_method"],
        slices=tuple(slices),
        base=text(body, "base_model", page),
        options={**_DEFAULTS.get(body["merge_method"], {}), **options},
        dtype=output_dtype(body, page),
        tokenizer=_tokenizer(body, page),
        dialect="mergekit",
        warnings=tuple(reader.warnings),
        page=page,
    )


class _Reader:
    """Reads models, slices and parameters; notes parameters without effect once each."""

    def __init__(self, name: str, method: type, page: Page | None) -> None:
        self.name, self.method, self.page = name, method, page
        self.warnings: list[str] = []

    def slice(self, entry: Any, keys: Keys) -> OutputSlice:
        self._check_keys(entry, keys, ("sources", "base_model", "parameters"))
        sources = [
            self.input(source, (*keys, "sources", index), ("model", "layer_range", "parameters"))
            for index, source in enumerate(listed(entry, "sources", self.page, keys))
        ]
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers}
        if len(lengths) > 1:
            ranges = ", ".join(str(list(source.layers or ())) for source in sources)
            fail(self.page, (*keys, "sources"), f"all sources of a slice need as many layers, found {ranges}")
        base = text(entry, "base_model", self.page, keys)
        return OutputSlice(tuple(sources), base, self.options(entry, keys), keys)

    def input(self, entry: Any, keys: Keys, known: tuple[str, ...]) -> Input:
        self._check_keys(entry, keys, known)
        model = text(entry, "model", self.page, keys)
        if not model:
            fail(self.page, keys, "expected `model: <path>`")
        layers = None
        if "layer_range" in known:
            layers = entry.get("layer_range")
            if (
                not isinstance(layers, list)
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
        return ("l1" if value else "none") if key == "rescale" and isinstance(value, bool) else value

    def _check_keys(self, entry: Any, keys: Keys, known: tuple[str, ...]) -> None:
        if not isinstance(entry, Mapping):
            fail(self.page, keys, f"expected a mapping of {', '.join(known)}, found {entry!r}")
        for key in entry:
            if key not in known:
                fail(
                    self.page,
                    (*keys, key),
                    f"no such key{nearest(key, known) or ';'} known: {', '.join(known)}",
                )


def _sets(body: Mapping[str, Any], parameter: str) -> bool:
    places = [body, *body.get("models", []), *body.get("slices", [])]
    places += [source for part in body.get("slices", []) for source in part.get("sources", [])]
    return any(parameter in (place.get("parameters") or {}) for place in places)


def _tokenizer(body: Mapping[str, Any], page: Page | None) -> Any:
    """`base` where the page asks for the base's tokenizer; other sources are not built."""
    nested = body.get("tokenizer")
    if nested is None:
        source, keys = body.get("tokenizer_source"), ("tokenizer_source",)
    else:
        if not isinstance(nested, Mapping):
            fail(page, ("tokenizer",), f"expected a mapping with `source`, found {nested!r}")
        for key in nested:
            if key != "source":
                fail(page, ("tokenizer", key), "is not supported; only `source: base` is")
        source, keys = nested.get("source"), ("tokenizer", "source")
    if source is None or source in ("base", body.get("base_model")):
        return "base" if source else None
    fail(page, keys, f"`{source}` is not supported; only `base` is")
