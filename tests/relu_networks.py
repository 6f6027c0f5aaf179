"""ReLU networks with weights in hand, and their knots counted without the package."""

import itertools

import numpy as np
import torch
from torch import nn


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(sizes, seed):
    """The networks of theory.md C1: weights of variance 2 / fan-in, biases of 0.25."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((b, a)) * np.sqrt(2 / a), rng.standard_normal(b) * 0.5) for a, b in itertools.pairwise(sizes)]


def network(parameters, activation=nn.ReLU):
    layers = []
    for weight, bias in parameters:
        linear = nn.Linear(*weight.shape[::-1], dtype=torch.float64)
        linear.weight.data, linear.bias.data = torch.tensor(weight), torch.tensor(bias)
        layers += [linear, activation()]
    return nn.Sequential(*layers[:-1])


def by_hand(parameters, vertices):
    """Units of a ReLU network whose pre-activation is positive at some vertices and not at others, per layer."""
    points, counts = vertices, []
    for weight, bias in parameters[:-1]:
        values = points @ weight.T + bias
        counts.append(int(((values > 0).any(axis=0) & (values <= 0).any(axis=0)).sum()))
        points = np.maximum(values, 0)
    return counts


def knots_on_a_line(parameters, low, high):
    """Exact knots of x -> network(x) on (low, high), by propagating the linear pieces through the layers."""
    ends = [low, high]
    for depth in range(1, len(parameters)):

        def pre_activation(x, depth=depth):
            value = np.array([x])
            for weight, bias in parameters[:depth]:
                value = weight @ (value if weight is parameters[0][0] else np.maximum(value, 0)) + bias
            return value

        roots = []
        for a, b in itertools.pairwise(ends):
            left, right = pre_activation(a), pre_activation(b)
            crossing = left * right < 0
            roots += list((a + (b - a) * left / (left - right))[crossing])
        ends = sorted(ends + roots)
    return len(ends) - 2
