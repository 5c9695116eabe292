"""The ELBO of guides that are mixtures over noise.

Notation: K = num_particles; z is drawn with the noise e_0, and e_1, ..., e_J are further draws.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_gradest.estimators import linear_surrogate
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.infer._particles import (
    Particles,
    concatenate,
    read_particles,
    refuse_log_weights,
)
from pyro_gradest.infer._semi_implicit import Mixture, read_mixture
from pyro_gradest.infer._trace import Program, trace_particles
from pyro_gradest.infer.multisample_elbo import program_of


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
        host_options: Options of the host's ``ELBO``: ``max_plate_nesting``, ``retain_graph`` and
            others; ``vectorize_particles`` runs the draws of the noise at once, too.

    Raises:
        TypeError: If an option has the wrong type.
        ValueError: If an option has a value that makes no sense.

    Bias and variance:
        Unbiased for the gradient of L_J. The bound underestimates the ELBO of the mixture by
        O(1/J), and does not decrease with J.

    Cost:
        K evaluations of the model, and K (J + 1) of the guide.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> def guide():
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     width = pyro.param("width", torch.tensor(1.0))
        ...     noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        ...     pyro.sample("z", dist.Normal(loc + width * noise, 0.3))
        >>> loss = SemiImplicitELBO(10, num_mixing=20, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> losses = [svi.step() for _ in range(200)]
        >>> bool(abs(pyro.param("loc") - 3.0) < 0.2 and abs(pyro.param("width").abs() - 0.4) < 0.1)
        True

    References:
        Yin and Zhou, `Semi-Implicit Variational Inference
        <https://arxiv.org/abs/1805.11183>`_, 2018, section 3. Lim and Johansen,
        `Particle Semi-Implicit Variational Inference <https://arxiv.org/abs/2407.00649>`_, 2024,
        for the family over particles.
    """

    _reparams = ("pathwise", "score")
    _signal_target = None

    def __init__(
        self,
        num_particles: int,
        *,
        num_mixing: int,
        reparam: str = "pathwise",
        **host_options: Any,
    ) -> None:
        check_count(num_particles, "num_particles", caller="SemiImplicitELBO")
        check_count(num_mixing, "num_mixing", caller="SemiImplicitELBO")
        if reparam not in self._reparams:
            raise ValueError(
                f'SemiImplicitELBO needs reparam="pathwise" or "score", got {reparam!r}.'
            )
        super().__init__(num_particles=num_particles, **host_options)
        self.num_mixing = num_mixing
        self.reparam = reparam

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Negative bound in nats, without gradient.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            The loss as a float. At one seed it equals that of :meth:`loss_and_grads`.

        Raises:
            ValueError: As :meth:`loss_and_grads`.
        """
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Negative bound in nats, whose gradient is that of the estimator.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            A scalar tensor for ``backward``, as ``elbo(model, guide)(*args)`` returns it.

        Raises:
            ValueError: As :meth:`loss_and_grads`.
        """
        program = program_of(self, model, guide, args, kwargs)
        particles, mixture = self._run(program._replace(is_weighted=False))
        log_p = particles.bound_scale * particles.log_p
        elbo = (log_p - mixture.log_q).detach()
        surrogate = linear_surrogate(
            log_p,
            mixture.log_q,
            mixture.log_drawn,
            weights=torch.full_like(elbo, 1 / self.num_particles),
            learning_signal=(elbo - self._baseline(elbo)) / self.num_particles,
        ).sum()
        # The second term is exactly zero: it brings the gradient and leaves the value alone.
        loss = -(elbo.mean(dim=0).sum() + (surrogate - surrogate.detach()))
        if not -float("inf") < loss.item() < float("inf"):
            refuse_log_weights(particles)
        return loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Negative bound in nats; adds the gradient to the parameters' ``grad``.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            The loss as a float.

        Raises:
            ValueError: If model and guide do not match, a site is enumerated, a shape does not fit
                its plate, a log-probability is NaN, the guide has no noise, a latent is a point
                mass, the latents differ in scale, or a plate that does not enclose all sites of
                the guide is subsampled. All before any gradient is formed.
            NotImplementedError: If a guide site samples by rejection, or a sequential plate
                encloses all sites of the guide.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return trace_particles(program_of(self, model, guide, args, kwargs), 1)

    def _run(self, program: Program) -> tuple[Particles, Mixture]:
        particles, mixtures = [], []
        K = self.num_particles
        for size in [K] if program.vectorize_particles else [1] * K:
            traces = trace_particles(program, size)
            particles.append(read_particles(program, *traces, size))
            mixtures.append(read_mixture(program, *traces, size, self.num_mixing))
        return concatenate(particles), Mixture(*map(torch.cat, zip(*mixtures, strict=True)))

    def _baseline(self, elbo: Float[Tensor, " K *batch"]) -> Float[Tensor, " K *batch"]:
        """The mean of the other particles, zero where there is none."""
        return (elbo.sum(dim=0) - elbo) / max(self.num_particles - 1, 1)
