"""Sums over pairs of samples without an array over pairs and dimensions."""

import torch
from jaxtyping import Float
from torch import Tensor


def squared_distances(
    points: Float[Tensor, " *batch P D"], samples: Float[Tensor, " *batch N D"]
) -> Float[Tensor, " *batch P N"]:
    """|x_i - y_j|^2 from inner products: both should be centred, or their offset is lost digits."""
    of_points = torch.sum(points**2, dim=-1)[..., :, None]
    of_samples = torch.sum(samples**2, dim=-1)[..., None, :]
    squared = ((-2 * points) @ samples.mT).add_(of_points).add_(of_samples)
    # What is no more than rounding is zero: between samples that coincide nothing may differ.
    rounding = 8 * torch.finfo(squared.dtype).eps
    return squared.masked_fill_(squared <= rounding * of_points + rounding * of_samples, 0.0)


def weighted_differences(
    weights: Float[Tensor, " *batch P N"],
    points: Float[Tensor, " *batch P D"],
    samples: Float[Tensor, " *batch N D"],
) -> Float[Tensor, " *batch P D"]:
    """sum_j w_ij (x_i - y_j)."""
    return torch.sum(weights, dim=-1, keepdim=True) * points - weights @ samples


def pairwise_median(
    squared_distance: Float[Tensor, " *batch N N"],
) -> Float[Tensor, " *batch"]:
    """Lower median of the distances between different points, with its floor."""
    num_points = squared_distance.shape[-1]
    rows, columns = torch.triu_indices(num_points, num_points, 1, device=squared_distance.device)
    squared = squared_distance[..., rows, columns]
    mean = torch.mean(squared, dim=-1)
    # Squared distances are known to about eps times their mean: stay well above that.
    floor = torch.finfo(squared.dtype).eps ** 0.5 * mean
    bandwidth = torch.sqrt(torch.maximum(torch.median(squared, dim=-1).values, floor))
    return torch.where(mean > 0, bandwidth, 1.0)
