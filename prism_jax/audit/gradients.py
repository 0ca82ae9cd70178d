"""The noise of drawn teachers, along a synthesis, beside what one training image changes.

Teachers of the first run are trained again with one image exchanged for another of its class,
everything else alike (order, views, initial weights); and once more on the same images with other
seeds, which is what training alone changes. All are asked for the gradients of the same images:
those of the first run's own course. None of the exchanged images starts one of those, where a
gradient would be of the very image that a teacher has seen or not.
"""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath

from prism_jax import pipeline, progress, synthesis
from prism_jax.audit.rows import cell_of, of_run, rows_of
from prism_jax.audit.shadows import MEMBERS, Shadows
from prism_jax.config import Experiment, unit_budget, units
from prism_jax.config.rules.recover import supervised_by
from prism_jax.core import pixels
from prism_jax.data import workdir
from prism_jax.errors import UserError
from prism_jax.stages import statistics
from prism_jax.stages.context import Context
from prism_jax.stages.makers import optimise
from prism_jax.synthesis import course, disagreement
from prism_jax.teachers import TeacherPool

RESEEDED, EXCHANGED = "reseeded", "exchanged"
SEED = 1_000_000  # of that, which no run has


def run(shadows: Shadows, stop: Any) -> None:
    """Make the study, where it is not there already."""
    settings = shadows.config.gradients
    cell = cell_of(shadows.config, settings.row)
    experiment = shadows.experiments[cell]
    wanted = workdir.digest(
        {"experiment": shadows.digest(cell), "exchanged": "no starts", **settings.to_dict()}
    )
    path = epath.Path(shadows.root) / "gradients.json"
    if path.exists() and workdir.read_record(path)["of"] == wanted:
        return

    def trained(one: Experiment, folder: pathlib.Path) -> Context:
        context = Context(one, str(folder), stop=stop)
        try:
            pipeline.RUNNERS["squeeze"](context)
        finally:
            context.work.lock.release()
        stop.check()
        return context

    contexts = {MEMBERS: trained(experiment, shadows.teachers(cell))}
    own, spared = shadows.root / "gradients", _starts(shadows, contexts[MEMBERS])
    for number in range(settings.images):
        at_N = shadows.plan.exchanged(0, number, shadows.train.labels_N, spared)
        # A folder of other images than before has another name.
        name = f"{EXCHANGED}_{number:02d}"
        data = shadows.data(own / f"{name}_{workdir.digest(at_N.tolist())}.npz", at_N)
        contexts[name] = trained(of_run(experiment, data, 0), pathlib.Path(data).with_suffix(""))
    assert experiment.dataset.path is not None
    reseeded = of_run(experiment, experiment.dataset.path, SEED)
    contexts[RESEEDED] = trained(reseeded, own / RESEEDED)
    workdir.write_record(path, {"of": wanted, "study": study(contexts, settings)})


def _starts(shadows: Shadows, context: Context) -> set[int]:
    """Positions of the training images that images of the study start from as they are."""
    _, start_BHWC = optimise.batch_of(context, units(context.config)[0])
    images = np.asarray(pixels.to_uint8(start_BHWC, context.inputs.normalisation))
    starts = {image.tobytes() for image in images}
    mine = shadows.plan.chosen(0, MEMBERS)
    return {int(at) for at in mine if shadows.train.images_uint8_NHWC[at].tobytes() in starts}


def check(shadows: Shadows) -> None:
    """Refuse what has no gradients of this kind, before any work.

    Raises:
      UserError: no such row, or numbers out of range.
    """
    settings = shadows.config.gradients
    known = [row for row in rows_of(shadows.config) if row not in shadows.without]
    if settings.row not in known:
        raise UserError(f"gradients.row is {settings.row!r}; it must be a row: {', '.join(known)}")
    experiment = shadows.experiments[cell_of(shadows.config, settings.row)]
    budget = unit_budget(experiment, units(experiment)[0])
    if experiment.recover.maker != "optimise" or not budget or experiment.recover.phase_sizes:
        raise UserError(
            f"gradients.row is {settings.row!r}, which optimises no images of one size; name a row "
            f"that does"
        )
    recover = experiment.recover
    logits_by, _ = supervised_by(experiment)
    if (logits_by, recover.alpha_ce, recover.alignment_scale) != ("fixed", 1.0, "none"):
        raise UserError(
            f"gradients.row is {settings.row!r}, and the study is of the primary's cross entropy "
            f"and unscaled statistics: recover.logits_by is {logits_by!r} (fixed), "
            f"recover.alpha_ce {recover.alpha_ce:g} (1), recover.alignment_scale "
            f"{recover.alignment_scale!r} (none); name a row that has these"
        )
    if recover.targets != "running" or recover.perturb_steps:
        raise UserError(
            f"gradients.row is {settings.row!r}, and the study reads teachers as they are, by "
            f"their running statistics: recover.targets is {recover.targets!r} (running), "
            f"recover.perturb_steps {recover.perturb_steps} (0); name a row that has these"
        )
    if not settings.iterations or not all(
        isinstance(i, int) and 0 <= i < budget for i in settings.iterations
    ):
        raise UserError(
            f"gradients.iterations is {tuple(settings.iterations)}; each must be in [0, {budget})"
        )
    if not settings.alphas or not all(
        isinstance(a, int | float) and 0 < a < np.inf for a in settings.alphas
    ):
        raise UserError(
            f"gradients.alphas is {tuple(settings.alphas)}; it must be one or more numbers, each "
            f"positive"
        )
    if settings.draws < 2:
        raise UserError(
            f"gradients.draws is {settings.draws}; noise is what differs between draws, of which "
            f"it needs two at least"
        )
    if not 1 <= settings.images <= experiment.dataset.num_classes:
        raise UserError(
            f"gradients.images is {settings.images}; one of a class is exchanged: 1 to "
            f"{experiment.dataset.num_classes}"
        )


def study(contexts: dict[str, Context], settings: Any) -> dict[str, Any]:
    """The numbers: of every iteration, cosines and norms between teachers, noise and changes."""
    context = contexts[MEMBERS]
    config = context.config
    recipe, unit = optimise.recipe_of(config), units(config)[0]
    pools = {name: _pool(one) for name, one in contexts.items()}
    pool = pools[MEMBERS]
    batch, start_BHWC = optimise.batch_of(context, unit)
    weights_RT = disagreement.drawn_weights(
        recipe, pool.teachers, config.seed, batch, settings.draws
    )
    read = jax.jit(
        functools.partial(disagreement.pixel_gradients, recipe, pool.teachers, pool.normalisation)
    )
    found = []
    for step, images_BHWC in _along(recipe, pool, config, batch, start_BHWC, settings.iterations):
        by_run = {}
        for name, one in pools.items():
            gradients = read(
                one.variables, np.uint32(config.seed), batch, np.int32(step), images_BHWC
            )
            ce, bn = (np.asarray(x, np.float64).reshape(len(pool), -1) for x in gradients)
            by_run[name] = ce[recipe.primary], bn, ce
        ours = by_run[MEMBERS]
        sizes = {
            name: disagreement.noise_and_change(
                ours[:2], theirs[:2], weights_RT, np.array(settings.alphas)
            )
            for name, theirs in by_run.items()
            if name != MEMBERS
        }
        found.append(
            {
                "iteration": step,
                "cosine_bn": disagreement.cosines(ours[1]).tolist(),
                "cosine_ce": disagreement.cosines(ours[2]).tolist(),
                "norm_bn": np.linalg.norm(ours[1], axis=1).tolist(),
                "norm_ce": np.linalg.norm(ours[2], axis=1).tolist(),
                "noise": next(iter(sizes.values())).noise_A.tolist(),
                "change": {name: s.change_A.tolist() for name, s in sizes.items()},
                "along": {name: s.along_A.tolist() for name, s in sizes.items()},
            }
        )
    return {
        "row": settings.row,
        "teachers": list(pool.names),
        "primary": pool.names[recipe.primary],
        "alphas": list(settings.alphas),
        "alpha": recipe.alpha_bn,
        "draws": settings.draws,
        "iterations": found,
    }


def _pool(context: Context) -> TeacherPool:
    recover = context.config.recover
    return statistics.with_targets(context, context.networks.pool(recover.pool, recover.dtype))


def _along(recipe, pool, config, batch, start_BHWC, iterations):
    """Yield (iteration, images before it) of a batch's course."""
    run = synthesis.engine(pool, recipe)
    (phase,) = course.phases_of(recipe, int(batch.budget), start_BHWC)
    state = run.place(course.begin(pool, recipe, phase, start_BHWC), 0)
    unit, done = run.place(course.prepare(pool, recipe, [(batch, start_BHWC)], config.seed), 0), 0
    with progress.task("gradients", len(iterations), unit="iteration") as bar:
        for step in sorted(iterations):
            [(state, _)] = run(config.seed, [(unit, state, run.place(np.int32(step - done), 0))])
            done = step
            yield step, run.fetch(state).images_BHWC
            bar.advance(1)
