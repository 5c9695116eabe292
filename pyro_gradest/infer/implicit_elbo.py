"""The ELBO of guides with sites that can only be sampled.

Notation: K = num_particles draws z_k; g estimates the score, grad log q, of the implicit sites.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from pyro.infer import ELBO
from torch import Tensor

from pyro_gradest.estimators import (
    IMQ,
    calibrate_score,
    entropy_surrogate,
    fit_whitening,
    knn_entropy,
    linear_surrogate,
    median_bandwidth,
    stein_score,
)
from pyro_gradest.estimators._validation import check_count
from pyro_gradest.infer._implicit import (
    ImplicitGroup,
    Parents,
    concatenate_groups,
    implicit_groups,
    implicit_parents,
)
from pyro_gradest.infer._particles import (
    Particles,
    concatenate,
    read_particles,
    refuse_log_weights,
)
from pyro_gradest.infer._random import replayed
from pyro_gradest.infer._trace import Program, deepest_plate, trace_particles
from pyro_gradest.infer.multisample_elbo import program_of, signal_surrogate

ScoreEstimator = Callable[[Float[Tensor, " *plates K D"]], Float[Tensor, " *plates K D"]]


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

    To anneal log p, scale the model alone, ``poutine.scale(model, beta)``, by a beta that rises to
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
        host_options: Options of the host's ``ELBO``: ``max_plate_nesting``,
            ``vectorize_particles``, ``retain_graph`` and others.

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
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> from pyro_gradest import Implicit
        >>> pyro.clear_param_store()
        >>> pyro.set_rng_seed(0)
        >>> def model():
        ...     pyro.sample("z", dist.Normal(3.0, 0.5))
        >>> def guide():
        ...     loc = pyro.param("loc", torch.tensor(0.0))
        ...     scale = pyro.param("scale", torch.tensor(1.0))
        ...     noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        ...     pyro.sample("z", Implicit(loc + scale * noise))
        >>> loss = ImplicitELBO(num_particles=50, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> losses = [svi.step() for _ in range(200)]
        >>> bool(abs(pyro.param("loc") - 3.0) < 0.2 and abs(pyro.param("scale").abs() - 0.5) < 0.1)
        True

    References:
        Li and Turner, `Gradient Estimators for Implicit Models
        <https://arxiv.org/abs/1705.07107>`_, 2018, section 2.1 and eq. 3.
    """

    _reparams = ("pathwise", "score")
    _signal_target = 1.0

    def __init__(
        self,
        num_particles: int,
        *,
        score_estimator: ScoreEstimator | None = None,
        reparam: str = "pathwise",
        **host_options: Any,
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
        super().__init__(num_particles=num_particles, **host_options)
        self.reparam = reparam
        self.score_estimator = score_estimator or _calibrated_stein_score
        self._parents: tuple[Callable, Parents] | None = None

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Estimate of the negative ELBO in nats, without gradient.

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
            particles, groups = self._run(self._program(model, guide, args, kwargs))
            loss = -self._elbo(particles, groups).item()
        _check_loss(loss, particles)
        return loss

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Float[Tensor, ""]:
        """Estimate of the negative ELBO in nats, whose gradient is that of the estimator.

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
        program = self._program(model, guide, args, kwargs)
        particles, groups = self._run(program)
        surrogate = self._explicit_surrogate(program, particles)
        for group in groups:
            samples = group.samples.movedim(0, -2)
            entropy = entropy_surrogate(samples, score_estimator=self.score_estimator)
            surrogate = surrogate + (group.weight * entropy).sum()
        # The second term is exactly zero: it brings the gradient and leaves the value alone.
        loss = -(self._elbo(particles, groups) + (surrogate - surrogate.detach()))
        _check_loss(loss.item(), particles)
        return loss

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Estimate of the negative ELBO in nats; adds the gradient to the parameters' ``grad``.

        Args:
            model: Pyro model.
            guide: Pyro guide.
            args: Arguments of model and guide.
            kwargs: Keyword arguments of model and guide.

        Returns:
            The loss as a float.

        Raises:
            ValueError: If model and guide do not match, a site is enumerated, a shape does not fit
                its plate, a draw or log-probability is not finite, or an implicit site is
                observed, has no noise, or depends on another site. All before any gradient is
                formed.
        """
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> tuple:
        return trace_particles(self._program(model, guide, args, kwargs), 1)

    def _guess_max_plate_nesting(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> None:
        """As the host does, but without evaluating densities."""
        self.max_plate_nesting = deepest_plate(model, guide, args, kwargs)
        self.max_plate_nesting += self.vectorize_particles

    def _program(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Program:
        program = program_of(self, model, guide, args, kwargs)
        if self._parents is None or self._parents[0] != guide:
            with replayed():
                self._parents = guide, implicit_parents(guide, args, kwargs)
        return program._replace(parents=self._parents[1], is_weighted=False)

    def _run(self, program: Program) -> tuple[Particles, list[ImplicitGroup]]:
        particles, groups = [], []
        K = self.num_particles
        for size in [K] if program.vectorize_particles else [1] * K:
            traces = trace_particles(program, size)
            particles.append(read_particles(program, *traces, size))
            groups.append(implicit_groups(traces[1], size))
        joined = concatenate_groups(groups)
        for group in joined:
            if not group.samples.isfinite().all():
                raise ValueError(
                    f"A draw of the implicit sites {list(group.sites)} is not finite. Check the "
                    "guide's parameters and learning rate; no parameter has been updated."
                )
        return concatenate(particles), joined

    def _explicit_surrogate(self, program: Program, particles: Particles) -> Float[Tensor, ""]:
        elbo, scale = particles.log_weights, particles.bound_scale / self.num_particles
        others = (elbo.sum(dim=0) - elbo) / (self.num_particles - 1)
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

    def _elbo(self, particles: Particles, groups: list[ImplicitGroup]) -> Float[Tensor, ""]:
        elbo = (particles.bound_scale[0] * particles.log_weights.mean(dim=0)).sum()
        for group in groups:
            entropy = knn_entropy(group.samples.detach().movedim(0, -2))
            elbo = elbo + (group.weight * entropy).sum()
        return elbo


def _calibrated_stein_score(samples: Tensor) -> Tensor:
    # The narrower the kernel, the less the ridge shrinks what is not linear, such as the way
    # between modes, and the noisier the scores; what is linear is calibrated anyway.
    whitening = fit_whitening(samples)
    whitened = whitening.points(samples)
    kernel = IMQ(0.7 * median_bandwidth(whitened))
    scores = stein_score(whitened, kernel=kernel, whiten=False)
    return calibrate_score(samples, whitening.score(scores))


def _check_loss(loss: float, particles: Particles) -> None:
    if not -float("inf") < loss < float("inf"):
        refuse_log_weights(particles)
