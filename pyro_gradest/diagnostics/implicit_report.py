"""What the figures of an implicit fit mean: when to trust it, and what to change."""

import math
from typing import NamedTuple

LARGEST_SHRINKAGE_ERROR = 0.1
"""Of c: the variance of the guide is off by about as much, its standard deviation by 5 %."""
LARGEST_VARIANCE_RATIO = 1.5
"""Between guide and target in any direction: a standard deviation off by 22 %, the most that an
interval from the guide should be taken for. What draws of the target may show by chance comes on
top."""
FEWEST_EQUIVALENT_DRAWS = 25
"""The mean of 25 exact draws is off by a fifth of a standard deviation: a fit that is worth fewer
is biased by that much or more."""
LARGEST_DISTANCE = 0.25
"""From the reference draws, in their standard deviations, beyond what their numbers explain. A
missing mode of a tenth of the mass is further."""
DRAWS_PER_DIMENSION = 5
"""Particles that a score estimate takes, and a tenth of the draws that the identity takes."""


class ImplicitSitesCheck(NamedTuple):
    """Figures of the implicit sites that share their plates; of the worst element of these."""

    sites: tuple[str, ...]
    num_elements: int
    """Elements of their plates."""
    dim: int
    """D, the dimensions of one element."""
    num_particles: int
    """K, the number of draws that a score is estimated from."""
    num_samples: int
    """N, the number of draws that were looked at."""
    shrinkage: float
    """c of the score estimate at K particles; 1 for the true score."""
    narrowest: float
    """Smallest eigenvalue of the Stein identity's matrix: about the variance of the guide over that
    of the target, in the direction in which the guide is too narrow most."""
    widest: float
    """Largest eigenvalue: the same where the guide is too wide most."""
    kernel_stein_discrepancy: float
    equivalent_draws: float
    """Number of exact draws that would be as far from the target by the discrepancy; N at best."""
    sliced_wasserstein: float | None
    """Distance to the reference draws, in their standard deviations."""
    num_reference: int
    """R, the number of reference draws; 0 if there were none."""

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong and what to change, in words; empty where nothing is."""
        faults = []
        few = self.num_particles < DRAWS_PER_DIMENSION * self.dim
        if self.shrinkage < 1 - LARGEST_SHRINKAGE_ERROR:
            more = DRAWS_PER_DIMENSION * self.dim if few else 2 * self.num_particles
            faults.append(
                f"the score estimate is {self.shrinkage:.2f} of what it should be, which makes the "
                f"guide too narrow. Raise num_particles to {more} or more, or correct the "
                "score_estimator by calibrate_score, as the default one is."
            )
        elif self.shrinkage > 1 + LARGEST_SHRINKAGE_ERROR:
            faults.append(
                f"the score estimate is {self.shrinkage:.2f} of what it should be, which makes the "
                "guide too wide. Correct the score_estimator by calibrate_score, as the default "
                "one is."
            )
        chance = self._chance
        if self.narrowest < (1 - min(chance, 1.0)) ** 2 / LARGEST_VARIANCE_RATIO:
            faults.append(
                f"in some direction the guide has {self.narrowest:.2f} of the target's variance: "
                "too narrow. Train longer at a smaller learning rate, give the guide noise in "
                "every dimension with a width that is constrained to be positive, start it wide."
            )
        if self.widest > LARGEST_VARIANCE_RATIO * (1 + chance) ** 2:
            faults.append(
                f"in some direction the guide has {self.widest:.2f} times the target's variance: "
                "too wide. Train longer and let the learning rate decay; if it stays, the guide "
                "can't take the target's shape: make it more flexible."
            )
        if self.equivalent_draws < FEWEST_EQUIVALENT_DRAWS:
            faults.append(
                f"the draws are as far from the target as {self.equivalent_draws:.0f} exact ones: "
                "the guide lies elsewhere or has another shape. Train longer and let the learning "
                "rate decay, or make the guide more flexible."
            )
        if self.sliced_wasserstein is not None and self.sliced_wasserstein > self._largest_distance:
            mode = "It may miss" if faults else "Nothing else shows it: it is likely to miss"
            faults.append(
                f"the draws are {self.sliced_wasserstein:.2f} standard deviations from the "
                f"reference draws. {mode} a mode. Start the guide wider, anneal the model from a "
                "small scale, or take the kernel IMQ."
            )
        return tuple(faults)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures can't tell, in words."""
        notes = []
        if self.num_particles < DRAWS_PER_DIMENSION * self.dim:
            notes.append(
                f"num_particles={self.num_particles} is few for {self.dim} dimensions; the rule is "
                f"{DRAWS_PER_DIMENSION * self.dim} or more."
            )
        if self.num_samples < 10 * DRAWS_PER_DIMENSION * self.dim:
            notes.append(
                f"{self.num_samples} draws are few to compare {self.dim} dimensions by. Pass "
                f"num_samples={10 * DRAWS_PER_DIMENSION * self.dim}."
            )
        if self.sliced_wasserstein is None:
            notes.append(
                "a mode that the guide misses altogether does not show without reference draws."
            )
        return tuple(notes)

    @property
    def _chance(self) -> float:
        """How far singular values of whitened draws of the target are from 1 by chance."""
        elements = math.sqrt(2 * math.log(2 * self.num_elements))
        return (math.sqrt(self.dim) + elements) / math.sqrt(self.num_samples)

    @property
    def _largest_distance(self) -> float:
        return LARGEST_DISTANCE + 2 / math.sqrt(min(self.num_samples, self.num_reference))


class ImplicitFitReport(NamedTuple):
    """Whether a fit with implicit sites can be trusted; print it to read why and what to change."""

    checks: tuple[ImplicitSitesCheck, ...]
    """One for each set of implicit sites whose entropy is joint."""

    @property
    def is_trusted(self) -> bool:
        """Whether no figure is beyond what would be trusted."""
        return not any(check.faults for check in self.checks)

    def __str__(self) -> str:
        header = ("sites", "D", "shrinkage", "narrowest", "widest", "worth draws", "distance")
        rows = [header, *map(_row, self.checks)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        if self.is_trusted:
            lines.append("Trust this fit, as far as these figures see.")
        else:
            lines.append("Do not trust this fit:")
        for check in self.checks:
            lines += [f"- {', '.join(check.sites)}: {fault}" for fault in check.faults]
        for check in self.checks:
            lines += [f"  ({', '.join(check.sites)}: {note})" for note in check.notes]
        return "\n".join(lines)


def _row(check: ImplicitSitesCheck) -> tuple[str, ...]:
    numbers = check.shrinkage, check.narrowest, check.widest
    distance = check.sliced_wasserstein
    return (
        ", ".join(check.sites),
        str(check.dim),
        *(f"{number:.2f}" for number in numbers),
        f"{check.equivalent_draws:.0f}",
        "-" if distance is None else f"{distance:.2f}",
    )
