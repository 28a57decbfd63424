"""Which experts answer a prompt: a small classifier of the prompt's feature that knows when it is guessing.

    p = softmax(z(x) / T)       multinomial logistic regression on standardised features, temperature T fitted
    on a fifth
                                of the prompts that the classifier has not seen
    u = H(p) / log K            0: sure, 1: no idea
    a = distance of x to the nearest task's mean, in units of the tasks' shared covariance (Mahalanobis)

    a above its threshold       the prompt is unlike all training prompts: all experts evenly
    u below u_lo                one expert alone
    otherwise                   a blend by p, small shares left out

Source  Mediator, arXiv:2502.04411: experts are chosen for a task, not for a token, and mixed by uncertainty.
        The form of router is reconstructed. Decided here besides: the threshold of `a` is a quantile of
        distances that were measured with the prompt left out of means and covariance (five folds): with fewer
        prompts than features those of the fit itself would call every new prompt unlike. Shares of a blend
        are rounded to hundredths, so that merged weights can be used again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from weightsmith.errors import InputError
from weightsmith.merging.mediator.options import RouterConfig
from weightsmith.runs.seeds import derive

log = logging.getLogger(__name__)

Branch = Literal["single", "blend", "ood", "given"]
FEW_PROMPTS = 8
_FOLDS = 5
_PLACES = 2


@dataclass(frozen=True)
class RoutingDecision:
    """What answers one prompt, and why.

    Attributes:
        task: The likeliest one, or the one that was given.
        weights: Weight of each expert, in the order of the tasks.
        uncertainty: 0 .. 1.
        ood: The prompt is unlike all training prompts.
        branch: Which rule decided.
    """

    task: str
    weights: tuple[float, ...]
    uncertainty: float
    ood: bool
    branch: Branch


@dataclass(frozen=True)
class Router:
    """A fitted router. Make one with `fit_router`.

    Attributes:
        tasks: Names, in the order of the classifier's outputs.
        config: Its options.
        layers: Weight and bias of each layer of the classifier: (out, in) and (out,) twice.
        centre: Mean of the features, (F,).
        scale: Their standard deviation, (F,).
        temperature: T.
        means: Mean standardised feature of each task, (K, F).
        directions: Orthonormal directions in which features vary within tasks, (R, F).
        variances: Variance along each of them, shrunk, (R,).
        rest: Variance along all other directions, shrunk.
        threshold: Largest distance that does not count as unlike.
        report: Numbers of the fit: held-out accuracy, negative log-likelihoods, prompts.
    """

    tasks: tuple[str, ...]
    config: RouterConfig
    layers: tuple[np.ndarray, ...]
    centre: np.ndarray
    scale: np.ndarray
    temperature: float
    means: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: float
    threshold: float
    report: Mapping[str, float]

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """Calibrated probability of each task: (B, F) -> (B, K)."""
        return _softmax(self._logits(features) / self.temperature)

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distance to the nearest task's mean: (B, F) -> (B,)."""
        x = (np.asarray(features, np.float64) - self.centre) / self.scale
        return _distances(x, self.means, self.directions, self.variances, self.rest)

    def decide(self, features: np.ndarray) -> list[RoutingDecision]:
        """One decision for each row of (B, F)."""
        features = np.atleast_2d(np.asarray(features, np.float64))
        finite: np.ndarray = np.all(np.isfinite(features), axis=1)
        safe = np.where(finite[:, None], features, self.centre)
        p, a = self.probabilities(safe), self.distances(safe)
        return [
            self._decide(row, bool(distance > self.threshold)) if known else self._unknown()
            for row, distance, known in zip(p, a, finite, strict=True)
        ]

    def without(self, task: str) -> Router:
        """The router for all tasks but one: its output and mean are dropped, all else stays."""
        keep = [index for index, name in enumerate(self.tasks) if name != task]
        *inner, weight, bias = self.layers
        return dataclasses.replace(
            self,
            tasks=tuple(self.tasks[index] for index in keep),
            layers=(*inner, weight[keep], bias[keep]),
            means=self.means[keep],
        )

    def to_tensors(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """What is stored: tensors by name, and facts."""
        tensors = {f"layers.{index}": layer for index, layer in enumerate(self.layers)}
        for name in ("centre", "scale", "means", "directions", "variances"):
            tensors[name] = getattr(self, name)
        facts = {
            "tasks": list(self.tasks),
            "config": dataclasses.asdict(self.config),
            "temperature": self.temperature,
            "rest": self.rest,
            "threshold": self.threshold,
            "report": dict(self.report),
        }
        return {name: np.ascontiguousarray(values) for name, values in tensors.items()}, facts

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> Router:
        """Read back what `to_tensors` gave.

        Raises:
            InputError: something is missing.
        """
        try:
            layers = sorted(name for name in tensors if name.startswith("layers."))
            return cls(
                tasks=tuple(facts["tasks"]),
                config=RouterConfig(**facts["config"]),
                layers=tuple(tensors[name] for name in layers),
                temperature=facts["temperature"],
                rest=facts["rest"],
                threshold=facts["threshold"],
                report=facts["report"],
                **{name: tensors[name] for name in ("centre", "scale", "means", "directions", "variances")},
            )
        except (KeyError, TypeError) as problem:
            raise InputError(f"not a router of Mediator: {problem!r}") from problem

    def _logits(self, features: np.ndarray) -> np.ndarray:
        x = (np.asarray(features, np.float64) - self.centre) / self.scale
        return _forward(x, self.layers)

    def _decide(self, p: np.ndarray, ood: bool) -> RoutingDecision:
        u, best = uncertainty(p, self.config.uncertainty), int(np.argmax(p))
        count = len(self.tasks)
        if ood and self.config.ood == "prior":
            weights: np.ndarray = np.full(count, 1 / count)
        elif ood and self.config.ood == "dense":
            weights = np.zeros(count)
        elif not ood and u < self.config.u_lo:
            weights = np.eye(count)[best]
        else:
            weights = blend(p, self.config.w_min)
        branch: Branch = "ood" if ood else "single" if u < self.config.u_lo else "blend"
        return RoutingDecision(self.tasks[best], tuple(map(float, weights)), u, ood, branch)

    def _unknown(self) -> RoutingDecision:
        log.warning("a prompt's feature is not finite: all experts answer evenly")
        count = len(self.tasks)
        return RoutingDecision(self.tasks[0], (1 / count,) * count, 1.0, True, "ood")


def uncertainty(p: np.ndarray, kind: str = "entropy") -> float:
    """How unsure probabilities (K,) are: 0 for one task alone, 1 where all are alike."""
    if len(p) == 1:
        return 0.0
    if kind == "max_prob":
        return float((1 - p.max()) * len(p) / (len(p) - 1))
    positive = p[p > 0]
    return float(min(1.0, max(0.0, -(positive * np.log(positive)).sum() / np.log(len(p)))))


def blend(p: np.ndarray, least: float) -> np.ndarray:
    """Probabilities (K,) without shares below `least`, in hundredths that sum to 1."""
    kept = np.where(p >= least, p, 0.0)
    if not kept.any():
        kept = np.eye(len(p))[int(np.argmax(p))]
    shares = np.round(kept / kept.sum(), _PLACES)
    shares[int(np.argmax(shares))] += 1 - shares.sum()
    return np.round(shares, _PLACES)


def fit_router(features: Mapping[str, np.ndarray], config: RouterConfig, seed: int = 0) -> Router:
    """Fit classifier, temperature and distance on prompts of known tasks.

    Args:
        features: By task, one row for each prompt: (N, F).
        config: The options.
        seed: Which fifth is held out for the temperature.

    Raises:
        InputError: fewer than two tasks, a task without prompts, or a feature that is not finite.
    """
    tasks = tuple(features)
    if len(tasks) < 2:
        raise InputError(f"router: expected prompts of at least 2 tasks, found {len(tasks)}")
    for task, rows in features.items():
        if not len(rows):
            raise InputError(f"router: task `{task}` has no prompts; expected {FEW_PROMPTS} or more")
        if len(rows) < FEW_PROMPTS:
            log.warning(
                "router: task `%s` has %d prompts, fewer than %d: it cannot be calibrated, "
                "its entropy will be over-confident",
                task,
                len(rows),
                FEW_PROMPTS,
            )
        if not np.isfinite(rows).all():
            raise InputError(f"router: a prompt of task `{task}` has a feature that is not finite")
    x = np.concatenate([np.asarray(rows, np.float64) for rows in features.values()])
    y = np.repeat(np.arange(len(tasks)), [len(rows) for rows in features.values()])
    turns = _turns(y, tasks, seed)
    held_out = turns % 5 == 4  # a fifth of each task's prompts; none of a task with fewer than five
    centre, scale = x[~held_out].mean(axis=0), x[~held_out].std(axis=0)
    scale = np.where(scale > 1e-12 * max(1.0, float(np.abs(centre).max())), scale, 1.0)
    z = (x - centre) / scale
    layers = _train(z[~held_out], y[~held_out], len(tasks), config, seed)
    judged = held_out if held_out.any() else ~held_out
    logits = _forward(z[judged], layers)
    temperature = fit_temperature(logits, y[judged])
    spread = _Spread.of(z, y, config.shrinkage)
    return Router(
        tasks=tasks,
        config=config,
        layers=layers,
        centre=centre,
        scale=scale,
        temperature=temperature,
        means=spread.means,
        directions=spread.directions,
        variances=spread.variances,
        rest=spread.rest,
        threshold=_threshold(z, y, turns % _FOLDS, config),
        report={
            "prompts": float(len(x)),
            "accuracy": float((logits.argmax(axis=1) == y[judged]).mean()),
            "nll_before": nll(logits, y[judged], 1.0),
            "nll": nll(logits, y[judged], temperature),
        },
    )


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood, in 0.05 .. 20: (N, K), (N,)."""
    low, high = np.log(0.05), np.log(20.0)
    # The loss has one minimum over log T: thirds of the bracket are dropped until it is narrow.
    for _ in range(80):
        one, other = low + (high - low) / 3, high - (high - low) / 3
        if nll(logits, labels, float(np.exp(one))) <= nll(logits, labels, float(np.exp(other))):
            high = other
        else:
            low = one
    best = float(np.exp((low + high) / 2))
    return best if nll(logits, labels, best) < nll(logits, labels, 1.0) else 1.0


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    """Mean negative log-likelihood of labels (N,) under logits (N, K) at a temperature."""
    scaled = logits / temperature
    peak = scaled.max(axis=1)
    total = peak + np.log(np.exp(scaled - peak[:, None]).sum(axis=1))
    return float((total - scaled[np.arange(len(labels)), labels]).mean())


def _train(
    x: np.ndarray, y: np.ndarray, count: int, config: RouterConfig, seed: int
) -> tuple[np.ndarray, ...]:
    """Weights and biases of the classifier, by L-BFGS in double precision."""
    import torch

    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    widths = [x.shape[1], *([config.hidden] if config.hidden else []), count]
    rng = np.random.default_rng(seed)
    layers = []
    for inside, outside in itertools.pairwise(widths):
        # A single layer has one minimum and starts from 0; a hidden one needs its units to differ.
        start = rng.standard_normal((outside, inside)) / np.sqrt(inside) * (len(widths) > 2)
        layers += [torch.from_numpy(start), torch.zeros(outside, dtype=torch.float64)]
    for layer in layers:
        layer.requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        layers, max_iter=config.iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        out = inputs
        for at in range(0, len(layers), 2):
            out = torch.nn.functional.linear(out, layers[at], layers[at + 1])
            out = torch.tanh(out) if at + 2 < len(layers) else out
        penalty = sum(weight.square().sum() for weight in layers[::2])
        value = torch.nn.functional.cross_entropy(out, labels) + 0.5 * config.l2 * penalty
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return tuple(layer.detach().numpy() for layer in layers)


def _forward(x: np.ndarray, layers: Sequence[np.ndarray]) -> np.ndarray:
    for at in range(0, len(layers), 2):
        x = x @ layers[at].T + layers[at + 1]
        x = np.tanh(x) if at + 2 < len(layers) else x
    return x


def _softmax(logits: np.ndarray) -> np.ndarray:
    grown = np.exp(logits - logits.max(axis=1, keepdims=True))
    return grown / grown.sum(axis=1, keepdims=True)


def _turns(y: np.ndarray, tasks: Sequence[str], seed: int) -> np.ndarray:
    """Each prompt's place in a random order of its task's, whatever the order of the tasks."""
    turns = np.zeros(len(y), np.int64)
    for number, task in enumerate(tasks):
        rows = np.flatnonzero(y == number)
        turns[np.random.default_rng(derive(seed, task)).permutation(rows)] = np.arange(len(rows))
    return turns


@dataclass(frozen=True)
class _Spread:
    """Means of the tasks and the shrunk covariance that they share, by its eigenvectors."""

    means: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: float

    @classmethod
    def of(cls, z: np.ndarray, y: np.ndarray, shrinkage: float, classes: int | None = None) -> _Spread:
        count = classes or int(y.max()) + 1
        means = np.stack([z[y == task].mean(axis=0) for task in range(count)])
        within = z - means[y]
        _, singular, directions = np.linalg.svd(within, full_matrices=False)
        spectrum = singular**2 / len(z)
        # An all-equal spectrum of the same trace is what covariance is shrunk towards.
        floor = max(float(spectrum.sum()) / z.shape[1], 1e-12)
        return cls(means, directions, (1 - shrinkage) * spectrum + shrinkage * floor, shrinkage * floor)


def _distances(
    z: np.ndarray, means: np.ndarray, directions: np.ndarray, variances: np.ndarray, rest: float
) -> np.ndarray:
    found = []
    for mean in means:
        away = z - mean
        along = away @ directions.T
        beside = np.maximum((away**2).sum(axis=1) - (along**2).sum(axis=1), 0)
        found.append((along**2 / variances).sum(axis=1) + beside / rest)
    return np.sqrt(np.min(found, axis=0))


def _threshold(z: np.ndarray, y: np.ndarray, fold: np.ndarray, config: RouterConfig) -> float:
    """The quantile of distances, each measured with its fold left out."""
    count = int(y.max()) + 1
    distances = np.zeros(len(y))
    for number in range(_FOLDS):
        out = fold == number
        if not out.any() or len(np.unique(y[~out])) < count:
            out = np.ones(len(y), np.bool_)  # a task of one prompt can't be left out
            spread = _Spread.of(z, y, config.shrinkage)
        else:
            spread = _Spread.of(z[~out], y[~out], config.shrinkage, count)
        found = _distances(z[out], spread.means, spread.directions, spread.variances, spread.rest)
        distances[out] = np.maximum(distances[out], found)
    return float(np.quantile(distances, config.ood_quantile))
