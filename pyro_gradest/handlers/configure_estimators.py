"""The estimator of each site of a guide, chosen from outside."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from pyro_gradest.infer._discrete_sites import ESTIMATORS, DiscreteSites
from pyro_gradest.infer._modules import as_module
from pyro_gradest.infer._site_estimators import SiteConfig, check_config


def configure_estimators(fn: Callable | None = None, config: Any = None) -> Any:
    """Choose the gradient estimator of each guide site, for the losses of this package.

    Sets ``infer={"estimator": ...}`` at the guide's sites, in the place of any that the guide has
    set itself. A site's estimator is one of

    - ``"pathwise"``, ``"dreg"``, ``"stl"`` or ``"score"``, in the place of the loss's ``reparam``;
    - a learning signal, which is a function from log-weights ``[K, *batch]`` to the coefficients of
      grad log q: those of :mod:`~pyro_gradest.estimators`, such as ``vimco_learning_signal`` or
      ``partial(ovis_gamma_learning_signal, gamma=0.5)``, or your own. The site takes the score
      function with that control variate;
    - ``IMLE()``, ``AdaptiveIMLE()``, ``StraightThrough()``, ``GumbelSoftmaxST()``, ``ReinMax()`` or
      ``SIMPLE()``, for a discrete site, which :func:`imle` then lets carry a gradient.

    Sites that are not named get what the loss does by default. ``IWAE``, ``VIMCO``, ``OVIS``,
    ``NVIL`` and ``RLOO`` honour all of these; ``ReweightedWakeSleep`` ``"score"`` and ``"dreg"``,
    ``TVO`` ``"score"``, ``ImplicitELBO`` ``"pathwise"`` and ``"score"``, and all three learning
    signals for their objectives, ``SemiImplicitELBO`` no learning signals; what a loss can't honour
    is refused. The host's own losses look at ``IMLE`` and its like alone.

    Args:
        fn: A guide: a function, a module or an autoguide. Left out, a decorator is returned.
        config: Estimators by site name, or a function from sites (as the host's handlers see them)
            to estimators or ``None``.

    Returns:
        A guide with these estimators; a module where ``fn`` is one, with the same
        parameters.

    Raises:
        TypeError: If ``config`` is nothing of that, or an estimator is none.
        ValueError: If an estimator has an unknown name; when run, if a named site does not exist or
            is observed, or the site or the loss can't have its estimator.

    Bias and variance:
        Unbiased for what the loss estimates, if each estimator is: ``"pathwise"``, ``"dreg"``,
        ``"score"``, and learning signals whose control variate for a particle does not depend on
        that particle. ``"stl"`` (for several particles), ``gamma > 0`` and ``IMLE`` and its like
        are biased by design.

    Cost:
        That of the estimators. ``"dreg"`` or ``"stl"`` at a site after a ``"pathwise"`` one runs
        the guide a second time, which ``reparam="dreg"`` in the loss avoids.

    Example:
        >>> import pyro, torch
        >>> import pyro.distributions as dist
        >>> from pyro.infer import SVI
        >>> from pyro_gradest import IWAE
        >>> from pyro_gradest.estimators import vimco_learning_signal
        >>> def model():
        ...     b = pyro.sample("b", dist.Bernoulli(0.3))
        ...     y = pyro.sample("y", dist.Normal(b, 1.0))
        ...     pyro.sample("x", dist.Normal(y, 1.0), obs=torch.tensor(2.0))
        >>> @configure_estimators(config={"b": vimco_learning_signal, "y": "dreg"})
        ... def guide():
        ...     b = pyro.sample("b", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.1))))
        ...     pyro.sample("y", dist.Normal(b + pyro.param("shift", torch.tensor(0.0)), 0.7))
        >>> loss = IWAE(10, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> losses = [svi.step() for _ in range(100)]
        >>> bool(pyro.param("shift") > 0.1)
        True

    References:
        Schulman, Heess, Weber and Abbeel, `Gradient Estimation Using Stochastic Computation Graphs
        <https://arxiv.org/abs/1506.05254>`_, 2015, for gradients with several kinds of sites.
    """
    check_config(config)
    if fn is None:
        return partial(configure_estimators, config=config)
    guide = SiteConfig(config)(fn)
    if not isinstance(config, Mapping) or any(isinstance(e, ESTIMATORS) for e in config.values()):
        guide = DiscreteSites(None, may_be_idle=True)(guide)
    return as_module(fn, guide)
