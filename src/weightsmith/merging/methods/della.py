"""DELLA-TIES: drop small changes of each fine-tune more often than large ones, then elect signs as TIES does.

Problem  As in TIES, with the trim by magnitude replaced by DELLA's random drop by rank.
Rule     tau_t as in `della_linear`;  gamma = sgn(sum_t w_t tau_t)
         theta = theta_0 + lambda * (sum of the w_t tau_t with sign gamma) / (sum of their w_t)
Source   Deep et al., arXiv:2406.11617, with the election of Yadav et al., arXiv:2306.01708. The name is
         mergekit's, whose page form restores L1 norms (`rescale: l1`) and calls cancelled entries positive
         (`zero_sign`).
Cost     As `della_linear`; `zero_sign: majority` needs one pass more.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.merging.methods.della_linear import DellaLinear
from weightsmith.merging.thinning import ElectedChanges


@dataclass(frozen=True, kw_only=True)
class Della(ElectedChanges, DellaLinear):
    """Drop by rank, rescale, elect, merge."""
