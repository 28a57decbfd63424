"""Breadcrumbs-TIES: drop the largest and the smallest changes of each fine-tune, then elect signs.

Problem  As in TIES, with the trim by magnitude at both ends.
Rule     tau_t as in `breadcrumbs`;  gamma = sgn(sum_t w_t tau_t)
         theta = theta_0 + lambda * (sum of the w_t tau_t with sign gamma) / (sum of their w_t)
Source   Davari and Belilovsky, arXiv:2312.06795, with the election of Yadav et al., arXiv:2306.01708. On
         mergekit's pages the sum is not divided (`normalize: false`) and cancelled entries are positive.
Cost     Two passes; `zero_sign: majority` needs one more.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.merging.methods.breadcrumbs import Breadcrumbs
from weightsmith.merging.thinning import ElectedChanges


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(ElectedChanges, Breadcrumbs):
    """Drop both ends, elect, merge."""
