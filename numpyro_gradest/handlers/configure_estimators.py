"""The estimator of each site of a guide, chosen from outside."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from numpyro_gradest.infer._discrete_sites import ESTIMATORS, DiscreteSites
from numpyro_gradest.infer._site_estimators import SiteConfig, check_config


def configure_estimators(fn: Callable | None = None, config: Any = None) -> Any:
    """Choose the gradient estimator of each guide site, for the losses of this package.

    Sets ``infer={"estimator": ...}`` at the guide's sites, in the place of any that the guide has
    set itself. A site's estimator is one of

    - ``"pathwise"``, ``"dreg"``, ``"stl"`` or ``"score"``, in the place of the loss's ``reparam``;
    - a learning signal, which is a function from log-weights ``[K, *batch]`` to the coefficients of
      grad log q: those of :mod:`~numpyro_gradest.estimators`, such as ``vimco_learning_signal`` or
      ``partial(ovis_gamma_learning_signal, gamma=0.5)``, or your own. The site takes the score
      function with that control variate;
    - ``IMLE()``, ``AdaptiveIMLE()``, ``StraightThrough()``, ``GumbelSoftmaxST()``, ``ReinMax()`` or
      ``SIMPLE()``, for a discrete site, which :func:`imle` then lets carry a gradient
      (``AdaptiveIMLE`` needs :func:`adapt_imle` too, which takes the same ``config`` if it is by
      site name).

    Sites that are not named get what the loss does by default. ``IWAE``, ``VIMCO``, ``OVIS``,
    ``NVIL`` and ``RLOO`` honour all of these; ``ReweightedWakeSleep`` ``"score"`` and ``"dreg"``,
    ``TVO`` ``"score"``, ``ImplicitELBO`` ``"pathwise"`` and ``"score"``, and all three learning
    signals for their objectives, ``SemiImplicitELBO`` no learning signals; what a loss can't honour
    is refused. The host's own losses look at ``IMLE`` and its like alone.

    Args:
        fn: A guide: a function, also one that calls the host's flax or haiku modules, or an
            autoguide. Left out, a decorator is returned.
        config: Estimators by site name, or a function from sites (as the host's handlers see them)
            to estimators or ``None``.

    Returns:
        A guide with these estimators. Of an autoguide keep the original, too, for its
        own methods.

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
        That of the estimators. Where ``"dreg"`` and others along the path meet, the guide is traced
        three times more and the model once.

    Example:
        >>> import numpyro, optax
        >>> import numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI
        >>> from numpyro_gradest import IWAE
        >>> from numpyro_gradest.estimators import vimco_learning_signal
        >>> def model():
        ...     b = numpyro.sample("b", dist.Bernoulli(0.3))
        ...     y = numpyro.sample("y", dist.Normal(b, 1.0))
        ...     numpyro.sample("x", dist.Normal(y, 1.0), obs=2.0)
        >>> @configure_estimators(config={"b": vimco_learning_signal, "y": "dreg"})
        ... def guide():
        ...     b = numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("logit", 0.1)))
        ...     numpyro.sample("y", dist.Normal(b + numpyro.param("shift", 0.0), 0.7))
        >>> svi = SVI(model, guide, optax.adam(0.05), loss=IWAE(10))
        >>> result = svi.run(random.key(0), 100, progress_bar=False)
        >>> bool(result.params["shift"] > 0.1)
        True

    References:
        Schulman, Heess, Weber and Abbeel, `Gradient Estimation Using Stochastic Computation Graphs
        <https://arxiv.org/abs/1506.05254>`_, 2015, for gradients with several kinds of sites.
    """
    check_config(config)
    if fn is None:
        return partial(configure_estimators, config=config)
    guide = SiteConfig(fn, config)
    if not isinstance(config, Mapping) or any(isinstance(e, ESTIMATORS) for e in config.values()):
        return DiscreteSites(guide, None, may_be_idle=True)
    return guide
