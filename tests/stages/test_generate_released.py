"""Images from networks that are read: a pipeline's directory, tiny and of random weights."""

from __future__ import annotations

import ast
import contextlib
import json
import shutil
import types

import jax
import numpy as np
import pytest
from diffusion import parity
from helpers.command import ROOT, call, snapshot
from helpers.compiling import only_fast_alike
from helpers.images import write_tree
from PIL import Image
from safetensors.numpy import load_file, save_file

from configs import tiny_d4m
from prism_jax.config import resolve
from prism_jax.diffusion import huggingface, prompts
from prism_jax.diffusion.autoencoder import AutoencoderKL
from prism_jax.stages import fingerprints, generator
from prism_jax.stages.context import Context

__all__ = ["only_fast_alike"]  # a fixture
pytestmark = pytest.mark.usefixtures("only_fast_alike")  # every test has all of its programs

CLASSES = tuple(f"class{i}" for i in range(10))  # as many as the tiny transformer knows
CASES = {"vae": "vae_decode", "unet": "unet_1", "text_encoder": "clip_text", "transformer": "dit"}


@pytest.fixture
def command(tmp_path):
    """Flags of a run on folders of 8 px, with a directory of networks that read 16 px."""
    write_tree(tmp_path / "images", splits=("train", "test"), classes=CLASSES)
    for part, case in CASES.items():
        parity.write(parity.BY_NAME[case], tmp_path / "networks" / part)
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    return [
        f"--config={ROOT / 'tests' / 'configs' / 'tiny_d4m.py'}",
        f"--workdir={tmp_path / 'run'}",
        "--stages=squeeze,recover",
        "--config.dataset.name=own",
        "--config.dataset.source=folder",
        f"--config.dataset.path={tmp_path / 'images'}",
        "--config.dataset.num_classes=10",
        "--config.squeeze.least_top1=0.0",
        "--config.recover.batch_size=10",
        f"--config.generate.directory={tmp_path / 'networks'}",
        "--config.generate.codec=directory",
        "--config.generate.clip=False",
        "--config.generate.image_size=16",
        "--config.generate.view=squashed",
        "--config.generate.batch_size=5",
    ]


DIT = ("--config.generate.generator=dit_released", "--config.generate.sampler=ddpm",
       "--config.generate.variance=learned")  # fmt: skip
DIFFUSION = ("--config.generate.generator=stable_diffusion", "--config.generate.sampler=pndm")


@pytest.fixture
def told(command, monkeypatch, tmp_path):
    """The texts that were encoded, in place of a tokenizer and an encoder that fits."""
    texts: list[str] = []
    config = tmp_path / "networks" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "hidden_size": 12}))
    (tmp_path / "networks" / "tokenizer").mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "networks" / "tokenizer" / name).write_text("{}")
    monkeypatch.setattr(prompts, "tokenise", lambda directory, given, encoder: None)

    def encode(directory, given):
        texts.extend(given)
        states = np.random.default_rng(0).standard_normal((len(given), 7, 12), np.float32)
        return prompts.Encoded(states, states[:, 0])

    monkeypatch.setattr(prompts, "encode", encode)
    return texts


def images(root) -> np.ndarray:
    paths = sorted((root / "recover" / "images").glob("*/*.png"))
    return np.stack([np.array(Image.open(path)) for path in paths])


def ok(*flags: str) -> str:
    status, out, err = call(*flags)
    assert status == 0, err
    return out


def refused(root, *flags: str) -> str:
    status, _, err = call(*flags)
    assert status == 2 and "Traceback" not in err, err
    assert not (root / "recover").exists()
    return err


def test_a_transformer_of_classes(command, tmp_path):
    ok(*command, *DIT)
    found = images(tmp_path / "run")
    assert found.shape == (20, 8, 8, 3) and found.std() > 10
    record = json.loads((tmp_path / "run" / "squeeze" / "generator" / "record.json").read_text())
    assert record["latent"] == [8, 8, 4] and record["source"] == "dit_released"
    before = snapshot(tmp_path / "run")
    ok(*command, *DIT)
    assert snapshot(tmp_path / "run") == before
    # The generator is there; what is asked of it now is still looked at.
    status, _, err = call(*command, *DIT, f"--workdir={tmp_path / 'run'}",
                          "--config.generate.guided_channels=5")  # fmt: skip
    assert status == 2 and "Traceback" not in err
    shutil.rmtree(tmp_path / "run" / "recover")
    status, _, err = call(*command, *DIT, "--config.generate.guided_channels=5")
    assert status == 2 and "guided_channels is 5, and the latents have 4" in err


@pytest.mark.parametrize("kind", ["dit", "diffusion"])
def test_finished_images_are_read_without_the_networks(command, tmp_path, told, kind):
    """As teachers' weights, they may be gone when no image is left to be made."""
    flags = (*command, *{"dit": DIT, "diffusion": DIFFUSION}[kind])
    flags += (f"--config.generate.class_names={tmp_path / 'names.txt'}",) * (kind == "diffusion")
    root = tmp_path / "run"
    ok(*flags)
    (tmp_path / "networks").rename(tmp_path / "moved")
    before = snapshot(root)
    ok(*flags)
    assert snapshot(root) == before
    nothing = tmp_path / "none"
    assert "there is no vae" in refused(nothing, *flags, f"--workdir={nothing}")
    shutil.rmtree(root / "recover")
    assert "there is no vae" in refused(root, *flags)
    status, _, err = call(*flags, "--config.generate.image_size=32")
    assert status == 2 and "Traceback" not in err  # other images


def test_a_denoiser_of_prompts(command, tmp_path, told, monkeypatch):
    flags = (
        *command, *DIFFUSION, f"--config.generate.class_names={tmp_path / 'names.txt'}",
        "--config.generate.template=a {}", "--config.generate.negative=blur",
    )  # fmt: skip
    ok(*flags)
    assert told == [*(f"a {name}" for name in CLASSES), "blur"]
    assert images(tmp_path / "run").shape == (20, 8, 8, 3)
    ok(*flags)
    assert len(told) == 11  # kept: nothing is encoded again
    # So are another run's, where nothing could cut or encode them.
    monkeypatch.setattr(prompts, "tokenise", lambda *given: pytest.fail("it was asked"))
    elsewhere = (*flags, f"--workdir={tmp_path / 'other'}")
    assert "adopted squeeze/generator" in ok(*elsewhere, f"--from={tmp_path / 'run'}")
    assert len(told) == 11
    exactly = "--config.parallel.matmul_precision=highest"  # they were encoded otherwise
    assert "squeeze/generator" in refused(tmp_path / "none", *flags, exactly)
    lost = tmp_path / "run" / "squeeze" / "generator" / "prompts" / prompts.TENSORS
    lost.unlink()
    shutil.rmtree(tmp_path / "run" / "recover")
    status, _, err = call(*flags)
    assert status == 2 and f"{lost} is damaged" in err


@pytest.mark.parametrize("kind", [DIT, DIFFUSION])
def test_a_generator_by_shapes_is_the_one_that_is_read(command, tmp_path, told, kind):
    c = tiny_d4m.get_config()
    names = (f"--config.generate.class_names={tmp_path / 'names.txt'}",)
    for flag in (*command, *kind, *(names if kind is DIFFUSION else ())):
        if flag.startswith("--config."):
            where, value = flag.removeprefix("--config.").split("=")
            section, field = where.split(".")
            with contextlib.suppress(ValueError, SyntaxError):
                value = ast.literal_eval(value)
            c[section][field] = value
    context = Context(resolve(c), str(tmp_path / "run"))
    parity.write(parity.BY_NAME[CASES["text_encoder"]], tmp_path / "networks" / "text_encoder")
    for part in ("vae", "unet", "transformer", "text_encoder"):
        assert huggingface.form(str(tmp_path / "networks"), part) == (
            huggingface.load(str(tmp_path / "networks"), part).module
        )
    described, read = generator.described(context), generator._released(context, tmp_path / "kept")
    assert described.generator[:2] == read.generator[:2]
    assert described.sampling == read.sampling and described.refining == read.refining
    assert described[5:] == read[5:]
    shapes = [jax.tree.map(np.shape, opened.weights) for opened in (described, read)]
    shapes = [shape._replace(condition=None) for shape in shapes]  # the texts are stood in for
    assert shapes[0] == shapes[1]
    (tmp_path / "networks" / "vae" / "config.json").unlink()
    assert huggingface.planned(str(tmp_path / "networks"), "vae") == AutoencoderKL()


def test_what_is_not_there_is_told_with_what_to_download(command, tmp_path, told):
    root, flags = tmp_path / "run", (*command, *DIFFUSION)
    names = (*flags, f"--config.generate.class_names={tmp_path / 'names.txt'}")
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    assert "has 2 names for 10 classes" in refused(root, *names)
    (tmp_path / "names.txt").write_text("\n".join(f"name {k}" for k in range(1000)))
    assert "has 1000 names for 10 classes" in refused(root, *names)  # whose would they be?
    (tmp_path / "names.txt").write_bytes("\n".join(CLASSES).encode() + b"\xe9\n")
    assert "is no text in UTF-8" in refused(root, *names)
    (tmp_path / "networks" / "vae" / "config.json").unlink()
    message = refused(root, *names)
    assert (
        "generator: there is no vae at" in message
        and "Download vae/ of a Stable Diffusion" in message
    )
    assert not root.exists()


def test_what_parts_say_is_refused_before_anything_is_made(command, tmp_path, told):
    """By their configs alone: nothing is trained, and nothing of the weights is read."""
    root, networks = tmp_path / "run", tmp_path / "networks"
    for part in CASES:
        for file in (networks / part).glob("*.safetensors"):
            file.write_bytes(b"")
    few = refused(root, *command, *DIT, "--config.generate.guided_channels=5")
    assert "guided_channels is 5, and the latents have 4" in few
    names = f"--config.generate.class_names={tmp_path / 'names.txt'}"
    ddpm = (*command, *DIFFUSION, names, "--config.generate.sampler=ddpm")
    assert "it learned none" in refused(root, *ddpm, "--config.generate.variance=learned")
    odd = refused(root, *command, *DIT, "--config.generate.image_size=18")
    assert "generate.image_size is 18: latents of 9 x 9 do not divide into patches" in odd
    text = networks / "text_encoder" / "config.json"
    said = text.read_text()
    text.write_text(json.dumps({**json.loads(said), "hidden_size": 24}))
    assert "gives states of 24 numbers, and its U-Net reads 12" in refused(root, *ddpm)
    text.write_text(said)
    (networks / "tokenizer" / "vocab.json").unlink()
    assert "there is no tokenizer at" in refused(root, *command, *DIFFUSION, names)
    assert "needs one {}" in refused(root, *ddpm, "--config.generate.template=a")
    config = networks / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "SiT"}))
    assert "holds a SiT; a transformer is a" in refused(root, *command, *DIT)
    assert not root.exists()


def test_a_wrong_tensor_is_named_before_a_teacher_is_trained(command, tmp_path):
    path = next((tmp_path / "networks" / "transformer").glob("*.safetensors"))
    tensors = load_file(path)
    save_file({**tensors, "extra.weight": np.zeros(2, np.float32)}, path)
    message = refused(tmp_path / "run", *command, *DIT)
    assert "1 tensors are not part of it: extra.weight" in message
    save_file(
        {**tensors, "proj_out_2.bias": np.full_like(tensors["proj_out_2.bias"], np.nan)}, path
    )
    message = refused(tmp_path / "run", *command, *DIT)
    assert "1 tensors are not finite: final_layer.linear.bias" in message
    assert not (tmp_path / "run" / "squeeze" / "first").exists()


def test_another_tokenizer_is_another_generator(command, tmp_path, told):
    names = f"--config.generate.class_names={tmp_path / 'names.txt'}"
    ok(*command, *DIFFUSION, names, "--stages=squeeze")
    before = prompts.digest(str(tmp_path / "networks"))
    (tmp_path / "networks" / "tokenizer" / "tokenizer_config.json").write_text('{"pad_token": "!"}')
    assert prompts.digest(str(tmp_path / "networks")) != before
    fingerprints._part_digest.cache_clear()
    message = refused(tmp_path / "run", *command, *DIFFUSION, names)
    assert "the generator in" in message and "files.text_encoder" in message


def test_another_size_or_other_classes_are_refused(command, tmp_path, told):
    root = tmp_path / "run"
    odd = refused(root, *command, *DIT, "--config.generate.image_size=18")
    assert "latents of 9 x 9 do not divide into patches of 2" in odd
    config = tmp_path / "networks" / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "latent_channels": 3}))
    message = refused(root, *command, *DIT)
    assert "latents of 3 channels, and the transformer in" in message
    assert "reads 4: they are of different models" in message and "image_size" not in message
    names = f"--config.generate.class_names={tmp_path / 'names.txt'}"
    assert "the unet in" in refused(root, *command, *DIFFUSION, names)


@pytest.mark.parametrize("here", [True, False])
def test_a_generator_that_is_there_is_looked_at_before_anything_is_made(command, tmp_path, here):
    """In the run, or in one that it is taken over from: what is asked of it may be other things."""
    made, root = tmp_path / "made", tmp_path / ("made" if here else "run")
    ok(*command, *DIT, f"--workdir={made}", "--stages=squeeze")
    shutil.rmtree(made / "squeeze" / "first")
    flags = (*command, *DIT, f"--workdir={root}", *([] if here else [f"--from={made}"]))
    before = snapshot(made)
    for asked, said in (
        ("image_size=18", "latents of 9 x 9 do not divide into patches"),
        ("guided_channels=5", "guided_channels is 5, and the latents have 4"),
    ):
        assert said in refused(root, *flags, f"--config.generate.{asked}")
    assert snapshot(made) == before and root.exists() == here
    with pytest.warns(UserWarning, match="trained on latents of 8 x 8, and generate.image_size=32"):
        refused(root, *flags, "--config.generate.image_size=32", "--stages=analyse")


def test_a_file_that_is_not_there_is_called_a_file(command, tmp_path):
    path = tmp_path / "none.pt"
    message = refused(tmp_path / "run", *command, *DIT, f"--config.generate.transformer={path}")
    assert f"there is no file {path}" in message and "config.json" not in message


def test_noise_without_the_steps_is_refused_before_anything_is_made(command, tmp_path, told):
    names = f"--config.generate.class_names={tmp_path / 'names.txt'}"
    file = tmp_path / "networks" / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    late = {
        "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2, "steps_offset": 900,
    }  # fmt: skip
    file.write_text(json.dumps(late))
    message = refused(tmp_path / "run", *command, *DIFFUSION, names)
    assert "with offset 900 begin at time" in message
    assert not (tmp_path / "run").exists()


def test_images_of_other_classes_are_other_images(monkeypatch):
    """A transformer of ImageNet's classes without anchors reads no data, but it is told classes."""

    def classes(indices, generator="dit_released"):
        source = types.SimpleNamespace(imagenet_indices=indices)
        config = types.SimpleNamespace(
            generate=types.SimpleNamespace(generator=generator),
            dataset=types.SimpleNamespace(num_classes=len(indices)),
        )
        inputs = types.SimpleNamespace(open=lambda split: source)
        return fingerprints._classes(types.SimpleNamespace(config=config, inputs=inputs))

    assert classes((0, 217)) != classes((155, 159))
    assert classes((0, 217)) != classes((0, 217, 482))
    assert classes((0, 217), "stable_diffusion") == {}
