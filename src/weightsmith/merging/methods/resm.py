"""RESM (R-TSVM): TSV-M with task weights from outliers and ranks from sparsity. RECONSTRUCTED.

Problem  Changes of fine-tunes are heavy-tailed and unevenly sparse; equal weights and equal ranks pile up
         the noise of some tasks and cut the signal of others.
Method   Two steps before TSV-M, for each matrix and task with a = |D_t|:
           outliers   o_t = share of sum(a) in entries above mean(a) + kappa std(a)
                      w_t = T o_t^g / sum_s o_s^g
           sparsity   s_t = share of entries with a <= eta rms(D_t)
                      R = round(q (1 - mean s)) within T .. q
                      r_t = R (1 - s_t) / sum_s (1 - s_s), whole numbers, at least 1
         then TSV-M with r_t triplets of each task and singular values w_t S_t.
Source   Yang et al., arXiv:2502.06876 ("R-TSVM" in v1 and v2, "RESM" in v3). The two steps are named in its
         abstracts; their formulas are not, and no code is published. RECONSTRUCTED: every formula above,
         every default below (preset "resm-recon"), each of them an option.
Decided  A task that changed nothing in a matrix is left out of it, as if it were not merged. Equal sparsities
         give equal ranks (a remainder below T stays unused, as in TSV-M), so that g = 0, eta = 0 without
         zeros is TSV-M. `layer` adds up the sums of its matrices, each with its own bound for outliers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weightsmith.errors import InputError
from weightsmith.merging.methods.tsvm import Tsvm, few_rows_ranks, orthogonal_sum
from weightsmith.merging.options import check_range
from weightsmith.merging.parameter import ParallelMap, Parameter
from weightsmith.merging.spectral import Change, each_model
from weightsmith.merging.sums import piece_absolutes, piece_dots, total

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-12
_BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Resm(Tsvm):
    """Options of RESM, and all those of TSV-M; `rank` is the share of the full rank kept before sparsity.

    Attributes:
        mode: "emphasize" gives tasks with heavy outliers more weight, "suppress" less.
        g: Strength of the outlier weights; 0 switches them off.
        kappa: An outlier lies above mean + kappa standard deviations of |D_t|.
        stat: Outliers count by their share of the sum of |D_t| ("ratio"), their sum ("mass"), their share of
            the entries ("count").
        granularity: One weight for each matrix ("tensor"), all matrices of a layer ("layer"), each row
            ("row").
        eta: Entries with |D_t| <= eta rms(D_t) count as zero; 0 counts exact zeros only.
        sparsity_tol: Entries with |D_t| at or below this number count as zero; takes the place of `eta`.
        preset: Name of this set of defaults.
    """

    mode: Literal["emphasize", "suppress"] = "emphasize"
    g: float = 1.0
    kappa: float = 3.0
    stat: Literal["ratio", "mass", "count"] = "ratio"
    granularity: Literal["tensor", "layer", "row"] = "tensor"
    eta: float = 0.1
    sparsity_tol: float | None = None
    preset: Literal["resm-recon"] = "resm-recon"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("g", "kappa", "eta"):
            check_range(key, getattr(self, key), 0.0)
        if self.sparsity_tol is not None:
            check_range("sparsity_tol", self.sparsity_tol, 0.0)

    @property
    def global_survey(self) -> bool:
        """Weights of a layer need all its matrices first."""
        return self.granularity == "layer" and self.g > 0

    def survey_all(self, parameters: Sequence[Parameter], parallel: ParallelMap) -> Mapping[str, Any]:
        """Task weights of each matrix's layer, by name; a matrix outside the layers stands for itself."""
        matrices = [parameter for parameter in parameters if self.takes(parameter)]
        groups: dict[int | str, np.ndarray] = defaultdict(lambda: np.zeros(0))
        for parameter, sums in zip(matrices, parallel(self._tile_sums, matrices), strict=True):
            key = _layer_key(parameter)
            groups[key] = groups[key] + sums if groups[key].size else sums
        weights = {key: self._weights(sums) for key, sums in groups.items()}
        found = {parameter.name: weights[_layer_key(parameter)] for parameter in matrices}
        return {parameter.name: found.get(parameter.name) for parameter in parameters}

    def change(self, deltas: Tensor, stats: Any, name: str) -> Change:
        """The merged change of one matrix from `deltas` (T, M, N), which may be overwritten."""
        sums, sparse = zip(*(_sums(delta, self) for delta in deltas), strict=True)
        # (T, 4) or, for rows, (T, M, 4): sum of |D|, of its outliers, number of outliers, of entries
        sums = np.stack(sums)
        active = np.flatnonzero(sums[..., 0].reshape(len(sums), -1).any(axis=-1))
        if not active.size:
            return Change(None, [0] * len(deltas), [0.0] * len(deltas))
        q = min(deltas.shape[-2:])
        ranks, weights = np.zeros(len(deltas), int), np.zeros(len(deltas))
        if q >= len(active):
            ranks[active] = share_ranks(q, [sparse[task] for task in active], self.rank)
        else:
            ranks[active] = few_rows_ranks(deltas[active])
        scales = np.array(each_model(self.alpha, len(deltas)), float)
        if self.granularity == "row":
            rows = np.zeros(sums.shape[:2])
            rows[active] = self._weights(sums[active])
            deltas.mul_(deltas.new_tensor(rows)[..., None])
            weights = rows.mean(axis=1)
        elif self.granularity == "layer" and self.g > 0:
            if stats is None:
                raise InputError(
                    f"{name}: granularity `layer` needs the layer's other matrices; merge a whole model"
                )
            # One task may have changed this layer elsewhere only: its weight has nothing to act on here.
            weights[active] = np.asarray(stats)[active]
            scales *= weights
        else:
            weights[active] = self._weights(sums[active])
            scales *= weights
        values, used = orthogonal_sum(deltas, ranks.tolist(), scales.tolist())
        return Change(values, used, weights.tolist())

    def _weights(self, sums: np.ndarray) -> np.ndarray:
        """Weights (T, ...) from sums (T, ..., 4): 0 where nothing changed, else 1 on average."""
        mass, outliers, number, entries = np.moveaxis(sums, -1, 0)
        changed = mass > 0
        if self.stat == "ratio":
            share = outliers / np.where(changed, mass, 1.0)
        else:
            share = outliers if self.stat == "mass" else number / entries
        # Logarithms: a 1e-12 to a high power leaves the range of floats.
        power = (self.g if self.mode == "emphasize" else -self.g) * np.log(share + _TINY)
        power = np.where(changed, power, -np.inf)
        best = power.max(axis=0)
        parts = np.exp(power - np.where(np.isfinite(best), best, 0.0))
        all_parts = parts.sum(axis=0)
        return changed.sum(axis=0) * parts / np.where(all_parts > 0, all_parts, 1.0)

    def _tile_sums(self, parameter: Parameter) -> np.ndarray:
        """The four sums of each task, fp64 (T, 4), from two passes over the tiles of one parameter."""
        tasks = range(parameter.num_models)
        mass: list[list[np.ndarray]] = [[] for _ in tasks]
        square: list[list[np.ndarray]] = [[] for _ in tasks]
        for tile in parameter.tiles():
            for task, delta in enumerate(tile.deltas()):
                mass[task].append(piece_absolutes(delta, parameter, tile.scratch))
                square[task].append(piece_dots(delta, delta, parameter))
        masses = [total(pieces) for pieces in mass]
        bounds = [_bound(masses[task], total(square[task]), parameter.numel, self.kappa) for task in tasks]
        outliers: list[list[np.ndarray]] = [[] for _ in tasks]
        number = np.zeros(len(tasks))
        for tile in parameter.tiles():
            for task, delta in enumerate(tile.deltas()):
                np.abs(delta, out=delta)
                above = delta > bounds[task]
                number[task] += np.count_nonzero(above)
                outliers[task].append(piece_dots(delta, above.astype(np.float32), parameter))
        sums = [masses, [total(pieces) for pieces in outliers], number, [parameter.numel] * len(tasks)]
        return np.array(sums, float).T


def resm(deltas: Tensor, **options: Any) -> Tensor:
    """Merge the changes of T tasks to one matrix.

    Args:
        deltas: fp32 or fp64 (T, M, N). Left untouched.
        **options: Fields of `Resm`; `granularity="layer"` has no meaning here.

    Returns:
        (M, N), the change to add to the base.
    """
    change = Resm(**options).change(deltas.clone(), None, "tensor")
    return deltas.new_zeros(deltas.shape[1:]) if change.values is None else change.values


def share_ranks(q: int, sparsity: Sequence[float], rank: float = 1.0) -> list[int]:
    """Ranks of tasks whose changes have these fractions of zeros: at least 1 each, at most q together.

    Example:
        >>> share_ranks(8, [0.5, 0.0])
        [2, 4]
    """
    tasks = len(sparsity)
    dense = 1.0 - np.asarray(sparsity, float)
    budget = min(max(round(rank * q * float(dense.mean())), tasks), q)
    if np.all(dense == dense[0]):
        return [budget // tasks] * tasks
    shares = budget * dense / dense.sum()
    ranks = np.maximum(np.floor(shares + 1e-9).astype(int), 1)
    spare = budget - int(ranks.sum())
    if spare > 0:  # to the largest remainders, ties to the lower task
        ranks[np.argsort(-(shares - ranks), kind="stable")[:spare]] += 1
    for _ in range(-spare):  # the least rank of 1 took more than there is: back from the largest
        ranks[int(ranks.argmax())] -= 1
    return ranks.tolist()


def _sums(delta: Tensor, options: Resm) -> tuple[np.ndarray, float]:
    """The four sums of one change, fp64 (4,) or (M, 4) for rows, and the fraction that counts as zero."""
    by_row = options.granularity == "row"
    rows, columns = delta.shape
    step = max(1, _BLOCK_ELEMENTS // columns)  # whole rows at a time, so that |D| never exists in full
    # Of each row: sum of |D|, of its squares, of outliers, number of outliers, number of zeros.
    per_row = delta.new_zeros(5, rows)
    for at in range(0, rows, step):
        a = delta[at : at + step].abs()
        per_row[0, at : at + step] = a.sum(-1)
        per_row[1, at : at + step] = a.square_().sum(-1)
    mass, square = per_row[:2].double().cpu().numpy()
    entries = columns if by_row else rows * columns
    if not by_row:
        mass, square = mass.sum(keepdims=True), square.sum(keepdims=True)
    limit = delta.new_tensor(_bound(mass, square, entries, options.kappa)).expand(rows)[:, None]
    zero = options.eta * float(np.sqrt(square.sum() / delta.numel()))
    if options.sparsity_tol is not None:
        zero = options.sparsity_tol
    for at in range(0, rows, step):
        a = delta[at : at + step].abs()
        above = a > limit[at : at + step]
        per_row[3, at : at + step] = above.sum(-1)
        per_row[4, at : at + step] = (a <= zero).sum(-1)
        per_row[2, at : at + step] = a.mul_(above).sum(-1)
    outliers, number, zeros = per_row[2:].double().cpu().numpy()
    if not by_row:
        outliers, number = outliers.sum(keepdims=True), number.sum(keepdims=True)
    sums = np.stack([mass, outliers, number, np.full_like(mass, entries)], axis=-1)
    return (sums if by_row else sums[0]), float(zeros.sum()) / delta.numel()


def _bound(mass: Any, square: Any, entries: int, kappa: float) -> Any:
    """The mean + kappa std of |D| from its sum and sum of squares."""
    mean = mass / entries
    return mean + kappa * np.sqrt(np.maximum(square / entries - mean * mean, 0.0))


def _layer_key(parameter: Parameter) -> int | str:
    return parameter.name if parameter.layer is None else parameter.layer
