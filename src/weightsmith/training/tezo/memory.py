"""What a zeroth-order optimiser keeps, in bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from weightsmith.training.tezo.low_rank import CPPiece, LazyPiece, LowRankPiece
from weightsmith.training.tezo.pieces import DensePiece, Piece, block_size
from weightsmith.training.tezo.zeroth_order import ZerothOrder


@dataclass(frozen=True)
class MemoryReport:
    """Bytes beside a forward pass.

    Attributes:
        weights: The parameters in training.
        factors: Factors of directions that stay from step to step.
        vectors: Running means and squares of matrices.
        dense: Running means and squares as large as their parameters.
        snapshot: Copies of weights while a probe runs.
        temporary: The largest temporary of a step.
        dense_adam: What Adam on dense directions would keep: two float32 numbers for each weight.
    """

    weights: int
    factors: int
    vectors: int
    dense: int
    snapshot: int
    temporary: int
    dense_adam: int

    @property
    def state(self) -> int:
        """What is kept from step to step, beside the weights."""
        return self.factors + self.vectors + self.dense

    def __str__(self) -> str:
        """One line for each number."""
        lines = [f"{name:>11} {value / 1e6:12.3f} MB" for name, value in asdict(self).items()]
        share = self.state / self.dense_adam
        return "\n".join([*lines, f"{'kept':>11} {self.state / 1e6:12.3f} MB, {share:.2%} of dense Adam's"])


def memory_report(optimizer: ZerothOrder) -> MemoryReport:
    """What the optimiser keeps now; after its first step that is all it will ever keep.

    Args:
        optimizer: With its parameters on their devices; ranks are decided here, if no step was taken.
    """
    pieces = optimizer.pieces()
    probed = {id(piece): optimizer.is_branched(piece) for piece in pieces}
    copied = optimizer.options.restore != "inplace"
    dense = [piece for piece in pieces if isinstance(piece, DensePiece)]
    short = [piece for piece in pieces if not isinstance(piece, DensePiece)]
    return MemoryReport(
        weights=sum(_bytes(piece.value) for piece in pieces),
        factors=sum(_factors(piece) for piece in short),
        vectors=sum(_averages(piece) for piece in short),
        dense=sum(_averages(piece) for piece in dense),
        snapshot=sum(_bytes(piece.value) for piece in pieces if copied and not probed[id(piece)]),
        temporary=max(map(_temporary, pieces)),
        dense_adam=sum(8 * piece.value.numel() for piece in pieces),
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _averages(piece: Piece) -> int:
    return sum(_bytes(value) for value in piece.state.values() if isinstance(value, Tensor))


def _factors(piece: Piece) -> int:
    """Of factors that are there, or will be after the first probe."""
    rows, columns = piece.value.shape[-2:]
    length = {CPPiece: rows + columns, LazyPiece: columns}[type(piece)]  # pyrefly: ignore[bad-index]
    return len(piece.value) * length * piece.rank * piece.factor_dtype.itemsize  # pyrefly: ignore


def _temporary(piece: Piece) -> int:
    """Blocks of a step's update; a product of factors where it takes more."""
    size = min(block_size(piece.value.device), piece.value.numel())
    if isinstance(piece, DensePiece):
        return 4 * (size if piece.value.is_contiguous() else piece.value.numel())
    rows, columns = piece.value.shape[-2:]
    blocks = 2 * 4 * max(size, columns) if piece.options.variant in ("adam", "lion") else 0
    assert isinstance(piece, LowRankPiece)
    widened = columns * piece.rank * piece.product_dtype.itemsize
    widened = 0 if piece.factor_dtype == piece.product_dtype else widened
    return blocks + widened + 4 * rows * piece.rank * (4 if blocks else 2)
