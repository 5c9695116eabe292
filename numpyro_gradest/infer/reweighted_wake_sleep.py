"""Reweighted wake-sleep with one set of weights per datum.

Notation: v self-normalised weights, theta and phi the parameters of model and guide,
lambda = insomnia.
"""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from numpyro_gradest.estimators import wake_phi_dreg_weights, wake_phi_learning_signal
from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.infer._dreams import dream_log_q
from numpyro_gradest.infer._site_estimators import WAKE_PHI, SiteEstimators
from numpyro_gradest.infer._trace import Program
from numpyro_gradest.infer.multisample_elbo import MultiSampleELBO


class ReweightedWakeSleep(MultiSampleELBO):
    r"""Reweighted wake-sleep: wake-theta for the model, wake-phi and sleep-phi for the guide.

    .. math::
        \nabla_\theta: \sum_k v_k \nabla \log p(x, z_k), \qquad
        \nabla_\phi: \lambda \sum_k v_k \nabla \log q(z_k | x)
        + (1 - \lambda)\, \mathbb E_{p(z', x')} \nabla \log q(z' | x')

    The model climbs the importance-weighted bound; the guide follows the posterior, by the
    weighted draws of the wake phase and by latents and data dreamt by the model in the sleep
    phase. Weights are per element of the plates common to all sites. By default no
    gradient passes through the values of latent sites, so that reparameterised and discrete sites
    are treated alike.

    In the sleep phase the guide has to look at data dreamt by the model instead of ``args``: by
    default it is called with ``observations={site name: value}`` (the convention of Pyro), which
    model and guide then take as a keyword argument; or ``dream_inputs`` says how.

    Args:
        num_particles: K, the number of particles in the wake phase.
        insomnia: lambda, between 0 and 1: 1 trains the guide by wake-phi alone, 0 by sleep-phi
            alone.
        num_sleep_particles: Number of dreams per step; ``num_particles`` if left out.
        dream_inputs: Callable ``(dream, *args, **kwargs) -> args`` that returns the tuple of
            positional arguments to call the guide with, given the values of the observed sites
            drawn from the model, by name.
        reparam: ``"score"`` takes the score function at every random guide site; ``"dreg"`` takes
            wake-phi doubly reparameterised at sites that allow it, with the same expectation and
            less noise. A site may choose between them, by ``infer={"estimator": ...}``.
        num_replicates: Number of independent wake phases of K particles to average.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        vectorize_particles: As in the host: ``True`` (``vmap``), ``False`` (``lax.map``) or a
            callable ``(fn, keys) -> stacked``.

    Raises:
        TypeError: If a count is not an integer, or an option is unknown.
        ValueError: If ``insomnia`` is not in [0, 1] or another option makes no sense; at the first
            evaluation, if model and guide do not match, or the guide can't be shown the dreams.

    Bias and variance:
        For the model, unbiased for the gradient of the K-sample bound. For the guide, wake-phi is
        self-normalised, O(1/K), for the inclusive divergence KL(p(z|x) || q(z|x)) at the data, and
        sleep-phi unbiased for the same divergence at data drawn from the model. Neither is a
        gradient of the bound. The value is the negative bound.

    Cost:
        K evaluations of model and guide; with ``insomnia < 1``, ``num_sleep_particles`` more.

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
        >>> loss = ReweightedWakeSleep(
        ...     num_particles=10, insomnia=0.5, dream_inputs=lambda dream, x: (dream["x"],)
        ... )
        >>> svi = SVI(model, guide, optax.adam(0.05), loss=loss)
        >>> x = jnp.array([-0.5, 0.2, 2.9, 3.3])
        >>> result = svi.run(random.key(0), 100, x, progress_bar=False)
        >>> bool(result.params["slope"] > 0.1)
        True

    References:
        Bornschein and Bengio, `Reweighted Wake-Sleep <https://arxiv.org/abs/1406.2751>`_, 2015,
        section 2. Le, Kosiorek, Siddharth, Teh and Wood, `Revisiting Reweighted Wake-Sleep
        <https://arxiv.org/abs/1805.10469>`_, 2019, section 2. Tucker, Lawson, Gu and Maddison,
        `Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives
        <https://arxiv.org/abs/1810.04152>`_, 2019, section 5, for ``reparam="dreg"``. The host's
        implementation has one weight for the whole batch; here every datum has its own.
    """

    _reparams = ("score", "dreg")

    def __init__(
        self,
        num_particles: int,
        *,
        insomnia: float = 1.0,
        num_sleep_particles: int | None = None,
        dream_inputs: Callable[..., tuple] | None = None,
        reparam: str = "score",
        num_replicates: int = 1,
        chunk_size: int | None = None,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        super().__init__(
            num_particles,
            reparam=reparam,
            num_replicates=num_replicates,
            chunk_size=chunk_size,
            vectorize_particles=vectorize_particles,
        )
        if not 0 <= insomnia <= 1:
            raise ValueError(f"ReweightedWakeSleep needs 0 <= insomnia <= 1, got {insomnia}.")
        if num_sleep_particles is not None:
            check_count(num_sleep_particles, "num_sleep_particles", caller="ReweightedWakeSleep")
        self.insomnia = insomnia
        self.num_sleep_particles = num_sleep_particles or num_particles
        self.dream_inputs = dream_inputs

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Array, " K *batch"],
        auxiliary_log_weights: Float[Array, " S *batch"] | None,
    ) -> Float[Array, " K *batch"]:
        return self.insomnia * wake_phi_learning_signal(log_weights)

    @property
    def _signal_target(self) -> str:
        return WAKE_PHI

    def _own_signals(
        self, estimators: SiteEstimators, log_weights: Float[Array, " K *batch"]
    ) -> dict[str, Float[Array, " K *batch"]]:
        signals = estimators.own_signals(log_weights)
        return {key: self.insomnia * signal for key, signal in signals.items()}

    def _path_weights(self, log_weights: Float[Array, " K *batch"]) -> Float[Array, " K *batch"]:
        return self.insomnia * wake_phi_dreg_weights(log_weights)

    def _further_surrogate(
        self, program: Program, log_weights: Float[Array, " K *batch"], key: Array
    ) -> Float[Array, ""] | float:
        if self.insomnia == 1:
            return 0.0
        keys = jax.random.split(key, self.num_sleep_particles)
        log_q = self.vectorize_particles_fn(
            lambda key: dream_log_q(program, key, self.dream_inputs), keys
        )
        return (1 - self.insomnia) * log_q.mean()
