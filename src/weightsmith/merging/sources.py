"""The checkpoints of a merge, opened and checked against each other; what each output tensor is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.checkpoints import Checkpoint, TensorInfo, layer_index
from weightsmith.checkpoints.adapter import AdapterCheckpoint
from weightsmith.checkpoints.folder import ADAPTER_CONFIG, MASKS_FILE, read_object
from weightsmith.checkpoints.stacks import Stack, is_first
from weightsmith.errors import CheckpointError
from weightsmith.merging import compatibility
from weightsmith.merging.config import Input, Keys, MergeConfig, OutputSlice, show
from weightsmith.merging.modules import WHOLE, UnknownModuleError, assign, split
from weightsmith.merging.settings import EachModel, Setting
from weightsmith.merging.stacking import check_cycled
from weightsmith.merging.statistics import Statistics
from weightsmith.merging.vocabulary import Alignment, align
from weightsmith.registry import load


@dataclass(frozen=True, slots=True)
class Origin:
    """A stored tensor of a checkpoint."""

    checkpoint: Checkpoint
    info: TensorInfo

    @property
    def name(self) -> str:
        """Its name in that checkpoint."""
        return self.info.name


@dataclass(frozen=True, slots=True)
class Part:
    """What one output tensor is made from, and the scopes its options come from.

    Attributes:
        base: Where the base's values are, for methods that take a base.
        models: Where the models' values are.
        model_options: Options of each model.
        positions: Each model's place in lists of one value a model.
        options: Options of the slice, and of the part of the model it belongs to.
        depth: 0 .. 1 over the layers of the slice, 0 outside.
        keys: Where the slice stands on the page.
    """

    base: Origin | None
    models: tuple[Origin, ...]
    model_options: tuple[Mapping[str, Setting], ...]
    positions: tuple[int, ...]
    options: tuple[Mapping[str, Setting], ...]
    depth: float
    keys: Keys


@dataclass(frozen=True, slots=True)
class _Roles:
    """Who is who in one slice once the base is told from the models."""

    base: tuple[Checkpoint, int] | None  # with the first layer it gives
    models: tuple[tuple[Checkpoint, int], ...]
    options: tuple[Mapping[str, Setting], ...]
    positions: tuple[int, ...]
    part: OutputSlice

    @property
    def reference(self) -> tuple[Checkpoint, int]:
        return self.base or self.models[0]


@dataclass(frozen=True, slots=True)
class Restack:
    """How the layers of the output, or of one part of it, are numbered in the donor.

    Attributes:
        module: The part of the model.
        kept: For each output layer its number in the donor.
        depth: Layers of the donor.
    """

    module: str
    kept: list[int]
    depth: int


class _PlacedError(CheckpointError):
    """A checkpoint's problem that tells the page's line already."""


class Sources:
    """All checkpoints of a merge; `parts` tells what each output tensor is made from.

    Attributes:
        donor: Whose config and tokenizer the output takes.
        roles: Every checkpoint once for each role, in the page's order: "base" or "model".
        statistics: What was measured of a model, by the `id` of its checkpoint.
        warnings: What the user should know.
        alignment: How the models come to one vocabulary; None where each is used as it is.
        restacks: Known once all parts were asked for: the stacks of layers that are put together anew.
    """

    def __init__(self, config: MergeConfig) -> None:
        self.config = config
        self.warnings: tuple[str, ...] = ()
        self.restacks: list[Restack] = []
        self.statistics: dict[int, Statistics] = {}
        self._opened: dict[str, Checkpoint] = {}
        self._identities: dict[str, str] = {}
        self._stacks: dict[tuple[int, str], Stack] = {}
        self._modules: dict[int, dict[str, list[str]]] = {}
        self._by_module: dict[str, list[_Roles]] = {}
        self.alignment: Alignment | None = None
        try:
            self._open_all()
        except BaseException:
            self.close()
            raise

    def opened(self, model: str) -> Checkpoint:
        """The open checkpoint of a model as the page names it."""
        return self._opened[self._identity(model)]

    def parts(self) -> Iterator[tuple[str, int | None, Part]]:
        """Name, layer and origin of every output tensor."""
        for module, slices in self._by_module.items():
            if any(roles.part.stacked for roles in slices):
                yield from self._stacked_parts(module, slices)
            else:
                yield from self._plain_parts(module, slices[0])

    def folders(self) -> Iterator[tuple[Path, str]]:
        """The folders that the merge reads, with the names of what is in them."""
        for checkpoint in self._opened.values():
            yield checkpoint.path, checkpoint.name
            for file in checkpoint.descriptors():  # an adapter's base lies elsewhere
                yield file.parent, checkpoint.name
        for measured in self.statistics.values():
            yield measured.checkpoint.path, "the statistics"
        if self.alignment is not None and self.alignment.output.files is not None:
            for file in self.alignment.output.files.values():
                yield file.parent, "the tokenizer"

    def close(self) -> None:
        """Close all checkpoints."""
        while self._opened:
            self._opened.popitem()[1].close()
        while self.statistics:
            self.statistics.popitem()[1].close()

    def _open_all(self) -> None:
        config = self.config
        self._method = load(config.method, "merging")
        needs_base = self._method.base == "required"
        if needs_base and config.base is None and any(part.base is None for part in config.slices):
            key = "base_model" if config.dialect == "mergekit" else "base"
            config.fail(
                (), f"`{config.method}` changes a base: name the model the others were tuned from in `{key}`"
            )
        if config.base is not None:
            self._open(config.base, ("base_model" if config.dialect == "mergekit" else "base",))
        for part in config.slices:
            if part.base is not None:
                self._open(part.base, (*part.keys, "base_model"))
            for source in part.inputs:
                self._open(source.model, source.keys)
                if source.statistics is not None:
                    self._measure(source.statistics, self.opened(source.model))
        first = config.slices[0].inputs[0].model
        self.donor = self.opened(first if config.base is None else config.base)
        for checkpoint in self._opened.values():
            compatibility.check_plain(checkpoint)
        self._slices = [self._assign(part) for part in config.slices]
        measured_folders = [measured.checkpoint for measured in self.statistics.values()]
        self._check_models()
        for roles in self._slices:
            self._by_module.setdefault(roles.part.module or WHOLE, []).append(roles)
        for module, slices in self._by_module.items():
            if not any(roles.part.stacked for roles in slices):
                self._check_names(module, slices[0])
        self.roles += [(measured, "statistics") for measured in measured_folders]

    def _open(self, model: str, keys: Keys) -> None:
        """Open a model that the page names at `keys`, once."""
        key = self._identity(model)
        if key in self._opened:
            return
        folder, plus, adapter = model.rpartition("+")
        try:
            if plus and not Path(model).exists():
                self._open(folder, keys)
                opened = Checkpoint.open(adapter, base=self.opened(folder))
                opened.check_adapter(model)
                self._opened[key] = opened
                return
            self._opened[key] = Checkpoint.open(model, base=self._below(model))
        except CheckpointError as problem:
            raise self._placed(problem, keys) from problem

    def _below(self, model: str) -> Checkpoint | None:
        """What an adapter that is named alone stands on: an adapter's own config often names a path of the
        machine it was trained on, so the page's base. Where that is an adapter itself, the model under it,
        unless the config names that adapter.
        """
        base = self.config.base
        known = self._opened.get(self._identity(base)) if base is not None else None
        settings = Path(model).expanduser() / ADAPTER_CONFIG
        named = read_object(settings).get("base_model_name_or_path") if settings.is_file() else None
        while isinstance(known, AdapterCheckpoint):
            if named and Path(named).expanduser().resolve() == known.path.resolve():
                break
            known = known.base
        return known

    def _placed(self, problem: CheckpointError, keys: Keys) -> CheckpointError:
        """The problem with the line of the page that names the model, where there is a page."""
        page = self.config.page
        if page is None or isinstance(problem, _PlacedError):
            return problem
        return _PlacedError(f"{page.path}:{page.line(keys)}: {show(keys)}: {problem}")

    def _identity(self, model: str) -> str:
        """The same text for the same model, however its path is written."""
        if model not in self._identities:
            path = Path(model).expanduser()
            self._identities[model] = str(path.resolve()) if path.exists() else model
        return self._identities[model]

    def _measure(self, folder: str, model: Checkpoint) -> None:
        """Open the statistics of a model, once."""
        known = self.statistics.get(id(model))
        if known is None:
            self.statistics[id(model)] = Statistics.open(folder, model)
        elif known.source != folder:
            raise CheckpointError(
                f"{model.name}: two folders of statistics are named, {known.source} and {folder}; one model "
                f"has one. {compatibility.NOTHING_WRITTEN}"
            )

    def _assign(self, part: OutputSlice) -> _Roles:
        """Take the base out of the models, or put it first where it is one of them."""
        base_name = part.base or self.config.base
        base_key = None if base_name is None else self._identity(base_name)
        listed = [source for source in part.inputs if self._identity(source.model) == base_key]
        inputs = list(enumerate(part.inputs))
        base: tuple[Checkpoint, int] | None = None
        if self._method.base != "none" and base_name is not None:
            inputs = [(place, source) for place, source in inputs if self._identity(source.model) != base_key]
            layers = (listed or part.inputs)[0].layers
            base = (self.opened(base_name), layers[0] if layers else 0)
            if listed and not part.stacked:
                self.warnings += (f"the base {base[0].name} is listed among the models and is ignored there",)
            if not inputs:
                self.config.fail(part.keys, f"no model is left after the base {base[0].name} is taken out")
        elif getattr(self._method, "base_is_model", False) and base_name is not None:
            first = listed[0] if listed else Input(base_name, layers=part.inputs[0].layers)
            inputs = [(0, first), *((place, source) for place, source in inputs if source is not first)]
        self._check_count(len(inputs), part)
        # Lists of one value a model count the models without the base, unless they are as long as the page's.
        lists = [len(value.values) for value in self.config.options.values() if isinstance(value, EachModel)]
        whole = any(length == len(part.inputs) != len(inputs) for length in lists)
        return _Roles(
            base,
            tuple((self.opened(s.model), s.layers[0] if s.layers else 0) for _, s in inputs),
            tuple(source.options for _, source in inputs),
            tuple(place if whole else at for at, (place, _) in enumerate(inputs)),
            part,
        )

    def _check_count(self, count: int, part: OutputSlice) -> None:
        least, most = self._method.min_models, self._method.max_models
        if count < least or (most is not None and count > most):
            bound = f"at least {least}" if count < least else f"at most {most}"
            wanted = f"exactly {least}" if least == most else bound
            self.config.fail(part.keys, f"`{self.config.method}` merges {wanted} models, found {count}")

    def _check_models(self) -> None:
        """Compare every checkpoint with the donor: architecture and tokenizer."""
        self.roles: list[tuple[Checkpoint, str]] = []
        seen: set[tuple[int, str]] = set()
        # Of a merge in parts a model is named once, whatever it gives to; else once for every mention.
        once = self.config.stacked or len(self._slices) > 1

        def note(checkpoint: Checkpoint, role: str, only_once: bool) -> None:
            if not only_once or (id(checkpoint), role) not in seen:
                seen.add((id(checkpoint), role))
                self.roles.append((checkpoint, role))

        if self.config.base is not None and any(roles.base is not None for roles in self._slices):
            note(self.donor, "base", True)
        for roles in self._slices:
            if roles.base is not None:
                note(roles.base[0], "base", True)
            for checkpoint, _ in roles.models:
                note(checkpoint, "model", once)
        others = list({id(c): c for c, _ in self.roles if c is not self.donor}.values())
        for checkpoint in others:
            self.warnings += tuple(compatibility.check_architecture(checkpoint, self.donor))
        for checkpoint in {id(c): c for c, _ in self.roles}.values():
            if (checkpoint.path / MASKS_FILE).is_file():
                self.warnings += (
                    f"{checkpoint.name} is pruned: its zeros stay only where all models have them, and its "
                    "masks are not carried over",
                )
        if self.config.tokenizer is None:
            key = "tokenizer_source" if self.config.dialect == "mergekit" else "tokenizer"
            compatibility.check_tokenizers(others, self.donor, key)
        self._align()

    def _align(self) -> None:
        """Bring all models to the output's vocabulary, where their own differ."""
        models = {id(c): c for c in (self.donor, *(c for c, _ in self.roles))}
        if self.config.base is not None:  # its tokens count also where its weights don't
            base = self.opened(self.config.base)
            models[id(base)] = base
        self.alignment = align(self.config, self.donor, list(models.values()), self._find)
        if self.alignment is None:
            return
        self.warnings += self.alignment.warnings
        aligned = self.alignment.checkpoints
        for key, measured in list(self.statistics.items()):
            if key in aligned:
                self.statistics[id(aligned[key])] = measured.aligned(aligned[key])

        def of(checkpoint: Checkpoint) -> Checkpoint:
            return aligned.get(id(checkpoint), checkpoint)

        self.donor = of(self.donor)
        self.roles = [(of(checkpoint), role) for checkpoint, role in self.roles]
        self._slices[:] = [
            dataclasses.replace(
                roles,
                base=roles.base and (of(roles.base[0]), roles.base[1]),
                models=tuple((of(checkpoint), first) for checkpoint, first in roles.models),
            )
            for roles in self._slices
        ]

    def _find(self, model: str) -> Checkpoint | None:
        return self._opened.get(self._identity(model))

    def _check_names(self, module: str, roles: _Roles) -> None:
        reference = roles.reference[0]
        names = self._names(reference, module)
        for checkpoint in {id(c): c for c, _ in roles.models if c is not reference}.values():
            compatibility.check_names(checkpoint, reference, self._names(checkpoint, module), names)

    def _names(self, checkpoint: Checkpoint, module: str) -> Collection[str]:
        """The tensors of a checkpoint that belong to a module of the page."""
        if list(self._by_module) == [WHOLE]:
            return checkpoint.tensors
        if id(checkpoint) not in self._modules:
            keys = {part.module: part.module_keys for part in self.config.slices}
            try:
                self._modules[id(checkpoint)] = assign(list(self._by_module), checkpoint.tensors)
            except UnknownModuleError as wrong:
                self.config.fail(keys.get(wrong.module, ("modules",)), str(wrong))
        return self._modules[id(checkpoint)][module]

    def _plain_parts(self, module: str, roles: _Roles) -> Iterator[tuple[str, int | None, Part]]:
        holders = [roles.base, *roles.models] if roles.base else list(roles.models)
        names = self._names(roles.reference[0], module)
        for group in split(names).values():  # each stack of layers has a depth of its own
            layers = {name: layer_index(name) for name in group}
            last = max((layer for layer in layers.values() if layer is not None), default=0)
            for name, layer in layers.items():
                if compatibility.is_buffer(name) and any(
                    compatibility.find(c, name) is None for c, _ in holders
                ):
                    continue  # a buffer that not every model stores: loaders make it anew
                depth = 0.0 if layer is None else layer / last if last else 1.0
                yield name, layer, self._part(roles, [name] * len(holders), depth)

    def _stacked_parts(self, module: str, slices: Sequence[_Roles]) -> Iterator[tuple[str, int | None, Part]]:
        donor = self._stack(self.donor, module)
        kept: list[int] = []
        origins: list[list[tuple[Checkpoint, int]]] = []
        for roles in slices:
            layers = roles.part.inputs[0].layers or (0, donor.depth)
            count = layers[1] - layers[0]
            holders = [roles.base, *roles.models] if roles.base else list(roles.models)
            for step in range(count):
                layer = len(kept)
                rests = self._rests(holders, step, roles.part)
                depth = step / (count - 1) if count > 1 else 1.0
                for rest in rests:
                    found = [self._stack(c, module).name(first + step, rest) for c, first in holders]
                    yield donor.name(layer, rest), layer, self._part(roles, found, depth)
                kept.append(roles.reference[1] + step)
                origins.append([(checkpoint, first + step) for checkpoint, first in holders])
        check_cycled(self.donor, origins)
        self.restacks.append(Restack(module, kept, donor.depth))
        for name in donor.outside(self._names(self.donor, module)):
            roles = slices[0 if is_first(name) else -1]
            holders = [roles.base, *roles.models] if roles.base else list(roles.models)
            if compatibility.is_buffer(name):
                continue
            for checkpoint, _ in holders:
                if compatibility.find(checkpoint, name) is None:
                    raise CheckpointError(
                        f"{checkpoint.name}: has no tensor `{name}`, {self.donor.name} has. "
                        f"{compatibility.NOTHING_WRITTEN}"
                    )
            yield name, None, self._part(roles, [name] * len(holders), 0.0)

    def _rests(self, holders: Sequence[tuple[Checkpoint, int]], step: int, part: OutputSlice) -> list[str]:
        """Rests of the names in one layer, the same in all models."""
        found = []
        for checkpoint, first in holders:
            stack = self._stack(checkpoint, part.module or WHOLE)
            if first + step >= stack.depth:
                self.config.fail(
                    part.keys,
                    f"{checkpoint.name} has layers 0 .. {stack.depth - 1}, layer {first + step} is asked for",
                )
            names = stack.rest[first + step]
            found.append([rest for rest in names if not compatibility.is_buffer(rest)])
        for (checkpoint, first), names in zip(holders, found, strict=True):
            other = set(names) ^ set(found[0])
            if other:
                owner = holders[0][0].name
                raise CheckpointError(
                    f"{checkpoint.name}: layer {first + step} and layer {holders[0][1] + step} of {owner} "
                    f"don't hold the same tensors: `{min(other)}` is in one only. "
                    f"{compatibility.NOTHING_WRITTEN}"
                )
        return found[0]

    def _part(self, roles: _Roles, names: Sequence[str], depth: float) -> Part:
        """`names` has one name for the base, if there is one, then one for each model."""
        holders = [roles.base, *roles.models] if roles.base else list(roles.models)
        origins = [
            Origin(checkpoint, _info(checkpoint, name))
            for (checkpoint, _), name in zip(holders, names, strict=True)
        ]
        base = origins.pop(0) if roles.base else None
        part = roles.part
        scopes = (part.options, part.module_options)
        return Part(base, tuple(origins), roles.options, roles.positions, scopes, depth, part.keys)

    def _stack(self, checkpoint: Checkpoint, module: str) -> Stack:
        key = id(checkpoint), module
        if key not in self._stacks:
            self._stacks[key] = Stack(checkpoint, self._names(checkpoint, module))
        return self._stacks[key]


def open_sources(config: MergeConfig) -> Sources:
    """Open every checkpoint of `config` and check that they fit.

    Raises:
        PageError: the page asks for what its models can't give.
        CheckpointError: a model can't be read or doesn't fit the others.
    """
    return Sources(config)


def _info(checkpoint: Checkpoint, name: str) -> TensorInfo:
    info = compatibility.find(checkpoint, name)
    assert info is not None
    return info
