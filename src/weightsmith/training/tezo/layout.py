"""Which parameters move, as what, and whether a saved state has their ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from weightsmith.errors import InputError
from weightsmith.training.sharded import local
from weightsmith.training.tezo.low_rank import CPPiece, LazyPiece
from weightsmith.training.tezo.noise import StepVectors
from weightsmith.training.tezo.options import LOZOOptions, TeZOOptions, ZerothOrderOptions, options_of
from weightsmith.training.tezo.pieces import DensePiece, Piece
from weightsmith.training.tezo.ranks import Matrix, chosen_ranks
from weightsmith.training.tezo.shares import Share, share_of, whole_shape


class Moving(NamedTuple):
    """A parameter that is trained.

    Attributes:
        name: Keys its directions.
        parameter: Itself.
        group: Its parameter group.
        matrices: (E, M, N), sharing its memory; None where it gets dense directions.
        share: What this process holds of it, where that is not the whole.
    """

    name: str
    parameter: Tensor
    group: dict[str, Any]
    matrices: Tensor | None
    share: Share | None = None

    @property
    def whole(self) -> torch.Size | None:
        """Shape of the matrices with the rows of all processes."""
        return None if self.matrices is None else whole_shape(self.matrices, self.share)


def moving(
    groups: Sequence[dict[str, Any]], names: Mapping[int, str], options: ZerothOrderOptions
) -> list[Moving]:
    """Parameters that move, each storage once.

    Raises:
        InputError: there are none, or one can't.
    """
    found: list[Moving] = []
    seen = set()
    for group in groups:
        for parameter in group["params"]:
            if not parameter.requires_grad or not parameter.numel():
                continue
            name = names[id(parameter)]
            _refuse_what_cannot_move(parameter, name)
            share = share_of(parameter.detach(), name, options_of(group, options))
            address = id(parameter) if share else parameter.data_ptr()  # a share may be empty
            place = (address, parameter.shape, parameter.stride())
            if place in seen:
                continue
            if parameter.device.type != "meta":
                seen.add(place)
            matrices = _matrices(local(parameter.detach()), name, options, sharded=share is not None)
            entry = Moving(name, parameter, group, matrices, share)
            frozen = parameter.ndim < 2 and getattr(options, "freeze_1d", False)
            found += [] if frozen else [entry]
    if not found:
        raise InputError("no parameter is trained: check requires_grad, and freeze_1d")
    return found


def make_pieces(
    members: Sequence[Moving], states: Mapping[Tensor, dict[str, Any]], options: ZerothOrderOptions
) -> list[Piece]:
    """A piece for each parameter, with the ranks of its saved state where there are any."""
    seed = members[0].group["seed"]
    matrices = [member for member in members if member.matrices is not None]
    saved = {m.name: states[m.parameter]["rank"] for m in members if "rank" in states[m.parameter]}
    known = all(member.name in saved for member in matrices)
    ranks = saved if known else _ranks(members, options) | saved
    vectors = StepVectors(
        [member.name for member in matrices],
        [len(member.matrices) * ranks[member.name] for member in matrices],  # pyrefly: ignore
        [member.parameter.device for member in matrices],
        seed,
    )
    places = {member.name: place for place, member in enumerate(matrices)}
    pieces: list[Piece] = []
    for name, parameter, _, found, share in members:
        state = states[parameter]
        if found is not None and isinstance(options, TeZOOptions):
            tau = vectors.of(places[name])
            pieces.append(CPPiece(name, found, state, options, seed, ranks[name], tau, share))
        elif found is not None and isinstance(options, LOZOOptions):
            pieces.append(LazyPiece(name, found, state, options, seed, ranks[name]))
        else:
            pieces.append(DensePiece(name, local(parameter.detach()), state, options, seed, share))
    return pieces


def check_state(
    members: Sequence[Moving], entries: Mapping[int, Mapping[str, Any]], options: ZerothOrderOptions
) -> None:
    """Refuse a state of other ranks.

    Args:
        members: The parameters of this run.
        entries: The saved state of each, by id.
        options: Of this run.

    Raises:
        InputError: names the parameter, what was saved and what is here.
    """
    # An automatic rank belongs to the weights that a run began with.
    fixed = [m for m in members if getattr(options_of(m.group, options), "rank", "auto") != "auto"]
    expected = _ranks(fixed, options)
    for member in members:
        name, entry = member.name, entries[id(member.parameter)]
        rank = None if member.matrices is None else expected.get(name, entry.get("rank"))
        if entry and entry.get("rank") != rank:
            shape = list(member.parameter.shape)
            raise InputError(
                f"{name}, shape {shape}: the saved state has rank {entry.get('rank')}, here it is {rank}"
            )


@torch.no_grad()
def _ranks(members: Sequence[Moving], options: ZerothOrderOptions) -> dict[str, int]:
    """Rank by name; groups without one of their own share the rule of the options."""
    together: dict[int | None, list[Moving]] = {}
    for member in members:
        if member.matrices is not None:
            together.setdefault(id(member.group) if "rank" in member.group else None, []).append(member)
    found: dict[str, int] = {}
    for these in together.values():
        rule = options_of(these[0].group, options)
        if isinstance(rule, LOZOOptions):
            found |= {m.name: min(rule.rank, *m.whole[-2:]) for m in these}  # pyrefly: ignore
        elif isinstance(rule, TeZOOptions):
            found |= chosen_ranks([_whole_matrix(member) for member in these], rule)
    return found


def _whole_matrix(member: Moving) -> Matrix:
    """What a rank is chosen for; of a sharded parameter the shape alone."""
    assert member.matrices is not None
    assert member.whole is not None
    here = member.share is None
    return Matrix(member.name, member.matrices if here else torch.empty(member.whole, device="meta"))


def _matrices(
    value: Tensor, name: str, options: ZerothOrderOptions, *, sharded: bool = False
) -> Tensor | None:
    if value.ndim < 2 or not isinstance(options, TeZOOptions | LOZOOptions):
        return None
    if value.ndim == 3 and any(fnmatchcase(name, pattern) for pattern in options.stacked):
        if sharded:
            raise InputError(
                f"{name}: is sharded and stacked; take it out of `stacked`, or replicate it (DDP)"
            )
        return value
    if value.ndim == 2:
        return value[None]
    # A convolution in channels-last order has no such view.
    return value.view(1, len(value), -1) if value.is_contiguous() else None


def _refuse_what_cannot_move(parameter: Tensor, name: str) -> None:
    flat = getattr(parameter, "_is_flat_param", False) or type(parameter).__name__ == "FlatParameter"
    if flat or hasattr(parameter, "ds_id"):
        raise InputError(
            f"{name}: FSDP1 and DeepSpeed keep parts of flattened parameters, which have no rows; take FSDP2 "
            "(fully_shard), or replicate the model (DDP)"
        )
    if not parameter.is_floating_point():
        raise InputError(
            f"{name} is {parameter.dtype}: probes move floating-point weights; freeze it, or train adapters "
            "(LoRA) on top of it, which restore='branch' perturbs without writing to weights"
        )
