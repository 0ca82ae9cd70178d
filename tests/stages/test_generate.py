"""Images from a denoiser, end to end on tiny networks: what is kept, and the same bits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.command import ROOT, assert_same, call, run, signal_when, snapshot
from helpers.compiling import as_users, only_fast_alike
from PIL import Image

from configs import tiny_d4m
from prism_jax.config import resolve
from prism_jax.data import weights, workdir
from prism_jax.data.datasets import dataset_info
from prism_jax.data.sources import open_sklearn
from prism_jax.diffusion import patches
from prism_jax.errors import UserError
from prism_jax.stages import anchoring, controls, fingerprints, generator, judging, recover
from prism_jax.stages.context import Context
from prism_jax.stages.inputs import first_classes
from prism_jax.stages.makers import start

__all__ = ["as_users", "only_fast_alike"]  # fixtures
# What a test does in this process has a tolerance, or is compared with what it does there again.
pytestmark = pytest.mark.usefixtures("only_fast_alike")

D4M = f"--config={ROOT / 'tests' / 'configs' / 'tiny_d4m.py'}"
RECOVER = "--stages=squeeze,recover"
KEPT = ("latents", "anchors")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The images, made by the real command on one device. Only to be read."""
    root = tmp_path_factory.mktemp("d4m") / "reference"
    done = run(D4M, f"--workdir={root}", RECOVER)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture
def made(reference, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(reference, tmp_path / "run")


def ok(root, *arguments: str) -> str:
    """Go on in this process, on eight devices."""
    status, out, err = call(D4M, f"--workdir={root}", RECOVER, *arguments)
    assert status == 0, err
    return out


def refused(root, *arguments: str) -> str:
    status, _, err = call(D4M, f"--workdir={root}", RECOVER, *arguments)
    assert status == 2 and "Traceback" not in err
    return err


def images(root) -> np.ndarray:
    """Class-major, uint8."""
    paths = sorted((root / "recover" / "images").glob("*/*.png"))
    return np.stack([np.array(Image.open(path)) for path in paths])


def kept(root, name: str, cls: int) -> dict[str, np.ndarray]:
    return weights.unpack((root / "generate" / name / f"{cls:05d}.safetensors").read_bytes())


def digests(root) -> dict[str, str]:
    """Of everything but seconds."""
    found = {}
    for path in sorted(p for p in (root / "generate").rglob("*") if p.is_file()):
        data = path.read_bytes()
        if b'"seconds"' in data and path.suffix == ".json":
            record = workdir.read_record(path)
            data = json.dumps(record | {"seconds": 0}).encode()
        found[str(path.relative_to(root))] = hashlib.sha256(data).hexdigest()
    return found


@pytest.mark.usefixtures("as_users")
def test_the_same_bits_on_eight_devices(made, reference):
    for name in ("recover", "generate"):
        shutil.rmtree(made / name)
    ok(made)
    assert_same(made, reference)
    assert digests(made) == digests(reference)
    before = snapshot(made)
    ok(made)
    assert snapshot(made) == before


def test_another_strength_keeps_generator_and_anchors(made, reference, tmp_path):
    """Strength 0 is the decoded anchor, worked out here by hand."""
    out = ok(tmp_path / "other", "--config.generate.strength=0.0", f"--from={reference}")
    assert "generator:" not in out and "latents:" not in out and "anchors:" not in out
    # Latents, which may be many gigabytes, are read for anchors alone.
    theirs = {n: digest for n, digest in digests(reference).items() if "/latents/" not in n}
    assert len(theirs) < len(digests(reference))
    assert digests(tmp_path / "other") == theirs
    codec = weights.unpack((reference / "squeeze/generator/weights.safetensors").read_bytes())
    scale, shift = codec["codec"]["deviation_C"], codec["codec"]["mean_C"]
    anchors = np.concatenate([kept(reference, "anchors", c)["latents"] for c in range(4)])

    def pixels_of(decoded) -> np.ndarray:
        return np.round(np.clip(np.asarray(decoded) / 2 + 0.5, 0, 1) * 255)[..., 0]

    decode = jax.jit(lambda anchors: patches.Pixels().decode(codec["codec"], anchors))
    found, expected = images(tmp_path / "other"), pixels_of(anchors * scale + shift)
    np.testing.assert_array_equal(found, pixels_of(decode(anchors)))
    assert np.abs(found - expected).max() <= 1  # a product and a sum round once on some machines
    assert np.abs(images(reference) - expected).max() > 20
    message = refused(made, "--config.generate.strength=0.0")
    assert "generated.generate.strength: 0.5 -> 0.0" in message


def test_another_guidance_is_measured_anew(reference, tmp_path):
    root = tmp_path / "other"
    out = ok(root, "--config.generate.guidance=3.0", f"--from={reference}", "--stages=squeeze")
    assert "generator: recognised" in out and "generator: loss" not in out
    before, now = (workdir.read_record(r / "squeeze/generator/quality.json")
                   for r in (reference, root))  # fmt: skip
    assert before.keys() == now.keys() == {"of", *generator.QUALITIES}
    assert before["of"] != now["of"] and before["distance"] != now["distance"]
    stale = context_of(root)  # its own guidance: what is there is of another
    assert generator.quality_of(stale) is None and not generator.is_measured(stale)
    assert generator.quality_of(context_of(root, guidance=3.0)) == now


def test_another_ipc_keeps_latents(reference, tmp_path):
    root = tmp_path / "other"
    out = ok(root, "--config.recover.ipc=3", f"--from={reference}")
    assert "anchors:" in out and "latents:" not in out
    ours, theirs = digests(root), digests(reference)
    same = {name for name in theirs if ours[name] == theirs[name]}
    assert {n for n in theirs if "latents" in n} <= same
    assert not any("anchors/0000" in n for n in same)


def test_another_pass_over_the_data_keeps_nothing(reference, tmp_path):
    root = tmp_path / "other"
    out = ok(root, "--config.generate.most_images=40", f"--from={reference}")
    assert "latents:" in out and "generator:" not in out
    assert kept(root, "latents", 0)["latents"].shape == (40, 8, 8, 1)


def test_weights_are_the_shares_of_clusters(reference, tmp_path):
    ok(tmp_path / "w", "--config.generate.weighted=True", f"--from={reference}")
    manifest = workdir.read_record(tmp_path / "w" / "recover" / "manifest.json")
    sizes = np.array([kept(reference, "anchors", c)["sizes"] for c in range(4)])
    expected = sizes / sizes.mean(1, keepdims=True)
    np.testing.assert_allclose(np.reshape(manifest["weights"], (4, 2)), expected)
    assert np.abs(expected - 1).max() > 0.05
    assert "weights" not in workdir.read_record(reference / "recover" / "manifest.json")
    np.testing.assert_array_equal(images(tmp_path / "w"), images(reference))
    # What an anchor weighs, its real image and its decoded latent weigh too; without one, nothing.
    c = tiny_d4m.get_config()
    c.generate.weighted, c.validate.controls = True, ("medoids", "decoded_anchors", "no_anchors")
    for name, weigh in (("medoids", True), ("decoded_anchors", True), ("no_anchors", False)):
        found = controls.labelled_set(Context(resolve(c), tmp_path / "w"), name)
        assert (found.weights_N is not None) == weigh
        if weigh:
            np.testing.assert_allclose(found.weights_N.reshape(4, 2), expected)


def test_the_judge_chooses_among_candidates(reference, tmp_path):
    free = ("--config.generate.anchors=none", "--config.generate.strength=1.0")
    ok(tmp_path / "c", *free, "--config.generate.candidates=2", f"--from={reference}")
    ok(tmp_path / "all", *free, "--config.recover.ipc=4", f"--from={reference}")
    assert not (tmp_path / "c" / "generate" / "latents").exists()
    every = images(tmp_path / "all").reshape(4, 4, 8, 8).astype(int)
    taken = images(tmp_path / "c").reshape(4, 2, 8, 8)
    run_of, wrong = Context(resolve(tiny_d4m.get_config()), tmp_path / "c"), 0
    for cls in range(4):
        path = tmp_path / "c" / "generate" / "candidates" / f"{cls:05d}.json"
        chosen = json.loads(path.read_text())["chosen"]
        assert np.abs(taken[cls] - every[cls][chosen]).max() <= 1  # another batch may round so
        said = judging.logits_of(
            run_of, run_of.config.judge, every[cls].astype(np.uint8)[..., None]
        )
        odds = np.exp(said) / np.exp(said).sum(1, keepdims=True)

        def surest(of: int, odds=odds) -> list[int]:
            """Those that are taken for the class before the others."""
            rank = sorted(range(4), key=lambda i: (odds[i].argmax() != of, -odds[i, of]))
            return rank[:2]

        assert chosen == surest(cls)
        wrong += chosen != surest((cls + 1) % 4)
    assert wrong  # another class's odds choose others
    assert any(np.abs(taken[c] - every[c][:2]).max() > 20 for c in range(4))


BOUND = 1e-5  # of latents, whose deviation is 1


@pytest.mark.parametrize("batch", [1, 7])
def test_another_batch_size_changes_no_draw(reference, batch):
    """And pixels by their rounding alone: docs/diffusion.md."""
    classes, slots = (x.ravel().astype(np.int32) for x in np.mgrid[:4, :10])

    def painted(batch_size: int, seed: int = 0) -> generator.Painted:
        context = context_of(reference, batch_size=batch_size)
        painter = generator.Painter(context, generator.open_(context), 40, keeps=True)
        anchors = anchoring.anchors_of(context, classes, slots)
        (found,) = painter.paint([generator.Wish(classes, slots, anchors)], seed)
        return found

    whole, parts, twin = painted(40), painted(batch), painted(40, seed=1)
    assert np.abs(parts.latents_NHWC - whole.latents_NHWC).max() < BOUND
    moved = np.abs(parts.images.astype(int) - whole.images)
    assert moved.max() <= 1 and (moved > 0).mean() < 1e-3
    assert np.abs(twin.latents_NHWC - whole.latents_NHWC).max() > 0.1


CHOSEN = ("--config.generate.candidates=2", "--config.generate.refine.steps=4",
          "--config.generate.refine.window=(1,3)")  # fmt: skip


def test_the_chosen_are_refined_and_not_sampled_again(reference, tmp_path):
    ok(tmp_path / "plain", CHOSEN[0], f"--from={reference}")
    ok(tmp_path / "r", *CHOSEN, f"--from={reference}")
    out = ok(
        tmp_path / "more", *CHOSEN, "--config.generate.refine.learning_rate=0.02",
        f"--from={tmp_path / 'r'}",
    )  # fmt: skip
    assert "candidates:" not in out and "recover:" in out
    plain, refined, more = (images(tmp_path / n).astype(int) for n in ("plain", "r", "more"))
    assert digests(tmp_path / "more") == digests(tmp_path / "r")
    for cls in range(4):
        one, other = (kept(tmp_path / n, "candidates", cls) for n in ("plain", "r"))
        np.testing.assert_array_equal(one["images"], other["images"])
        assert other["latents"].shape == (2, 8, 8, 1) and "latents" not in one
    assert 0 < np.abs(more - plain).mean() and np.abs(refined - plain).max() <= 2
    # What the candidates took counts among recover's seconds.
    manifest = workdir.read_record(tmp_path / "plain" / "recover" / "manifest.json")
    parts = [tmp_path / "plain" / "generate" / "candidates" / f"{c:05d}.json" for c in range(4)]
    sampled = sum(workdir.read_record(part)["seconds"] for part in parts)
    assert sum(unit["seconds"] for unit in manifest["units"]) >= sampled > 0
    message = refused(tmp_path / "r", *CHOSEN, "--config.generate.refine.steps=5")
    assert "refined.steps: 4 -> 5" in message


def test_images_are_refined_without_candidates_too(reference, tmp_path):
    rate = "--config.generate.refine.learning_rate=0.05"
    ok(tmp_path / "r", *CHOSEN[1:], rate, f"--from={reference}")
    assert np.abs(images(tmp_path / "r").astype(int) - images(reference)).max() > 2


def test_modes_draw_images_to_their_anchors(reference, tmp_path):
    def distance(root) -> float:
        return float(np.abs(images(root).astype(float) - images(tmp_path / "anchors")).mean())

    ok(tmp_path / "anchors", "--config.generate.strength=0.0", f"--from={reference}")
    free = ("--config.generate.sampler=ddpm", "--config.generate.strength=1.0")
    ok(tmp_path / "free", *free, "--config.generate.anchors=none", f"--from={reference}")
    ok(tmp_path / "drawn", *free, "--config.generate.mode_weight=0.5", f"--from={reference}")
    assert distance(tmp_path / "drawn") < 0.9 * distance(tmp_path / "free")


MOMENTS = [
    "squeeze/generator/checkpoints/[3-9]",
    "generate/latents/00001.json",
    "generate/anchors/00000.json",
    "recover/images/00000/00000.png",
]


def test_killed_in_substage_after_substage(tmp_path, reference):
    root, said = tmp_path / "run", ""
    command = (D4M, f"--workdir={root}", RECOVER, "--config.recover.checkpoint_seconds=0.001")
    for pattern in MOMENTS:
        killed = signal_when(lambda p=pattern: any(root.glob(p)), signal.SIGKILL, *command)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        said += killed.stdout
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "generator: continues after step" in said + done.stdout
    assert_same(root, reference)
    assert digests(root) == digests(reference)


@pytest.mark.usefixtures("as_users")
def test_killed_among_candidates_and_refined_images(tmp_path, reference):
    """Made by one device; without an interruption by eight."""
    root, whole = tmp_path / "run", tmp_path / "whole"
    ok(whole, *CHOSEN, f"--from={reference}")
    command = (D4M, f"--workdir={root}", RECOVER, *CHOSEN, f"--from={reference}")
    for pattern in ("generate/candidates/00001.json", "recover/images/00000/00000.png"):
        killed = signal_when(lambda p=pattern: any(root.glob(p)), signal.SIGKILL, *command)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert_same(root, whole)
    assert digests(root) == digests(whole)


KILLS = 10
SUBSTAGES = ("latents", "anchors", "candidates", "images")


@pytest.mark.slow
def test_killed_ten_times_at_drawn_events(tmp_path, reference):
    """In every substage, at a file that is half written, written or in its place."""
    root, whole = tmp_path / "run", tmp_path / "whole"
    trained = ("--stages=recover", *CHOSEN)
    for into in (root, whole):
        shutil.copytree(reference / "squeeze", into / "squeeze")
    done = run(D4M, f"--workdir={whole}", *trained)
    assert done.returncode == 0, done.stderr
    random, kills = np.random.default_rng(0), []
    while len(kills) < KILLS:
        substage, number = SUBSTAGES[len(kills) % 4], int(random.integers(1, 13))
        command = (f"in {substage}", str(number), D4M, f"--workdir={root}", *trained)
        done = run(*command, command=("tests/helpers/dying.py",))
        if done.returncode == 0:  # it happened less often than that
            assert_same(root, whole)
            for name in ("generate", "recover"):
                shutil.rmtree(root / name)
            continue
        assert done.returncode == -signal.SIGKILL, f"{kills} {command[0]} {number}: {done.stderr}"
        kills.append(f"{substage} {number}")
    done = run(D4M, f"--workdir={root}", *trained)
    assert done.returncode == 0, f"{kills}: {done.stderr}"
    assert_same(root, whole)
    assert digests(root) == digests(whole)


CONTROLS = "--config.validate.controls=medoids,decoded_anchors,no_anchors"


def test_controls_of_generated_images(made, tmp_path):
    """Real images next to the anchors, anchors as they are, images of no anchors."""
    before = snapshot(made, "recover", "generate/anchors", "squeeze")
    ok(made, CONTROLS)
    assert snapshot(made, "recover", "generate/anchors", "squeeze") == before

    def control(name: str, cls: int) -> np.ndarray:
        return kept(made, name, cls)["images"][..., 0].astype(int)

    source = first_classes(open_sklearn(dataset_info("digits"), None, "train", 8), 4)
    for cls in range(4):
        record = json.loads((made / "generate" / "medoids" / f"{cls:05d}.json").read_text())
        real = np.stack([source.image(at) for at in record["positions"]])[..., 0]
        np.testing.assert_array_equal(control("medoids", cls), real)
        assert set(source.labels_N[record["positions"]]) == {cls}
        np.testing.assert_array_equal(
            record["positions"],
            np.flatnonzero(source.labels_N == cls)[kept(made, "anchors", cls)["nearest"]],
        )
    ok(tmp_path / "0", "--config.generate.strength=0.0", f"--from={made}")
    decoded = np.concatenate([control("decoded_anchors", cls) for cls in range(4)])
    np.testing.assert_array_equal(images(tmp_path / "0"), decoded)
    free = ("--config.generate.anchors=none", "--config.generate.strength=1.0")
    ok(tmp_path / "1", *free, f"--from={made}")
    drawn = np.concatenate([control("no_anchors", cls) for cls in range(4)])
    assert np.abs(images(tmp_path / "1") - drawn).max() <= 1
    assert np.abs(decoded - drawn).max() > 20
    shutil.rmtree(made / "generate" / "medoids")
    status, _, err = call(D4M, f"--workdir={made}", CONTROLS, "--stages=relabel")
    assert status == 2 and "the images of the control medoids are not in" in err


@pytest.mark.parametrize("loss", ["kl", "ce"])
def test_a_finished_run_needs_none_of_what_its_images_were_made_from(made, loss):
    stages = ("--stages=squeeze,recover,relabel,validate", f"--config.validate.loss={loss}")
    ok(made, CONTROLS, *stages)
    shutil.rmtree(made / "generate")
    before = snapshot(made)
    ok(made, CONTROLS, *stages)
    assert snapshot(made) == before  # it is only read
    # The twin: another student's training reads them, and they are made again.
    ok(made, "--config.validate.controls=medoids", *stages, "--config.validate.seeds=(0,1)")
    assert {path.name for path in (made / "generate").iterdir()} == {*KEPT, "medoids"}


def test_damage_is_named(made):
    shutil.rmtree(made / "recover")
    path = made / "generate" / "anchors" / "00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(data)
    assert f"{path} is damaged" in refused(made)
    path = made / "squeeze" / "generator" / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    assert f"{path} is damaged" in refused(made)


def test_a_class_whose_record_was_moved_away_is_made_again(made):
    """As the message on a damaged one says."""
    before, painted = digests(made), images(made)
    record = made / "generate" / "anchors" / "00001.json"
    whole = record.read_text()
    record.write_text(whole[:20])
    shutil.rmtree(made / "recover")
    assert f"{record} is damaged" in refused(made)
    record.unlink()
    ok(made)
    assert digests(made) == before
    np.testing.assert_array_equal(images(made), painted)


def test_what_the_data_does_not_allow_is_refused_before_any_work(tmp_path):
    root = tmp_path / "run"
    few = refused(
        root, "--config.generate.anchors=chunked_released", "--config.generate.expand=100"
    )
    assert "needs 200 images of every class" in few and "has 14" in few
    wide = (
        "--config.generate.codec=patches", "--config.generate.patch=2",
        "--config.generate.denoiser.token=2", "--config.generate.components=5",
    )  # fmt: skip
    assert "generate.components is 5, and patches of generate.patch=2 have 4" in refused(
        root, *wide
    )
    apart = ("--config.generate.outliers=0.5", "--config.generate.most_images=4")
    assert "has 2 training images" in refused(root, *apart, "--config.recover.ipc=3")
    many = refused(root, "--config.recover.ipc=500")
    assert "recover.ipc is 500" in many and "images to find anchors among" in many
    assert not root.exists()


def test_weights_are_read_before_a_generator_is_trained(reference, tmp_path):
    data = (reference / "squeeze/first/weights.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(data)
    for field in ("checkpoint", "start_from"):
        given = f"--config.networks.first.{field}={tmp_path / 'w.safetensors'}"
        said = refused(tmp_path / "run", given, "--config.networks.first.width=0.5")
        assert "w.safetensors" in said and not (tmp_path / "run/squeeze").exists()


def test_another_generator_is_refused(made):
    before = snapshot(made)
    assert "the generator in" in refused(made, "--config.generate.fit.steps=31")
    assert snapshot(made) == before


def test_a_fit_that_diverges_is_named_before_it_is_saved(tmp_path):
    fast = ("--config.generate.fit.learning_rate=1e30", "--config.recover.checkpoint_seconds=1e-6")
    assert "the generator's loss is" in refused(tmp_path / "run", *fast)


def context_of(root, **fields) -> Context:
    """The tiny run with fields of generate, of which nothing is made yet."""
    c = tiny_d4m.get_config()
    with c.unlocked():
        for name, value in fields.items():
            setattr(c.generate, name, value)
    return Context(resolve(c), root)


def context_of_before(root, **fields) -> Context:
    """The same, with fields that nothing reads: once they were not refused."""
    experiment = context_of(root).config
    fields = {"generate": dataclasses.replace(experiment.generate, **fields)}
    return Context(dataclasses.replace(experiment, **fields), root)


@pytest.mark.parametrize(
    ("kept_of", "fields"),
    [
        (fingerprints.latents, {"flip": True}),
        (fingerprints.generator, {"dtype": "bfloat16"}),
    ],
)
def test_what_decides_bits_is_in_the_fingerprint(kept_of, fields, tmp_path):
    before = kept_of(context_of(tmp_path))
    assert kept_of(context_of(tmp_path)) == before
    assert kept_of(context_of(tmp_path, strength=0.3)) == before
    assert kept_of(context_of(tmp_path, **fields)) != before


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"patch": 2}, False),  # of images as they are
        ({"components": 3, "codec": "patches", "patch": 2}, True),
        ({"expand": 3}, False),  # all latents of a class at once
        ({"expand": 3, "anchors": "chunked"}, True),
    ],
)
def test_what_nothing_reads_is_in_no_fingerprint(fields, read, tmp_path):
    *_, (name, value) = reversed(fields.items())
    usual = {k: v for k, v in fields.items() if k != name}
    before, now = (context_of_before(tmp_path, **given) for given in (usual, fields))
    assert getattr(now.config.generate, name) == value
    same = [f(before) == f(now) for f in (fingerprints.generator, fingerprints.anchors)]
    assert (False in same) == read


def test_latents_are_kept_where_fewer_images_are_painted_at_once(tmp_path):
    before = context_of(tmp_path, batch_size=8)
    assert fingerprints.latents(context_of(tmp_path, batch_size=4)) != fingerprints.latents(before)
    fewer = context_of(tmp_path, batch_size=4, encode_batch_size=8)
    assert fingerprints.latents(fewer) == fingerprints.latents(before)
    assert fingerprints.recover(fewer) != fingerprints.recover(before)
    assert anchoring.encoded_at_once(fewer.config.generate, 100) == 8


@pytest.mark.parametrize("stage", ["latents", "anchors"])
def test_too_little_memory_says_which_batch_to_lower(tmp_path, monkeypatch, stage):
    def exhaust(context, name, make):
        if name == stage:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(anchoring, "_run", exhaust)
    context = context_of(tmp_path, batch_size=8)
    with pytest.raises(UserError) as said:
        recover.run(context)
    of_latents = "Lower generate.encode_batch_size (now 8 real images)" in str(said.value)
    assert of_latents == (stage == "latents")
    kept = "Lower generate.batch_size" in str(said.value)
    assert kept == ("To take the latents over, set generate.encode_batch_size=8" in str(said.value))
    assert kept == (stage != "latents")


def test_more_images_than_a_class_has_where_none_is_asked_for(tmp_path):
    """Without anchors images are free, and only controls of real ones count classes' images."""
    c = tiny_d4m.get_config()
    c.recover.ipc = 500
    free = {"anchors": "none", "strength": 1.0}
    with c.unlocked():
        c.generate.update(free)
        c.validate.controls = ()
    start.check(Context(resolve(c), tmp_path))
    with c.unlocked():
        c.validate.controls = ("random_real",)
    with pytest.raises(UserError, match="500 training images of every class are asked for"):
        start.check(Context(resolve(c), tmp_path))


@pytest.mark.parametrize(("most", "batch"), [(None, None), (10, 10)])
def test_a_class_by_itself_is_encoded_as_among_all(most, batch, tmp_path, monkeypatch):
    """Of unequal classes, as another host or a second start has them."""
    context = context_of(tmp_path, batch_size=200, most_images=most)
    sizes = np.bincount(context.inputs.open("train").labels_N)
    assert sizes.min() < sizes.max() < 200
    params = patches.fit_pixels(context.inputs.read(context.inputs.open("train"))[:])
    opened = SimpleNamespace(
        generator=SimpleNamespace(codec=patches.Pixels()),
        weights=SimpleNamespace(codec=params),
        image_size=context.config.dataset.image_size,
    )
    monkeypatch.setattr(anchoring.generator, "open_", lambda context: opened)
    shapes, read = [], anchoring.real_images

    def seen(context, opened, positions):
        shapes.append(len(positions))
        return read(context, opened, positions)

    monkeypatch.setattr(anchoring, "real_images", seen)
    everyone = list(anchoring._latents(context, list(range(len(sizes)))))
    (alone,) = anchoring._latents(context, [int(sizes.argmin())])
    assert set(shapes) == {batch or sizes.max()}
    np.testing.assert_array_equal(
        alone.tensors["latents"], everyone[sizes.argmin()].tensors["latents"]
    )


def test_a_judge_is_loaded_once(tmp_path, monkeypatch):
    """And pads what is left over: as images read one at a time."""
    run = context_of(tmp_path)
    module = run.networks.build("first")
    images = run.inputs.read(run.inputs.open("train"))[:103]
    like = module.init(jax.random.key(0), images[:1].astype(np.float32), train=False)
    loads = []
    monkeypatch.setattr(run.networks, "load", lambda name: loads.append(name) or like)
    whole = judging.logits_of(run, "first", images)
    assert whole.shape == (103, 4) and whole.dtype == np.float32
    np.testing.assert_allclose(
        judging.logits_of(run, "first", images[101:]), whole[101:], rtol=1e-5
    )
    assert loads == ["first"]


@pytest.mark.parametrize(
    ("known", "expected"), [(tuple(range(1000))[::-1], range(1000)[::-1]), (None, range(1000))]
)
def test_a_transformer_knows_imagenet_in_its_own_order(known, expected, tmp_path, monkeypatch):
    run = context_of(tmp_path)
    dataset = dataclasses.replace(run.config.dataset, num_classes=1000)
    run.config = dataclasses.replace(run.config, dataset=dataset)
    source = SimpleNamespace(imagenet_indices=known, class_names=None)
    monkeypatch.setattr(run.inputs, "open", lambda split: source)
    np.testing.assert_array_equal(generator._imagenet_labels(run, 1000), expected)
    if known is None:  # folders with names of nobody's order
        source.class_names = [f"class {k}" for k in range(1000)]
        with pytest.raises(UserError, match="which of them they are is not known"):
            generator._imagenet_labels(run, 1000)


def test_controls_of_many_images_are_read_class_by_class(made):
    ok(made, CONTROLS)
    c = tiny_d4m.get_config()
    c.validate.controls = ("medoids",)
    held = anchoring.control_images(Context(resolve(c), made), "medoids")
    c.dataset.cache_gigabytes = 0.0
    lazy = anchoring.control_images(Context(resolve(c), made), "medoids")
    assert isinstance(held, np.ndarray) and not isinstance(lazy, np.ndarray)
    np.testing.assert_array_equal(lazy[:], held)
    np.testing.assert_array_equal(lazy[[5, 0, 3]], held[[5, 0, 3]])
    np.testing.assert_array_equal(
        held.reshape(4, 2, 8, 8, 1)[2], kept(made, "medoids", 2)["images"]
    )
