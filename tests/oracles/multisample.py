"""Layer 1, one particle at a time, in NumPy.

Every function here is the definition, not the formula the packages use: a bound is the log of an
average, a leave-one-out control variate really leaves one particle out and computes the bound
anew, a learning signal is the bound minus that control variate. Sums are plain loops over
particles in extended precision (where the platform has it), so that cancellation in the oracle
stays far below what the tests ask of the packages.

Arrays are ``[K, *batch]`` in nats. Notation: L bound, v normalised weights.

Weights of zero (log-weight -inf): where a control variate is -inf, because nothing but particle k
has weight, particle k is credited as in wake-phi, a_k = v_k = 1; a tuple in which no particle has
weight has coefficients of zero. Everything else is the plain formula.
"""

from itertools import pairwise

import numpy as np

FLOAT = np.longdouble


def log_sum_exp(terms):
    """log of the sum of exp of a list of scalars; -inf for an empty list."""
    terms = [FLOAT(term) for term in terms]
    largest = max(terms, default=FLOAT(-np.inf))
    if np.isinf(largest):
        return largest
    total = FLOAT(0)
    for term in terms:
        total += np.exp(term - largest)
    return largest + np.log(total)


def bound_of(log_weights):
    """L = log of the average weight, of a list of scalars."""
    return log_sum_exp(log_weights) - np.log(FLOAT(len(log_weights)))


def weights_of(log_weights):
    """v_k, of a list of scalars; zeros if no particle has weight."""
    total = log_sum_exp(log_weights)
    if total == -np.inf:
        return [FLOAT(0) for _ in log_weights]
    return [np.exp(FLOAT(log_weight) - total) for log_weight in log_weights]


def _per_batch_element(function, *arrays):
    """Apply a function of lists of scalars to every batch element, particles along axis 0."""
    batch = arrays[0].shape[1:]
    results = {
        index: function(*([array[(k, *index)] for k in range(len(array))] for array in arrays))
        for index in np.ndindex(*batch)
    }
    stacked = np.array([results[index] for index in np.ndindex(*batch)], dtype=FLOAT)
    # [batch elements, ...] -> [..., *batch]
    return np.moveaxis(stacked, 0, -1).reshape(stacked.shape[1:] + batch).astype(np.float64)


def iwae_bound(log_weights):
    return _per_batch_element(bound_of, log_weights)


def renyi_bound(log_weights, *, alpha):
    def bound(lw):
        if alpha == 1:  # the limit, by l'Hospital: the average log-weight
            return sum(FLOAT(x) for x in lw) / len(lw)
        return bound_of([(FLOAT(1) - FLOAT(alpha)) * FLOAT(x) for x in lw]) / (1 - FLOAT(alpha))

    return _per_batch_element(bound, log_weights)


def _renyi_bound_of(log_weights, alpha):
    """The bound of order alpha of a list of scalars; its limit at 1 is their mean."""
    if alpha == 1:
        return sum(FLOAT(x) for x in log_weights) / len(log_weights)
    order = FLOAT(1) - FLOAT(alpha)
    return bound_of([order * FLOAT(x) for x in log_weights]) / order


def _renyi_weights_of(log_weights, alpha):
    """Its derivatives in the log-weights. A weight of zero is none at any order."""
    order = FLOAT(1) - FLOAT(alpha)
    return weights_of([-np.inf if x == -np.inf else order * FLOAT(x) for x in log_weights])


def renyi_weights(log_weights, *, alpha):
    return _per_batch_element(lambda lw: _renyi_weights_of(lw, alpha), log_weights)


def renyi_learning_signal(log_weights, *, alpha, control_variate="asymptotic"):
    def control(others):
        K = FLOAT(len(others) + 1)
        if control_variate == "none":
            return FLOAT(0)
        if control_variate == "geometric":
            return _renyi_bound_of([*others, sum(FLOAT(x) for x in others) / len(others)], alpha)
        # A stand-in whose tempered weight is the mean of the others' leaves their bound as it is.
        of_others = _renyi_bound_of(others, alpha)
        if control_variate == "arithmetic":
            return of_others
        # As if particle k added nothing; with the constant that is finite at alpha = 1.
        return of_others + np.log1p(-1 / K)

    def signal(lw):
        bound, weights = _renyi_bound_of(lw, alpha), _renyi_weights_of(lw, alpha)
        coefficients = []
        for k, weight in enumerate(weights):
            c = control(lw[:k] + lw[k + 1 :])
            if bound == -np.inf:
                coefficients.append(FLOAT(0))
            else:
                coefficients.append(weight if c == -np.inf else bound - c - weight)
        return coefficients

    return _per_batch_element(signal, log_weights)


def normalized_weights(log_weights):
    return _per_batch_element(weights_of, log_weights)


def effective_sample_size(log_weights):
    def size(lw):
        sum_of_squares = sum(v * v for v in weights_of(lw))
        return 1 / sum_of_squares if sum_of_squares > 0 else FLOAT(0)

    return _per_batch_element(size, log_weights)


def _signal(log_weights, control_variate):
    """a_k = L - control variate_k - v_k of a list of log-weights.

    ``control_variate(others)`` sees the other particles only: that is what makes it one.
    """
    bound, weights = bound_of(log_weights), weights_of(log_weights)
    coefficients = []
    for k, weight in enumerate(weights):
        control = control_variate(log_weights[:k] + log_weights[k + 1 :])
        if bound == -np.inf:
            coefficients.append(FLOAT(0))
        elif control == -np.inf:
            coefficients.append(weight)
        else:
            coefficients.append(bound - control - weight)
    return coefficients


def reinforce_learning_signal(log_weights):
    return _per_batch_element(lambda lw: _signal(lw, lambda others: FLOAT(0)), log_weights)


def vimco_learning_signal(log_weights, *, leave_one_out="geometric"):
    def control_variate(others):
        # The bound again, with a mean of the other weights in the place of particle k.
        if leave_one_out == "geometric":
            stand_in = sum(FLOAT(x) for x in others) / len(others)
        else:
            stand_in = bound_of(others)
        return bound_of([*others, stand_in])

    return _per_batch_element(lambda lw: _signal(lw, control_variate), log_weights)


def ovis_gamma_learning_signal(log_weights, *, gamma=0.0):
    def signal(lw):
        # The limit of the optimal control variate: particle k adds nothing to the average.
        coefficients = _signal(lw, lambda others: log_sum_exp(others) - np.log(FLOAT(len(lw))))
        for k, weight in enumerate(weights_of(lw)):
            if log_sum_exp(lw[:k] + lw[k + 1 :]) > -np.inf:
                coefficients[k] += gamma * (weight + np.log1p(-1 / FLOAT(len(lw))))
        return coefficients

    return _per_batch_element(signal, log_weights)


def ovis_mc_learning_signal(log_weights, auxiliary_log_weights, *, alpha=0.0):
    def prefactors(lw):
        """L - v_k of every particle."""
        bound = _renyi_bound_of(lw, alpha)
        return [bound - weight for weight in _renyi_weights_of(lw, alpha)]

    def coefficient(lw, k, draw):
        """The prefactor, less what it would be with the draw in the place of particle k."""
        others = lw[:k] + lw[k + 1 :]
        if _renyi_bound_of(lw, alpha) == -np.inf:
            return FLOAT(0)
        if _renyi_bound_of([*others, draw], alpha) == -np.inf:
            # No control variate: as in wake-phi, or at order 1, where no bound is finite, nothing.
            return FLOAT(0) if alpha == 1 else _renyi_weights_of(lw, alpha)[k]
        return prefactors(lw)[k] - prefactors([*others, draw])[-1]

    def signal(lw, auxiliary):
        return [
            sum(coefficient(lw, k, draw) for draw in auxiliary) / len(auxiliary)
            for k in range(len(lw))
        ]

    return _per_batch_element(signal, log_weights, auxiliary_log_weights)


def wake_phi_learning_signal(log_weights):
    return normalized_weights(log_weights)


def dreg_weights(log_weights, *, alpha=0.0):
    def weights(lw):
        return [alpha * v + (1 - FLOAT(alpha)) * v * v for v in _renyi_weights_of(lw, alpha)]

    return _per_batch_element(weights, log_weights)


def wake_phi_dreg_weights(log_weights):
    def weights(lw):
        # The others' weight is summed: 1 - v has no digit left where one particle dominates.
        vs = weights_of(lw)
        return [v * sum(vs[:k] + vs[k + 1 :], FLOAT(0)) for k, v in enumerate(vs)]

    return _per_batch_element(weights, log_weights)


def reinforce_leave_one_out_learning_signal(log_weights):
    def signal(lw):
        if -np.inf in lw:
            return [FLOAT(0) for _ in lw]
        lw = [FLOAT(x) for x in lw]
        others = [sum(lw[:k] + lw[k + 1 :]) / (len(lw) - 1) for k in range(len(lw))]
        return [(x - other) / len(lw) for x, other in zip(lw, others, strict=True)]

    return _per_batch_element(signal, log_weights)


def _thermodynamic(lw, partition):
    """For each interval of [0, 1]: its left end, its width, and the weights at the left end."""
    for left, right in zip(partition, [*partition[1:], 1.0], strict=True):
        yield FLOAT(left), FLOAT(right) - FLOAT(left), weights_of([FLOAT(left) * x for x in lw])


def _mean(weights, terms):
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def thermodynamic_bound(log_weights, *, partition):
    def bound(lw):
        if -np.inf in lw:
            return FLOAT(-np.inf)
        lw = [FLOAT(x) for x in lw]
        return sum(width * _mean(w, lw) for _, width, w in _thermodynamic(lw, partition))

    return _per_batch_element(bound, log_weights)


def _thermodynamic_slopes(lw, partition, slopes):
    """What one particle's log p or log q adds to the gradient: of log w, and of log pi_beta."""
    if -np.inf in lw:
        return [FLOAT(0) for _ in lw]
    lw = [FLOAT(x) for x in lw]
    coefficients = [FLOAT(0) for _ in lw]
    for beta, width, w in _thermodynamic(lw, partition):
        of_log_weight, of_log_density = slopes(beta)
        for k, x in enumerate(lw):
            deviation = FLOAT(len(lw)) / (len(lw) - 1) * (x - _mean(w, lw))
            coefficients[k] += width * w[k] * (of_log_weight + deviation * of_log_density)
    return coefficients


def thermodynamic_weights(log_weights, *, partition):
    def weights(lw):
        return _thermodynamic_slopes(lw, partition, lambda beta: (1, beta))

    return _per_batch_element(weights, log_weights)


def thermodynamic_learning_signal(log_weights, *, partition):
    def signal(lw):
        return _thermodynamic_slopes(lw, partition, lambda beta: (-1, 1 - beta))

    return _per_batch_element(signal, log_weights)


def nvil_learning_signal(log_weights, mean=0.0, variance=0.0, *, baseline=0.0, normalize=True):
    """A scalar baseline; see ``nvil_moments`` for the moments."""

    def signal(lw):
        bound = bound_of(lw)
        if bound == -np.inf:
            return [FLOAT(0) for _ in lw]
        scale = max(FLOAT(1), np.sqrt(FLOAT(variance))) if normalize else FLOAT(1)
        return [(bound - FLOAT(baseline) - FLOAT(mean) - v) / scale for v in weights_of(lw)]

    return _per_batch_element(signal, log_weights)


def nvil_moments(mean, variance, is_first, log_weights, baseline, decay):
    """Running moments after one more batch of ``[K, B]`` log-weights."""
    centred = [
        bound_of(list(lw)) - b
        for lw, b in zip(log_weights.T, baseline, strict=True)
        if bound_of(list(lw)) > -np.inf
    ]
    batch_mean = sum(centred) / len(centred)
    batch_variance = sum((x - batch_mean) ** 2 for x in centred) / len(centred)
    share = 0.0 if is_first else decay
    return (
        share * mean + (1 - share) * batch_mean,
        share * variance + (1 - share) * batch_variance,
    )


def antithetic_joint(logit):
    """P(b, b~), ``[2, 2]``: how long u makes b = 1[u < p] and b~ = 1[1 - u < p] what they are."""
    p = 1 / (1 + np.exp(-FLOAT(logit)))
    ends = sorted([FLOAT(0), p, 1 - p, FLOAT(1)])
    joint = np.zeros((2, 2), dtype=FLOAT)
    for left, right in pairwise(ends):
        u = (left + right) / 2
        joint[int(u < p), int(1 - u < p)] += right - left
    return joint.astype(np.float64)


def antithetic_score(value, partner, logit):
    """(-1)^b~ 1[b != b~] sigma(|alpha|)."""
    return (-1) ** int(partner) * (value != partner) / (1 + np.exp(-abs(logit)))


def disarm_learning_signal(log_weights, partner_log_weights):
    """Half of what the bound gains by b_k over b~_k, averaged over the two sets of others.

    A difference in which one of the bounds is -inf counts for nothing.
    """

    def gain(lw, partner_lw, k, others):
        bounds = [bound_of([*others[:k], own[k], *others[k + 1 :]]) for own in (lw, partner_lw)]
        return FLOAT(0) if -np.inf in bounds else bounds[0] - bounds[1]

    def signal(lw, partner_lw):
        return [
            sum(gain(lw, partner_lw, k, others) for others in (lw, partner_lw)) / 4
            for k in range(len(lw))
        ]

    return _per_batch_element(signal, log_weights, partner_log_weights)


def linear_surrogate(log_p, log_q_path, log_q_score, *, weights, learning_signal):
    def functional(p, path, score, b, a):
        total = FLOAT(0)
        for k in range(len(p)):
            # A coefficient of zero removes its term, also where the log-probability is -inf.
            if b[k] != 0:
                total += FLOAT(b[k]) * (FLOAT(p[k]) - FLOAT(path[k]))
            if a[k] != 0:
                total += FLOAT(a[k]) * FLOAT(score[k])
        return total

    return _per_batch_element(functional, log_p, log_q_path, log_q_score, weights, learning_signal)
