"""PRISM's objective for ``TwoConvs`` in NumPy and float64, its gradient derived by hand.

Independent of the package: it shares no line with it, and knows nothing of JAX. What it says of
itself (analytic gradient = central differences) is tested too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

EPSILON = 1e-5
STRIDES = (1, 2)


class Energy(NamedTuple):
    """One teacher's two terms and their gradients by the images it reads."""

    ce: float
    bn: float
    ce_gradient_BHWC: np.ndarray
    bn_gradient_BHWC: np.ndarray


def convolve(x, kernel, stride):
    """A 3x3 convolution with padding 1, tap by tap; also the function that pulls back."""
    size = (x.shape[1] - 1) // stride + 1
    reach = stride * (size - 1) + 1
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [(u, v) for u in range(3) for v in range(3)]

    def window(u, v):
        return np.s_[:, u : u + reach : stride, v : v + reach : stride]

    y = sum(padded[window(u, v)] @ kernel[u, v] for u, v in taps)

    def pull_back(dy):
        dx = np.zeros_like(padded)
        for u, v in taps:
            dx[window(u, v)] += dy @ kernel[u, v].T
        return dx[:, 1:-1, 1:-1]

    return y, pull_back


def distance(a, b):
    """A norm that is not squared, and its gradient by ``a``."""
    norm = np.sqrt(((a - b) ** 2).sum())
    return norm, (a - b) / norm


def energy(variables, x, labels, *, first_multiplier=10.0, targets=None) -> Energy:
    """Cross entropy and BN alignment of one teacher; its targets are its running statistics,
    unless others are given."""
    params, running = variables["params"], variables["batch_stats"]
    alignment, steps = 0.0, []
    y = x
    for layer, stride in enumerate(STRIDES, 1):
        z, pull_conv = convolve(y, params[f"conv{layer}"]["kernel"], stride)
        bn, stats = params[f"bn{layer}"], running[f"bn{layer}"]
        target = (targets or running)[f"bn{layer}"]
        count = z[..., 0].size
        mean = z.mean((0, 1, 2))
        var = ((z - mean) ** 2).mean((0, 1, 2))
        far_mean, d_mean = distance(mean, target["mean"])
        far_var, d_var = distance(var, target["var"])
        weight = first_multiplier if layer == 1 else 1.0
        alignment += weight * (far_mean + far_var)
        d_alignment = weight * (d_mean + 2 * (z - mean) * d_var) / count
        gain = bn["scale"] / np.sqrt(stats["var"] + EPSILON)
        normal = (z - stats["mean"]) * gain + bn["bias"]
        steps.append((pull_conv, gain, normal > 0, d_alignment))
        y = np.maximum(normal, 0)

    pooled = y.mean((1, 2))
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"]
    logits = logits - logits.max(1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    rows = np.arange(len(labels))
    ce = -log_p[rows, labels].mean()
    d_logits = np.exp(log_p)
    d_logits[rows, labels] -= 1
    d_pooled = (d_logits / len(labels)) @ params["head"]["kernel"].T

    d_ce = np.broadcast_to(d_pooled[:, None, None] / y[0, ..., 0].size, y.shape)
    d_bn = np.zeros_like(y)
    for pull_conv, gain, alive, d_alignment in reversed(steps):
        d_ce = pull_conv(d_ce * alive * gain)
        d_bn = pull_conv(d_bn * alive * gain + d_alignment)
    return Energy(ce, alignment, d_ce, d_bn)


def show(x, crop, flip, roll):
    """Crop, bilinear resize, flip, roll, pixel by pixel; also the function that pulls back."""
    _, height, width, _ = x.shape
    top, left, h, w = (int(c) for c in crop)

    def sources(size, start, length, flipped, shift):
        """For every output pixel: its two source pixels and the second one's share."""
        cut = [min(max((i + 0.5) * length / size - 0.5, 0.0), length - 1.0) for i in range(size)]
        cut = np.roll(cut[::-1] if flipped else cut, shift)
        low = np.floor(cut).astype(int)
        return start + low, start + np.minimum(low + 1, length - 1), cut - low

    up, down, down_share = sources(height, top, h, False, int(roll[0]))
    lefts, rights, right_share = sources(width, left, w, bool(flip), int(roll[1]))
    corners = [
        (rows, columns, np.outer(row_share, column_share)[:, :, None])
        for rows, row_share in ((up, 1 - down_share), (down, down_share))
        for columns, column_share in ((lefts, 1 - right_share), (rights, right_share))
    ]
    shown = sum(share * x[:, rows[:, None], columns] for rows, columns, share in corners)

    def pull_back(dy):
        dx = np.zeros_like(x)
        for rows, columns, share in corners:
            np.add.at(dx, (slice(None), rows[:, None], columns), share * dy)
        return dx

    return shown, pull_back


def objective(pool_variables, x, labels, view, *, primary, drawn, alpha, first_multiplier=10.0):
    """The loss, the terms of the drawn teachers, and the gradient by the images.

    Args:
      pool_variables: one float64 tree per teacher.
      view: (crop, flip, roll).
      drawn: indices of the teachers whose statistics count, the primary among them.

    Returns:
      loss, {teacher: Energy}, gradient_BHWC.
    """
    shown, pull_back = show(x, *view)
    read = {
        t: energy(pool_variables[t], shown, labels, first_multiplier=first_multiplier)
        for t in drawn
    }
    share = alpha * float(np.float32(1 / len(drawn)))  # weights are float32 in any mode
    loss = read[primary].ce + share * sum(read[t].bn for t in drawn)
    gradient = read[primary].ce_gradient_BHWC + share * sum(read[t].bn_gradient_BHWC for t in drawn)
    return loss, read, pull_back(gradient)
