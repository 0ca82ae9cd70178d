"""What every PyTorch side of the benchmarks has; torch alone is needed."""

from __future__ import annotations

import functools

import measuring
import torch


class Side:
    """What every PyTorch side has: a device, the machine's rates as PyTorch gets them."""

    def __init__(self, device: str):
        self.device, self._sizes = "cpu" if device == "cpu" else "cuda", measuring.SIZES[device]

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @functools.cached_property
    def _arrays(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A matrix; what is copied, and where to."""
        side, block, dtype = self._sizes
        matrix = torch.ones(side, side, device=self.device, dtype=getattr(torch, dtype))
        values = torch.zeros(block, device=self.device)
        return matrix, values, torch.empty_like(values)

    def matmul(self) -> float:
        """One product; returns its FLOP."""
        matrix, _, _ = self._arrays
        matrix @ matrix
        self.wait()
        return 2.0 * len(matrix) ** 3

    def copy(self) -> float:
        """One copy; returns the bytes read and written."""
        _, values, target = self._arrays
        target.copy_(values)
        self.wait()
        return 2.0 * 4 * len(values)

    def facts(self) -> dict[str, int | None]:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        return {"account_bytes": None, "device_peak_bytes": peak}
