"""Every term of every method for ``TwoConvs`` in PyTorch and float64, gradients by autograd.

Independent of the package: it shares no line with it. Views are applied in NumPy (``by_hand``).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from helpers import by_hand

EPSILON = 1e-5


@dataclasses.dataclass
class Terms:
    """What an objective is made of; each field has the meaning of the recipe's."""

    alpha: float = 0.25
    match: tuple[str, ...] = ("bn",)
    first: str = "bn1"
    multiplier: float = 10.0
    variance_weight: float = 1.0
    patch: int = 5
    class_share: float = 0.0
    ema: float = 0.0
    from_zero: bool = False
    swap_class_patch: bool = False
    total_variation: float = 0.0
    image_l2: float = 0.0
    densification: float = 0.0
    flatness: float = 0.0
    at_scale_of: int | None = None
    per_class: int = 1
    squared: bool = False
    unbiased: bool = False


def read(torch, variables, x):
    """Logits, and the inputs of all layers, of images (B, C, H, W)."""
    params, running = variables["params"], variables["batch_stats"]
    inputs = {}
    for i in (1, 2):
        inputs[f"conv{i}"] = x
        kernel = torch.as_tensor(params[f"conv{i}"]["kernel"]).permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, kernel, stride=i, padding=1)
        inputs[f"bn{i}"] = x
        names = ("mean", "var"), ("scale", "bias")
        mean, var = (torch.as_tensor(running[f"bn{i}"][n]) for n in names[0])
        scale, bias = (torch.as_tensor(params[f"bn{i}"][n]) for n in names[1])
        x = torch.nn.functional.batch_norm(x, mean, var, scale, bias, eps=EPSILON)
        x = torch.relu(x)
    head = params["head"]
    logits = x.mean((2, 3)) @ torch.as_tensor(head["kernel"]) + torch.as_tensor(head["bias"])
    return logits, inputs


def statistics(torch, inputs, terms: Terms):
    """``{layer: {name: vector}}`` of a batch."""
    found = {}
    for layer, x in inputs.items():
        conv = layer.startswith("conv")
        stats = {}
        if ("conv" if conv else "bn") in terms.match:
            flat = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1)
            stats |= {"mean": flat.mean(1), "var": flat.var(1, unbiased=terms.unbiased)}
        if conv and "patch" in terms.match:
            p = terms.patch
            size = [-(-n // p) * p for n in x.shape[2:]]
            x = torch.nn.functional.interpolate(x, size, mode="bilinear")
            rows, columns = (n // p for n in size)
            x = x.reshape(len(x), x.shape[1], rows, p, columns, p).permute(2, 4, 0, 1, 3, 5)
            x = x.reshape(rows * columns, -1)
            stats |= {"patch_mean": x.mean(1), "patch_var": x.var(1, unbiased=False)}
        if stats:
            found[layer] = stats
    return found


def distance(torch, batch, target, terms: Terms, dropped):
    total = 0.0
    for layer, stats in batch.items():
        if layer in dropped:
            continue
        for name, value in stats.items():
            norm = torch.norm(torch.as_tensor(np.asarray(target[layer][name])) - value)
            weight = terms.variance_weight if "var" in name else 1.0
            weight *= terms.multiplier if layer == terms.first else 1.0
            total = total + weight * (norm**2 if terms.squared else norm)
    return total


def targets(variables, labels, terms: Terms):
    """Global targets, and the mean of those of the batch's classes."""
    whole = {**variables["batch_stats"], **variables.get("conv_statistics", {})}
    per_class = variables.get("class_statistics", {"bn": {}, "conv": {}})
    swap = {"patch_mean": "patch_var", "patch_var": "patch_mean"} if terms.swap_class_patch else {}
    mean = {
        layer: {swap.get(n, n): np.asarray(table)[labels].mean(0) for n, table in stats.items()}
        for layer, stats in {**per_class["bn"], **per_class["conv"]}.items()
    }
    return whole, mean


class Teacher:
    """One teacher's energy, with what it remembers of earlier batches."""

    def __init__(self, variables, terms: Terms):
        self.variables, self.terms, self.average = variables, terms, {}

    def size(self, torch) -> float:
        """The distance of statistics that are all zero from the targets."""
        zeros = {
            layer: {n: torch.zeros(len(x), dtype=torch.float64) for n, x in stats.items()}
            for layer, stats in self.variables["batch_stats"].items()
        }
        return float(distance(torch, zeros, self.variables["batch_stats"], self.terms, ()))

    def energy(self, torch, x, labels, *, logit_weight, statistic_weight, average=None, dropped=()):
        """The weighted loss of images (B, C, H, W), and its parts by name."""
        terms = self.terms
        logits, inputs = read(torch, self.variables, x)
        parts = {"ce": torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long())}
        batch = statistics(torch, inputs, terms)
        if terms.ema and statistic_weight > 0:
            batch = {layer: self._remember(layer, s, dropped) for layer, s in batch.items()}
        whole, classes = targets(self.variables, labels, terms)
        bn = distance(torch, batch, whole, terms, dropped)
        if terms.class_share:
            by_class = distance(torch, batch, classes, terms, dropped)
            bn = (1 - terms.class_share) * bn + terms.class_share * by_class
        parts["bn"] = bn
        loss = logit_weight * parts["ce"] + terms.alpha * statistic_weight * bn
        if terms.flatness:
            with torch.no_grad():
                smooth, _ = read(torch, self.variables, average)
            log_p, log_q = (torch.log_softmax(z / 4, 1) for z in (smooth, logits))
            parts["flatness"] = (log_p.exp() * (log_p - log_q)).mean()
            loss = loss + logit_weight * terms.flatness * parts["flatness"]
        return loss, parts

    def _remember(self, layer, stats, dropped):
        if layer in dropped:
            return stats
        matched = {}
        for name, value in stats.items():
            now = value.detach()
            old = self.average.get((layer, name))
            if old is None:
                old = 0 * now if self.terms.from_zero else now
            new = self.terms.ema * old + (1 - self.terms.ema) * now
            self.average[layer, name] = new
            matched[name] = new + value - now
        return matched


def priors(torch, x, terms: Terms):
    """The weighted terms of the images alone."""
    total = 0.0
    if terms.total_variation:
        pairs = (
            (x[:, :, :, :-1], x[:, :, :, 1:]),
            (x[:, :, :-1], x[:, :, 1:]),
            (x[:, :, 1:, :-1], x[:, :, :-1, 1:]),
            (x[:, :, :-1, :-1], x[:, :, 1:, 1:]),
        )
        total = total + terms.total_variation * sum(torch.norm(a - b) for a, b in pairs)
    if terms.image_l2:
        total = total + terms.image_l2 * torch.norm(x.reshape(len(x), -1), dim=1).mean()
    if terms.densification:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, (32, 32)).reshape(len(x), -1)
        for rows in pooled.split(terms.per_class):
            values = torch.linalg.eigvalsh(rows @ rows.T)
            total = total + terms.densification * torch.nn.functional.kl_div(
                torch.log_softmax(values, 0),
                torch.softmax(values.detach() / 4, 0),
                reduction="sum",
            )
    return total


def shown(torch, images_BHWC, view):
    """Viewed images as a leaf (B, C, H, W), and the function that pulls its gradient back."""
    seen, pull_back = by_hand.show(images_BHWC, *view)
    leaf = torch.tensor(seen).permute(0, 3, 1, 2).contiguous().requires_grad_()
    return leaf, lambda: pull_back(leaf.grad.permute(0, 2, 3, 1).numpy())
