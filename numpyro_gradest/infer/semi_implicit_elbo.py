"""The ELBO of guides that are mixtures over noise.

Notation: K = num_particles; z is drawn with the noise e_0, and e_1, ..., e_J are further draws.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpyro.infer import ELBO

from numpyro_gradest.estimators import linear_surrogate
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._particles import Particles, read_particle, refuse_log_weights
from numpyro_gradest.infer._semi_implicit import Mixture, read_mixture
from numpyro_gradest.infer._site_estimators import SiteEstimators
from numpyro_gradest.infer._trace import Program, trace_particle
from numpyro_gradest.infer.multisample_elbo import gradient_only, mean_state


class SemiImplicitELBO(ELBO):
    r"""The SIVI bound, for guides whose latents have a density given noise, but none without.

    .. math::
        L_J = \mathbb{E} \Bigl[\log p(x, z) - \log \frac1{J+1} \sum_{j=0}^J q(z \mid e_j)\Bigr],
        \qquad z \sim q(z \mid e_0), \quad e_0, \dots, e_J \sim q(e)

    A lower bound of the ELBO of the mixture q(z), the integral of q(z | e) over the noise, which it
    reaches as J grows. In the guide, draw the noise at auxiliary sites
    (``infer={"is_auxiliary": True}``) and the latents from any distributions whose parameters are
    computed from it. Reparameterised sites take the pathwise gradient, the others the score
    function with the mean of the other particles for a baseline.

    The noise may be an index, ``Categorical`` with fixed equal weights, into learned parameters: a
    mixture over as many particles, which is the family of particle semi-implicit inference (PVI).
    That method's preconditioned, noisy flow of the particles is the optimiser's part.

    Each element of the plates that enclose every site of the guide, noise and latents, has a
    mixture of its own; all that lies outside or deeper belongs to a joint one. So draw noise inside
    the plate of local latents where that is meant: one mixture over N data needs far more draws.
    Scale and N/B of subsampled plates multiply the log of the mixture.

    Args:
        num_particles: K, the number of draws of z that are averaged.
        num_mixing: J >= 1, the number of further draws of the noise for each draw of z.
        reparam: ``"pathwise"`` differentiates through the values of guide sites with a
            reparameterised sampler; ``"score"`` takes the score function at all of them. Each may
            choose for itself, by ``infer={"estimator": ...}``.
        vectorize_particles: As in the host: ``True`` for ``vmap``, ``False`` for ``lax.map``, or a
            callable ``(fn, keys) -> stacked results``; used for draws of the noise as well.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option has a value that makes no sense.

    Bias and variance:
        Unbiased for the gradient of L_J. The bound underestimates the ELBO of the mixture by
        O(1/J), and does not decrease with J.

    Cost:
        K evaluations of the model, and K (J + 1) of the guide.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> def model():
        ...     numpyro.sample("z", dist.Normal(3.0, 0.5))
        >>> def guide():
        ...     loc, width = numpyro.param("loc", 0.0), numpyro.param("width", 1.0)
        ...     noise = numpyro.sample("noise", dist.Normal(0, 1), infer={"is_auxiliary": True})
        ...     numpyro.sample("z", dist.Normal(loc + width * noise, 0.3))
        >>> svi = SVI(model, guide, optax.adam(0.05), loss=SemiImplicitELBO(10, num_mixing=20))
        >>> params = svi.run(random.key(0), 200, progress_bar=False).params
        >>> bool(abs(params["loc"] - 3.0) < 0.2 and abs(abs(params["width"]) - 0.4) < 0.1)
        True

    References:
        Yin and Zhou, `Semi-Implicit Variational Inference
        <https://arxiv.org/abs/1805.11183>`_, 2018, section 3. Lim and Johansen,
        `Particle Semi-Implicit Variational Inference <https://arxiv.org/abs/2407.00649>`_, 2024,
        for the family over particles.
    """

    can_infer_discrete = True

    _reparams = ("pathwise", "score")
    _signal_target = None

    def __init__(
        self,
        num_particles: int,
        *,
        num_mixing: int,
        reparam: str = "pathwise",
        vectorize_particles: bool | Callable = True,
    ) -> None:
        check_count(num_particles, "num_particles", caller="SemiImplicitELBO")
        check_count(num_mixing, "num_mixing", caller="SemiImplicitELBO")
        if reparam not in self._reparams:
            raise ValueError(
                f'SemiImplicitELBO needs reparam="pathwise" or "score", got {reparam!r}.'
            )
        super().__init__(num_particles, vectorize_particles)
        self.num_mixing = num_mixing
        self.reparam = reparam

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
                its plate, a log-probability is NaN, the guide has no noise, a latent is a point
                mass, the latents differ in scale, or a plate that does not enclose all sites of
                the guide is subsampled. Values can't be checked under ``jit``.
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
        ).with_plate_key(plate_key)
        keys = jax.random.split(main_key, self.num_particles)
        particles, mixture = self.vectorize_particles_fn(partial(self._run, program), keys)
        refuse_log_weights(particles)

        log_p = particles.bound_scale * particles.log_p
        elbo = jax.lax.stop_gradient(log_p - mixture.log_q)
        surrogate = linear_surrogate(
            log_p,
            mixture.log_q,
            mixture.log_drawn,
            weights=jnp.full_like(elbo, 1 / self.num_particles),
            learning_signal=(elbo - self._baseline(elbo)) / self.num_particles,
        ).sum()
        bound = elbo.mean(axis=0).sum()
        loss = -(bound + gradient_only(surrogate))
        return {"loss": loss, "mutable_state": mean_state(particles.mutable_state) or None}

    def _run(self, program: Program, key: Array) -> tuple[Particles, Mixture]:
        key, noise_key = jax.random.split(key)
        traces = trace_particle(program, key)
        keys = jax.random.split(noise_key, self.num_mixing)
        mixture = read_mixture(program, *traces, keys, self.vectorize_particles_fn)
        return read_particle(program, *traces), mixture

    def _baseline(self, elbo: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
        """The mean of the other particles, zero where there is none."""
        return (elbo.sum(axis=0) - elbo) / max(self.num_particles - 1, 1)
