"""The privacy budget of a training: the noise that it needs, and what its steps have spent.

DP-SGD with Poisson sampling: Abadi et al., "Deep Learning with Differential Privacy" (CCS 2016).
Accountant: Gopi et al., "Numerical Composition of Differential Privacy" (NeurIPS 2021), whose
implementation in Opacus is all that is used of it. Neighbours differ by adding or removing a unit.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq

from synthcube.errors import ConfigError
from synthcube.schema import SpentPrivacy
from synthcube.training.config import PrivacyConfig

HOPELESS = 2.0
"""Noise over the largest possible signal above which a training learns nothing."""
_LEAST_SIGMA, _MOST_SIGMA = 1e-2, 1e6
_PRECISION = 1e-3  # of the logarithm of sigma


@lru_cache(maxsize=512)
def epsilon_spent(sigma: float, sample_rate: float, steps: int, delta: float) -> float:
    """The least epsilon, rounded up, that holds with `delta` after so many steps.

    Args:
        sigma: standard deviation of the noise over the largest norm of one unit's part.
        sample_rate: probability of a unit to join a step.
    """
    if steps == 0:
        return 0.0
    prv = _opacus()
    accountant = prv()
    accountant.history = [(sigma, sample_rate, steps)]
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="raise"):
        # Of a bound that is only used to choose the grid.
        warnings.filterwarnings("ignore", message="Optimal order is the", category=UserWarning)
        try:
            return float(accountant.get_epsilon(delta))
        except FloatingPointError:  # too little noise for any promise
            return math.inf


def sigma_for(epsilon: float, sample_rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier, up to 0.2%, with which so many steps spend at most `epsilon`.

    Raises ConfigError where none is enough.
    """

    def excess(logarithm: float) -> float:
        spent = epsilon_spent(math.exp(logarithm), sample_rate, steps, delta)
        return math.log(min(max(spent, 1e-12), 1e12) / epsilon)

    # In small steps downwards, because little noise is expensive to account for.
    high = 1.0
    while excess(math.log(high)) > 0:
        high *= 2
        if high > _MOST_SIGMA:
            raise ConfigError(
                f"training.privacy.epsilon {epsilon:g} cannot be kept in {steps} steps: give a "
                "larger one, or fewer epochs."
            )
    low = high / 2 if high > 1 else high / 1.3
    while excess(math.log(low)) <= 0:
        high, low = low, low / 1.3
        if low < _LEAST_SIGMA:
            return high
    root = float(brentq(excess, math.log(low), math.log(high), xtol=_PRECISION, rtol=1e-6))
    while excess(root) > 0:
        root += _PRECISION
    return math.exp(root)


@dataclass(frozen=True, slots=True)
class Budget:
    """What a private training does in each step, and how much of it is done.

    Args:
        subjects: training subjects, each of which joins a step with `sample_rate`.
        sigma: standard deviation of the noise, in units of `clip_norm`.
        steps: steps that are taken.
    """

    subjects: int
    batch_size: int
    delta: float
    clip_norm: float
    sigma: float
    steps: int = 0

    @property
    def sample_rate(self) -> float:
        """Probability of a subject to join a step."""
        return self.batch_size / self.subjects

    @property
    def epsilon(self) -> float:
        """What the steps so far have spent."""
        return self.after(self.steps)

    def after(self, steps: int) -> float:
        """What so many steps in all spend."""
        return epsilon_spent(self.sigma, self.sample_rate, steps, self.delta)

    def noise_over_signal(self, weights: int) -> float:
        """Norm of the noise in a step over the largest norm that its gradient can have."""
        return self.sigma * math.sqrt(weights) / self.batch_size

    def spent(self) -> SpentPrivacy:
        """What the steps so far have spent, as it is published."""
        return SpentPrivacy(
            epsilon=self.epsilon, delta=self.delta, sample_rate=self.sample_rate,
            subjects=self.subjects, steps=self.steps, sigma=self.sigma, clip_norm=self.clip_norm,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def of_record(cls, values: Mapping[str, Any]) -> Budget:
        """The budget that :meth:`record` wrote."""
        return cls(**values)


def planned(
    privacy: PrivacyConfig, batch_size: int, subjects: int, steps: int, before: Budget | None = None
) -> Budget:
    """The budget of a training of so many steps in all.

    Args:
        before: of the checkpoint that is continued, whose noise stays.

    Raises ConfigError where the settings do not fit the checkpoint, or spend more than they say.
    """
    if faults := size_faults(batch_size, subjects):
        raise ConfigError("This training cannot be private:", faults)
    delta = privacy.delta or 1 / (10 * subjects)
    if before is None:
        sigma = sigma_for(privacy.epsilon, batch_size / subjects, steps, delta)
        return Budget(subjects, batch_size, delta, privacy.clip_norm, sigma)
    now = Budget(subjects, batch_size, delta, privacy.clip_norm, before.sigma, before.steps)
    if now != before:
        faults = [
            f"{name}: was {value:g}, is {now.record()[name]:g}"
            for name, value in before.record().items()
            if now.record()[name] != value
        ]
        raise ConfigError(
            "A private training goes on with the same subjects, batch size and privacy, because "
            "its steps are counted together:",
            faults,
        )
    total = now.after(max(steps, now.steps))
    if total > privacy.epsilon * (1 + 1e-9):
        raise ConfigError(
            f"{now.steps} steps have spent epsilon {now.epsilon:.3g}, and {steps} in all would "
            f"spend {total:.3g}, more than training.privacy.epsilon {privacy.epsilon:g}. To spend "
            f"it, set training.privacy.epsilon to {math.ceil(100 * total) / 100:g}; the people of "
            "these images are promised less then."
        )
    return now


def size_faults(batch_size: int, subjects: int) -> list[str]:
    """The reason why subjects cannot be drawn for such batches; empty if they can."""
    if batch_size <= subjects:
        return []
    return [
        f"training.batch_size {batch_size} is more than the {subjects} training subjects: with "
        "privacy it is the mean number of subjects in a step"
    ]


def noise_warning(budget: Budget, weights: int) -> str:
    """What to change where a step of so many trained weights is mostly noise; empty elsewhere."""
    ratio = budget.noise_over_signal(weights)
    if ratio <= HOPELESS:
        return ""
    return (
        f"hopeless at this n: with {budget.subjects} subjects the noise of a step is {ratio:.2g} "
        f"times the largest possible signal, and above {HOPELESS:g} next to nothing is learned. "
        "Start from a model of public images and train few of its weights (training.start_from "
        "and training.freeze), raise training.batch_size, or find more subjects"
    )


def described() -> str:
    """Name and version of the accountant."""
    from importlib.metadata import version

    return f"PRV (Gopi et al. 2021), opacus {version('opacus')}"


def require_installed() -> None:
    """Raise ConfigError unless the accountant is installed."""
    _opacus()


def _opacus() -> Any:
    try:
        from opacus.accountants.prv import PRVAccountant
    except ImportError as error:
        raise ConfigError(
            "training.privacy needs the accountant of Opacus, which is not installed: "
            "pip install 'synthcube[privacy]'."
        ) from error
    return PRVAccountant
