"""Gradients through discrete sites, for any loss that differentiates through values."""

from collections.abc import Callable
from typing import Any

from pyro_gradest.infer._discrete_sites import DiscreteSites


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
    under noise either, take ``ReinMax``, ``SIMPLE`` and ``StraightThrough`` alone. For several
    draws use the objective's ``num_particles``. The mean over particles, scales and subsampled
    plates multiply the gradient that arrives at a site, and with it the step of ``IMLE``, but not
    that of ``AdaptiveIMLE``, whose state is kept in the parameter store as ``"<site>_imle"`` and
    updated in each ``backward()``; ``torch.autograd.grad`` leaves it as it is. An error of a solver
    bears a note that names the site.

    Args:
        fn: A guide, or a model: one that samples the host's ``OneHotCategorical`` needs to be
            wrapped, too. Left out, a decorator and context manager is returned.
        config: Estimators by site name, one estimator for all latent discrete sites, or a function
            from site names to estimators or ``None``: ``IMLE``, ``AdaptiveIMLE``,
            ``StraightThrough``, ``GumbelSoftmaxST``, ``ReinMax`` or ``SIMPLE``. Left out, sites say
            so themselves, by ``infer={"estimator": IMLE()}``.

    Returns:
        ``fn`` with these gradients; a module where ``fn`` is one, with the same parameters.

    Raises:
        TypeError: If ``config`` is nothing of that, or returns it when run.
        ValueError: When run, if a named site does not exist, is observed, enumerated, not
            discrete, or draws integers; or if an estimator does not draw from the site's
            distribution, or is not for it; or if nothing says which sites get which estimator.

    Bias and variance:
        Biased by design, as the estimator is: for objectives whose log-densities are linear or
        quadratic in the states ``IMLE`` is unbiased in the limit of a small step and ``ReinMax``
        unbiased, also at ``KSubset`` and ``SpanningTree`` sites, where ``IMLE``, if at all, is so
        for linear ones; ``SIMPLE``, which ``StraightThrough`` is there, is unbiased for these. The
        KL divergence of ``TraceMeanField_ELBO`` is exact, and so is its gradient.

    Cost:
        That of the estimator.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro_gradest import AdaptiveIMLE
        >>> def guide():
        ...     pyro.sample("z", dist.Bernoulli(logits=pyro.param("theta", torch.tensor(0.5))))
        >>> trace = pyro.poutine.trace(imle(guide, {"z": AdaptiveIMLE()})).get_trace()
        >>> trace.nodes["z"]["value"].requires_grad
        True

    References:
        Niepert, Minervini and Franceschi, `Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions <https://arxiv.org/abs/2106.01798>`_, 2021.
    """
    messenger = DiscreteSites(config)
    return messenger if fn is None else messenger(fn)
