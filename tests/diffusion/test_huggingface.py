"""Directories as people have them: every form is read alike, and every misfit is refused."""

from __future__ import annotations

import dataclasses
import json
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from diffusion import parity

from prism_jax.diffusion import huggingface, noise
from prism_jax.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline's directory with an autoencoder in it: (directory, its vae/, its tensors)."""
    parity.write(parity.BY_NAME["vae_decode"], tmp_path / "vae")
    return tmp_path, tmp_path / "vae", safetensors.numpy.load_file(tmp_path / "vae" / WEIGHTS)


def load(path, part="vae"):
    return huggingface.load(str(path), part)


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def refused(path, part="vae"):
    with pytest.raises(UserError) as caught:
        load(path, part)
    return str(caught.value)


def write_bfloat16(tensors, path):
    """By the format, for NumPy's writer knows no BF16."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        narrow = tensor.astype(ml_dtypes.bfloat16)
        offsets = [len(body), len(body) + narrow.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": offsets}
        body += narrow.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_a_part_is_found_in_its_pipeline_and_by_itself(pipeline):
    directory, folder, _ = pipeline
    whole, alone = load(directory), load(folder)
    assert whole.module == alone.module and same(whole.params, alone.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(alone.params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_half_precision(variant, pipeline):
    directory, folder, tensors = pipeline
    dtype = np.float16 if variant == "fp16" else ml_dtypes.bfloat16
    full = load(directory).params
    path = folder / f"diffusion_pytorch_model.{variant}.safetensors"
    if variant == "fp16":
        safetensors.numpy.save_file({n: t.astype(dtype) for n, t in tensors.items()}, path)
    else:
        write_bfloat16(tensors, path)
    assert same(load(directory).params, full)  # the full one, while it is there
    (folder / WEIGHTS).unlink()
    found = load(directory).params
    assert same(found, jax.tree.map(lambda a: a.astype(dtype).astype(np.float32), full))
    assert not same(found, full)


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_names_of_attention(convolutions, pipeline):
    directory, folder, tensors = pipeline
    expected = load(directory).params
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, former in old.items():
            if f".attentions.0.{new}." in name:
                name = name.replace(new, former)
                if convolutions and name.endswith("weight"):
                    tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    assert sum(".proj_attn." in name for name in renamed) == 4
    safetensors.numpy.save_file(renamed, folder / WEIGHTS)
    assert same(load(directory).params, expected)


def shards(folder, tensors):
    names = sorted(tensors)
    files = {
        f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)
    }
    for file, held in files.items():
        safetensors.numpy.save_file({name: tensors[name] for name in held}, folder / file)
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return list(files)


def test_shards(pipeline):
    directory, folder, tensors = pipeline
    expected, before = load(directory).params, huggingface.digest(str(directory), "vae")
    files = shards(folder, tensors)
    assert same(load(directory).params, expected)
    assert huggingface.digest(str(directory), "vae") != before
    (folder / files[1]).unlink()
    assert f"lists {files[1]}, which are not there; download them" in refused(directory)
    (folder / f"{WEIGHTS}.index.json").write_text("{}")
    assert "index.json is damaged (KeyError: 'weight_map')" in refused(directory)


def test_pickles_are_read_without_torch(pipeline):
    torch = pytest.importorskip("torch", reason="writes the file")
    directory, folder, tensors = pipeline
    expected = load(directory).params
    (folder / WEIGHTS).unlink()
    state = {name: torch.from_numpy(tensor) for name, tensor in tensors.items()}
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    assert same(load(directory).params, expected)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_text_encoder_s_name_and_its_counter_may_be_there(prefix, tmp_path):
    parity.write(parity.BY_NAME["clip_text"], tmp_path / "text_encoder")
    expected = load(tmp_path, "text_encoder").params
    file = tmp_path / "text_encoder" / "model.safetensors"
    tensors = {f"{prefix}{n}": t for n, t in safetensors.numpy.load_file(file).items()}
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(7)[None]
    safetensors.numpy.save_file(tensors, file)
    assert same(load(tmp_path, "text_encoder").params, expected)


def test_all_misfits_are_told_at_once(pipeline):
    directory, folder, tensors = pipeline
    tensors["decoder.extra.weight"] = tensors.pop("decoder.conv_in.bias")
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"][:, :1].copy()
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    message = refused(directory)
    assert "1 tensors are missing: decoder.conv_in.bias" in message
    assert "1 tensors are not part of it: decoder.extra.weight" in message
    assert "encoder.conv_in.weight (8, 1, 3, 3), not (8, 3, 3, 3)" in message
    assert str(folder) in message and "Download that part again" in message


def test_every_tensor_is_needed_and_no_other(pipeline):
    """Each, left out alone, is missed; the twin: all of them load."""
    directory, folder, tensors = pipeline
    load(directory)
    for name in [*tensors][::20]:
        safetensors.numpy.save_file(
            {n: t for n, t in tensors.items() if n != name}, folder / WEIGHTS
        )
        assert f"1 tensors are missing: {name}." in refused(directory)


def test_what_is_not_there(pipeline, tmp_path):
    directory, folder, _ = pipeline
    message = refused(directory, "unet")
    assert f"neither {directory / 'unet' / 'config.json'}" in message
    assert "Download unet/ of a Stable Diffusion 1 or 2 repository into" in message
    (folder / WEIGHTS).unlink()
    assert "has a config.json and no weights. Download one of diffusion_pytorch" in refused(folder)
    (folder / "config.json").write_text("[")
    assert "cannot be read as the config of a vae" in refused(folder)
    (tmp_path / "sd.safetensors").write_bytes(b"")
    assert "is one file; a unet is read from a directory" in refused(
        tmp_path / "sd.safetensors", "unet"
    )


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
SD15 = {  # as published
    **BETAS, "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "clip_sample": False,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
DIT = {  # as diffusers writes it
    **LINEAR, "_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False,
    "set_alpha_to_one": True, "steps_offset": 0, "prediction_type": "epsilon",
    "trained_betas": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, noise.STABLE_DIFFUSION),
        (SD15, noise.STABLE_DIFFUSION),
        (
            {**SD15, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"},  # 2.1
            dataclasses.replace(noise.STABLE_DIFFUSION, prediction="v"),
        ),
        ({"clip_sample": True}, noise.STABLE_DIFFUSION),  # diffusers' pipeline overrules it
        (
            {"prediction_type": "v_prediction", "beta_end": 0.02, "clip_sample": False},
            dataclasses.replace(noise.STABLE_DIFFUSION, prediction="v", last=0.02),
        ),
        ({"prediction_type": "sample"}, "the kind of prediction is 'sample'"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "the noise schedule is 'squaredcos_cap_v2'"),
        ({"num_train_timesteps": 500}, "other than 1000 steps"),
        (  # as Stable Diffusion 1.5 and 2.1 state them
            {"trained_betas": None, "rescale_betas_zero_snr": False, "timestep_spacing": "leading"},
            noise.STABLE_DIFFUSION,
        ),
        (
            {"timestep_spacing": "trailing"},
            dataclasses.replace(noise.STABLE_DIFFUSION, spacing="trailing"),
        ),
        (
            {"timestep_spacing": "linspace"},
            dataclasses.replace(noise.STABLE_DIFFUSION, spacing="even"),
        ),
        ({"timestep_spacing": "karras"}, "scheduler_config.json: timestep_spacing is 'karras'"),
        ({"trained_betas": [0.1, 0.2]}, r"scheduler_config.json: trained_betas is \[0.1, 0.2\]"),
        ({"rescale_betas_zero_snr": True}, "json: rescale_betas_zero_snr is True"),
        ({"use_flow_sigmas": True}, "json: use_flow_sigmas is True"),
        ({"timestep_spacing": ["leading"]}, r"timestep_spacing is \['leading'\]"),
        ({"beta_start": "0.00085"}, "beta_start is '0.00085' and beta_end is 0.012; they are numb"),
        ({"beta_start": -1.0}, "beta_start is -1.0"),
        ({"beta_end": 12}, "beta_end is 12;"),
        ({"beta_start": 0.02}, "the second not the smaller one"),
        ({"beta_start": float("nan")}, "beta_start is nan"),
        ({"beta_start": None}, "states no beta_start, so"),
        ({"beta_schedule": None, "beta_end": None}, "states no beta_schedule and no beta_end"),
        ({"steps_offset": None}, "steps_offset is None; it is a whole number"),
        ({"steps_offset": 1.5}, "steps_offset is 1.5"),
        ({"steps_offset": True}, "steps_offset is True"),
        ({"set_alpha_to_one": "false"}, "set_alpha_to_one is 'false'; it is true or false"),
        ([], "is damaged"),
    ],
)
def test_a_scheduler_s_config_says_what_noise_a_denoiser_knows(said, expected, tmp_path):
    found = noise.STABLE_DIFFUSION
    assert huggingface.schedule(str(tmp_path), found) == found
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**BETAS, **said} if isinstance(said, dict) else said))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            huggingface.schedule(str(tmp_path), found)
    else:
        assert huggingface.schedule(str(tmp_path), found) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_max": 80, "prediction_type": "epsilon"},
        {"_class_name": "UnCLIPScheduler", "prediction_type": "epsilon"},
        {"_class_name": "DDIMScheduler"},  # diffusers' would be linear, of 1e-4 to 2e-2
    ],
)
@pytest.mark.parametrize("usual", [noise.STABLE_DIFFUSION, noise.DIT])
def test_noise_that_a_file_does_not_tell_is_not_taken_for_the_usual(other, usual, tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"num_train_timesteps": 1000, **other}))
    said = f"of a {other['_class_name']}, states no beta_schedule and no beta_start and no beta_end"
    with pytest.raises(UserError, match=said):
        huggingface.schedule(str(tmp_path), usual)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_dit_has_its_own_spacing(spacing, tmp_path):
    file = tmp_path / "scheduler" / "scheduler_config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**DIT, "timestep_spacing": spacing}))
    assert huggingface.schedule(str(tmp_path), noise.DIT) == noise.DIT
    file.write_text(json.dumps({**DIT, "steps_offset": None}))  # of a spacing that is not DiT's
    assert huggingface.schedule(str(tmp_path), noise.DIT) == noise.DIT
    file.write_text(json.dumps({**DIT, "rescale_betas_zero_snr": True}))
    with pytest.raises(UserError, match="rescale_betas_zero_snr"):
        huggingface.schedule(str(tmp_path), noise.DIT)


def test_another_network_is_refused(pipeline):
    directory, folder, _ = pipeline
    message = refused(folder, "unet")
    assert "holds a AutoencoderKL; a unet is a UNet2DConditionModel" in message


@pytest.mark.parametrize(
    "entry, value, told",
    [
        ("act_fn", "gelu", "act_fn='gelu'; only act_fn='silu' is implemented"),
        ("use_quant_conv", False, "use_quant_conv=False"),
        ("up_block_types", ["AttnUpDecoderBlock2D"] * 2, "up_block_types"),
        ("new_entry", "tanh", "new_entry='tanh', which is unknown here"),
    ],
)
def test_another_form_is_refused(entry, value, told, pipeline):
    directory, folder, _ = pipeline
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "new_entry": None}))
    load(directory)  # what says nothing is no form
    (folder / "config.json").write_text(json.dumps({**config, entry: value}))
    message = refused(directory)
    assert told in message and str(folder) in message


@pytest.mark.parametrize(
    "name, entry, value",
    [
        ("unet_1", "class_embed_type", "timestep"),
        ("unet_1", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("unet_1", "freq_shift", 1),
        ("unet_1", "addition_embed_type", "text_time"),  # as SDXL's
        ("dit", "norm_type", "ada_norm_single"),  # as PixArt's
        ("dit", "out_channels", 7),
        ("clip_text", "hidden_act", "gelu_new"),
    ],
)
def test_other_forms_of_the_others_are_refused(name, entry, value, tmp_path):
    case = parity.BY_NAME[name]
    parity.write(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: value}))
    assert str(value) in refused(tmp_path, case.part)


def test_a_width_of_heads_that_nothing_reads_may_be_null(tmp_path):
    parity.write(parity.BY_NAME["unet_1"], tmp_path)
    plain = huggingface.form(str(tmp_path), "unet")
    config = json.loads((tmp_path / "config.json").read_text())
    heads = {"num_attention_heads": config["attention_head_dim"], "attention_head_dim": None}
    (tmp_path / "config.json").write_text(json.dumps({**config, **heads}))
    assert huggingface.form(str(tmp_path), "unet") == plain
    (tmp_path / "config.json").write_text(json.dumps({**config, "attention_head_dim": None}))
    assert "attention_head_dim=None" in refused(tmp_path, "unet")  # the twin: where it is read


@pytest.mark.parametrize(
    "name, entry, value, told",
    [
        ("unet_1", "attention_head_dim", 3, "=3, which does not divide its 8 channels"),
        ("unet_1", "attention_head_dim", [2], "must be one number, or 2"),
        ("unet_1", "block_out_channels", None, "block_out_channels=None; it must be a list"),
        ("unet_1", "block_out_channels", [8, 16, 24], "must be a list of 3 words"),
        ("unet_1", "down_block_types", "DownBlock2D", "must be a list of 2 words"),
        ("unet_1", "layers_per_block", [1, 2], "only one number for all levels is implemented"),
        ("unet_1", "cross_attention_dim", None, "it must be a whole number above 0"),
        ("unet_1", "norm_num_groups", 3, "=3, which does not divide its 8 channels"),
        ("unet_1", "norm_num_groups", None, "it must be a whole number above 0"),
        ("vae_decode", "norm_num_groups", 3, "=3, which does not divide its 8 channels"),
        ("vae_decode", "scaling_factor", None, "scaling_factor=None; it must be a number above 0"),
        ("vae_decode", "scaling_factor", "0.18", "scaling_factor='0.18'"),
        ("vae_decode", "scaling_factor", 0, "scaling_factor=0"),
        ("vae_decode", "block_out_channels", [], "it must be a list"),
        ("clip_text", "max_position_embeddings", None, "it must be a whole number above 0"),
        ("clip_text", "num_attention_heads", 5, "=5, which does not divide its 16 channels"),
        ("clip_text", "hidden_act", ["gelu"], "it must be a word"),
        ("clip_image", "patch_size", True, "patch_size=True"),
        ("dit", "num_embeds_ada_norm", None, "it must be a whole number above 0"),
        ("dit", "attention_head_dim", 7, "their product must be a multiple of four"),
    ],
)
def test_an_entry_that_means_nothing_is_named(name, entry, value, told, tmp_path):
    case = parity.BY_NAME[name]
    parity.write(case, tmp_path)
    huggingface.formed(str(tmp_path), case.part)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: value}))
    with pytest.raises(UserError) as caught:
        huggingface.formed(str(tmp_path), case.part)
    message = str(caught.value)
    assert told in message and entry in message and str(tmp_path) in message


# How many refusals there are at least, of entries that decide the form.
FORMS = {"unet_1": 60, "vae_decode": 40, "clip_text": 40, "clip_whole_image": 10, "dit": 40}


@pytest.mark.parametrize("name", FORMS)
def test_no_entry_of_a_config_ends_in_a_traceback(name, tmp_path):
    """Whatever stands there, it is a form, or a person is told."""
    case = parity.BY_NAME[name]
    parity.write(case, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    built, refusals = set(), 0
    for key in config:
        for value in (None, "7", [], {}, -1, 0, 1.5, [3, 3, 3], [["x"]], float("nan")):
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                module = huggingface.form(str(tmp_path), case.part)
                if module not in built:  # it takes a second
                    built.add(module)
                    huggingface.formed(str(tmp_path), case.part)
            except UserError as error:
                refusals += str(tmp_path) in str(error)
    assert refusals >= FORMS[name]


@pytest.mark.parametrize(
    "entry, value", [("layers_per_block", [2, 2]), ("cross_attention_dim", [12, 12])]
)
def test_a_number_for_every_level_is_the_number(entry, value, tmp_path):
    parity.write(parity.BY_NAME["unet_1"], tmp_path)
    expected = huggingface.form(str(tmp_path), "unet")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, entry: value}))
    assert huggingface.form(str(tmp_path), "unet") == expected
