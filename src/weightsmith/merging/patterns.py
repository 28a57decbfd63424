"""Patterns of tensor names that a page gives: one that no tensor has is a slip, and says so.

A filter (`{filter: self_attn, value: 0.3}`) is a part of names; an option that a method lists in its
`patterns` (`exclude` of `tsvm`) holds shell patterns. mergekit passes over a filter without a tensor, so on
its pages that is a warning.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from weightsmith.checkpoints.names import nearest_tensor
from weightsmith.merging.config import Keys, MergeConfig
from weightsmith.merging.settings import PerTensor, Setting


def check_patterns(config: MergeConfig, method: type, names: Collection[str]) -> tuple[str, ...]:
    """Refuse patterns without a tensor; returns what is only worth a warning.

    Args:
        config: The checked page.
        method: The method's class.
        names: Names of all tensors, of the output and of the inputs, tied ones too.

    Raises:
        PageError: a pattern that matches none of `names`; names the nearest.
    """
    warnings = []
    for keys, what, pattern in _unmatched(config, method, names):
        problem = f"{what} `{pattern}` matches no tensor{nearest_tensor(pattern, names)}"
        if config.dialect == "own":
            config.fail(keys, problem)
        warnings.append(problem)
    return tuple(dict.fromkeys(warnings))


def _unmatched(config: MergeConfig, method: type, names: Collection[str]) -> Iterator[tuple[Keys, str, str]]:
    for keys, options in _scopes(config):
        for key, setting in options.items():
            if isinstance(setting, PerTensor):
                for index, (word, _) in enumerate(setting.rules):
                    if word is not None and not any(word in name for name in names):
                        yield (*keys, key, index, "filter"), "filter", word
            elif key in getattr(method, "patterns", ()):
                patterns: Any = setting
                for index, pattern in enumerate(patterns):
                    if not any(fnmatchcase(name, pattern) for name in names):
                        yield (*keys, key, index), "pattern", pattern


def _scopes(config: MergeConfig) -> Iterator[tuple[Keys, Mapping[str, Setting]]]:
    inner = ("parameters",) if config.dialect == "mergekit" else ()
    yield inner, config.options
    modules = {part.module_keys: part.module_options for part in config.slices if part.module}
    for keys, options in modules.items():
        yield (*keys, *inner), options
    for part in config.slices:
        yield (*part.keys, *inner), part.options
        for source in part.inputs:
            yield (*source.keys, *inner), source.options
