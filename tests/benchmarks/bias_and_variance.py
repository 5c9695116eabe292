"""Exact bias and variance of the score-function estimators, summed over every tuple of particles.

    python -m tests.benchmarks.bias_and_variance [--output docs/bias_and_variance.md]

Writes the page. What multiplies grad log q at each draw comes from both packages, by their own
autodiff, and must agree to 1e-10. The targets come from the definitions of the objectives, by a
complex step.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.conformance.backends import HOSTS, Backend, backend_for
from tests.oracles import multisample as oracle
from tests.oracles.enumeration import (
    complex_step_gradient,
    log_bernoulli,
    log_softmax,
    moments,
    renyi_log_mean_exp,
)

NUM_PARTICLES = (2, 3, 6)
PARTITION = (0.0, 0.05, 0.2, 0.5)
TOLERANCE = 1e-10

INTRODUCTION = f"""\
# Bias and variance, exactly

Written by `make table`; a test holds it to what that writes. On a model with few states there are
few tuples of particles, so expectations are sums and every figure is exact: no random number is
drawn. The figures are those of `pyro_gradest` and of `numpyro_gradest`, which agree to
{TOLERANCE:g}.

- The gradient is that of the guide's parameters, at a latent that can't be reparameterised.
- **Bias** is |mean - target| / |target|. The target is the exact gradient of what the estimator is
  for: the bound over K particles, another one, or a divergence.
- **Variance** is summed over the parameters. Compare it within a target: the gradient of something
  else may be small.
- `NVIL(K)` is at its first step, where it has no baseline yet; "converged" is with the bound's
  expectation for one.
- `gamma` adds gamma times wake-phi to the gradient of the bound, which is the bias seen here.
- `TVO` has the partition {list(PARTITION)}.
- `DisARM` is for Bernoulli sites. Its K pairs cost what 2 K particles cost the others.
- At few particles `OVIS(K)` need not beat `VIMCO(K)`: its variance falls faster as K grows.
"""


@dataclass(frozen=True, eq=False)  # hashed by identity
class Model:
    """A latent with M states and a guide with parameters of its own."""

    title: str
    log_joint: np.ndarray
    log_q: Callable[[np.ndarray], np.ndarray]
    """From parameters, which may be complex, to ``[M]``."""
    parameters: np.ndarray
    bits: np.ndarray | None = None
    """Where the parameters are the log-odds of bits, these in every state, ``[M, P]``."""

    @cached_property
    def scores(self) -> np.ndarray:
        """Gradient of log q in every state, ``[P, M]``."""
        return self.gradient(self.log_q)

    def gradient(self, function: Callable[[np.ndarray], Any]) -> np.ndarray:
        """Of a function of the parameters, along axis 0."""
        return complex_step_gradient(lambda at: function(at["guide"]), {"guide": self.parameters})


ONE_BIT = np.array([[0], [1]])
TWO_BITS = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])


def of_bits(bits: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return np.sum(log_bernoulli(logits, bits), axis=-1)


MODELS = (
    Model(
        "One bit, the guide close to the posterior",
        np.array([1.0485, 1.6019]),
        partial(of_bits, ONE_BIT),
        np.array([0.2033]),
        ONE_BIT,
    ),
    Model(
        "Three states, the guide far from the posterior",
        np.array([-1.1, 0.4, -2.3]),
        log_softmax,
        np.array([0.3, -0.5, 0.1]),
    ),
    Model(
        "Two bits that depend on each other, and a guide where they can't",
        np.array([0.0, -2.5, -2.0, 1.0]),
        partial(of_bits, TWO_BITS),
        np.array([0.4, -0.2]),
        TWO_BITS,
    ),
)


# Targets: from a model and K to what the gradient should be on average.


def indices(model: Model, num_draws: int) -> np.ndarray:
    """Every tuple of states, ``[num_draws, T]``."""
    return np.indices((len(model.log_joint),) * num_draws).reshape(num_draws, -1)


def expected_bound(
    model: Model, num_particles: int, alpha: float, parameters: np.ndarray
) -> np.ndarray:
    states, log_q = indices(model, num_particles), model.log_q(parameters)
    bound = renyi_log_mean_exp((model.log_joint - log_q)[states], alpha)
    return np.sum(np.exp(np.sum(log_q[states], axis=0)) * bound)


@cache
def bound_gradient(model: Model, num_particles: int, alpha: float = 0.0) -> np.ndarray:
    return model.gradient(partial(expected_bound, model, num_particles, alpha))


def mixed_gradient(model: Model, num_particles: int) -> np.ndarray:
    """Of the bound and the ELBO, half each."""
    return (bound_gradient(model, num_particles) + bound_gradient(model, num_particles, 1.0)) / 2


def thermodynamic_gradient(model: Model, num_particles: int) -> np.ndarray:
    def objective(parameters: np.ndarray) -> np.ndarray:
        log_q = model.log_q(parameters)
        log_weights = model.log_joint - log_q
        total = 0.0
        for left, right in zip(PARTITION, [*PARTITION[1:], 1.0], strict=True):
            density = np.exp(log_q + left * log_weights)
            total += (right - left) * np.sum(density * log_weights) / np.sum(density)
        return total

    return model.gradient(objective)


def inclusive_gradient(model: Model, num_particles: int) -> np.ndarray:
    """Of -KL(posterior, guide): wake-phi climbs it, and its limit is the mean score there."""
    posterior = np.exp(log_softmax(model.log_joint))
    return model.scores @ posterior


class Estimator(NamedTuple):
    """A layer-1 function and what it estimates."""

    name: str
    """As a user writes it."""
    function: str
    options: dict[str, Any]
    target: Callable[[Model, int], np.ndarray] = bound_gradient
    num_auxiliary: int = 0
    has_converged: bool = False
    """Whether NVIL's baseline is what it tends to: the expectation of the bound."""
    elbo_weight: float = 0.0
    is_of_one: bool = False
    """Whether there is one particle in the bound, and K replicates."""


def renyi(name: str, alpha: float, control_variate: str) -> Estimator:
    options = {"alpha": alpha, "control_variate": control_variate}
    return Estimator(name, "renyi_learning_signal", options, partial(bound_gradient, alpha=alpha))


def half_elbo(name: str, control_variate: str) -> Estimator:
    options = {"control_variate": control_variate}
    return Estimator(
        f"{name}(K, elbo_weight=0.5)",
        "renyi_learning_signal",
        options,
        mixed_gradient,
        elbo_weight=0.5,
    )


TARGETS = {
    "the bound over K particles": [
        Estimator("IWAE(K)", "reinforce_learning_signal", {}),
        Estimator("NVIL(K)", "nvil_learning_signal", {}),
        Estimator("NVIL(K), converged", "nvil_learning_signal", {}, has_converged=True),
        Estimator("VIMCO(K)", "vimco_learning_signal", {"leave_one_out": "geometric"}),
        Estimator(
            'VIMCO(K, leave_one_out="arithmetic")',
            "vimco_learning_signal",
            {"leave_one_out": "arithmetic"},
        ),
        Estimator("OVIS(K)", "ovis_gamma_learning_signal", {"gamma": 0.0}),
        Estimator("OVIS(K, num_auxiliary=1)", "ovis_mc_learning_signal", {}, num_auxiliary=1),
        Estimator("OVIS(K, num_auxiliary=2)", "ovis_mc_learning_signal", {}, num_auxiliary=2),
        Estimator("OVIS(K, gamma=0.5)", "ovis_gamma_learning_signal", {"gamma": 0.5}),
        Estimator("OVIS(K, gamma=1)", "ovis_gamma_learning_signal", {"gamma": 1.0}),
        Estimator("DisARM(K)", "disarm_learning_signal", {}),
    ],
    "the Rényi bound of order 0.5": [
        renyi("IWAE(K, alpha=0.5)", 0.5, "none"),
        renyi("VIMCO(K, alpha=0.5)", 0.5, "geometric"),
        renyi('VIMCO(K, alpha=0.5, leave_one_out="arithmetic")', 0.5, "arithmetic"),
        renyi("OVIS(K, alpha=0.5)", 0.5, "asymptotic"),
    ],
    "the ELBO": [
        renyi("IWAE(K, alpha=1)", 1.0, "none"),
        renyi("OVIS(K, alpha=1)", 1.0, "asymptotic"),
        Estimator(
            "RLOO(K)",
            "reinforce_leave_one_out_learning_signal",
            {},
            partial(bound_gradient, alpha=1.0),
        ),
        Estimator(
            "DisARM(1, num_replicates=K)",
            "disarm_learning_signal",
            {},
            partial(bound_gradient, alpha=1.0),
            is_of_one=True,
        ),
    ],
    "the bound over K particles and the ELBO, half each": [
        half_elbo("IWAE", "none"),
        half_elbo("VIMCO", "geometric"),
        half_elbo("OVIS", "asymptotic"),
    ],
    "the thermodynamic objective": [
        Estimator(
            "TVO(K)",
            "thermodynamic_learning_signal",
            {"partition": PARTITION},
            thermodynamic_gradient,
        ),
    ],
    "the inclusive divergence": [
        Estimator("ReweightedWakeSleep(K)", "wake_phi_learning_signal", {}, inclusive_gradient),
    ],
}


def coefficients(
    backend: Backend, estimator: Estimator, log_weights: np.ndarray, expected: np.ndarray
) -> np.ndarray:
    """What multiplies grad log q at each of the K draws, ``[K, T]``, by the package's autodiff."""
    bound, auxiliary = np.split(log_weights, [len(log_weights) - estimator.num_auxiliary])
    options = dict(estimator.options)
    if estimator.has_converged:
        options["baseline"] = backend.array(expected)

    # The log-weights are arguments too: compiled in as constants, XLA takes minutes to fold them.
    def surrogate(log_q: Any, *log_weights: Any) -> Any:
        package, nothing = backend.estimators, 0.0 * log_q
        state = (package.initial_nvil_state(),) if "nvil" in estimator.function else ()
        function = partial(getattr(package, estimator.function), *log_weights, *state, **options)
        if weight := estimator.elbo_weight:
            signal = (1 - weight) * function(alpha=0.0) + weight * function(alpha=1.0)
        else:
            signal = function()
        return package.linear_surrogate(
            nothing, nothing, log_q, weights=nothing, learning_signal=signal
        )

    arguments = (bound, auxiliary) if estimator.num_auxiliary else (bound,)
    return backend.gradients(surrogate, np.zeros_like(bound), *arguments)[0]


class Figures(NamedTuple):
    bias: float
    variance: float


NONE = Figures(np.nan, np.nan)


def figures_of_pairs(host: str, estimator: Estimator, model: Model, num_particles: int) -> Figures:
    """Bias and variance over every tuple of antithetic pairs."""
    if model.bits is None:
        return NONE
    bits, logits, num_states = model.bits, model.parameters, len(model.bits)
    joint = np.array([oracle.antithetic_joint(logit) for logit in logits])
    first, partner = np.array(list(product(range(num_states), repeat=2))).T
    probabilities = joint[np.arange(len(logits)), bits[first], bits[partner]].prod(axis=1)
    first, partner = first[probabilities > 0], partner[probabilities > 0]
    probabilities = probabilities[probabilities > 0]

    size = 1 if estimator.is_of_one else num_particles
    chosen = np.indices((len(first),) * size).reshape(size, -1)  # [K, T]
    sides = first[chosen], partner[chosen]
    log_weights = [(model.log_joint - model.log_q(logits))[side] for side in sides]
    backend = backend_for(host)

    def estimate(function: str, *arrays: np.ndarray) -> np.ndarray:
        evaluate = getattr(backend.estimators, function)
        return backend.numpy(evaluate(*map(backend.array, arrays)))

    signal = estimate("disarm_learning_signal", *log_weights)
    values = (
        np.broadcast_to(one, (*chosen.shape, len(logits)))
        for one in (bits[sides[0]], bits[sides[1]], logits)
    )
    gradients = np.einsum("kt,ktp->tp", signal, estimate("antithetic_score", *values))
    for side, one in zip(sides, log_weights, strict=True):
        weights = estimate("normalized_weights", one)
        signal = weights.mean(axis=0) - weights
        gradients += np.einsum("kt,pkt->tp", signal, model.scores[:, side]) / 2
    actual = moments(gradients, probabilities[chosen].prod(axis=0))
    target = estimator.target(model, num_particles)
    bias = np.linalg.norm(actual.mean - target) / np.linalg.norm(target)
    return Figures(float(bias), actual.variance * size / num_particles)


def figures(host: str, estimator: Estimator, num_particles: int) -> list[Figures]:
    """Bias and variance under each model."""
    if estimator.function == "disarm_learning_signal":
        return [figures_of_pairs(host, estimator, model, num_particles) for model in MODELS]
    num_draws = num_particles + estimator.num_auxiliary
    states = [indices(model, num_draws) for model in MODELS]
    log_q = [model.log_q(model.parameters) for model in MODELS]
    columns = [
        (model.log_joint - one)[at] for model, one, at in zip(MODELS, log_q, states, strict=True)
    ]
    expected = np.repeat(
        [expected_bound(model, num_particles, 0.0, model.parameters) for model in MODELS],
        [at.shape[1] for at in states],
    )
    # The tuples of all models side by side: JAX compiles once.
    together = coefficients(backend_for(host), estimator, np.concatenate(columns, axis=1), expected)
    parts = np.split(together, np.cumsum([at.shape[1] for at in states])[:-1], axis=1)
    results = []
    for model, one, at, part in zip(MODELS, log_q, states, parts, strict=True):
        gradients = np.einsum("kt,pkt->tp", part, model.scores[:, at[:num_particles]])
        actual = moments(gradients, np.exp(np.sum(one[at], axis=0)))
        target = estimator.target(model, num_particles)
        bias = np.linalg.norm(actual.mean - target) / np.linalg.norm(target)
        results.append(Figures(float(bias), actual.variance))
    return results


def table(host: str) -> dict[tuple[str, int], list[Figures]]:
    """By estimator and K."""
    return {
        (estimator.name, num_particles): figures(host, estimator, num_particles)
        for estimators in TARGETS.values()
        for estimator in estimators
        for num_particles in NUM_PARTICLES
    }


def largest_difference(tables: list[dict[tuple[str, int], list[Figures]]]) -> float:
    first, *others = ([results[key] for key in sorted(results)] for results in tables)
    return max(float(np.nanmax(np.abs(np.array(first) - np.array(other)))) for other in others)


def document(results: dict[tuple[str, int], list[Figures]]) -> str:
    """The page."""
    lines = [INTRODUCTION]
    heads = [f"{what}, K = {k}" for what in ("bias", "variance") for k in NUM_PARTICLES]
    for i, model in enumerate(MODELS):
        lines += [f"## {model.title}", ""]
        for target, estimators in TARGETS.items():
            lines += [f"| for {target} | " + " | ".join(heads) + " |"]
            lines += ["|---|" + "---:|" * len(heads)]
            for one in estimators:
                row = [results[one.name, k][i] for k in NUM_PARTICLES]
                if NONE in row:
                    continue
                cells = ["0" if cell.bias < TOLERANCE else f"{cell.bias:.3g}" for cell in row]
                cells += [f"{cell.variance:.3g}" for cell in row]
                lines += [f"| `{one.name}` | " + " | ".join(cells) + " |"]
            lines += [""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    import jax

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/bias_and_variance.md"))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    tables = {}
    for host in HOSTS:
        tables[host] = table(host)
        print(f"{host}_gradest: {len(tables[host])} estimators and K, {len(MODELS)} models each")
    difference = largest_difference(list(tables.values()))
    print(f"They differ by {difference:.1e} at most.")
    if difference > TOLERANCE:
        raise SystemExit(f"That is more than {TOLERANCE:g}: nothing is written.")
    text = document(tables[HOSTS[0]])
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(text)
    print(f"{text}\nSaved as {arguments.output}")


if __name__ == "__main__":
    main()
