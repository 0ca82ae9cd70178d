"""Recover guided by a tiny CLIP, through the real command: kept, resumed, refused."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.clip_files import needs_tokenizers, write_clip
from helpers.command import TINY, call, snapshot
from helpers.compiling import only_fast_alike
from PIL import Image

from prism_jax import parallel, plan, programs
from prism_jax.config import resolve
from prism_jax.diffusion import prompts
from prism_jax.main import parse
from prism_jax.stages import fingerprints, guiding
from prism_jax.stages.context import Context

__all__ = ["only_fast_alike"]  # a fixture
pytestmark = [needs_tokenizers, pytest.mark.usefixtures("only_fast_alike")]
STAGES = "--stages=squeeze,recover"
GUIDED = ("--config.recover.clip=5.0", "--config.recover.parametrisation=pyramid")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def run(directory, tmp_path_factory):
    """A finished run, its flags and the images."""
    root = tmp_path_factory.mktemp("run")
    flags = (TINY, STAGES, *GUIDED, f"--config.recover.clip_directory={directory}")
    status, _, err = call(*flags, f"--workdir={root}")
    assert status == 0, err
    return root, flags


def images(root) -> np.ndarray:
    paths = sorted((root / "recover" / "images").glob("*/*.png"))
    return np.stack([np.array(Image.open(path)) for path in paths])


def experiment(*flags):
    return resolve(parse([TINY, *flags], [])[0])


def refused(*flags) -> str:
    status, _, err = call(TINY, *flags)
    assert status == 2 and "Traceback" not in err, err
    return err


def test_what_is_kept_and_what_the_record_says(run):
    root, flags = run
    kept = root / "squeeze" / "clip"
    assert json.loads((kept / "record.json").read_text())["shape"] == [4, 8]
    told = json.loads((kept / "prompts" / "record.json").read_text())["prompts"]
    assert told == [f"a photo of a {name}" for name in range(4)]
    record = json.loads((root / "recover" / "units" / "g00000_b00000.json").read_text())
    before, after = (record["terms"][at]["clip"] for at in ("start", "end"))
    assert 0 < after < before < 2
    told = json.loads((root / "summary.json").read_text())["recover"]["clip"]
    assert told.keys() == {"start", "end"} and 0 < told["end"] < told["start"]


def test_a_finished_run_is_only_read_and_needs_no_tokenizer(run, monkeypatch):
    root, flags = run
    before = snapshot(root)
    monkeypatch.setattr(prompts, "tokenise", None)
    status, _, err = call(*flags, f"--workdir={root}")
    assert status == 0, err
    assert snapshot(root) == before


def test_texts_are_adopted_and_the_images_come_again(run, monkeypatch, tmp_path):
    root, flags = run
    monkeypatch.setattr(prompts, "encode", None)  # nothing is encoded again
    # Only stops between dispatches tell these runs apart.
    more = ("--config.recover.steps_per_dispatch=5", f"--from={root}")
    target = tmp_path / "run"
    status, out, err = call(
        *flags, *more, f"--workdir={target}", "--config.recover.checkpoint_seconds=1e-9"
    )
    assert status == 0, err
    assert "squeeze/clip" in out
    np.testing.assert_array_equal(images(target), images(root))


def test_another_template_or_other_classes_are_refused(run):
    root, flags = run
    err = refused(*flags[1:], f"--workdir={root}", "--config.recover.clip_template={}")
    assert "what CLIP says of the classes" in err and 'template: "a photo of a {}" -> "{}"' in err
    err = refused(*flags[1:], f"--workdir={root}", "--config.dataset.num_classes=3")
    assert "made from other settings" in err


def test_weights_and_texts_are_part_of_what_images_are_made_from(run, directory, tmp_path):
    root, flags = run
    found = fingerprints.recover(Context(experiment(*flags[1:]), root))
    assert found["clip"].keys() == {"image_encoder", "texts"}
    assert not {"clip_directory", "clip_template"} & found["recover"].keys()
    other = write_clip(tmp_path / "other")
    file = other / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["visual_projection.weight"] += 1
    safetensors.numpy.save_file(tensors, file)
    moved = fingerprints.recover(
        Context(experiment(*flags[1:-1], f"--config.recover.clip_directory={other}"), root)
    )
    assert moved["clip"] != found["clip"]
    exact = Context(experiment(*flags[1:], "--config.parallel.matmul_precision=highest"), root)
    assert fingerprints.clip_texts(exact)["matmul_precision"] == "highest"
    plain = fingerprints.recover(Context(experiment(), root))
    assert not {"clip", "alpha_ce", "parametrisation", "resolutions", "view_noise"} & {
        *plain,
        *plain["recover"],
    }


def test_programs_and_the_plan(run, directory, tmp_path):
    _, flags = run
    with parallel.described(jax.local_devices()[:1]):
        guided, plain = (
            programs.find(e, "recover").lower().as_text()
            for e in (experiment(*flags[1:]), experiment())
        )
    assert "tensor<2x12x12x3xf32>" in guided and "tensor<2x12x12x3xf32>" not in plain
    status, out, err = call(*flags, f"--workdir={tmp_path / 'x'}", "--plan")
    assert status == 0, err
    assert "weight 5, read from" in out and "components of 1, 2, 4, 8 px" in out


def test_before_the_directory_is_there_the_published_form_is_planned(tmp_path):
    absent = experiment(*GUIDED, f"--config.recover.clip_directory={tmp_path / 'none'}")
    guide = guiding.described(Context(absent, "unused"))
    assert guide.encoder.size == 224 and guide.texts_KD.shape == (4, 512)
    told = [line for line in plan.missing(absent, str(tmp_path)) if line.startswith("CLIP: ")]
    whats = [line.partition(" at ")[0] for line in told]
    assert whats == [
        f"CLIP: there is no {what}" for what in ("image_encoder", "text_encoder", "tokenizer")
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"projection_dim": 6}, None),
        (None, "there is no image_encoder at"),
    ],
)
def test_encoders_that_cannot_be_used(change, said, tmp_path):
    directory = write_clip(tmp_path / "clip")
    config = directory / "config.json"
    if change is None:
        config.unlink()
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    err = refused(
        STAGES, *GUIDED, f"--config.recover.clip_directory={directory}",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert (said or "the weights of") in err
    assert not (tmp_path / "run" / "squeeze").exists()


def test_encoders_of_two_models_do_not_belong_together(tmp_path):
    from diffusion import parity

    directory = tmp_path / "clip"
    parity.write(parity.BY_NAME["clip_image"], directory / "image_encoder")
    parity.write(parity.BY_NAME["clip_text"], directory / "text_encoder")
    (directory / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (directory / "tokenizer" / name).write_text("{}")
    err = refused(
        STAGES, *GUIDED, f"--config.recover.clip_directory={directory}",
        f"--workdir={tmp_path / 'run'}",
    )  # fmt: skip
    assert "do not belong together" in err and "no projection" in err
    assert not (tmp_path / "run" / "squeeze").exists()


def test_a_tokenizer_of_another_model_is_said_before_any_work(tmp_path):
    directory = write_clip(tmp_path / "clip")
    file = directory / "vocab.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({word: number + 5000 for word, number in known.items()}))
    flags = (STAGES, *GUIDED, f"--config.recover.clip_directory={directory}")
    err = refused(*flags, f"--workdir={tmp_path / 'run'}")
    assert f"knows {len(known)}, from 0 on: they are of different models" in err
    assert not (tmp_path / "run" / "squeeze").exists()


def test_what_cannot_be_read_is_said_before_any_work(directory, tmp_path):
    guided = (STAGES, *GUIDED, f"--config.recover.clip_directory={directory}")
    root = tmp_path / "run"
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    err = refused(*guided, f"--config.generate.class_names={names}", f"--workdir={root}")
    assert "has 2 names for 4 classes" in err
    (directory / "merges.txt").rename(directory / "aside")
    try:
        assert "there is no tokenizer at" in refused(*guided, f"--workdir={root}")
    finally:
        (directory / "aside").rename(directory / "merges.txt")
    long = f"--config.recover.clip_template={'word ' * 40}{{}}"
    assert "Shorten" in refused(*guided, long, f"--workdir={root}")
    assert not (root / "squeeze").exists()
