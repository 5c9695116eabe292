"""What an objective should return, from its definition and the draws that it made.

A ``Case`` is a model and a guide, and the same as two functions of parameters and draws. The
recorder notes what every particle drew; from there the bound, the weights and the learning signal
are NumPy loops (the oracle), and the gradient is that of log p and log q at fixed draws.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer import ELBO
from numpyro.primitives import Messenger

from numpyro_gradest import OVIS
from tests.conformance.backends import QUICK_TO_COMPILE
from tests.oracles import multisample as oracle


class Case(NamedTuple):
    """A program all of whose latents are score-function sites."""

    model: Callable[[], Any]
    guide: Callable[[], Any]
    log_p: Callable[[dict, dict], Any]
    """(params, draws of one particle) -> ``[*batch]``"""
    log_q: Callable[[dict, dict], Any]
    params: dict[str, Any]
    bound_scale: Any = 1.0
    log_drawn: Callable[[dict, dict], Any] | None = None
    """Log-probability of the draws, where a mask or a scale sets log q apart from it."""


_OVIS = partial(OVIS, 2)


class Evaluation(NamedTuple):
    loss: jax.Array
    gradient: dict[str, jax.Array]
    draws: dict[str, jax.Array]
    """``[K, ...]`` by site, those of plates (subsample indices) included."""


class _Recorder(Messenger):
    """Runs particles one after the other and notes what each drew first: in the guide."""

    def __init__(self) -> None:
        super().__init__()
        self.particles: list[dict[str, Any]] = []

    def run(self, fn: Callable, keys: jax.Array) -> Any:
        results = []
        for i in range(len(keys)):
            self.particles.append({})
            results.append(fn(keys[i]))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    def postprocess_message(self, msg: dict[str, Any]) -> None:
        if not self.particles:  # a single particle is not vectorised
            self.particles.append({})
        is_latent = msg["type"] == "sample" and not msg["is_observed"]
        if is_latent or msg["type"] == "plate":
            self.particles[-1].setdefault(msg["name"], jax.lax.stop_gradient(msg["value"]))


def evaluate(
    build: Callable[..., ELBO], model: Callable, guide: Callable, params: dict, *, seed: int = 0
) -> Evaluation:
    """Loss, gradient and draws of the objective ``build(vectorize_particles=...)``."""

    @partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def run(params: dict) -> Evaluation:
        recorder = _Recorder()

        def loss(params: dict) -> jax.Array:
            objective = build(vectorize_particles=recorder.run)
            return objective.loss(random.key(seed), params, model, guide)

        with recorder:
            value, gradient = jax.value_and_grad(loss)(params)
        draws = jax.tree.map(lambda *leaves: jnp.stack(leaves), *recorder.particles)
        return Evaluation(value, gradient, draws)

    return run(as_arrays(params))


def assert_follows_definition(
    case: Case,
    build: Callable[..., ELBO] = _OVIS,
    signal: Callable = oracle.ovis_gamma_learning_signal,
) -> Evaluation:
    """Loss and gradient of an objective are those of its definition at the same draws."""
    actual = evaluate(build, case.model, case.guide, case.params)

    def log_probs(params: dict) -> tuple[jax.Array, jax.Array]:
        """log w, and log q of the draws, ``[K, *batch]``."""
        log_drawn = case.log_drawn or case.log_q
        draws = _unstack(actual.draws)
        log_weights = jnp.stack([case.log_p(params, z) - case.log_q(params, z) for z in draws])
        return log_weights, jnp.stack([log_drawn(params, z) for z in draws])

    params = as_arrays(case.params)
    (log_weights, _), pull_back = jax.vjp(log_probs, params)
    log_weights = np.asarray(log_weights)
    bound = oracle.iwae_bound(log_weights)
    np.testing.assert_allclose(actual.loss, -np.sum(case.bound_scale * bound), rtol=1e-10)

    # The signal has the -v_k in which log q enters the weight; here log w brings that term itself.
    weights = oracle.normalized_weights(log_weights)
    coefficients = (case.bound_scale * weights, case.bound_scale * (signal(log_weights) + weights))
    (ascent,) = pull_back(jax.tree.map(jnp.asarray, coefficients))
    for name in case.params:
        np.testing.assert_allclose(
            actual.gradient[name], -ascent[name], rtol=1e-9, atol=1e-12, err_msg=name
        )
    return actual


def as_arrays(params: dict) -> dict[str, jax.Array]:
    """As SVI keeps parameters: not weakly typed."""
    return jax.tree.map(lambda value: jnp.asarray(value, dtype=float), params)


def _unstack(draws: dict[str, jax.Array]) -> list[dict[str, jax.Array]]:
    num_particles = len(next(iter(draws.values())))
    return [{name: draw[k] for name, draw in draws.items()} for k in range(num_particles)]


def log_bernoulli(logits: Any, value: Any) -> jax.Array:
    return value * logits - jax.nn.softplus(logits)


def log_normal(value: Any, loc: Any, scale: Any) -> jax.Array:
    return jax.scipy.stats.norm.logpdf(value, loc, scale)
