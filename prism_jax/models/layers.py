"""Convolution, normalisation, pooling and dropout with PyTorch's conventions, NHWC.

``Conv`` hides what XLA does badly on a CPU (measured, jax 0.10): the gradient of a convolution
inside a loop is 10 to 15 times slower unless the input gradient is a convolution with an
explicitly transposed kernel; a depthwise convolution is 10 to 80 times slower than shifted
multiply-adds; a map smaller than its kernel costs 50 times its share. :func:`choose_form` picks
the form of each pass, ``FORMS`` holds them. Other platforms run the plain ``lax`` convolution
but for products of a matrix, which need no window, and for depthwise ones.
Frozen networks have their kernels transposed once, by :func:`freeze`.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import lax

from prism_jax import parallel
from prism_jax.types import Array, PyTree

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
MOMENTUM = 0.1
EPSILON = 1e-5  # of a BatchNorm


class Spec(NamedTuple):
    """A convolution without its arrays; zeros pad every side."""

    x_shape: tuple[int, ...]  # B H W C
    kernel_shape: tuple[int, ...]  # height, width, C / groups, features
    stride: int
    padding: int
    groups: int

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width of the result."""
        sizes = zip(self.x_shape[1:3], self.kernel_shape[:2], strict=True)
        rows, columns = (output_size(n, k, self.stride, self.padding) for n, k in sizes)
        return rows, columns


def at_least_float32(x: Array) -> Array:
    """Half precision is too coarse to sum and square in; double precision stays."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Form(NamedTuple):
    """One way to compute a convolution and its two gradients; each takes (array, array, Spec).

    ``slide`` is the input's gradient from a kernel that is flipped already, where that helps.
    """

    forward: Callable[[Array, Array, Spec], Array]  # x, kernel
    input_gradient: Callable[[Array, Array, Spec], Array]  # dy, kernel
    kernel_gradient: Callable[[Array, Array, Spec], Array]  # x, dy
    slide: Callable[[Array, Array, Spec], Array] | None = None  # dy, flipped kernel


def output_size(size: int, kernel: int, stride: int, padding: int) -> int:
    """How many windows of a kernel there are along an axis of ``size``; zeros pad both ends."""
    return (size + 2 * padding - kernel) // stride + 1


def conv2d(
    x_BHWC: Array,
    kernel_HWIO: Array,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    flipped_HWOI: Array | None = None,
) -> Array:
    """Convolve, in the form that suits the platform and the shapes.

    Args:
      x_BHWC: the input.
      kernel_HWIO: (height, width, C / groups, features), of the input's dtype.
      stride, padding, groups: as in PyTorch.
      flipped_HWOI: ``flip(kernel_HWIO)`` where it is at hand; only the input's gradient reads
        it, and no gradient flows through it.

    Returns:
      (B, H', W', features) with H' = floor((H + 2 padding - height) / stride) + 1.
    """
    spec = Spec(x_BHWC.shape, kernel_HWIO.shape, stride, padding, groups)
    return _conv(x_BHWC, kernel_HWIO, flipped_HWOI, spec)


def flip(kernel_HWIO: Array) -> Array:
    """The kernel of the input's gradient: turned by half a turn, inputs and features swapped."""
    return kernel_HWIO[::-1, ::-1].swapaxes(2, 3)


def freeze(variables: PyTree, dtype: jnp.dtype | None = None) -> PyTree:
    """Prepare a frozen network's variables: what every step would make anew of the same weights.

    Call it outside the loop that optimises the images. Gradients by the parameters of what is
    frozen are not whole: its layers read the collections.

    Args:
      dtype: in which the network computes, where that is not float32.

    Returns:
      The variables with the collections "flipped", on a CPU the kernels (a tenth of a ResNet's
      step, measured), "folded", the gain and shift of each BatchNorm, and "converted", the
      parameters in ``dtype`` (on a GPU each of these is a launch per layer).
    """

    flat = traverse_util.flatten_dict(variables["params"])
    flipped = {
        path: flip(leaf)
        for path, leaf in flat.items()
        if path[-1] == "kernel" and leaf.ndim == 4 and leaf.shape[0] > 1
        if parallel.platform() == "cpu"
    }
    running = traverse_util.flatten_dict(variables.get("batch_stats", {}))
    folded: dict[tuple[str, ...], Array] = {}
    for path in (path[:-1] for path in running if path[-1] == "var"):
        scale_C, bias_C = (flat[(*path, name)] for name in ("scale", "bias"))
        mean_C, var_C = (running[(*path, name)] for name in ("mean", "var"))
        gain_C, shift_C = _fold(scale_C, bias_C, mean_C, var_C, EPSILON)
        folded |= {(*path, "gain"): gain_C, (*path, "shift"): shift_C}
    made: dict[str, Any] = {"flipped": flipped, "folded": folded}
    if dtype is not None and dtype != jnp.float32:
        made["converted"] = {path: leaf.astype(dtype) for path, leaf in flat.items()}
    return variables | {name: traverse_util.unflatten_dict(tree) for name, tree in made.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv(x_BHWC: Array, kernel_HWIO: Array, flipped_HWOI: Array | None, spec: Spec) -> Array:
    return _run("forward", x_BHWC, kernel_HWIO, spec)


def _conv_forward(x_BHWC: Array, kernel_HWIO: Array, flipped_HWOI: Array | None, spec: Spec):
    y_BHWC = _run("forward", x_BHWC, kernel_HWIO, spec)
    return y_BHWC, (x_BHWC, kernel_HWIO, flipped_HWOI)


def _conv_backward(spec: Spec, saved: tuple[Array, Array, Array | None], dy_BHWC: Array):
    x_BHWC, kernel_HWIO, flipped_HWOI = saved
    dx_BHWC = _input_gradient(dy_BHWC, kernel_HWIO, flipped_HWOI, spec)
    nothing = None if flipped_HWOI is None else jnp.zeros_like(flipped_HWOI)
    return dx_BHWC, _run("kernel_gradient", x_BHWC, dy_BHWC, spec), nothing


def _input_gradient(
    dy_BHWC: Array, kernel_HWIO: Array, flipped_HWOI: Array | None, spec: Spec
) -> Array:
    form = FORMS[choose_form("input_gradient", spec, parallel.platform())]
    if flipped_HWOI is None or form.slide is None:
        return form.input_gradient(dy_BHWC, kernel_HWIO, spec)
    return form.slide(dy_BHWC, flipped_HWOI, spec)


_conv.defvjp(_conv_forward, _conv_backward)


def choose_form(step: str, spec: Spec, platform: str) -> str:
    """Name the form for one step of a convolution.

    Args:
      step: a field of :class:`Form`.
      spec: shapes, stride, padding, groups.
      platform: "cpu", "tpu" or "gpu"; any other counts as the last.

    Returns:
      A key of ``FORMS``.
    """
    height, width, per_group, features = spec.kernel_shape
    # Windows that do not overlap are rows of a matrix. XLA:GPU fuses the slicing that a stride
    # needs into the product, and its tiling of that ends the process (openxla/xla 47381).
    apart = height == width and height in (1, spec.stride) and spec.padding == 0
    depthwise = per_group == 1 and features == spec.groups > 1
    if platform == "tpu":
        if spec.groups > 1:
            return "eights" if depthwise and _eights_suit(spec) else "lax"
        # Products too: among convolutions XLA:TPU copies their maps from layout to layout.
        return "lax apart"
    if apart and spec.groups == 1 and (platform == "cpu" or spec.stride == 1):
        return "product"
    if platform != "cpu":
        # A sum of scaled maps fuses with the norm and activation around it. cuDNN's input gradient
        # is not used for groups: with a stride its forward pass runs over a map spread with zeros.
        return "fused" if depthwise and height * width <= 25 else "lax"
    if spec.groups > 1:
        if per_group > 1:
            return "split"
        return "depthwise" if depthwise else "lax"
    # The input gradient slides the kernel over the output's map.
    rows, columns = spec.output_size if step == "input_gradient" else spec.x_shape[1:3]
    if step == "kernel_gradient":
        return "dense"
    if rows < height or columns < width:
        return "taps"
    halved = min(per_group, features) == 64 and max(per_group, features) <= 128
    if halved and spec.stride == 1 and height == width == 3 and min(rows, columns) >= 28:
        return "two rows"
    return "dense"


def _eights_suit(spec: Spec) -> bool:
    """Whether XLA:TPU lays a depthwise convolution's maps out so that eight channels are a tile.

    Its tiles are 8 x 128. Of large maps it puts the batch into the 128 where that fills more
    than three quarters of them (seen at 10 to 512 images). Where the channels stand there, this
    form costs up to three and a half times the plain one. More channels without a stride are
    dearer as soon as a product is three passes.
    """
    images, channels = spec.x_shape[0], spec.groups
    lanes = -(-images // 128) * 128
    few = channels <= 32 or (spec.stride > 1 and channels < 240)
    return images > 0.75 * lanes and channels % 8 == 0 and few


def _run(step: str, left: Array, right: Array, spec: Spec) -> Array:
    form = FORMS[choose_form(step, spec, parallel.platform())]
    result: Array = getattr(form, step)(left, right, spec)
    return result


def _lax_forward(x_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    return lax.conv_general_dilated(
        x_BHWC,
        kernel_HWIO,
        window_strides=(spec.stride, spec.stride),
        padding=[(spec.padding, spec.padding)] * 2,
        dimension_numbers=DIMENSIONS,
        feature_group_count=spec.groups,
    )


def _transposed(forward: Callable[[Array, Array, Spec], Array]) -> Form:
    """A form whose gradients are JAX's of its forward pass, which is linear in each argument."""

    def input_gradient(dy_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
        x_BHWC = jax.ShapeDtypeStruct(spec.x_shape, dy_BHWC.dtype)
        transpose = jax.linear_transpose(lambda x: forward(x, kernel_HWIO, spec), x_BHWC)
        return transpose(dy_BHWC)[0]

    def kernel_gradient(x_BHWC: Array, dy_BHWC: Array, spec: Spec) -> Array:
        kernel_HWIO = jax.ShapeDtypeStruct(spec.kernel_shape, dy_BHWC.dtype)
        transpose = jax.linear_transpose(lambda k: forward(x_BHWC, k, spec), kernel_HWIO)
        return transpose(dy_BHWC)[0]

    return Form(forward, input_gradient, kernel_gradient)


def _lax_input_gradient_apart(dy_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    """The plain one, with nothing fused into its input.

    XLA:TPU pulls what makes ``dy`` into a convolution and computes it once for every tap: max
    pooling's gradient 49 times for the first one of a ResNet (seen in its estimate of cycles).
    """
    return _LAX.input_gradient(lax.optimization_barrier(dy_BHWC), kernel_HWIO, spec)


def _eights_forward(x_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    """Depthwise as dense convolutions of eight channels, nearly all of whose weights are zero.

    XLA:TPU counts these as products of its matrix units, at so many passes as their precision
    takes; its estimate of a depthwise one is the same at any precision.
    """
    own_IO = jnp.tile(jnp.eye(8, dtype=kernel_HWIO.dtype), spec.groups // 8)
    dense = spec._replace(groups=spec.groups // 8)
    return _lax_forward(x_BHWC, kernel_HWIO * own_IO, dense)


def _product(x_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    """Convolve with windows that do not overlap: a matrix product."""
    size, _, _, features = spec.kernel_shape
    if size == 1:
        return x_BHWC[:, :: spec.stride, :: spec.stride] @ kernel_HWIO[0, 0]
    batch, _, _, channels = spec.x_shape
    rows, columns = spec.output_size
    windows = x_BHWC[:, : rows * size, : columns * size]
    windows = windows.reshape(batch, rows, size, columns, size, channels).swapaxes(2, 3)
    return windows.reshape(batch, rows, columns, -1) @ kernel_HWIO.reshape(-1, features)


def _dense_input_gradient(dy_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    return _slide_flipped(dy_BHWC, flip(kernel_HWIO), spec)


def _slide_flipped(dy_BHWC: Array, flipped_HWOI: Array, spec: Spec) -> Array:
    """Convolve with the flipped kernel, in the layout XLA has a fast path for."""
    return lax.conv_general_dilated(
        dy_BHWC,
        flipped_HWOI,
        window_strides=(1, 1),
        padding=_edges(spec.x_shape[1:3], spec.kernel_shape[:2], spec.stride, spec.padding),
        lhs_dilation=(spec.stride, spec.stride),
        dimension_numbers=DIMENSIONS,
    )


def _two_rows(x_BHWC: Array, kernel_HWIO: Array, padding: list[tuple[int, int]]) -> Array:
    """Convolve with stride 1, two rows of the result at a time.

    A third of the products are with zeros. With 64 channels on a large map XLA:CPU still needs
    only 0.7 of the time, for its convolution there is half as fast as with 128 (measured).
    """
    size, _, channels, features = kernel_HWIO.shape
    (top, bottom), columns = padding
    rows = x_BHWC.shape[1] + top + bottom - size + 1
    upper = jnp.pad(kernel_HWIO, ((0, 1), (0, 0), (0, 0), (0, 0)))
    lower = jnp.pad(kernel_HWIO, ((1, 0), (0, 0), (0, 0), (0, 0)))
    pairs_BHWF = lax.conv_general_dilated(
        x_BHWC,
        jnp.concatenate([upper, lower], axis=-1),
        window_strides=(2, 1),
        padding=[(top, bottom + rows % 2), columns],
        dimension_numbers=DIMENSIONS,
    )
    batch, half, width, _ = pairs_BHWF.shape
    split = pairs_BHWF.reshape(batch, half, width, 2, features).swapaxes(2, 3)
    return split.reshape(batch, 2 * half, width, features)[:, :rows]


def _two_rows_forward(x_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    return _two_rows(x_BHWC, kernel_HWIO, [(spec.padding, spec.padding)] * 2)


def _two_rows_slide(dy_BHWC: Array, flipped_HWOI: Array, spec: Spec) -> Array:
    edges = _edges(spec.x_shape[1:3], spec.kernel_shape[:2], spec.stride, spec.padding)
    return _two_rows(dy_BHWC, flipped_HWOI, edges)


def _two_rows_input_gradient(dy_BHWC: Array, kernel_HWIO: Array, spec: Spec) -> Array:
    return _two_rows_slide(dy_BHWC, flip(kernel_HWIO), spec)


def _dense_kernel_gradient(x_BHWC: Array, dy_BHWC: Array, spec: Spec) -> Array:
    """Slide the gradient over the input, channels as images, in the layout XLA is fast in.

    The same bits as differentiating the convolution outside a loop; inside one, that is 50 to
    100 times slower (measured).
    """
    padding = []
    for size, kernel, out in zip(
        spec.x_shape[1:3], spec.kernel_shape[:2], spec.output_size, strict=True
    ):
        reach = (out - 1) * spec.stride + 1
        padding.append((spec.padding, kernel - 1 + reach - size - spec.padding))
    gradient_IHWO = lax.conv_general_dilated(
        x_BHWC.transpose(3, 1, 2, 0),
        dy_BHWC.transpose(1, 2, 0, 3),
        window_strides=(1, 1),
        padding=padding,
        rhs_dilation=(spec.stride, spec.stride),
        dimension_numbers=DIMENSIONS,
    )
    return gradient_IHWO.transpose(1, 2, 0, 3)


def _edges(
    size: Sequence[int], kernel: Sequence[int], stride: int, padding: int
) -> list[tuple[int, int]]:
    """Zeros to put around the gradient of a window's output, per axis.

    With ``stride - 1`` more between its rows and columns, the flipped window slides over it with
    stride 1 to give the gradient of the input.
    """
    edges = []
    for n, k in zip(size, kernel, strict=True):
        low = k - 1 - padding
        reach = (output_size(n, k, stride, padding) - 1) * stride + 1
        edges.append((low, n + k - 1 - low - reach))
    return edges


def _sum_of_products(maps: list[Array], taps: list[Array]) -> Array:
    """Depthwise: a tap scales its map per channel."""
    return functools.reduce(operator.add, map(operator.mul, maps, taps))


def _wide_sum_of_products(maps: list[Array], taps: list[Array]) -> Array:
    """The same, where bfloat16's products are added in float32.

    Their factors are not widened: what a map was made from would then be kept in float32.
    """
    wide = jnp.promote_types(maps[0].dtype, jnp.float32)
    products = [(x * tap).astype(wide) for x, tap in zip(maps, taps, strict=True)]
    return functools.reduce(operator.add, products).astype(maps[0].dtype)


def _stacked_product(maps: list[Array], taps: list[Array]) -> Array:
    """Dense: all taps as one matrix product."""
    return jnp.concatenate(maps, axis=-1) @ jnp.concatenate(taps, axis=0)


def _live_taps(size: int, kernel: int, stride: int, padding: int) -> list[int]:
    """Taps that meet the map at all; the others only ever read padding."""
    reads = np.arange(output_size(size, kernel, stride, padding)) * stride - padding
    return [i for i in range(kernel) if np.any((reads + i >= 0) & (reads + i < size))]


def _windows(x_BHWC: Array, kernel: tuple[int, ...], stride: int, padding: int, fill: float):
    """Yield ((i, j), the map that tap (i, j) reads) for all taps that meet the map."""
    size = x_BHWC.shape[1:3]
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x_BHWC, edges, constant_values=fill)
    reach = [
        (output_size(n, k, stride, padding) - 1) * stride + 1
        for n, k in zip(size, kernel, strict=True)
    ]
    live = [_live_taps(n, k, stride, padding) for n, k in zip(size, kernel, strict=True)]
    for i, j in itertools.product(*live):
        yield (i, j), padded[:, i : i + reach[0] : stride, j : j + reach[1] : stride]


def _forward_by_taps(x_BHWC, kernel_HWIO, spec: Spec, *, contract, tap) -> Array:
    windows = list(_windows(x_BHWC, spec.kernel_shape[:2], spec.stride, spec.padding, fill=0.0))
    return contract([w for _, w in windows], [tap(kernel_HWIO[ij]) for ij, _ in windows])


def _input_gradient_by_taps(dy_BHWC, kernel_HWIO, spec: Spec, *, contract, tap) -> Array:
    """Slide the flipped kernel over the gradient, spread out by the stride.

    Going by the phases of the stride instead takes a quarter of the products at stride 2, but
    XLA does not vectorise their interleaving: 33 ms where this takes 3.5 (measured).
    """
    size, kernel, stride, padding = (
        spec.x_shape[1:3], spec.kernel_shape[:2], spec.stride, spec.padding,
    )  # fmt: skip
    spread = _spread(dy_BHWC, size, kernel, stride, padding, fill=0.0)
    live = [_live_taps(n, k, stride, padding) for n, k in zip(size, kernel, strict=True)]
    maps, taps = [], []
    for i, j in itertools.product(*live):
        top, left = kernel[0] - 1 - i, kernel[1] - 1 - j
        maps.append(spread[:, top : top + size[0], left : left + size[1]])
        taps.append(tap(kernel_HWIO[i, j]))
    return contract(maps, taps)


def _spread(dy_BHWC: Array, size, kernel, stride: int, padding: int, fill: float) -> Array:
    """(B, H + height - 1, W + width - 1, C): the map that a flipped window slides over."""
    edges = _edges(size, kernel, stride, padding)
    config = [(0, 0, 0), *((low, high, stride - 1) for low, high in edges), (0, 0, 0)]
    return lax.pad(dy_BHWC, jnp.asarray(fill, dy_BHWC.dtype), config)


def _depthwise_kernel_gradient(x_BHWC: Array, dy_BHWC: Array, spec: Spec) -> Array:
    """Correlate tap by tap, in a loop: 25 reductions side by side take XLA a second to compile."""
    (batch, *size, channels), stride, padding = spec.x_shape, spec.stride, spec.padding
    edges = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = jnp.pad(x_BHWC, edges)
    rows, columns = ((out - 1) * stride + 1 for out in spec.output_size)
    live = [
        _live_taps(n, k, stride, padding) for n, k in zip(size, spec.kernel_shape[:2], strict=True)
    ]
    taps = np.array(list(itertools.product(*live)), np.int32)

    def correlate(tap: Array) -> Array:
        corner = (np.int32(0), tap[0], tap[1], np.int32(0))
        window = lax.dynamic_slice(padded, corner, (batch, rows, columns, channels))
        return jnp.sum(window[:, ::stride, ::stride] * dy_BHWC, axis=(0, 1, 2))

    gradient = jnp.zeros(spec.kernel_shape, dy_BHWC.dtype)
    return gradient.at[taps[:, 0], taps[:, 1], 0].set(lax.map(correlate, jnp.asarray(taps)))


def _split(step: str) -> Callable[[Array, Array, Spec], Array]:
    """Run one step group by group, each group in the form its own shape asks for."""

    def run(left: Array, right: Array, spec: Spec) -> Array:
        height, width, per_group, features = spec.kernel_shape
        part = spec._replace(
            x_shape=(*spec.x_shape[:3], per_group),
            kernel_shape=(height, width, per_group, features // spec.groups),
            groups=1,
        )
        function = getattr(FORMS[choose_form(step, part, "cpu")], step)
        groups = (jnp.split(array, spec.groups, axis=-1) for array in (left, right))
        return jnp.concatenate([function(*pair, part) for pair in zip(*groups, strict=True)], -1)

    return run


_DENSE: dict[str, Any] = {"contract": _stacked_product}
_DEPTHWISE: dict[str, Any] = {"contract": _sum_of_products, "tap": operator.itemgetter(0)}
_FUSED = {**_DEPTHWISE, "contract": _wide_sum_of_products}
_LAX = _transposed(_lax_forward)
FORMS = {
    "lax": _LAX,
    "lax apart": _LAX._replace(input_gradient=_lax_input_gradient_apart),
    "eights": _transposed(_eights_forward)._replace(kernel_gradient=_LAX.kernel_gradient),
    "product": _transposed(_product),
    "dense": Form(_lax_forward, _dense_input_gradient, _dense_kernel_gradient, _slide_flipped),
    "two rows": Form(
        _two_rows_forward, _two_rows_input_gradient, _dense_kernel_gradient, _two_rows_slide
    ),
    "taps": Form(
        functools.partial(_forward_by_taps, **_DENSE, tap=lambda tap_IO: tap_IO),
        functools.partial(_input_gradient_by_taps, **_DENSE, tap=jnp.transpose),
        _dense_kernel_gradient,
    ),
    "depthwise": Form(
        functools.partial(_forward_by_taps, **_DEPTHWISE),
        functools.partial(_input_gradient_by_taps, **_DEPTHWISE),
        _depthwise_kernel_gradient,
    ),
    "fused": Form(
        functools.partial(_forward_by_taps, **_FUSED),
        functools.partial(_input_gradient_by_taps, **_FUSED),
        _LAX.kernel_gradient,
    ),
    "split": Form(_split("forward"), _split("input_gradient"), _split("kernel_gradient")),
}


def parameter(
    module: nn.Module,
    name: str,
    init: nn.initializers.Initializer,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
) -> Array:
    """``module.param``, without tracing ``init`` once more for a parameter that is there already.

    Flax does that to compare the shapes: a seventh of what it takes to trace PRISM's pool
    (measured).
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    value: Array = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"parameter {name} has shape {value.shape}; its layer needs {shape}")
    return value


def computes_in(module: nn.Module) -> jnp.dtype | None:
    """The floating type that is a module's attribute "dtype"; None where it has no such one."""
    named = getattr(module, "dtype", None)
    if named is None:  # which NumPy takes for float64
        return None
    try:
        dtype = jnp.dtype(named)
    except TypeError:  # another meaning of the name
        return None
    return dtype if jnp.issubdtype(dtype, jnp.floating) else None


def converted(module: nn.Module, name: str, value: Array) -> Array:
    """A layer's parameter in its ``dtype``: the one that :func:`freeze` made, or ``value``'s."""
    if module.has_variable("converted", name):
        kept: Array = module.get_variable("converted", name)
        if kept.dtype == module.dtype:
            return kept
    return value.astype(module.dtype)


def sow_last(module: nn.Module, collection: str, **values: Array) -> None:
    """Sow values by their names, the last ones of a pass in place of any before."""
    for name, value in values.items():
        module.sow(collection, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)


class Conv(nn.Module):
    """2-D convolution with PyTorch's padding; params "kernel" (HWIO) and "bias".

    Where the collection "conv_inputs" is mutable, its input is sown there as ``x``.

    Attributes:
      features: output channels.
      kernel_size: side of the square kernel.
      stride, padding, groups: as in PyTorch.
      use_bias: add a bias.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        if not self.is_initializing():
            sow_last(self, "conv_inputs", x=x_BHWC)
        shape = (
            self.kernel_size,
            self.kernel_size,
            x_BHWC.shape[-1] // self.groups,
            self.features,
        )
        kernel_HWIO = parameter(self, "kernel", nn.initializers.he_normal(), shape, jnp.float32)
        y_BHWC = conv2d(
            x_BHWC.astype(self.dtype),
            converted(self, "kernel", kernel_HWIO),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            flipped_HWOI=self._flipped(),
        )
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y_BHWC = y_BHWC + converted(self, "bias", bias)
        return y_BHWC

    def _flipped(self) -> Array | None:
        if not self.has_variable("flipped", "kernel"):
            return None
        return self.get_variable("flipped", "kernel").astype(self.dtype)


class Dense(nn.Module):
    """Affine map of the last axis; params "kernel" (inputs, features) and "bias".

    Attributes:
      features: outputs.
      kernel_init: PyTorch's default unless stated.
      dtype: of the computation; parameters are float32.
    """

    features: int
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
        1 / 3, "fan_in", "uniform"
    )
    use_bias: bool = True
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape, jnp.float32)
        y = x.astype(self.dtype) @ converted(self, "kernel", kernel)
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + converted(self, "bias", bias)
        return y


class BatchPart(NamedTuple):
    """What a forward pass in training is of its batch.

    Attributes:
      groups: images that each BatchNorm group holds, in order; together the images of the pass.
      first: row of the batch that comes first in the pass.
      batch: images in the batch.
    """

    groups: tuple[int, ...]
    first: int
    batch: int


_PART: contextvars.ContextVar[BatchPart | None] = contextvars.ContextVar("part", default=None)


@contextlib.contextmanager
def part_of_batch(part: BatchPart) -> Iterator[None]:
    """Trace a training forward pass as a part of a batch.

    BatchNorm then normalises group by group, and Dropout takes the rows of the pass out of the
    batch's mask: what is dropped does not depend on how the batch is divided.
    """
    token = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(token)


class BatchNorm(nn.Module):
    """Batch normalisation that tells the moments of its input.

    When the collection "bn_statistics" is mutable, the mean and the biased variance of the
    input over (B, H, W) are sown there as ``mean`` and ``var``, at least in float32, so that
    ``apply(variables, x, mutable=["bn_statistics"])`` returns a tree like
    ``variables["batch_stats"]``. Otherwise they are not computed. On a GPU a frozen network tells
    what :func:`whole_statistics` makes such a tree of.

    Evaluation normalises with the running statistics. Training normalises with the biased
    batch statistics and, where "batch_stats" is mutable, updates the running ones as PyTorch
    does: ``running += momentum * (batch - running)``, with the unbiased variance. Inside
    :func:`part_of_batch` each group is normalised by itself, and the running statistics take up
    group after group, as if each had been a forward pass of its own.

    Attributes:
      epsilon: added to the variance.
      momentum: weight of the new batch, PyTorch's convention.
      dtype: of the result.
    """

    epsilon: float = EPSILON
    momentum: float = MOMENTUM
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        shape = x_BHWC.shape[-1:]
        scale_C = parameter(self, "scale", nn.initializers.ones, shape, jnp.float32)
        bias_C = parameter(self, "bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        wide = at_least_float32(x_BHWC)
        mean_C, var_C = running_mean.value, running_var.value
        frozen = not train and self.has_variable("folded", "gain")
        if not self.is_initializing():
            tell = self.is_mutable_collection("bn_statistics")
            if tell and frozen and parallel.platform() == "gpu":
                self._tell_sums(wide)
            elif tell or train:  # a result that is not used is not computed
                batch_mean_C, batch_var_C = moments(wide)
                if tell:
                    sow_last(self, "bn_statistics", mean=batch_mean_C, var=batch_var_C)
            if train:
                part = _PART.get()
                if part is not None and len(part.groups) > 1:
                    stacks = _stacks(wide, part.groups)
                    found = [jax.vmap(moments)(s) for s in stacks]
                    if self.is_mutable_collection("batch_stats"):
                        counts = [s[0].size // s.shape[-1] for s in stacks for _ in s]
                        mean_nC, var_nC = map(jnp.concatenate, zip(*found, strict=True))
                        var_nC *= jnp.asarray([[_bessel(n)] for n in counts], jnp.float32)
                        running_mean.value = self._take_up(running_mean.value, mean_nC)
                        running_var.value = self._take_up(running_var.value, var_nC)
                    normal = jax.vmap(self._normaliser(scale_C, bias_C))
                    outputs = [normal(s, *m) for s, m in zip(stacks, found, strict=True)]
                    return jnp.concatenate([y.reshape(-1, *x_BHWC.shape[1:]) for y in outputs])
                mean_C, var_C = batch_mean_C, batch_var_C
                if self.is_mutable_collection("batch_stats"):
                    unbiased_C = var_C * _bessel(x_BHWC.size // x_BHWC.shape[-1])
                    running_mean.value += self.momentum * (mean_C - running_mean.value)
                    running_var.value += self.momentum * (unbiased_C - running_var.value)
        normal = self._normaliser(scale_C, bias_C)
        # A CPU folds within its pass over the map.
        if not frozen or self.epsilon != EPSILON or parallel.platform() == "cpu":
            return normal(wide, mean_C, var_C)
        gain_C: Array = self.get_variable("folded", "gain")
        shift_C: Array = self.get_variable("folded", "shift")
        return (wide * gain_C + shift_C).astype(self.dtype)

    def _normaliser(self, scale_C: Array, bias_C: Array) -> Callable[[Array, Array, Array], Array]:
        def normal(x: Array, mean_C: Array, var_C: Array) -> Array:
            gain_C, shift_C = _fold(scale_C, bias_C, mean_C, var_C, self.epsilon)
            return (x * gain_C + shift_C).astype(self.dtype)

        return normal

    def _tell_sums(self, x_BHWC: Array) -> None:
        """Tell the sums of every image, for :func:`whole_statistics`."""
        sums_BC, squares_BC = _sums_of_images(x_BHWC)
        share_C = jnp.full(x_BHWC.shape[-1:], 1 / np.prod(x_BHWC.shape[:-1]), jnp.float32)
        sow_last(self, "bn_statistics", sum=sums_BC, squares=squares_BC, share=share_C)

    def _take_up(self, running_C: Array, group_nC: Array) -> Array:
        """``running += momentum * (group - running)`` for one group after the other, summed up."""
        left = (1.0 - self.momentum) ** np.arange(len(group_nC), -1, -1)
        weight_n1 = jnp.asarray(self.momentum * left[1:, None], jnp.float32)
        return jnp.float32(left[0]) * running_C + (weight_n1 * group_nC).sum(0)


def _fold(scale_C: Array, bias_C: Array, mean_C: Array, var_C: Array, epsilon: float):
    """Gain and shift of a normalisation."""
    gain_C = scale_C * lax.rsqrt(var_C + epsilon)
    return gain_C, bias_C - mean_C * gain_C


def _stacks(x_BHWC: Array, groups: tuple[int, ...]) -> list[Array]:
    """Consecutive groups of images, (n, B / n, H, W, C); unequal ones each in a stack of its own.

    The one reshape of equal groups leaves whole groups on the device that holds them.
    """
    assert sum(groups) == len(x_BHWC), (groups, x_BHWC.shape)
    if len(set(groups)) == 1:
        return [x_BHWC.reshape(len(groups), groups[0], *x_BHWC.shape[1:])]
    return [x[None] for x in jnp.split(x_BHWC, np.cumsum(groups)[:-1].tolist())]


def _bessel(count: int) -> float:
    """From the biased to the unbiased variance of ``count`` values."""
    return count / max(count - 1, 1)


def moments(*maps_BHWC: Array) -> tuple[Array, Array]:
    """Mean and biased variance over all but the last axis of a map, in one pass over it.

    Several maps (..., C) are parts of one, whose moments (C,) these are.

    ``E[x^2] - E[x]^2`` cancels where a channel lies far from zero: its relative error in float32
    is below 1e-6 (1 + mean^2 / var). A shift by the running mean would avoid that, but makes
    XLA:CPU write a shifted copy of every map, a fifth of a network's step (measured).
    """
    means = [_means(x_BHWC) for x_BHWC in maps_BHWC]
    mean_C, square_C = means[0]
    if len(maps_BHWC) > 1:
        count = sum(x_BHWC.size for x_BHWC in maps_BHWC)
        shares = [x_BHWC.size / count for x_BHWC in maps_BHWC]
        mean_C, square_C = (
            functools.reduce(operator.add, map(operator.mul, shares, of_parts))
            for of_parts in zip(*means, strict=True)
        )
    return mean_C, _variance(mean_C, square_C)


@jax.custom_jvp
def _means(x_BHWC: Array) -> tuple[Array, Array]:
    """Means of a map and of its squares, per channel."""
    form = MEANS["complex" if parallel.platform() == "gpu" else "apart"]
    return form(x_BHWC)


@_means.defjvp
def _means_jvp(primals, tangents):
    """The derivative has one form."""
    _, slopes = jax.jvp(MEANS["apart"], primals, tangents)
    return _means(*primals), slopes


def _means_apart(x_BHWC: Array) -> tuple[Array, Array]:
    axes = tuple(range(x_BHWC.ndim - 1))
    return jnp.mean(x_BHWC, axes), jnp.mean(jnp.square(x_BHWC), axes)


def _means_as_complex(x_BHWC: Array) -> tuple[Array, Array]:
    """Sum both as the parts of one number: XLA:GPU then launches half as many reductions."""
    both_C = jnp.mean(lax.complex(x_BHWC, jnp.square(x_BHWC)), tuple(range(x_BHWC.ndim - 1)))
    return both_C.real, both_C.imag


MEANS = {"apart": _means_apart, "complex": _means_as_complex}


@jax.custom_jvp
def _sums_of_images(x_BHWC: Array) -> tuple[Array, Array]:
    """Sums of every image's values and of their squares, per channel; of any rank above one."""
    both_BC = _sum_of_image(lax.complex(x_BHWC, jnp.square(x_BHWC)))
    return both_BC.real, both_BC.imag


@_sums_of_images.defjvp
def _sums_of_images_jvp(primals, tangents):
    """No factor stands at a sum: for every layer it would be a launch of its own."""
    (x_BHWC,), (dx_BHWC,) = primals, tangents
    slopes = _sum_of_image(dx_BHWC), _sum_of_image((x_BHWC + x_BHWC) * dx_BHWC)
    return _sums_of_images(x_BHWC), slopes


def _sum_of_image(x_BHWC: Array) -> Array:
    return jnp.sum(x_BHWC, tuple(range(1, x_BHWC.ndim - 1)))


def whole_statistics(told: PyTree) -> PyTree:
    """The moments of all layers from the sums of images that a frozen network tells on a GPU.

    There the last stage of every layer's reduction is a launch. All at once they are one.

    Args:
      told: a collection "bn_statistics": a layer's "sum" and "squares" (R, C) of each of R rows
        of a batch, and the "share" (C,) that a value has in a mean. Layers that told moments
        keep them.

    Returns:
      A tree of the same layers with "mean" and "var", the biased one, (C,) each.
    """
    flat = traverse_util.flatten_dict(told)
    by_rows: dict[int, list[tuple[str, ...]]] = {}  # of one batch size, but in odd networks
    for *layer, name in flat:
        if name == "sum":
            by_rows.setdefault(len(flat[(*layer, name)]), []).append(tuple(layer))
    for layers in by_rows.values():
        sums, squares, shares = (
            [flat.pop((*layer, name)) for layer in layers] for name in ("sum", "squares", "share")
        )
        means_N = jnp.concatenate(sums + squares, 1).sum(0) * jnp.concatenate(shares + shares)
        ends = np.cumsum([len(share_C) for share_C in shares + shares])[:-1].tolist()
        means = jnp.split(means_N, ends)
        halves = means[: len(layers)], means[len(layers) :]
        for layer, mean_C, square_C in zip(layers, *halves, strict=True):
            flat |= {(*layer, "mean"): mean_C, (*layer, "var"): _variance(mean_C, square_C)}
    return traverse_util.unflatten_dict(flat)


def _variance(mean_C: Array, square_C: Array) -> Array:
    return jnp.maximum(square_C - jnp.square(mean_C), 0.0)


def normalise(x: Array, axes: int | tuple[int, ...], epsilon: float) -> Array:
    """Zero mean and unit variance over the axes, at least in float32."""
    x = at_least_float32(x)
    centred = x - jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axes, keepdims=True)
    return centred * lax.rsqrt(variance + epsilon)


class InstanceNorm(nn.Module):
    """Normalise each channel of each image over (H, W); params "scale" and "bias"."""

    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array, train: bool = False) -> Array:
        del train  # as BatchNorm is called; there is nothing to learn from a batch
        scale_C = parameter(self, "scale", nn.initializers.ones, x_BHWC.shape[-1:], jnp.float32)
        bias_C = parameter(self, "bias", nn.initializers.zeros, x_BHWC.shape[-1:], jnp.float32)
        return (normalise(x_BHWC, (1, 2), self.epsilon) * scale_C + bias_C).astype(self.dtype)


class LayerNorm(nn.Module):
    """Normalise over the last axis; params "scale" and "bias"."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = parameter(self, "scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = parameter(self, "bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return (normalise(x, -1, self.epsilon) * scale + bias).astype(self.dtype)


class Dropout(nn.Module):
    """Zero entries with probability ``rate`` and scale the others up; rng "dropout".

    Attributes:
      rate: probability in [0, 1).
      whole_images: drop all of an image or nothing: stochastic depth ("row" mode), arXiv
        1603.09382.
    """

    rate: float
    whole_images: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if not train or self.rate == 0.0:
            return x
        part = _PART.get() or BatchPart((), 0, len(x))
        shape = (part.batch, *((1,) * (x.ndim - 1) if self.whole_images else x.shape[1:]))
        uniform = jax.random.uniform(self.make_rng("dropout"), shape, jnp.float32)
        uniform = uniform[part.first : part.first + len(x)]
        return jnp.where(uniform >= self.rate, x / (1 - self.rate), jnp.zeros((), x.dtype))


def conv_norm(
    x_BHWC: Array,
    features: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
    *,
    names: tuple[str, str],
    activation: Callable[[Array], Array] | None = None,
    train: bool,
    dtype: jnp.dtype,
    momentum: float = MOMENTUM,
) -> Array:
    """Add to the calling module a convolution that keeps the map, its BatchNorm, an activation.

    Args:
      names: of the convolution and of the BatchNorm.
      momentum: of the BatchNorm's running statistics.
    """
    x_BHWC = Conv(
        features,
        kernel_size,
        stride,
        padding=(kernel_size - 1) // 2,
        groups=groups,
        use_bias=False,
        dtype=dtype,
        name=names[0],
    )(x_BHWC)
    x_BHWC = BatchNorm(momentum=momentum, dtype=dtype, name=names[1])(x_BHWC, train)
    return x_BHWC if activation is None else activation(x_BHWC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def max_pool(x_BHWC: Array, size: int, stride: int, padding: int = 0) -> Array:
    """PyTorch's MaxPool2d, as a maximum of shifted maps.

    The gradient of XLA's own pooling is 8 times slower on a CPU (measured) and is a scatter on
    a GPU. Where maxima tie, the first of a window has the gradient.
    """
    windows = _windows(x_BHWC, (size, size), stride, padding, fill=-np.inf)
    return functools.reduce(jnp.maximum, [window for _, window in windows])


def _max_pool_forward(x_BHWC: Array, size: int, stride: int, padding: int):
    y_BHWC = max_pool(x_BHWC, size, stride, padding)
    if parallel.platform() == "cpu":
        return y_BHWC, (x_BHWC, None)
    # Now, while the windows are at hand; without the barrier XLA would read them again.
    first_BHWC = _first(x_BHWC, size, stride, padding)
    y_BHWC, first_BHWC = lax.optimization_barrier((y_BHWC, first_BHWC))
    return y_BHWC, (x_BHWC, first_BHWC)


def _first(x_BHWC: Array, size: int, stride: int, padding: int) -> Array:
    """Where in each window its first maximum is, as int8: row by row of the window.

    Found by what is greater, never by what equals the maximum: XLA computes a map anew wherever it
    is read, and a product and a sum that are rounded once in one place and twice in another give
    values of which none is the maximum.
    """
    windows = _windows(x_BHWC, (size, size), stride, padding, fill=-np.inf)
    (i, j), best = next(windows)
    first = jnp.full(best.shape, float(i * size + j))  # of integers XLA:TPU makes a pass of its own
    for (i, j), window in windows:
        higher = window > best
        best = jnp.where(higher, window, best)
        first = jnp.where(higher, float(i * size + j), first)
    return first.astype(jnp.int8)


def _max_pool_backward(size: int, stride: int, padding: int, saved, dy_BHWC: Array):
    x_BHWC, first_BHWC = saved
    by = parallel.suited(cpu=_pool_gradient_by_gather, default=_pool_gradient_by_phases)
    if first_BHWC is None:
        first_BHWC = _first(x_BHWC, size, stride, padding)
    sizes = x_BHWC.shape[1:3]
    return (by(first_BHWC, dy_BHWC, sizes=sizes, size=size, stride=stride, padding=padding),)


def _pool_gradient_by_gather(
    first_BHWC, dy_BHWC, *, sizes: tuple[int, int], size: int, stride: int, padding: int
) -> Array:
    """Every entry looks at all windows that could hold it, spread out by the stride."""
    rows, columns = sizes
    spread = functools.partial(
        _spread, size=sizes, kernel=(size, size), stride=stride, padding=padding
    )
    first, dy = spread(first_BHWC, fill=-1), spread(dy_BHWC, fill=0.0)
    dx_BHWC = jnp.zeros((dy_BHWC.shape[0], *sizes, dy_BHWC.shape[3]), dy_BHWC.dtype)
    for i, j in itertools.product(range(size), repeat=2):
        near = (slice(None), slice(i, i + rows), slice(j, j + columns))
        place = (size - 1 - i) * size + size - 1 - j
        dx_BHWC += jnp.where(first[near] == place, dy[near], 0.0)
    return dx_BHWC


def _pool_gradient_by_phases(
    first_BHWC, dy_BHWC, *, sizes: tuple[int, int], size: int, stride: int, padding: int
) -> Array:
    """Entries of one phase of the stride lie alike in the windows that hold them.

    At stride 2 a quarter of the gather's comparisons. XLA:CPU does not vectorise the strides.
    """
    reach = (size - 1) // stride  # back to the first window that holds an entry
    ahead = (stride - 1 + padding) // stride

    def beyond(map_BHWC: Array, fill: float) -> Array:
        counts = zip(sizes, map_BHWC.shape[1:3], strict=True)
        edges = [(reach, max(0, -(-n // stride) + ahead - m), 0) for n, m in counts]
        blank = jnp.asarray(fill, map_BHWC.dtype)
        return lax.pad(map_BHWC, blank, [(0, 0, 0), *edges, (0, 0, 0)])

    def holding(phase: int, count: int) -> list[tuple[int, slice]]:
        """The windows that hold entries ``phase``, ``phase + stride``, ...: nearest, and back.

        Each with where in it they are.
        """
        at, nearest = (phase + padding) % stride, reach + (phase + padding) // stride
        back = range((size - 1 - at) // stride + 1)
        return [(at + k * stride, slice(nearest - k, nearest - k + count)) for k in back]

    first, dy = beyond(first_BHWC, -1), beyond(dy_BHWC, 0.0)
    dx_BHWC = jnp.zeros((dy_BHWC.shape[0], *sizes, dy_BHWC.shape[3]), dy_BHWC.dtype)
    for corner in itertools.product(range(stride), repeat=2):
        counts = [len(range(phase, n, stride)) for phase, n in zip(corner, sizes, strict=True)]
        looked = []
        for (i, rows), (j, columns) in itertools.product(*map(holding, corner, counts)):
            near = (slice(None), rows, columns)
            looked.append(jnp.where(first[near] == i * size + j, dy[near], 0.0))
        if 0 in counts or not looked:
            continue
        places = zip(sizes, counts, corner, strict=True)
        apart = [(i, n - 1 - i - (m - 1) * stride, stride - 1) for n, m, i in places]
        spread = functools.reduce(operator.add, looked)
        zero = jnp.zeros((), spread.dtype)
        dx_BHWC += lax.pad(spread, zero, [(0, 0, 0), *apart, (0, 0, 0)])
    return dx_BHWC


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def avg_pool(x_BHWC: Array, size: int) -> Array:
    """Mean of windows that do not overlap; a rest at the end is dropped."""
    batch, height, width, channels = x_BHWC.shape
    rows, columns = height // size, width // size
    windows = x_BHWC[:, : rows * size, : columns * size]
    return windows.reshape(batch, rows, size, columns, size, channels).mean((2, 4))


def adaptive_avg_pool(x_BHWC: Array, size: int) -> Array:
    """PyTorch's AdaptiveAvgPool2d: cell i averages floor(i H / size) to ceil((i + 1) H / size)."""

    def average(length: int) -> Array:
        matrix = np.zeros((size, length), np.float64)
        for i in range(size):
            start, stop = i * length // size, -(-(i + 1) * length // size)
            matrix[i, start:stop] = 1 / (stop - start)
        return jnp.asarray(matrix, x_BHWC.dtype)

    rows, columns = (average(n) for n in x_BHWC.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x_BHWC, columns)


def global_avg_pool(x_BHWC: Array) -> Array:
    """Mean over the map: (B, C)."""
    return jnp.mean(x_BHWC, axis=(1, 2))


def flatten(x_BHWC: Array) -> Array:
    """Flatten a map in PyTorch's order (C, H, W), so that imported linear weights fit."""
    return x_BHWC.transpose(0, 3, 1, 2).reshape(x_BHWC.shape[0], -1)


def sow_embedding(module: nn.Module, x_BD: Array) -> Array:
    """Keep the penultimate features as "features/embedding", where that collection is mutable."""
    if not module.is_initializing():
        module.sow(
            "features", "embedding", x_BD, init_fn=lambda: None, reduce_fn=lambda _, new: new
        )
    return x_BD


def scale_channels(channels: int, width: float, divisor: int = 8) -> int:
    """``channels * width``, rounded to the divisor, at least one divisor; exact at width 1."""
    if width == 1.0:
        return channels
    return max(divisor, int(channels * width / divisor + 0.5) * divisor)


def scale_blocks(blocks: int, depth: float) -> int:
    """``blocks * depth``, rounded, at least one."""
    return max(1, round(blocks * depth))
