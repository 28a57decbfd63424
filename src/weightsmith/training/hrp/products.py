"""What a large adapter learnt in a layer, and the directions that a small one takes from it."""

from __future__ import annotations

import torch
from torch import Tensor

from weightsmith.runs.seeds import derive
from weightsmith.training.hrp.factors import defect, filled, principal
from weightsmith.training.hrp.layers import Layer
from weightsmith.training.hrp.options import HRPOptions
from weightsmith.training.hrp.preheat import PREHEAT
from weightsmith.training.hrp.report import LayerReport


class Product:
    """What the large adapter learnt in one layer."""

    def __init__(self, layer: Layer) -> None:
        self.left, self.right = layer.left(PREHEAT), layer.right(PREHEAT)
        self.scale = layer.module.scaling[PREHEAT]
        self.finite = bool(self.left.isfinite().all() and self.right.isfinite().all())

    @property
    def usable(self) -> bool:
        """Whether it has a direction at all."""
        return self.finite and bool(self.left.any())

    def spectrum(self) -> Tensor:
        """Singular values, largest first."""
        return principal(self.left[0], self.right[0], 1).triplets.s

    def directions(
        self, rank: int, seed: int, options: HRPOptions, scale: float, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor], LayerReport]:
        """Rows for A and columns for B, stacked for experts, and what is told of them."""
        rows, columns, values, fallback = [], [], [], None
        known, away = rank, 0.0
        for expert, (left, right) in enumerate(zip(self.left, self.right, strict=True)):
            own = derive(seed, expert) if len(self.left) > 1 else seed
            if not self.finite or not bool(left.any()):
                fallback = "no gradient reached it" if self.finite else "not finite"
                v = _kept(right, rank, own) if self.finite else filled(right[:, :0].float(), rank, own)
                u = filled(left[:, :0].float(), rank, own + 1)
                s = torch.zeros(right.shape[1], dtype=v.dtype)
                known = 0
            else:
                found = principal(left, right, rank, seed=own)
                (u, s, v), known = found.triplets, min(known, found.known)
            away = max(away, defect((u if options.assign == "B" else v).to(dtype)))
            if options.assign == "both":
                size = s[:rank].to(u) * (self.scale / scale)
                if len(size) < u.shape[1]:
                    size = torch.cat([size, size.new_zeros(u.shape[1] - len(size))])
                u, v = u * size / options.length, v * options.length
            else:
                u, v = u * options.length, v * options.length
            rows.append(v.mT)
            columns.append(u)
            values.append(s)
        spectrum = torch.stack(values).double().square().mean(0).sqrt()
        total = float(spectrum.square().sum())
        following = float(spectrum[rank]) if rank < len(spectrum) else 0.0
        report = LayerReport(
            rank=rank,
            preheat_rank=self.right.shape[-1],
            singular_values=tuple(float(f"{value:.6g}") for value in spectrum.tolist()),
            captured=float(spectrum[:rank].square().sum()) / total if total else 0.0,
            gap=float(spectrum[rank - 1]) / following if following and rank <= len(spectrum) else None,
            known=known,
            defect=away,
            fallback=fallback,
        )
        one = len(rows) == 1
        return (rows[0] if one else torch.stack(rows), columns[0] if one else torch.stack(columns)), report


def _kept(right: Tensor, rank: int, seed: int) -> Tensor:
    """The first directions that the large adapter began with: nothing has moved them."""
    basis = torch.linalg.qr(right.float())[0]
    return filled(basis, rank, seed)
