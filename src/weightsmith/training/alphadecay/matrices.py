"""Which parameters of a model take part in AlphaDecay, and why the others don't."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from weightsmith.checkpoints.names import layer_index, nearest_tensor
from weightsmith.errors import InputError
from weightsmith.training.alphadecay.options import AlphaDecayOptions
from weightsmith.training.names import plain_name

_ADAPTER = re.compile(r"(^|\.)(lora_|vera_|ia3_|hada_|lokr_|oft_|prompt_encoder)")


@dataclass(frozen=True, eq=False)
class Matrix:
    """One parameter that takes part.

    Attributes:
        name: Its name without the prefixes of wrappers.
        parameter: (O, I), or (E, O, I) for experts kept in one parameter.
        layer: Index of its block; None outside the blocks.
        split: (axis, sizes) of the projections fused in it, or None.
    """

    name: str
    parameter: nn.Parameter
    layer: int | None
    split: tuple[int, tuple[int, ...]] | None = None

    def pieces(self, whole: Tensor) -> Iterator[Tensor]:
        """The matrices (O, I) inside the parameter's values `whole`: experts, then fused projections."""
        for matrix in whole if whole.ndim == 3 else [whole]:
            if self.split is None:
                yield matrix
            else:
                axis, sizes = self.split
                yield from matrix.split(sizes, dim=axis)

    def piece_shapes(self) -> list[tuple[int, int]]:
        """Shapes of `pieces`, from the parameter's (global) shape."""
        *experts, rows, columns = self.parameter.shape
        shapes = [(rows, columns)]
        if self.split is not None:
            axis, sizes = self.split
            shapes = [(size, columns) if axis == 0 else (rows, size) for size in sizes]
        return shapes * (experts[0] if experts else 1)

    def cost(self) -> float:
        """Relative work of its exponent."""
        return float(sum(min(shape) ** 2 * max(shape) for shape in self.piece_shapes()))


def find_matrices(model: nn.Module, options: AlphaDecayOptions) -> tuple[list[Matrix], dict[str, str]]:
    """The parameters that take part, in the model's order, and for every other matrix the reason why not.

    Raises:
        InputError: none takes part (lists the reasons), or one that would has no values in this process.
    """
    _check_patterns(model, options)
    found: list[Matrix] = []
    skipped: dict[str, str] = {}
    excluded = _embeddings_and_heads(model)
    author = _author_weights(model) if options.compat == "author" else None
    seen: set[int] = set()
    for holder_name, holder in model.named_modules():
        for key, parameter in holder.named_parameters(recurse=False):
            if parameter.ndim not in (2, 3) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = plain_name(f"{holder_name}.{key}" if holder_name else key)
            matrix = Matrix(
                name, parameter, layer_index(name), _split(name, parameter, holder, options.split)
            )
            if author is not None:
                reason = "" if id(parameter) in author else "the public code leaves it out"
            else:
                reason = _outside(matrix, holder, excluded)
            reason = reason or _unfit(matrix, options)
            if reason:
                skipped[name] = reason
            else:
                _check_values(matrix)
                found.append(matrix)
    if not found:
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:8])
        raise InputError(
            f"no matrix of the model can take part in AlphaDecay: {listed or 'it has no matrices'}"
        )
    return found, skipped


def _check_patterns(model: nn.Module, options: AlphaDecayOptions) -> None:
    """Refuse a pattern that no parameter's name fits: it is a slip of the pen."""
    names = [plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    for key in ("include", "exclude", "split"):
        for pattern in getattr(options, key):
            try:
                fits = any(re.search(pattern, name) for name in names)
            except re.error as problem:
                raise InputError(
                    f"AlphaDecay: {key}: `{pattern}` is no regular expression: {problem}"
                ) from problem
            if not fits:
                raise InputError(
                    f"AlphaDecay: {key}: `{pattern}` matches no parameter{nearest_tensor(pattern, names)}"
                )


def _embeddings_and_heads(model: nn.Module) -> dict[int, str]:
    """Id of the parameters that are (or are tied to) an embedding or the output head -> what they are."""
    known = {
        id(parameter): "an embedding"
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        for parameter in module.parameters(recurse=False)
    }
    for module in model.modules():
        output = getattr(module, "get_output_embeddings", None)
        head = output() if callable(output) else None
        weight = getattr(head, "weight", None)
        if weight is not None:
            known.setdefault(id(weight), "the output head")
    return known


def _author_weights(model: nn.Module) -> set[int]:
    linear = [module.weight for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return {id(weight) for weight in linear[1:-1]}


def _outside(matrix: Matrix, holder: nn.Module, excluded: Mapping[int, str]) -> str:
    """Why a parameter is none of the blocks' projections, or an empty string."""
    if id(matrix.parameter) in excluded:
        return excluded[id(matrix.parameter)]
    if _ADAPTER.search(matrix.name):
        return "part of an adapter"
    if matrix.layer is None:
        return "outside the repeated blocks"
    # transformers' Conv1D is a linear layer with its weight transposed, which no spectrum notices.
    linear = isinstance(holder, (nn.Linear, nn.MultiheadAttention)) or type(holder).__name__ == "Conv1D"
    experts = matrix.parameter.ndim == 3 and not isinstance(holder, nn.modules.conv._ConvNd)
    return "" if linear or experts else f"a parameter of {type(holder).__name__}, not of a linear layer"


def _unfit(matrix: Matrix, options: AlphaDecayOptions) -> str:
    """Why a projection can't or shan't take part, or an empty string."""
    if options.include and not any(re.search(pattern, matrix.name) for pattern in options.include):
        return "not among `include`"
    if any(re.search(pattern, matrix.name) for pattern in options.exclude):
        return "excluded"
    if not matrix.parameter.requires_grad:
        return "frozen"
    smallest = min(min(shape) for shape in matrix.piece_shapes())
    # An empty parameter is one that another wrapper has taken away: `_check_values` says so.
    if smallest < options.min_dim and matrix.parameter.numel():
        return f"its smaller side is {smallest}, below min_dim {options.min_dim}"
    return ""


def _check_values(matrix: Matrix) -> None:
    parameter = matrix.parameter
    if parameter.is_meta:
        raise InputError(f"{matrix.name} is on the meta device: make AlphaDecay after the weights are loaded")
    if parameter.numel() == 0:
        raise InputError(
            f"{matrix.name} is empty in this process: a wrapper (ZeRO-3) holds its weights, which have to "
            "be gathered first; use FSDP2 (fully_shard)"
        )


def _split(
    name: str, parameter: Tensor, holder: nn.Module, patterns: Mapping[str, tuple[int, int | tuple[int, ...]]]
) -> tuple[int, tuple[int, ...]] | None:
    """(axis, sizes) for a fused projection, axis counted within one (O, I)."""
    if isinstance(holder, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        patterns = {"in_proj_weight": (0, 3), **patterns}
    for pattern, (axis, pieces) in patterns.items():
        if not re.search(pattern, name):
            continue
        length = parameter.shape[parameter.ndim - 2 + axis] if axis in (0, 1) else -1
        sizes = (length // pieces,) * pieces if isinstance(pieces, int) and pieces > 0 else pieces
        if length < 0 or isinstance(sizes, int) or sum(sizes) != length:
            raise InputError(
                f"split `{pattern}`: ({axis}, {pieces}) does not divide {name} of shape "
                f"{tuple(parameter.shape)}"
            )
        return axis, tuple(sizes)
    return None
