"""Gradients through discrete sites, for any loss that differentiates through values."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from numpyro_gradest.estimators import AdaptiveIMLE
from numpyro_gradest.infer._discrete_sites import (
    ESTIMATORS,
    DiscreteSites,
    as_choice,
    is_moved,
    is_state,
    state_name,
    update_state,
)


class AdaptIMLEState(NamedTuple):
    """What the optimizer of :func:`adapt_imle` keeps."""

    inner: Any
    """The state of the optimizer that it was given."""
    held: dict[str, Array]
    """The states of ``AdaptiveIMLE``, by parameter, as they have to be found."""


def imle(fn: Callable | None = None, config: Any = None) -> Any:
    """Let discrete sites of a program carry the gradient of an estimator such as ``IMLE``.

    The sites keep their distribution and their exact log-probability: draws are exactly discrete,
    and any objective that differentiates through reparameterised values trains them, as
    ``Trace_ELBO``, ``TraceMeanField_ELBO`` (with its analytic KL) and ``IWAE`` do. Losses of this
    package that take the score function there, as with ``reparam="score"``, refuse it, and so do
    sites that are enumerated.

    ``Bernoulli``, ``OneHotCategorical``, ``KSubset``, ``SpanningTree`` and ``PerturbAndMAP`` sites
    can carry a gradient, also under ``to_event``, ``mask`` and in plates. At ``KSubset`` sites that
    of ``IMLE`` is a difference of exact draws from the same random numbers, not of the k largest
    entries under noise, which have another law. ``SpanningTree`` sites, whose draws are no maxima
    under noise either, take ``ReinMax``, ``SIMPLE`` and ``StraightThrough`` alone. Sites within the
    host's ``scan`` and ``cond`` carry a gradient too, but not that of ``AdaptiveIMLE``. For several
    draws use the objective's ``num_particles``. The mean over particles, scales and subsampled
    plates multiply the gradient that arrives at a site, and with it the step of ``IMLE``, but not
    that of ``AdaptiveIMLE``, whose state is the parameter ``"<site>_imle"`` in the state of
    ``SVI``: wrap the optimizer in :func:`adapt_imle`. Under the host's own objectives ``SVI`` warns
    of discrete latents, as it does not know of the gradient. An error of a solver names the site.

    Args:
        fn: A guide, or a model. Left out, a decorator and context manager is returned.
        config: Estimators by site name, one estimator for all latent discrete sites, or a function
            from site names to estimators or ``None``: ``IMLE``, ``AdaptiveIMLE``,
            ``StraightThrough``, ``GumbelSoftmaxST``, ``ReinMax`` or ``SIMPLE``. Left out, sites say
            so themselves, by ``infer={"estimator": IMLE()}``.

    Returns:
        ``fn`` with these gradients.

    Raises:
        TypeError: If ``config`` is nothing of that, or returns it when run.
        ValueError: When run, if a named site does not exist, is observed, enumerated, not
            discrete, draws integers, or is within ``scan`` or ``cond`` with an estimator that
            keeps a state; or if an estimator does not draw from the site's distribution, or is not
            for it; or if nothing says which sites get which estimator.

    Bias and variance:
        Biased by design, as the estimator is: for objectives whose log-densities are linear or
        quadratic in the states ``IMLE`` is unbiased in the limit of a small step and ``ReinMax``
        unbiased, also at ``KSubset`` and ``SpanningTree`` sites, where ``IMLE``, if at all, is so
        for linear ones; ``SIMPLE``, which ``StraightThrough`` is there, is unbiased for these. The
        KL divergence of ``TraceMeanField_ELBO`` is exact, and so is its gradient.

    Cost:
        That of the estimator.

    Example:
        >>> import jax, numpyro
        >>> import numpyro.distributions as dist
        >>> from numpyro_gradest import IMLE
        >>> def value(theta):
        ...     def guide():
        ...         return numpyro.sample("z", dist.Bernoulli(logits=theta))
        ...     return numpyro.handlers.seed(imle(guide, {"z": IMLE(step_size=9.0)}), 0)()
        >>> jax.grad(value)(0.5)
        Array(0.05555556, dtype=float32)

    References:
        Niepert, Minervini and Franceschi, `Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions <https://arxiv.org/abs/2106.01798>`_, 2021.
    """
    return DiscreteSites(fn, config)


def adapt_imle(optimizer: Any, config: Any) -> Any:
    """Let an optax optimizer update the state of ``AdaptiveIMLE`` sites by their own rule.

    The state is a parameter, so that it is saved and restored with the state of ``SVI`` and works
    under ``jit``, ``scan`` and any number of particles; what arrives as its gradient are the
    counts of non-zero entries. All other parameters go to ``optimizer``, and so what transforms
    gradients or updates belongs there: ``adapt_imle(optax.chain(optax.clip(1.0), optax.adam(1e-3)),
    config)``. Around ``adapt_imle`` clipping does no harm; a transformation that would change the
    state of a site makes the next draw there raise an error.

    Args:
        optimizer: An optax optimizer for the other parameters.
        config: What :func:`imle` was given, or :func:`configure_estimators` by site name; entries
            of other estimators are passed over.

    Returns:
        An optax optimizer.

    Raises:
        TypeError: If ``optimizer`` is not from optax.
        ValueError: When initialised, if a state belongs to a site that ``config`` does not have.

    Bias and variance:
        Unbiased: the other parameters are updated as by ``optimizer``.

    Cost:
        O(1) per site.

    Example:
        >>> import optax
        >>> from numpyro_gradest import AdaptiveIMLE
        >>> optimizer = adapt_imle(optax.adam(1e-3), {"z": AdaptiveIMLE()})

    References:
        Minervini, Franceschi and Niepert, `Adaptive Perturbation-Based Gradient Estimation for
        Discrete Latent Variable Models <https://arxiv.org/abs/2209.04862>`_, 2023.
    """
    if not all(hasattr(optimizer, name) for name in ("init", "update", "_replace")):
        raise TypeError(
            f"adapt_imle needs an optax optimizer, such as optax.adam(1e-3), got {optimizer!r}. "
            "Those of numpyro.optim have one of the same name in optax."
        )
    if isinstance(config, Mapping):
        config = {name: one for name, one in config.items() if isinstance(one, ESTIMATORS)}
    choose = as_choice(config)

    def estimator_of(parameter: str) -> AdaptiveIMLE | None:
        site = parameter.removesuffix(state_name(""))
        estimator = choose(site) if site != parameter else None
        return estimator if isinstance(estimator, AdaptiveIMLE) else None

    def others(tree: dict[str, Any]) -> dict[str, Any]:
        return {name: leaf for name, leaf in tree.items() if estimator_of(name) is None}

    def init(params: dict[str, Any]) -> AdaptIMLEState:
        for name, leaf in params.items():
            if is_state(name, leaf) and estimator_of(name) is None:
                raise ValueError(
                    f"The program has a state of AdaptiveIMLE, {name!r}, but the config of "
                    f"adapt_imle no AdaptiveIMLE for site {name.removesuffix(state_name(''))!r}. "
                    "Give it one there, by the name that the site has under handlers.scope."
                )
        held = {name: leaf for name, leaf in params.items() if estimator_of(name) is not None}
        return AdaptIMLEState(optimizer.init(others(params)), held)

    def update(
        gradients: dict[str, Any], state: AdaptIMLEState, params: dict[str, Any], **extra: Any
    ) -> tuple[dict[str, Array], AdaptIMLEState]:
        updates, inner = optimizer.update(others(gradients), state.inner, others(params), **extra)
        updates, held = dict(updates), {}
        for name, known in state.held.items():
            estimator = estimator_of(name)
            assert estimator is not None
            new = update_state(estimator, known, gradients[name])
            # The next draw is refused; no state but this one's own counts.
            held[name] = jnp.where(is_moved(known, params[name]), new.at[3:].set(1.0), new)
            updates[name] = held[name] - params[name]
        return updates, AdaptIMLEState(inner, held)

    return optimizer._replace(init=init, update=update)
