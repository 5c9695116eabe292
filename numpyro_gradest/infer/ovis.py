"""OVIS: optimal control variates for guides with discrete sites.

Notation: v self-normalised weights, L the K-sample bound, h_k the gradient of log q(z_k | x),
S = num_auxiliary.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Array, Float

from numpyro_gradest.estimators import (
    ovis_gamma_learning_signal,
    ovis_mc_learning_signal,
    renyi_learning_signal,
)
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._trace import Program
from numpyro_gradest.infer.multisample_elbo import MultiSampleELBO


class OVIS(MultiSampleELBO):
    r"""Importance-weighted bound with optimal control variates at discrete sites.

    .. math:: L = \log \frac1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k | x)}, \qquad z_k \sim q

    At sites without a reparameterised sampler, the control variate approaches the one that
    minimises the variance of each particle's term: by its limit for many particles
    (``num_auxiliary=0``,
    :func:`~numpyro_gradest.estimators.ovis_gamma_learning_signal`), or by Monte Carlo with S draws
    (:func:`~numpyro_gradest.estimators.ovis_mc_learning_signal`). Reparameterised sites get the
    pathwise gradient, and mixed guides both.

    Args:
        num_particles: K, the number of particles in the bound, at least 2.
        num_auxiliary: S, the number of auxiliary draws for the Monte Carlo control variate. They
            enter the control variate only, never the bound. 0 is the asymptotic form.
        gamma: Between 0 and 1. Adds ``gamma`` times the wake-phi gradient to the asymptotic form,
            which helps while the effective sample size is near one.
        reparam: What guide sites with a reparameterised sampler get. ``"pathwise"`` differentiates
            through their values; ``"dreg"`` does so doubly reparameterised: the same expectation
            and a signal-to-noise ratio that does not fall with K; ``"stl"`` leaves the score of
            their density out, which is biased for K > 1; ``"score"`` takes the score function at
            every random site. A site may choose for itself, by ``infer={"estimator": ...}`` or
            ``configure_estimators``.
        alpha: Order of the variational Renyi bound, between 0 (the importance-weighted bound) and 1
            (the ELBO, averaged over the particles).
        num_replicates: Number of independent K-particle bounds to average: MIWAE.
        elbo_weight: Between 0 and 1: how much the ELBO counts beside the bound: CIWAE.
        pool_replicates: Whether the model climbs the one bound over the particles of all
            replicates, which is then the loss, while the guide climbs their average: PIWAE. A point
            mass in the guide counts as the model's.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        vectorize_particles: As in the host: ``True`` (``vmap``), ``False`` (``lax.map``) or a
            callable ``(fn, keys) -> stacked``.

    Raises:
        TypeError: If a count is not an integer, or an option is unknown.
        ValueError: If ``num_particles < 2``, ``gamma`` is not in [0, 1], or ``gamma``
            is combined with ``num_auxiliary``, ``alpha`` or ``elbo_weight``; at the first
            evaluation, if model and guide do not match.

    Bias and variance:
        Unbiased for the gradient of the K-sample bound, of any order alpha, if ``gamma=0``, with a
        signal-to-noise ratio of the guide's gradient that, at order 0 and in the limit of many
        particles, grows as sqrt(K). With ``gamma > 0`` biased by design, by ``gamma`` times the
        wake-phi gradient. A large signal-to-noise ratio is not a large likelihood: on sigmoid
        belief networks ``gamma=0`` trains about as well as VIMCO.

    Cost:
        K + S evaluations of model and guide, S of them without gradient, and O(K (1 + S)) to
        combine them.

    Example:
        >>> import numpyro
        >>> import numpyro.distributions as dist
        >>> import optax
        >>> from jax import numpy as jnp, random
        >>> from numpyro.infer import SVI
        >>> def model(x):
        ...     with numpyro.plate("data", len(x)):
        ...         z = numpyro.sample("z", dist.Bernoulli(0.3))
        ...         numpyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = numpyro.param("slope", 0.1)
        ...     with numpyro.plate("data", len(x)):
        ...         numpyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> svi = SVI(model, guide, optax.adam(0.05), loss=OVIS(num_particles=10))
        >>> x = jnp.array([-0.5, 0.2, 2.9, 3.3])
        >>> result = svi.run(random.key(0), 100, x, progress_bar=False)
        >>> bool(result.params["slope"] > 0.1)
        True

    References:
        Lievin, Dittadi, Christensen and Winther, `Optimal Variance Control of the Score Function
        Gradient Estimator for Importance Weighted Bounds <https://arxiv.org/abs/2008.01998>`_,
        2020, section 4.
    """

    _least_particles = 2

    def __init__(
        self,
        num_particles: int,
        *,
        num_auxiliary: int = 0,
        gamma: float = 0.0,
        reparam: str = "pathwise",
        alpha: float = 0.0,
        num_replicates: int = 1,
        elbo_weight: float = 0.0,
        pool_replicates: bool = False,
        chunk_size: int | None = None,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        super().__init__(
            num_particles,
            reparam=reparam,
            alpha=alpha,
            num_replicates=num_replicates,
            elbo_weight=elbo_weight,
            pool_replicates=pool_replicates,
            chunk_size=chunk_size,
            vectorize_particles=vectorize_particles,
        )
        if num_auxiliary != 0:
            check_count(num_auxiliary, "num_auxiliary", caller="OVIS")
        if not 0 <= gamma <= 1:
            raise ValueError(f"OVIS needs 0 <= gamma <= 1, got {gamma}.")
        if num_auxiliary and gamma:
            raise ValueError(
                f"OVIS got gamma={gamma} and num_auxiliary={num_auxiliary}: gamma belongs to the "
                "asymptotic control variate, auxiliary draws to the Monte Carlo one. Set one of "
                "them to 0."
            )
        for option, value in (("alpha", alpha), ("elbo_weight", elbo_weight)):
            if value and gamma:
                raise ValueError(
                    f"OVIS got {option}={value} with gamma={gamma}: the wake-phi term is known for "
                    f"the importance-weighted bound only. Leave gamma at 0, or use {option}=0."
                )
        self.num_auxiliary = num_auxiliary
        self.gamma = gamma

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Array, " K *batch"],
        auxiliary_log_weights: Float[Array, " S *batch"] | None,
    ) -> Float[Array, " K *batch"]:
        if auxiliary_log_weights is not None:
            return self._mixed(partial(ovis_mc_learning_signal, log_weights, auxiliary_log_weights))
        if self.gamma:
            return ovis_gamma_learning_signal(log_weights, gamma=self.gamma)
        return self._mixed(partial(renyi_learning_signal, log_weights))
