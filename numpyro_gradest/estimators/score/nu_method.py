"""The nu-method: a score among gradient fields, by accelerated iteration instead of a ridge.

Notation follows Zhou, Shi and Zhu (2020): M samples (our N), Gamma the curl-free kernel, L and zeta
as in the kernel exponential family, t the iteration, with regularisation lambda = t^-2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from numpyro_gradest.estimators._validation import check_count
from numpyro_gradest.estimators.score._standardize import standardize
from numpyro_gradest.estimators.score._validation import as_samples
from numpyro_gradest.estimators.score.exponential_family import CurlFreeFit
from numpyro_gradest.estimators.score.kernels import CurlFree, RadialKernel

# Coefficients, those before, their weight of the divergence and the one before, scores.
_State = tuple[Array, Array, Array, Array, Array]


def fit_nu_method(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    num_iterations: int = 30,
    nu: float = 1.0,
    whiten: bool = True,
) -> CurlFreeFit:
    """Score by the nu-method, with what it takes to evaluate it at other points.

    As :func:`nu_method_score`, which returns the estimate at the samples alone.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, made curl-free; ``None`` is IMQ at the median
            distance.
        num_iterations: t >= 1.
        nu: Order of the method, positive.
        whiten: Estimate in coordinates with covariance one.

    Returns:
        A :class:`CurlFreeFit`, detached, with the leading axes of the samples.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or an option makes no sense.

    Bias and variance:
        Biased by design: fewer iterations shrink the score more.

    Cost:
        O(N^2 D) time per iteration and O(N^2 + N D) memory per batch element; evaluation at P
        points O(N P D).

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> fit = fit_nu_method(jnp.linspace(-2, 2, 50)[:, None])
        >>> print(np.abs(fit.score(jnp.array([[0.0]]))) < 1e-2)  # a symmetric density
        [[ True]]

    References:
        Zhou, Shi and Zhu, `Nonparametric Score Estimators <https://arxiv.org/abs/2005.10099>`_,
        2020, section 3.
    """
    return _fit(samples, kernel, num_iterations, nu, whiten, caller="fit_nu_method")


def nu_method_score(
    samples: Float[Array, " *batch N D"],
    *,
    kernel: RadialKernel | None = None,
    num_iterations: int = 30,
    nu: float = 1.0,
    whiten: bool = True,
) -> Float[Array, " *batch N D"]:
    r"""Score by the nu-method, an accelerated iteration stopped early, at samples of q.

    .. math::
        \hat s_t = \hat s_{t-1} + u_t (\hat s_{t-1} - \hat s_{t-2})
            - \omega_t (L \hat s_{t-1} + \zeta), \qquad \hat s_0 = 0

    .. math::
        u_t = \frac{(t-1)(2t-3)(2t+2\nu-1)}{(t+2\nu-1)(2t+4\nu-1)(2t+2\nu-3)}, \qquad
        \omega_t = \frac{4 (2t+2\nu-1)(t+\nu-1)}{(t+2\nu-1)(2t+4\nu-1)}

    The iteration needs an operator no larger than 1, which
    :class:`CurlFree`, with Gamma(x, x) = I, gives for every kernel and bandwidth.

    Args:
        samples: Independent draws of q, shape ``[*batch, N, D]``, N >= 2, float32 or float64.
        kernel: :class:`RBF` or :class:`IMQ`, made curl-free; its bandwidth in whitened units or
            none; ``None`` is IMQ at the median distance.
        num_iterations: t >= 1. It acts as a ridge of N / t^2 would, so take more for more samples.
        nu: Order of the method, positive.
        whiten: Estimate in coordinates with covariance one, and map the score back.

    Returns:
        Detached estimate of grad log q at each sample, in the inverse units of the samples, shape
        ``[*batch, N, D]``. Zero where all samples coincide.

    Raises:
        TypeError: If ``samples`` is neither float32 nor float64.
        ValueError: If N < 2, a sample is not finite, or an option makes no sense.

    Bias and variance:
        Biased by design: fewer iterations shrink the score more.

    Cost:
        O(N^2 D) time per iteration and O(N^2 + N D) memory per batch element; nothing is
        factorised, and the number of operations is known beforehand.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> samples = jax.scipy.special.ndtri(jnp.linspace(0.01, 0.99, 50))[:, None]  # normal
        >>> shrinkage = -(nu_method_score(samples) * samples).mean()
        >>> print(np.asarray(shrinkage).round(2))  # 1 of the exact score, -x
        0.91

    References:
        Zhou, Shi and Zhu, `Nonparametric Score Estimators <https://arxiv.org/abs/2005.10099>`_,
        2020, section 3. Scaling the kernel to Gamma(x, x) = I is ours.
    """
    return _fit(samples, kernel, num_iterations, nu, whiten, caller="nu_method_score").scores


def _fit(
    samples: Array,
    kernel: RadialKernel | None,
    num_iterations: int,
    nu: float,
    whiten: bool,
    *,
    caller: str,
) -> CurlFreeFit:
    samples = as_samples(samples, caller=caller)
    check_count(num_iterations, "num_iterations", caller=caller)
    if not nu > 0:
        raise ValueError(f"{caller} needs nu > 0, got {nu}. Use nu=1.0.")
    whitening, points, kernel, _ = standardize(samples, kernel, whiten, caller=caller)
    curl_free = CurlFree(kernel)
    gamma = curl_free.operator(points, points)
    divergence = curl_free.divergence(points, points)

    # s_t = Gamma c_t - w_t (M zeta): the iteration for s becomes one for c and the number w.
    num_samples = points.shape[-2]
    zero, zeros = jnp.zeros((), points.dtype), jnp.zeros_like(points)

    def iterate(state: _State, rates: Float[Array, " 2"]) -> tuple[_State, None]:
        coefficients, previous, weight, previous_weight, scores = state
        momentum, step = rates[0], rates[1] / num_samples
        change = momentum * (coefficients - previous) - step * scores
        previous, coefficients = coefficients, coefficients + change
        weight_change = momentum * (weight - previous_weight) + step
        previous_weight, weight = weight, weight + weight_change
        scores = gamma(coefficients) - weight * divergence
        return (coefficients, previous, weight, previous_weight, scores), None

    rates = jnp.array([_rates(t, nu) for t in range(1, num_iterations + 1)], points.dtype)
    start = (zeros, zeros, zero, zero, zeros)
    (coefficients, _, weight, _, scores), _ = jax.lax.scan(iterate, start, rates)
    return CurlFreeFit(
        scores=whitening.score(scores),
        whitening=whitening,
        whitened=points,
        kernel=kernel,
        coefficients=coefficients,
        divergence_weight=jnp.broadcast_to(weight, points.shape[:-2]),
    )


def _rates(t: int, nu: float) -> tuple[float, float]:
    """u_t and omega_t."""
    common = (2 * t + 2 * nu - 1) / ((t + 2 * nu - 1) * (2 * t + 4 * nu - 1))
    # The denominator of u_t may vanish at t = 1, where its numerator does too.
    momentum = 0.0 if t == 1 else (t - 1) * (2 * t - 3) / (2 * t + 2 * nu - 3) * common
    return momentum, 4 * (t + nu - 1) * common
