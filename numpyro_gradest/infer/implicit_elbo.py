"""The ELBO of guides with sites that can only be sampled.

Notation: K = num_particles draws z_k; g estimates the score, grad log q, of the implicit sites.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.infer import ELBO

from numpyro_gradest.estimators import (
    IMQ,
    calibrate_score,
    entropy_surrogate,
    fit_whitening,
    knn_entropy,
    linear_surrogate,
    median_bandwidth,
    stein_score,
)
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._implicit import ImplicitGroup, implicit_groups
from numpyro_gradest.infer._particles import Particles, read_particle, refuse_log_weights
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program, trace_particle
from numpyro_gradest.infer.multisample_elbo import gradient_only, mean_state, signal_surrogate

ScoreEstimator = Callable[[Float[Array, " *plates K D"]], Float[Array, " *plates K D"]]
Groups = dict[tuple[str, ...], ImplicitGroup]


class ImplicitELBO(ELBO):
    r"""The ELBO of a guide some of whose sites are :class:`Implicit`: their entropy is estimated.

    .. math::
        \nabla_\phi = \frac1K \sum_k \nabla_\phi \bigl[\log p(x, z_k) - \log q(z_k)\bigr]
        - \hat g(z_k) \cdot \nabla_\phi z_k, \qquad \hat g \approx \nabla_z \log q(z)

    with log q that of the other sites. Implicit sites outside of all plates have one joint
    entropy; sites in plates have one per element, estimated for all elements at once. Where the
    model's site is constrained, the score is estimated in unconstrained space and the Jacobian is
    exact. Sites that have a density keep it: reparameterised ones take the pathwise gradient, the
    others the score function with the mean of the other particles for a baseline.

    The loss that is reported is a number to watch, not a bound: its entropy is the
    Kozachenko-Leonenko estimate from the K draws.

    To anneal log p, scale the model alone, ``handlers.scale(model, beta)``, by a beta that rises to
    one and is an argument of model and guide.

    Args:
        num_particles: K >= 2, the number of draws; take at least five per dimension of the
            implicit sites of one plate element.
        score_estimator: Function from samples ``[*plates, K, D]`` to their score, same shape;
            ``None`` is :func:`stein_score`, with the kernel :class:`IMQ` at 0.7 times the median
            distance, corrected by :func:`calibrate_score`.
        reparam: ``"pathwise"`` differentiates through the values of explicit guide sites with a
            reparameterised sampler; ``"score"`` takes the score function at all of them. Each may
            choose for itself, by ``infer={"estimator": ...}``.
        vectorize_particles: As in the host: ``True`` for ``vmap``, ``False`` for ``lax.map``, or a
            callable ``(fn, keys) -> stacked results``.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option has a value that makes no sense.

    Bias and variance:
        Biased by design, by the score estimate; the rest of the gradient is unbiased. The default
        has the guide's covariance right at five particles per dimension. Its shape is estimated
        well in few dimensions only; in many, a guide that is flexible and trained for long drifts
        where the estimate does not look. Then train no longer than the loss falls, take a smaller
        network, and compare with :func:`check_implicit_fit`.

    Cost:
        K evaluations of model and guide, and one score estimate per element of the plates around
        implicit sites, O(K^3 + K^2 D) with the default.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_gradest import Implicit
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(3.0, 0.5))
        >>> def guide():
        ...     loc, scale = numpyro.param("loc", 0.0), numpyro.param("scale", 1.0)
        ...     noise = numpyro.sample("noise", dist.Normal(0, 1), infer={"is_auxiliary": True})
        ...     numpyro.sample("z", Implicit(loc + scale * noise))
        >>> svi = SVI(model, guide, optax.adam(0.05), loss=ImplicitELBO(num_particles=50))
        >>> params = svi.run(random.key(0), 200, progress_bar=False).params
        >>> bool(abs(params["loc"] - 3.0) < 0.2 and abs(abs(params["scale"]) - 0.5) < 0.1)
        True

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.1 and eq. 3.
    """

    can_infer_discrete = True
    _reparams = ("pathwise", "score")
    _signal_target = 1.0

    def __init__(
        self,
        num_particles: int,
        *,
        score_estimator: ScoreEstimator | None = None,
        reparam: str = "pathwise",
        vectorize_particles: bool | Callable = True,
    ) -> None:
        check_count(num_particles, "num_particles", caller="ImplicitELBO")
        if num_particles < 2:
            raise ValueError(
                "ImplicitELBO estimates an entropy from its particles and needs num_particles >= "
                f"2 (better five per dimension), got {num_particles}."
            )
        if reparam not in self._reparams:
            raise ValueError(f'ImplicitELBO needs reparam="pathwise" or "score", got {reparam!r}.')
        if score_estimator is not None and not callable(score_estimator):
            raise TypeError(
                "ImplicitELBO needs score_estimator as a function from samples [*, K, D] to "
                f"scores of that shape, got {score_estimator!r}."
            )
        super().__init__(num_particles, vectorize_particles)
        self.reparam = reparam
        self.score_estimator = score_estimator or _calibrated_stein_score

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: dict[str, Any],
        model: Callable,
        guide: Callable,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Estimate of the negative ELBO in nats, and the mean state of ``mutable`` sites.

        Args:
            rng_key: Random key of this evaluation.
            param_map: Constrained values of the ``param`` sites, by name.
            model: NumPyro model.
            guide: NumPyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            ``{"loss": scalar, "mutable_state": dict or None}``. The value is the estimate, the
            gradient that of the estimator.

        Raises:
            ValueError: If model and guide do not match, a site is enumerated, a shape does not fit
                its plate, a draw or log-probability is not finite, or an implicit site is
                observed, has no noise, or depends on another site. Values can't be checked under
                ``jit``.
        """
        plate_key, main_key = jax.random.split(rng_key)
        program = Program(
            model,
            guide,
            param_map,
            args,
            kwargs,
            SiteEstimators.of(self),
            is_weighted=False,
            takes_implicit=True,
        )
        keys = jax.random.split(main_key, self.num_particles)
        run = partial(_run_particle, program.with_plate_key(plate_key))
        particles, groups = self.vectorize_particles_fn(run, keys)
        _refuse_not_finite(groups)
        refuse_log_weights(particles)

        surrogate = self._explicit_surrogate(program, particles)
        elbo = jnp.sum(particles.bound_scale[0] * particles.log_weights.mean(axis=0))
        for group in groups.values():
            samples, weight = jnp.moveaxis(group.samples, 0, -2), group.weight[0]
            entropy = entropy_surrogate(samples, score_estimator=self.score_estimator)
            surrogate += jnp.sum(weight * entropy)
            elbo += jnp.sum(weight * knn_entropy(samples))
        loss = -(jax.lax.stop_gradient(elbo) + gradient_only(surrogate))
        return {"loss": loss, "mutable_state": mean_state(particles.mutable_state) or None}

    def _explicit_surrogate(self, program: Program, particles: Particles) -> Float[Array, ""]:
        elbo, scale = particles.log_weights, particles.bound_scale / self.num_particles
        others = (elbo.sum(axis=0) - elbo) / (self.num_particles - 1)
        signals = program.estimators.own_signals(elbo)
        signals = {key: particles.bound_scale * signal for key, signal in signals.items()}
        return (
            signal_surrogate(particles, signals)
            + linear_surrogate(
                particles.log_p,
                particles.log_q_path,
                particles.log_q_score,
                weights=scale,
                learning_signal=scale * (elbo - others),
            ).sum()
        )


def _calibrated_stein_score(samples: Array) -> Array:
    # The narrower the kernel, the less the ridge shrinks what is not linear, such as the way
    # between modes, and the noisier the scores; what is linear is calibrated anyway.
    whitening = fit_whitening(samples)
    whitened = whitening.points(samples)
    kernel = IMQ(0.7 * median_bandwidth(whitened))
    scores = stein_score(whitened, kernel=kernel, whiten=False)
    return calibrate_score(samples, whitening.score(scores))


def _run_particle(program: Program, key: Array) -> tuple[Particles, Groups]:
    traces = trace_particle(program, key)
    return read_particle(program, *traces), implicit_groups(traces[1])


def _refuse_not_finite(groups: Groups) -> None:
    """Values that are being traced can't be looked at, and pass."""
    for sites, group in groups.items():
        samples = group.samples
        if not isinstance(samples, jax.core.Tracer) and not jnp.isfinite(samples).all():
            raise ValueError(
                f"A draw of the implicit sites {list(sites)} is not finite. Check the guide's "
                "parameters and learning rate; no parameter has been updated."
            )
