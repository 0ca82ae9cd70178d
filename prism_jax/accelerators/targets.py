"""The machines that programs can be compiled for without having them: one table.

``h100`` is one GPU, ``h100x8`` eight of them; ``v5e:4x4`` is a TPU slice of sixteen chips. A GPU
is described to XLA by what decides its programs (compute capability, sizes); a TPU by its name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from prism_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Device:
    """What is known of one device.

    Attributes:
      platform: "cuda" or "tpu".
      memory_bytes: what it has.
      usable: the share of it that a JAX process takes by default.
      bytes_per_second: of its memory.
      flops: dense, by what is multiplied: "bfloat16", "tensorfloat32" (a GPU's float32 product by
        default) and "float32" (exact, and everything that is no matrix product).
      clock_hz: of a TPU: its peak rate divided by what its matrix units do in a cycle.
      capability, cores, core_bytes, l2_bytes, cuda_clock_ghz: of a GPU, for XLA.
      dimensions: of a TPU slice's shape.
      chip: how libtpu is told to see a chip of two cores: as the one device that JAX has.
    """

    name: str
    platform: str
    memory_bytes: int
    usable: float
    bytes_per_second: float
    flops: Mapping[str, float]
    clock_hz: float | None = None
    capability: tuple[int, int] = (0, 0)
    cores: int = 0
    core_bytes: int = 0
    l2_bytes: int = 0
    cuda_clock_ghz: float = 0.0
    dimensions: int = 0
    chip: str | None = None


def _gpu(name: str, capability: tuple[int, int], gigabytes: int, rates: tuple, **known: Any):
    """A GPU; rates: TB/s, then TFLOP/s of bfloat16, TensorFloat-32 and float32."""
    bandwidth, *flops = rates
    kinds = ("bfloat16", "tensorfloat32", "float32")
    by_kind = {kind: 1e12 * rate for kind, rate in zip(kinds, flops, strict=True)}
    return Device(
        name, "cuda", gigabytes << 30, 0.75, 1e12 * bandwidth, by_kind, capability=capability,
        **known,
    )  # fmt: skip


def _tpu(
    name: str,
    gigabytes: float,
    bandwidth: float,
    tera: float,
    clock: float,
    dimensions: int,
    chip: str | None = None,
):
    """A TPU: GiB, TB/s and TFLOP/s of bfloat16 per chip, GHz."""
    memory = int(gigabytes * (1 << 30))
    return Device(
        name, "tpu", memory, 1.0, 1e12 * bandwidth, {"bfloat16": 1e12 * tera},
        clock_hz=1e9 * clock, dimensions=dimensions, chip=chip,
    )  # fmt: skip


# The vendors' data sheets; dense rates.
DEVICES = {
    device.name: device
    for device in (
        _gpu("a100", (8, 0), 80, (2.039, 312, 156, 19.5), cores=108, core_bytes=167936,
             l2_bytes=41943040, cuda_clock_ghz=1.41),
        _gpu("rtx4090", (8, 9), 24, (1.008, 165.2, 82.6, 82.6), cores=128, core_bytes=102400,
             l2_bytes=75497472, cuda_clock_ghz=2.52),
        _gpu("l4", (8, 9), 24, (0.300, 121, 60, 30.3), cores=58, core_bytes=102400,
             l2_bytes=50331648, cuda_clock_ghz=2.04),
        _gpu("h100", (9, 0), 80, (3.35, 989, 494.7, 67), cores=132, core_bytes=233472,
             l2_bytes=52428800, cuda_clock_ghz=1.98),
        _gpu("h200", (9, 0), 140, (4.8, 989, 494.7, 67), cores=132, core_bytes=233472,
             l2_bytes=62914560, cuda_clock_ghz=1.98),
        _gpu("b200", (10, 0), 180, (8.0, 2250, 1125, 75), cores=148, core_bytes=233472,
             l2_bytes=132120576, cuda_clock_ghz=1.965),
        _tpu("v4", 32, 1.228, 275, 1.05, 3, chip="megacore"),
        _tpu("v5e", 16, 0.819, 197, 1.5, 2),
        _tpu("v5p", 95, 2.765, 459, 1.75, 3),
        _tpu("v6e", 32, 1.64, 918, 1.75, 2),
    )
}  # fmt: skip

# A block may take a kilobyte less than a core has.
_DESCRIPTION = """
platform_name: "CUDA"
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {threads}
  shared_memory_per_block: 49152
  shared_memory_per_core: {core_bytes}  shared_memory_per_block_optin: {block_bytes}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  core_count: {cores}  fpus_per_core: {fpus}  clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2_bytes}  device_memory_size: {memory}
  driver_version: "13.0.0"  runtime_version: "12.9.0"  compile_time_toolkit_version: "12.9.0"
}}
dnn_version_info {{ major: 9 minor: 10 }}
"""


EIGHT_CHIPS = (2, 4)


@dataclasses.dataclass(frozen=True)
class Target:
    """A machine: a device and how many there are, for a TPU as the shape of a slice in chips."""

    name: str
    device: Device
    shape: tuple[int, ...]

    @property
    def devices(self) -> int:
        """How many devices JAX has there."""
        return math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """How many processes a run has there: one for eight GPUs, or for four chips of a slice.

        Eight chips of a v5e or v6e, 2 x 4, are one host too (of larger slices they are two).
        """
        return -(-math.prod(self.shape) // self._chips_of_a_host)

    @property
    def devices_of_a_host(self) -> int:
        """How many devices a process has there."""
        return min(math.prod(self.shape), self._chips_of_a_host)

    @property
    def _chips_of_a_host(self) -> int:
        return 8 if self.device.platform == "cuda" or self.shape == EIGHT_CHIPS else 4


def known() -> str:
    """What may be named, for people."""
    gpus = [d.name for d in DEVICES.values() if d.platform == "cuda"]
    tpus = [d.name for d in DEVICES.values() if d.platform == "tpu"]
    return (
        f"GPUs {', '.join(gpus)}, several of them as in h100x8; TPUs {', '.join(tpus)}, slices of "
        f"them as in v5e:4x4, v6e:16x16, v5p:2x2x1"
    )


def parse(name: str) -> Target:
    """A machine by its name.

    Raises:
      UserError: there is no such machine; the message names those there are.
    """
    if device := DEVICES.get(name):
        return Target(name, device, (1,) * max(1, device.dimensions))
    gpu = re.fullmatch(r"(\w+?)(?:x(\d+))?", name)
    tpu = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if tpu and (device := DEVICES.get(tpu[1])) and device.platform == "tpu":
        shape = tuple(map(int, tpu[2].split("x")))
        if len(shape) == device.dimensions and min(shape) > 0:
            return Target(name, device, shape)
        example = "x".join(["2"] * min(2, device.dimensions) + ["1"] * (device.dimensions - 2))
        raise UserError(
            f"--target={name} has a shape of {len(shape)} numbers; a slice of {device.name} has "
            f"{device.dimensions} positive ones, as in {device.name}:{example}"
        )
    if gpu and (device := DEVICES.get(gpu[1])) and device.platform == "cuda":
        if (count := int(gpu[2] or 1)) > 8 and count % 8:
            raise UserError(f"--target={name}: hosts have eight GPUs each; give a multiple of 8")
        if count > 0:
            return Target(name, device, (count,))
    raise UserError(f"--target={name} is unknown; there are: {known()}")


# --- the compilers ---------------------------------------------------------------------------

_MODULES = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}  # any of them
_EXTRAS = {"cuda": "cuda12-local", "tpu": "tpu"}


def compiler_missing(target: Target) -> str | None:
    """What to do where the compiler of a machine is not installed; None where it is."""
    platform = target.device.platform
    if any(importlib.util.find_spec(name) for name in _MODULES[platform]):
        return None
    import jax

    more = " nvidia-cuda-nvcc-cu12" if platform == "cuda" else ""
    return (
        f"the compiler for {target.name} is not installed. It needs no driver and no device: "
        f'{sys.executable} -m pip install "jax[{_EXTRAS[platform]}]=={jax.__version__}"{more}'
    )


def environment(target: Target) -> dict[str, str]:
    """The variables with which a process compiles for a machine: it looks for no device."""
    variables = {"JAX_PLATFORMS": "cpu"}
    if target.device.platform == "tpu":
        variables |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no device to be alone with
        }
    return variables


def devices_of(target: Target) -> list[Any]:
    """The described devices, by the machine's compiler: of GPUs one host's, of a TPU the slice's.

    Raises:
      UserError: the compiler knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    device = target.device
    if device.platform == "cuda":
        given: dict[str, Any] = {
            "topology_name": device.name,
            "target_config": _describe(device),
            "topology": f"1x1x{target.devices_of_a_host}",
        }
    else:
        given = {"topology_name": f"{device.name}:{'x'.join(map(str, target.shape))}"}
        if math.prod(target.shape) == 1:
            given["chips_per_host_bounds"] = (1, 1, 1)
        if target.shape == EIGHT_CHIPS:
            given["chips_per_host_bounds"] = (*EIGHT_CHIPS, 1)
        if device.chip:
            given["chip_config_name"] = device.chip
    try:
        return list(topologies.get_topology_desc(platform=device.platform, **given).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        raise UserError(
            f"--target={target.name}: its compiler knows no such slice "
            f"({str(error).splitlines()[0]}); there are: {known()}"
        ) from error


def _describe(device: Device) -> str:
    """A GPU as XLA wants it described."""
    major, minor = device.capability
    return _DESCRIPTION.format(
        major=major,
        minor=minor,
        threads=1536 if device.capability == (8, 9) else 2048,
        core_bytes=device.core_bytes,
        block_bytes=device.core_bytes - 1024,
        cores=device.cores,
        fpus=64 if device.capability == (8, 0) else 128,
        clock=device.cuda_clock_ghz,
        bandwidth=int(device.bytes_per_second),
        l2_bytes=device.l2_bytes,
        memory=device.memory_bytes,
    )
