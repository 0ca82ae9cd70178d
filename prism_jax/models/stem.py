"""The stem of the ImageNet networks: a convolution and max pooling, both with stride 2.

Between the two lies the largest map of a network. On a TPU what reads and makes it was
half of a ResNet-18's iteration by the compiler's estimate, most of it the gradient, put together
from the phases of the pooling's stride. There the convolution gives every phase as a map of its own
instead, the pooling takes its windows from the four, and their gradients go back through four
convolutions. A frozen BatchNorm and the ReLU come after the pooling, on a quarter of the values.
"""

from __future__ import annotations

import functools
import itertools
import operator
from typing import TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from prism_jax import parallel
from prism_jax.models import layers
from prism_jax.types import Array

# Every second row and column of a map (B, H, W, C), by the parity of both: 00, 01, 10, 11.
Phases: TypeAlias = tuple[Array, Array, Array, Array]
Parities: TypeAlias = tuple[int, int]
PARITIES: tuple[Parities, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))


def conv_norm_pool(
    images_BHWC: Array,
    features: int,
    kernel_size: int,
    *,
    names: tuple[str, str],
    train: bool,
    dtype: jnp.dtype,
) -> Array:
    """Add a stem to the calling module: convolution, BatchNorm, ReLU, PyTorch's MaxPool2d(3, 2, 1).

    Of maxima that tie, a frozen network on a TPU gives the gradient to the first, as PyTorch
    does; any other shares it. There ``nn.intercept_methods`` sees neither layer's call.

    Args:
      images_BHWC: normalised.
      features: channels of the result.
      kernel_size: side of the square kernel, odd.
      names: of the convolution and of the BatchNorm.
      dtype: of the computation.

    Returns:
      (B, H / 4, W / 4, features), rounded up.
    """
    conv = layers.Conv(
        features, kernel_size, 2, (kernel_size - 1) // 2, use_bias=False, dtype=dtype, name=names[0]
    )
    norm = layers.BatchNorm(dtype=dtype, name=names[1])
    frozen = not train and norm.has_variable("folded", "gain")
    every_phase_has_values = min(images_BHWC.shape[1:3]) > 2
    if frozen and every_phase_has_values and parallel.platform() == "tpu":
        return _by_phases(images_BHWC, conv, norm)
    return layers.max_pool(nn.relu(norm(conv(images_BHWC), train)), 3, 2, 1)


def _by_phases(images_BHWC: Array, conv: layers.Conv, norm: layers.BatchNorm) -> Array:
    """The same of a frozen network.

    A normalisation that does not turn round a channel's order may be done after the pooling, on
    a quarter of the values; where it would, the kernel's sign is turned in its place.
    """
    gain_C: Array = norm.get_variable("folded", "gain")
    shift_C: Array = norm.get_variable("folded", "shift")
    sign_C = jnp.where(gain_C < 0, -1.0, 1.0)
    layers.sow_last(conv, "conv_inputs", x=images_BHWC)
    kernel_HWIO = (conv.get_variable("params", "kernel") * sign_C).astype(conv.dtype)
    maps = convolve(images_BHWC.astype(conv.dtype), kernel_HWIO, conv.padding)
    if norm.is_mutable_collection("bn_statistics"):
        mean_C, var_C = layers.moments(*map(layers.at_least_float32, maps))
        layers.sow_last(norm, "bn_statistics", mean=mean_C * sign_C, var=var_C)
    pooled_BHWC = max_pool(maps, _size(maps))
    wide_BHWC = layers.at_least_float32(pooled_BHWC)
    return nn.relu((wide_BHWC * (gain_C * sign_C) + shift_C).astype(norm.dtype))


def _size(maps: Phases) -> tuple[int, int]:
    """Height and width of the whole map."""
    (rows, columns), (odd_rows, odd_columns) = (maps[i].shape[1:3] for i in (0, 3))
    return rows + odd_rows, columns + odd_columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x_BHWC: Array, kernel_HWIO: Array, padding: int) -> Phases:
    """The phases of a convolution with stride 2: each has stride 4.

    Args:
      x_BHWC, kernel_HWIO: of one dtype, which is the result's.
      padding: zeros on every side, less than the kernel's.

    Returns:
      Four maps (B, rows, columns, O).
    """
    return _each_phase(_strided_phase, x_BHWC, kernel_HWIO, padding)


def _convolve_forward(x_BHWC: Array, kernel_HWIO: Array, padding: int):
    return convolve(x_BHWC, kernel_HWIO, padding), (x_BHWC, kernel_HWIO)


def _convolve_backward(padding: int, saved: tuple[Array, Array], gradients: Phases):
    """The input's gradient by blocks, the kernel's by strides.

    What makes the gradients is not pulled into the convolutions, where XLA:TPU would compute it
    once for every tap.
    """
    x_BHWC, kernel_HWIO = saved
    gradients = lax.optimization_barrier(gradients)
    by_blocks = functools.partial(_each_phase, _phase_of_blocks, padding=padding)
    by_strides = functools.partial(_each_phase, _strided_phase, padding=padding)
    pull_back = jax.linear_transpose(lambda x: by_blocks(x, kernel_HWIO), x_BHWC)
    pull_back_kernel = jax.linear_transpose(lambda k: by_strides(x_BHWC, k), kernel_HWIO)
    return *pull_back(gradients), *pull_back_kernel(gradients)


convolve.defvjp(_convolve_forward, _convolve_backward)


def _each_phase(form, x_BHWC: Array, kernel_HWIO: Array, padding: int) -> Phases:
    counts = [
        [(layers.output_size(n, k, 2, padding) + 1 - odd) // 2 for odd in range(2)]
        for n, k in zip(x_BHWC.shape[1:3], kernel_HWIO.shape[:2], strict=True)
    ]
    return tuple(
        form(x_BHWC, kernel_HWIO, [2 * i - padding, 2 * j - padding], (counts[0][i], counts[1][j]))
        for i, j in PARITIES
    )


def _strided_phase(x_BHWC, kernel_HWIO, firsts: list[int], counts: tuple[int, int]) -> Array:
    """Windows at every fourth row and column.

    Args:
      firsts: row and column of the map where the first window begins; negative: before it.
      counts: how many rows and columns of windows.
    """
    edges, read = [], []
    places = zip(x_BHWC.shape[1:3], kernel_HWIO.shape[:2], firsts, counts, strict=True)
    for size, kernel, first, count in places:
        end = first + 4 * (count - 1) + kernel
        edges.append((max(-first, 0), max(end - size, 0)))
        # No negative edges: XLA:CPU then reads what is not the map's (seen on two axes).
        read.append(slice(max(first, 0), end))
    return lax.conv_general_dilated(
        x_BHWC[:, *read], kernel_HWIO, (4, 4), edges, dimension_numbers=layers.DIMENSIONS
    )


def _phase_of_blocks(x_BHWC, kernel_HWIO, firsts: list[int], counts: tuple[int, int]) -> Array:
    """The same as a convolution of 3 x 3 blocks of 4 x 4 pixels, without strides.

    So the input's gradient has 16 values at each place of a small map; with a stride it would be
    a convolution over a map spread with zeros.
    """
    batch, *sizes, channels = x_BHWC.shape
    blocks = [-(-n // 4) for n in sizes]
    rest = [(0, 4 * m - n) for m, n in zip(blocks, sizes, strict=True)]
    x = jnp.pad(x_BHWC, [(0, 0), *rest, (0, 0)])
    x = x.reshape(batch, blocks[0], 4, blocks[1], 4, channels).swapaxes(2, 3)
    x = x.reshape(batch, *blocks, 16 * channels)
    # A window begins in the block before its own.
    taps = [
        (4 + first, 8 - first - k) for first, k in zip(firsts, kernel_HWIO.shape[:2], strict=True)
    ]
    kernel = jnp.pad(kernel_HWIO, [*taps, (0, 0), (0, 0)])
    kernel = kernel.reshape(3, 4, 3, 4, channels, -1).swapaxes(1, 2)
    edges = [(1, count + 1 - m) for count, m in zip(counts, blocks, strict=True)]
    return lax.conv_general_dilated(
        x, kernel.reshape(3, 3, 16 * channels, -1), (1, 1), edges,
        dimension_numbers=layers.DIMENSIONS,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(maps: Phases, size: tuple[int, int]) -> Array:
    """PyTorch's MaxPool2d(3, 2, 1) of a map that is given by its phases.

    Where maxima tie, the first of a window has the gradient.

    Args:
      size: height H and width W of the whole map, for the gradient.

    Returns:
      (B, H / 2, W / 2, C), rounded up.
    """
    return functools.reduce(jnp.maximum, _windows(maps))


def _windows(maps: Phases) -> list[Array]:
    """What the nine places of the windows read, row by row.

    Window i has the rows 2 i - 1, 2 i and 2 i + 1: two of the odd phase, one of the even.
    """
    counts = maps[0].shape[1:3]
    read = {}
    for parities, x in zip(PARITIES, maps, strict=True):
        edges = [
            (odd, count - n, 0)
            for odd, count, n in zip(parities, counts, x.shape[1:3], strict=True)
        ]
        padded = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        for shift in itertools.product(*(range(1 + odd) for odd in parities)):
            near = (slice(k, k + n) for k, n in zip(shift, counts, strict=True))
            read[_place(parities, shift)] = padded[:, *near]
    return [read[place] for place in range(9)]


def _place(parities: Parities, shift: tuple[int, ...]) -> int:
    """Where in a window a phase is read: the even one in the middle, the odd one on both sides."""
    row, column = (2 * k if odd else 1 for odd, k in zip(parities, shift, strict=True))
    return 3 * row + column


def _max_pool_forward(maps: Phases, size: tuple[int, int]):
    # Not within the last phase's convolution, and counted in floats: XLA:TPU then reads the
    # windows once for both results.
    maps = lax.optimization_barrier(maps)
    y_BHWC = max_pool(maps, size)
    first_BHWC = jnp.zeros(y_BHWC.shape, jnp.float32)
    for place, window in reversed(list(enumerate(_windows(maps)))):
        first_BHWC = jnp.where(window == y_BHWC, float(place), first_BHWC)
    return lax.optimization_barrier((y_BHWC, first_BHWC.astype(jnp.int8)))


def _max_pool_backward(size: tuple[int, int], first_BHWC: Array, dy_BHWC: Array):
    """A value looks at the windows that hold it: do they have their maximum there?"""
    counts = dy_BHWC.shape[1:3]
    edges = [(0, n // 2 + 1 - count, 0) for n, count in zip(size, counts, strict=True)]
    edges = [(0, 0, 0), *edges, (0, 0, 0)]
    first = lax.pad(first_BHWC, jnp.int8(-1), edges)
    dy = lax.pad(dy_BHWC, jnp.zeros((), dy_BHWC.dtype), edges)

    def phase(parities: Parities) -> Array:
        shape = [(n + 1 - odd) // 2 for n, odd in zip(size, parities, strict=True)]
        parts = []
        for back in itertools.product(*(range(1 + odd) for odd in parities)):
            near = (slice(None), *(slice(k, k + n) for k, n in zip(back, shape, strict=True)))
            place = _place(parities, tuple(odd - k for odd, k in zip(parities, back, strict=True)))
            parts.append(jnp.where(first[near] == place, dy[near], 0.0))
        return functools.reduce(operator.add, parts)

    return (tuple(map(phase, PARITIES)),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)
