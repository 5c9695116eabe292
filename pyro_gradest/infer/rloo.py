"""The ELBO with leave-one-out baselines for the score function.

Notation: lw_k = log p(x, z_k) - log q(z_k | x), h_k the gradient of log q(z_k | x).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators import reinforce_leave_one_out_learning_signal
from pyro_gradest.infer._credit import Credit
from pyro_gradest.infer._trace import Program
from pyro_gradest.infer.multisample_elbo import MultiSampleELBO


class RLOO(MultiSampleELBO):
    r"""The ELBO over several draws, each with the others for a baseline at discrete sites.

    .. math:: \mathrm{ELBO} = E\Big[ \frac1K \sum_{k=1}^K \log \frac{p(x, z_k)}{q(z_k | x)} \Big]

    Sites without a reparameterised sampler get the score function, where draw k is credited with
    its log-weight minus the mean of the others; there is one baseline for each element of the
    plates common to all sites, or, with ``credit="downstream"``, of those of the site. The draws
    are not weighed against each other, so that global latents and mini-batches go together.

    Args:
        num_particles: K, the number of draws, at least 2.
        credit: ``"whole"`` credits each draw with its whole log-weight; ``"downstream"`` each
            score-function site with those terms of it that depend on the site's draw: an element
            of a plate with its own, and also where other sites lie outside of the plate.
            Dependencies are found by the host's provenance, as in its ``TraceGraph_ELBO``. Within a
            plate they are taken to be from element to element, as the plate declares: what is
            computed from several of its elements may come back into it by way of a site outside
            only. Where a draw turns into a Python number (an ``if``, ``.item()``, ``.numpy()``) or
            is written into a tensor (``tensor[i] = draw``), selects entries (``x[draw > 0]``) or
            passes through ``torch.func``, provenance ends, and all that follows is taken to depend
            on the draw.
        reparam: What guide sites with a reparameterised sampler get. ``"pathwise"`` differentiates
            through their values; ``"stl"`` and ``"dreg"``, which are the same here, leave the
            score of their density out, whose mean is zero; ``"score"`` takes the score function at
            every random site. A site may choose for itself, by ``infer={"estimator": ...}`` or
            ``configure_estimators``.
        num_replicates: Number of independent averages of K draws to average.
        chunk_size: Run particles in chunks of this size: memory does not grow with
            ``num_particles``, at two forward passes instead of one.
        **host_options: The arguments of the host's :class:`~pyro.infer.elbo.ELBO`:
            ``max_plate_nesting``, ``vectorize_particles``, ``strict_enumeration_warning``,
            ``retain_graph``, ``ignore_jit_warnings``, ``jit_options``, ``tail_adaptive_beta``.

    Raises:
        TypeError: If a count is not an integer, or an option is unknown.
        ValueError: If ``num_particles < 2`` or an option has a value that makes no sense; at the
            first evaluation, if model and guide do not match; with ``credit="downstream"``, if
            the guide has factors, or particles one by one have different sites.

    Bias and variance:
        Unbiased for the gradient of the ELBO, with each ``reparam`` and ``credit``. The variance
        falls as 1/K. ``credit="downstream"`` leaves out terms of mean zero, which lowers it as a
        rule, and most where a latent lies outside of the plate of the others; but not always, as
        such a term may happen to be correlated with what is left.

    Cost:
        K evaluations of model and guide, and O(K) to combine them. ``credit="downstream"`` adds
        the host's bookkeeping for every operation of model and guide.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> import torch
        >>> from pyro.infer import SVI
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.3))
        ...         pyro.sample("x", dist.Normal(3 * z, 1.0), obs=x)
        >>> def guide(x):
        ...     slope = pyro.param("slope", torch.tensor(0.1))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Bernoulli(logits=slope * x))
        >>> loss = RLOO(num_particles=10, vectorize_particles=True)
        >>> svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
        >>> x = torch.tensor([-0.5, 0.2, 2.9, 3.3])
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> bool(pyro.param("slope") > 0.1)
        True

    References:
        Kool, van Hoof and Welling, `Buy 4 REINFORCE Samples, Get a Baseline for Free!
        <https://openreview.net/forum?id=r1lgTGL5DE>`_, 2019. Schulman, Heess, Weber and Abbeel,
        `Gradient Estimation Using Stochastic Computation Graphs
        <https://arxiv.org/abs/1506.05254>`_, 2015, theorem 1, for the costs downstream.
    """

    _least_particles = 2

    def __init__(
        self,
        num_particles: int,
        *,
        credit: str = "whole",
        reparam: str = "pathwise",
        num_replicates: int = 1,
        chunk_size: int | None = None,
        **host_options: Any,
    ) -> None:
        super().__init__(
            num_particles,
            reparam=reparam,
            alpha=1.0,
            num_replicates=num_replicates,
            chunk_size=chunk_size,
            **host_options,
        )
        if credit not in ("whole", "downstream"):
            raise ValueError(f'RLOO needs credit="whole" or "downstream", got {credit!r}.')
        self.credit = credit
        self._has_credits = credit == "downstream"

    def _learning_signal(
        self,
        program: Program,
        log_weights: Float[Tensor, " K *batch"],
        auxiliary_log_weights: Float[Tensor, " S *batch"] | None,
    ) -> Float[Tensor, " K *batch"]:
        if self._has_credits:
            return torch.zeros_like(log_weights)
        return reinforce_leave_one_out_learning_signal(log_weights)

    def _signals_of_credits(
        self, credits: dict[str, Credit]
    ) -> dict[str, Float[Tensor, " runs *plates"]]:
        signals = {}
        for site, credit in credits.items():
            costs = self._by_replicate(credit.cost)
            signal = reinforce_leave_one_out_learning_signal(costs) / self.num_replicates
            signals[site] = signal.reshape(credit.cost.shape)
        return signals
