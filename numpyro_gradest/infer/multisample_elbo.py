"""Base of the multi-sample objectives: log-weights in, a loss with the right gradient out.

Notation: K = num_particles, R = num_replicates, lw_k = log p(x, z_k) - log q(z_k | x).
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.infer import ELBO

from numpyro_gradest.estimators import (
    dreg_weights,
    effective_sample_size,
    linear_surrogate,
    renyi_bound,
    renyi_weights,
)
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._credit import Credit
from numpyro_gradest.infer._particles import Particles, refuse_log_weights, run_particle
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program

SAMPLE_SIZE = "_effective_sample_size"
"""State under which a loss leaves the effective sample size of a step, for who puts it there."""


class Coefficients(NamedTuple):
    """What the log-probabilities are multiplied by, ``[K, replicates, *batch]``."""

    weights: Array
    """b, of log p and, subtracted, of the log q of reparameterised sites."""
    learning_signal: Array
    """a, of the log q of score-function sites."""
    signals: dict[str, Array]
    """a of the sites with a learning signal of their own, by its key."""
    credits: dict[str, Array]
    """a of the sites that have one for what is downstream of each, ``[K, *plates of the site]``."""
    path_weights: Array | None = None
    """If there are ``"dreg"`` sites: of the log-weights along the path through their draws."""
    model_weights: Array | None = None
    """Of log p other than along the path, if these are not ``weights``."""
    antithetic_signal: Array | None = None
    """a once more, at antithetic pairs."""

    def along_path(self, kind: str) -> "Coefficients":
        """Those along the path that starts at the draws of a kind."""
        whole = Coefficients(self.weights, self.learning_signal, self.signals, self.credits)
        moved = self.path_weights
        if kind != "dreg" or moved is None:
            return whole
        # The path moves the weights, those of the score-function sites included.
        return Coefficients(
            moved,
            self.learning_signal - moved,
            {key: signal - moved for key, signal in self.signals.items()},
            self.credits,
        )


class MultiSampleELBO(ELBO, ABC):
    r"""Base of the objectives that weigh K particles against each other.

    A subclass is one function from log-weights to the learning signal a. The loss is the negative
    importance-weighted bound, summed over the elements of the plates common to all sites of model
    and guide, and its gradient that of

    .. math:: -\sum_k b_k \log p(x, z_k) - b_k \log q_{\mathrm{path}} + a_k \log q_{\mathrm{score}}

    with b the self-normalised weights of order alpha, and a and b held constant.

    Args:
        num_particles: K, the number of particles in the bound.
        reparam: What guide sites with a reparameterised sampler get. ``"pathwise"`` differentiates
            through their values; ``"dreg"`` does so doubly reparameterised: the same expectation
            and a signal-to-noise ratio that does not fall with K; ``"stl"`` leaves the score of
            their density out, which is biased for K > 1; ``"score"`` takes the score function at
            every random site. A site may choose for itself, by ``infer={"estimator": ...}`` or
            ``configure_estimators``.
        alpha: Order of the variational Renyi bound, between 0 (the importance-weighted bound) and 1
            (the ELBO, averaged over the particles).
        num_replicates: Number of independent K-particle bounds that are averaged: MIWAE.
        elbo_weight: Between 0 and 1: how much the ELBO counts beside the bound: CIWAE.
        pool_replicates: Whether the model climbs the one bound over the particles of all
            replicates, which is then the loss, while the guide climbs their average: PIWAE. A point
            mass in the guide counts as the model's.
        chunk_size: Run the particles in chunks of this size, so that memory does not grow with
            ``num_particles``; the random numbers are the same, and so is, to rounding, the
            gradient. Model and guide run twice instead of once.
        vectorize_particles: As in the host: ``True`` for ``vmap``, ``False`` for ``lax.map``, or a
            callable ``(fn, keys) -> stacked results``.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option has a value that makes no sense.
    """

    can_infer_discrete = True
    # VIMCO and OVIS leave one particle out.
    _least_particles = 1
    _reparams: tuple[str, ...] = ("pathwise", "dreg", "stl", "score")
    num_auxiliary = 0
    # DisARM alone has a particle be two draws; a second axis of the batch tells them apart.
    _is_antithetic = False
    # RLOO can give a site the credit for what is downstream of it.
    _has_credits = False

    def __init__(
        self,
        num_particles: int,
        *,
        reparam: str = "pathwise",
        alpha: float = 0.0,
        num_replicates: int = 1,
        elbo_weight: float = 0.0,
        pool_replicates: bool = False,
        chunk_size: int | None = None,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        name = type(self).__name__
        check_count(num_particles, "num_particles", caller=name)
        check_count(num_replicates, "num_replicates", caller=name)
        if chunk_size is not None:
            check_count(chunk_size, "chunk_size", caller=name)
        if num_particles < self._least_particles:
            raise ValueError(
                f"{name} compares each particle with the others and needs num_particles >= "
                f"{self._least_particles}, got {num_particles}. Raise num_particles, or use "
                f"IWAE({num_particles}), which is the ELBO; to average several one-particle bounds "
                "use IWAE(1, num_replicates=...)."
            )
        if not 0 <= alpha <= 1:
            raise ValueError(
                f"{name} needs 0 <= alpha <= 1, got {alpha}: 0 is the importance-weighted bound, 1 "
                "the ELBO, and beyond them the estimate is no lower bound or has no finite "
                "variance."
            )
        if not 0 <= elbo_weight <= 1:
            raise ValueError(
                f"{name} needs 0 <= elbo_weight <= 1, got {elbo_weight}: 0 is the bound over "
                "particles, 1 the ELBO."
            )
        if reparam not in self._reparams:
            choices = " or ".join(f'"{choice}"' for choice in self._reparams)
            raise ValueError(f"{name} needs reparam={choices}, got {reparam!r}.")
        if chunk_size is not None and callable(vectorize_particles):
            raise ValueError(
                f"{name} got both chunk_size={chunk_size} and a callable vectorize_particles, but "
                "either decides how particles are run. Pass one of the two."
            )
        super().__init__(num_particles, vectorize_particles)
        self.reparam = reparam
        self.alpha = alpha
        self.num_replicates = num_replicates
        self.elbo_weight = elbo_weight
        self.pool_replicates = pool_replicates
        self.chunk_size = chunk_size

    @abstractmethod
    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Array, " K *batch"],
        auxiliary_log_weights: Float[Array, " S *batch"] | None,
    ) -> Float[Array, " K *batch"]:
        """Full coefficient of grad log q at score-function sites."""

    def _bound(self, log_weights: Float[Array, " K *batch"]) -> Float[Array, " *batch"]:
        """What the negative loss is, for each element of the common plates."""
        if self.pool_replicates:
            replicates = log_weights.shape[1:]
            log_weights = log_weights.reshape(-1, *replicates[1:])
            return jnp.broadcast_to(self._mixed(partial(renyi_bound, log_weights)), replicates)
        return self._mixed(partial(renyi_bound, log_weights))

    def _weights(self, log_weights: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
        """b, the coefficient of grad log p."""
        return self._mixed(partial(renyi_weights, log_weights))

    def _path_weights(self, log_weights: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
        """Under ``"dreg"``: coefficient of the log-weights along the path through the draws."""
        return self._mixed(partial(dreg_weights, log_weights))

    def _mixed(self, of_order: Callable[..., Array]) -> Array:
        """What ``of_order`` is at the order alpha, and for the ELBO, by their weights."""
        if self.elbo_weight == 0:
            return of_order(alpha=self.alpha)
        of_elbo = of_order(alpha=1.0)
        if self.elbo_weight == 1:
            return of_elbo
        return (1 - self.elbo_weight) * of_order(alpha=self.alpha) + self.elbo_weight * of_elbo

    @property
    def _signal_target(self) -> float | str | None:
        """What learning signals of sites have to be for: the bound of this order, if of one."""
        if self.elbo_weight == 0:
            return float(self.alpha)
        return 1.0 if self.elbo_weight == 1 else None

    def _own_signals(
        self, estimators: SiteEstimators, log_weights: Float[Array, " K *batch"]
    ) -> dict[str, Float[Array, " K *batch"]]:
        """Full coefficients of grad log q at sites that have a learning signal of their own."""
        return estimators.own_signals(log_weights)

    def _coefficients(
        self,
        program: Program,
        log_weights: Float[Array, " K *batch"],
        auxiliary_log_weights: Float[Array, " S *batch"] | None,
    ) -> Coefficients:
        has_dreg = "dreg" in program.estimators.met
        return Coefficients(
            weights=self._weights(log_weights),
            learning_signal=self._learning_signal(program, log_weights, auxiliary_log_weights),
            signals=self._own_signals(program.estimators, log_weights),
            credits={},
            path_weights=self._path_weights(log_weights) if has_dreg else None,
            model_weights=self._pooled_weights(log_weights) if self.pool_replicates else None,
        )

    def _signals_of_credits(
        self, credits: dict[str, Credit]
    ) -> dict[str, Float[Array, " runs *plates"]]:
        """Full coefficients of grad log q at sites with a signal of what is downstream of each."""
        return {}

    def _pooled_weights(self, log_weights: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
        of_all = self._weights(log_weights.reshape(-1, *log_weights.shape[2:]))
        return self.num_replicates * of_all.reshape(log_weights.shape)

    @property
    def _is_weighted(self) -> bool:
        num_pooled = self.num_replicates if self.pool_replicates else 1
        return self.num_particles * num_pooled > 1 and self.alpha != 1 and self.elbo_weight != 1

    def _further_surrogate(
        self, program: Program, log_weights: Float[Array, " K *batch"], key: Array
    ) -> Float[Array, ""] | float:
        """A further term whose gradient is added; its value is not."""
        return 0.0

    def _next_state(
        self, program: Program, log_weights: Float[Array, " K *batch"]
    ) -> dict[str, Any]:
        """New values of ``mutable`` sites of the objective's own."""
        return {}

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Any],
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Negative bound in nats, and the state of ``mutable`` sites averaged over particles.

        Args:
            rng_key: Random key of this evaluation.
            param_map: Constrained values of the ``param`` sites, by name.
            model: NumPyro model.
            guide: NumPyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            ``{"loss": scalar, "mutable_state": dict or None}``. The value is the bound, the
            gradient that of the estimator.

        Raises:
            ValueError: If model and guide do not match, a site is enumerated, a shape does not fit
                its plate, a plate that is not common to all sites is subsampled, or a
                log-probability is NaN. Values can't be checked under ``jit``: there
                ``stable_update`` skips such steps, and ``jax_debug_nans`` finds their origin.
        """
        plate_key, main_key, auxiliary_key, guide_key = jax.random.split(rng_key, 4)
        program = Program(
            model,
            guide,
            param_map,
            args,
            kwargs,
            SiteEstimators.of(self),
            is_weighted=self._is_weighted,
            is_antithetic=self._is_antithetic,
            has_credits=self._has_credits,
        )
        program = program.with_plate_key(plate_key)

        keys = jax.random.split(main_key, self.num_particles * self.num_replicates)
        particles = self._run(program.detached() if self.chunk_size else program, keys)
        refuse_log_weights(particles)
        log_weights = self._by_replicate(particles.log_weights)
        auxiliary = None
        if self.num_auxiliary:
            keys_s = jax.random.split(auxiliary_key, self.num_auxiliary * self.num_replicates)
            auxiliary_particles = self._run(program.detached(), keys_s)
            refuse_log_weights(auxiliary_particles)
            auxiliary = self._by_replicate(auxiliary_particles.log_weights)

        scale = particles.bound_scale / self.num_replicates
        coefficients = jax.tree.map(
            lambda one: scale * one.reshape(scale.shape),
            self._coefficients(program, log_weights, auxiliary),
        )
        coefficients = coefficients._replace(credits=self._signals_of_credits(particles.credits))
        if self.chunk_size:
            # Only keys and coefficients are kept: the backward pass runs each chunk again.
            @jax.checkpoint
            def rerun(key: Array, coefficients: Coefficients) -> Array:
                of_one = jax.tree.map(lambda one: one[None], coefficients)
                return _surrogate(self._run(program, key[None]), of_one)

            chunks = (keys, coefficients)
            surrogate = jax.lax.map(lambda xs: rerun(*xs), chunks, batch_size=self.chunk_size).sum()
        else:
            surrogate = _surrogate(particles, coefficients)
        surrogate += self._further_surrogate(program, log_weights, guide_key)

        bound = jnp.sum(scale[0] * self._bound(log_weights).sum(axis=0))
        _warn_of_no_weight(bound)
        loss = -(jax.lax.stop_gradient(bound) + gradient_only(surrogate))
        state = mean_state(particles.mutable_state) | self._next_state(program, log_weights)
        if SAMPLE_SIZE in param_map:
            state[SAMPLE_SIZE] = effective_sample_size(log_weights).mean()
        return {"loss": loss, "mutable_state": state or None}

    def _run(self, program: Program, keys: Array) -> Particles:
        """One particle for each key, stacked along axis 0."""
        if len(keys) == 1:
            return jax.tree.map(
                lambda leaf: jnp.asarray(leaf)[None], run_particle(program, keys[0])
            )
        if self.chunk_size:
            return jax.lax.map(partial(run_particle, program), keys, batch_size=self.chunk_size)
        return self.vectorize_particles_fn(partial(run_particle, program), keys)

    def _by_replicate(
        self, log_weights: Float[Array, " runs *batch"]
    ) -> Float[Array, " K replicates *batch"]:
        return log_weights.reshape(-1, self.num_replicates, *log_weights.shape[1:])


@jax.custom_jvp
def gradient_only(surrogate: Float[Array, ""]) -> Float[Array, ""]:
    """Zero, with the gradient of ``surrogate``, whose value then need not be computed."""
    return jnp.zeros_like(surrogate)


@gradient_only.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return jnp.zeros_like(primals[0]), tangents[0]


def _surrogate(particles: Particles, coefficients: Coefficients) -> Float[Array, ""]:
    surrogate = _linear(particles, coefficients)
    for kind, along_path in sorted(particles.along_paths.items()):
        log_q_path = along_path.log_q_path + along_path.log_q_draw
        moved = along_path._replace(log_q_path=log_q_path)
        surrogate += _linear(moved, coefficients.along_path(kind))
    return surrogate


def _linear(particles: Particles, coefficients: Coefficients) -> Float[Array, ""]:
    log_p, nothing = particles.log_p, jnp.zeros_like(particles.log_p)
    surrogate = signal_surrogate(particles, coefficients.signals)
    for site, credit in particles.credits.items():
        none = jnp.zeros_like(credit.log_q)
        surrogate = surrogate + _total(none, none, credit.log_q, none, coefficients.credits[site])
    if coefficients.model_weights is not None:
        surrogate = surrogate + _total(log_p, nothing, nothing, coefficients.model_weights, nothing)
        log_p = nothing
    if (signal := coefficients.antithetic_signal) is not None:
        surrogate = surrogate + _total(nothing, nothing, particles.antithetic, nothing, signal)
    return surrogate + _total(
        log_p,
        particles.log_q_path,
        particles.log_q_score,
        coefficients.weights,
        coefficients.learning_signal,
    )


def signal_surrogate(
    particles: Particles, signals: dict[str, Float[Array, " K *batch"]]
) -> Float[Array, ""] | float:
    """What sites with a learning signal of their own add to the surrogate."""
    nothing = jnp.zeros_like(particles.log_p)
    terms = [
        _total(nothing, nothing, log_q, nothing, signals[key])
        for key, log_q in particles.log_q_signals.items()
    ]
    return sum(terms, 0.0)


def _total(
    log_p: Array, log_q_path: Array, log_q_score: Array, weights: Array, signal: Array
) -> Float[Array, ""]:
    return linear_surrogate(
        log_p, log_q_path, log_q_score, weights=weights, learning_signal=signal
    ).sum()


def _warn_of_no_weight(bound: Float[Array, ""]) -> None:
    """Warn of an infinite loss; values that are being traced can't be looked at, and pass."""
    if not isinstance(bound, jax.core.Tracer) and bound == -jnp.inf:
        warnings.warn(
            "Every particle has zero weight for some of the data, so the bound is -inf; these data "
            "contribute no gradient. Widen the guide, or raise num_particles.",
            stacklevel=3,
        )


def mean_state(state: dict[str, Any]) -> dict[str, Any]:
    """Average the state that each particle left behind; what is not a float is the first's."""

    def mean(leaf: Array) -> Array:
        return leaf.mean(axis=0) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf[0]

    return jax.tree.map(mean, state)
