"""One-hot categorical whose log-probability can be differentiated in the value."""

from pyro import distributions as dist
from pyro.ops.provenance import detach_provenance
from torch import Tensor

# How often a value's log-probability was taken in the form that has a gradient in the value.
LINEAR_LOG_PROBS = "_gradest_linear_log_probs"


def count_linear_log_prob(value: Tensor) -> None:
    setattr(value, LINEAR_LOG_PROBS, getattr(value, LINEAR_LOG_PROBS, 0) + 1)


class OneHotCategorical(dist.OneHotCategorical):
    r"""Categorical distribution of one-hot vectors, with a log-probability linear in the value.

    .. math:: \log p(z) = \sum_i z_i \log p_i

    Use it for discrete sites that carry a gradient, in model and guide alike. A log-probability
    that looks up the index of the one has no gradient in the value, and the model's prior would
    silently count for nothing.

    Args:
        probs: Probabilities, shape ``[*batch, n]``, to be normalised.
        logits: Instead of ``probs``, their logarithms up to a constant.
        validate_args: As in the host.

    Example:
        >>> import torch
        >>> site = OneHotCategorical(logits=torch.zeros(2))
        >>> value = torch.tensor([0.0, 1.0], requires_grad=True)
        >>> torch.autograd.grad(site.log_prob(value), value)
        (tensor([-0.6931, -0.6931]),)

    References:
        Liu, Dong, Liu, Yu and Gao, `Bridging Discrete and Backpropagation: Straight-Through and
        Beyond <https://arxiv.org/abs/2304.08612>`_, 2023.
    """

    def __init__(
        self,
        probs: Tensor | None = None,
        logits: Tensor | None = None,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(probs, logits, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if value.grad_fn is not None:
            count_linear_log_prob(detach_provenance(value))  # TraceGraph_ELBO wraps the value
        # 0 * -inf is nan: an impossible class has a log-probability that is only very small.
        return (value * self.logits.clamp(min=-1e30)).sum(dim=-1)

    def expand(self, batch_shape: object, _instance: object = None) -> "OneHotCategorical":
        return super().expand(batch_shape, self._get_checked_instance(type(self), _instance))
