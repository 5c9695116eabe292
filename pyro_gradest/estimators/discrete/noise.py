"""Noise that turns the maximiser of a linear objective into a draw: small objects to pass on."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_gradest.estimators._validation import check_count


class Noise(ABC):
    """A law of independent noise, one draw for every entry of theta.

    Derive a class with the one method to use noise of your own.
    """

    @abstractmethod
    def sample_like(
        self, theta: Float[Tensor, " *shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " *shape"]:
        """Draws of the shape and dtype of ``theta``."""


@dataclass(frozen=True)
class GumbelNoise(Noise):
    """Standard Gumbel noise.

    The default: at temperature 1 an argmax draws from softmax(theta), the k largest are drawn one
    after the other without replacement, and a ranking follows Plackett and Luce.

    Bias and variance:
        Unbiased: the draws have exactly the laws above.

    Cost:
        One uniform number and two logarithms per entry.

    Example:
        >>> import torch
        >>> GumbelNoise().sample_like(torch.zeros(3, 2)).shape
        torch.Size([3, 2])

    References:
        Yellott, The relationship between Luce's choice axiom, Thurstone's theory of comparative
        judgment, and the double exponential distribution, 1977.
    """

    def sample_like(
        self, theta: Float[Tensor, " *shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " *shape"]:
        return _exponential_like(theta, generator).log_().neg_()


@dataclass(frozen=True)
class LogisticNoise(Noise):
    """Standard logistic noise, the difference of two Gumbel draws.

    The default of :func:`threshold`, which at temperature 1 then draws Bernoulli values.

    Bias and variance:
        Unbiased: ``theta + noise > 0`` has probability sigmoid(theta) exactly.

    Cost:
        Two uniform numbers and four logarithms per entry.

    Example:
        >>> import torch
        >>> LogisticNoise().sample_like(torch.zeros(3, 2)).shape
        torch.Size([3, 2])

    References:
        Maddison, Mnih and Teh, `The Concrete Distribution
        <https://arxiv.org/abs/1611.00712>`_, 2017, appendix B.
    """

    def sample_like(
        self, theta: Float[Tensor, " *shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " *shape"]:
        exponentials = _exponential_like(theta, generator), _exponential_like(theta, generator)
        return exponentials[0].log_().sub_(exponentials[1].log_())


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Standard Gaussian noise.

    Its lighter tails suit solvers whose states have many entries, such as paths; no state's
    probability is known in closed form.

    Bias and variance:
        Biased by design as a sampler of softmax(theta): the law of the maximiser is another one.

    Cost:
        One normal number per entry.

    Example:
        >>> import torch
        >>> GaussianNoise().sample_like(torch.zeros(3, 2)).shape
        torch.Size([3, 2])

    References:
        Berthet, Blondel, Teboul, Cuturi, Vert and Bach, `Learning with Differentiable Perturbed
        Optimizers <https://arxiv.org/abs/2002.08676>`_, 2020.
    """

    def sample_like(
        self, theta: Float[Tensor, " *shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " *shape"]:
        return torch.randn(theta.shape, dtype=theta.dtype, device=theta.device, generator=generator)


@dataclass(frozen=True)
class SumOfGammaNoise(Noise):
    r"""Noise of which a sum of k draws is close to a Gumbel draw.

    .. math:: \frac1k \Big( \sum_{i=1}^s \mathrm{Gamma}(1/k, \text{scale } k/i) - \log s \Big)

    Offered for comparison with the paper, not recommended: for subsets of five of ten items at
    temperature 1 it lies further from :math:`p(z) \propto e^{\langle z, \theta \rangle}` than
    Gumbel noise does, and takes most of a draw's time.

    Args:
        num_ones: k, the number of ones in a state.
        num_terms: s, at which the series is cut.

    Raises:
        ValueError: If either is not a positive integer.

    Bias and variance:
        Biased by design as a sampler of the exponential family that it is made for.

    Cost:
        s gamma draws per entry.

    Example:
        >>> import torch
        >>> SumOfGammaNoise(num_ones=5).sample_like(torch.zeros(3, 2)).shape
        torch.Size([3, 2])

    References:
        Niepert, Minervini and Franceschi, `Implicit MLE: Backpropagating Through Discrete
        Exponential Family Distributions <https://arxiv.org/abs/2106.01798>`_, 2021, theorem 1.
    """

    num_ones: int
    num_terms: int = 10

    def __post_init__(self) -> None:
        check_count(self.num_ones, "num_ones", caller="SumOfGammaNoise")
        check_count(self.num_terms, "num_terms", caller="SumOfGammaNoise")

    def sample_like(
        self, theta: Float[Tensor, " *shape"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, " *shape"]:
        concentration = torch.full_like(theta, 1 / self.num_ones)
        total = torch.zeros_like(theta)
        for i in range(1, self.num_terms + 1):
            # torch.distributions.Gamma draws by the same function, but takes no generator.
            total += torch._standard_gamma(concentration, generator=generator) / i
        return total - math.log(self.num_terms) / self.num_ones


def _exponential_like(theta: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = torch.rand(theta.shape, dtype=theta.dtype, device=theta.device, generator=generator)
    # Zero is among the values of rand, and would be infinitely large; one is not. In place, for
    # arrays that stay in the cache.
    return uniform.clamp_min_(torch.finfo(theta.dtype).eps / 4).log_().neg_()
