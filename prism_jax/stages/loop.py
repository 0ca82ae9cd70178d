"""The training loop that squeeze and validate share: batches in, a tested network out.

Resume order, when a run continues:
  1. restore the newest checkpoint (optimiser step n and the state after it),
  2. cut metrics.jsonl back to lines of steps <= n,
  3. go on with batch n: batches are addressed by number, so nothing is repeated or lost.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax import progress
from prism_jax.data import workdir
from prism_jax.data.checkpoints import Checkpoints
from prism_jax.data.metrics import MetricsWriter, truncate
from prism_jax.data.pipeline import on_device
from prism_jax.errors import UserError
from prism_jax.stages.context import Context
from prism_jax.training import TrainBatch, Trainer, TrainState
from prism_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training: the state, and what its tests said."""

    state: TrainState
    top1: float
    top5: float
    best_top1: float
    per_class: list[float | None]
    seconds: float
    answers_N: np.ndarray


def train(
    context: Context,
    trainer: Trainer,
    folder: epath.Path,
    *,
    title: str,
    batches: Callable[[int], Iterable[TrainBatch]],
    per_epoch: int,
    eval_every: int,
    checkpoint_seconds: float,
    variables: PyTree | None = None,
) -> Trained:
    """Train to the last epoch of the trainer's recipe, testing on the way.

    Args:
      folder: holds metrics.jsonl and checkpoints/ while it lasts.
      title: what the progress bar says.
      batches: ``batches(n)`` yields batch n and all that follow.
      per_epoch: batches per epoch.
      eval_every: epochs between two tests; the last epoch is always tested.
      variables: the weights to begin with; None: fresh ones.

    Raises:
      UserError: a loss that is not finite; the step is named.
      Interrupted: a stop was requested; the state is saved.
    """
    epochs = trainer.recipe.epochs
    total = epochs * per_epoch
    checkpoints = Checkpoints(
        folder / "checkpoints",
        every_seconds=checkpoint_seconds,
        of=workdir.read_fingerprint(folder),
    )
    state = trainer.start(context.inputs.image_shape, variables)
    best, seconds = 0.0, 0.0
    losses: list[float | jax.Array] = []  # of the epoch so far
    if restored := checkpoints.restore(jax.device_get(state)):
        done, state, meta = restored
        state = trainer.place(state)
        best, seconds, losses = meta["best_top1"], meta["seconds"], meta["losses"]
        context.say(f"{title}: continues after step {done} of {total}")
    done = int(state.step)
    metrics = folder / "metrics.jsonl"
    truncate(metrics, lambda line: line["step"] <= done)
    writer = MetricsWriter(metrics, tensorboard_dir=folder / "tensorboard")
    images, labels = context.inputs.test_set()
    started = time.monotonic()

    def elapsed() -> float:
        return seconds + time.monotonic() - started

    def mean_loss(step: int) -> float:
        """Of the epoch that ends at a step, or of its part so far."""
        mean = float(np.mean(np.array(jax.device_get(losses), np.float32)))
        if not np.isfinite(mean):
            raise UserError(
                f"{title}: the training loss is {mean} in epoch {(step - 1) // per_epoch} (step "
                f"{step - len(losses)} to {step - 1}); lower the learning rate"
            )
        return mean

    def save(step: int) -> None:
        if losses:
            mean_loss(step)  # what is saved goes on
        so_far = [float(loss) for loss in jax.device_get(losses)]
        meta = {"best_top1": best, "seconds": elapsed(), "losses": so_far}
        meta["averaged"] = trainer.recipe.ema is not None  # for whoever imports the network
        writer.flush()
        checkpoints.save(step, state, meta)

    result = None
    with progress.task(title, total, unit="step", done=done) as bar:
        for batch in on_device(batches(done), put=trainer.mesh.put):
            state, loss = trainer.step(state, batch)
            losses.append(loss)
            done += 1
            shown: dict[str, Any] = {}
            if done % per_epoch == 0:
                epoch = done // per_epoch
                mean = mean_loss(done)
                losses = []
                if epoch % eval_every == 0 or epoch == epochs:
                    result = trainer.test(state, images, labels)
                    best = max(best, result.top1)
                    tested = {"loss": mean, "top1": result.top1, "top5": result.top5}
                    writer.write(done, epoch=epoch, **tested)
                    shown = {"loss": mean, "top1": result.top1}
            bar.advance(1, **shown)
            if context.stop.requested or (checkpoints.due and done < total):
                save(done)
                if context.stop.requested:
                    checkpoints.close()
                    context.stop.check()
    writer.close()
    save(total)
    checkpoints.close()
    if result is None:  # everything was done before; only the record was missing
        result = trainer.test(state, images, labels)
    per_class = [None if np.isnan(x) else float(x) for x in result.per_class_K]
    return Trained(state, result.top1, result.top5, best, per_class, elapsed(), result.answers_N)
