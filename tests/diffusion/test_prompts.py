"""Prompts: tokens as CLIP's tokenizer makes them, states kept and found again."""

from __future__ import annotations

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from diffusion import parity
from helpers.clip_files import (
    needs_tokenizers,
    read_for,
    vocabulary,
    write_clip,
    write_tokenizer,
)

from prism_jax.diffusion import clip, huggingface, prompts
from prism_jax.errors import UserError

NAMES = ["tench", "a Tench,  42", "cat's"]


def write_pipeline(folder):
    """A text encoder for the tiny vocabulary, with a tokenizer beside it."""
    case = parity.BY_NAME["clip_text"]
    parity.write(case, folder / "text_encoder")
    read_for(folder / "text_encoder", "model.safetensors", 12)
    write_tokenizer(folder / "tokenizer")


def reads(length: int, **form) -> clip.TextEncoder:
    """A text encoder of the tiny vocabulary."""
    return clip.TextEncoder(**{"vocabulary": len(vocabulary()), "length": length, **form})


def test_prompts_of_classes():
    assert prompts.of_classes(["tench, Tinca tinca"]) == ["tench, Tinca tinca"]
    assert prompts.of_classes(["a", "b"], "a photo of {}.") == ["a photo of a.", "a photo of b."]
    with pytest.raises(UserError, match="'a photo' needs one {}"):
        prompts.of_classes(["a"], "a photo")
    with pytest.raises(UserError, match=r"classes \[1\] have no name"):
        prompts.of_classes(["a", " "])


@needs_tokenizers
@pytest.mark.parametrize("padding", [None, "!", {"content": "!"}])
def test_tokens_by_hand(padding, tmp_path):
    """Lower case, one space for many, single digits, an English ending, merges in their order."""
    write_tokenizer(tmp_path / "tokenizer", padding)
    known = vocabulary()
    words = [
        ["tench</w>"],
        ["a</w>", "tench</w>", ",</w>", "4</w>", "2</w>"],
        ["c", "a", "t</w>", "'s</w>"],
    ]
    pad = prompts.END if padding is None else "!"
    expected = [
        [known[w] for w in [prompts.START, *row, prompts.END, *[pad] * (8 - len(row))]]
        for row in words
    ]
    np.testing.assert_array_equal(prompts.tokenise(str(tmp_path), NAMES, reads(10)), expected)
    assert known["!"] == 0


@needs_tokenizers
@pytest.mark.parametrize("padding", [None, "!"])
def test_tokens_are_those_of_transformers(padding, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the test above stands for it")
    write_tokenizer(tmp_path, padding)
    theirs = transformers.CLIPTokenizer.from_pretrained(
        tmp_path, **({"pad_token": padding} if padding else {})
    )
    texts = [*NAMES, "x.y,z  o'clock's 2nd  ", "don't 100", "", "tenchtench tench's"]
    expected = theirs(texts, padding="max_length", max_length=32)["input_ids"]
    np.testing.assert_array_equal(prompts.tokenise(str(tmp_path), texts, reads(32)), expected)


@needs_tokenizers
def test_a_prompt_that_is_too_long_is_refused_and_not_cut(tmp_path):
    write_tokenizer(tmp_path / "tokenizer")
    prompts.tokenise(str(tmp_path), ["abcd"], reads(6))
    with pytest.raises(UserError, match="'abcde' has 5 tokens; 4 fit. Shorten"):
        prompts.tokenise(str(tmp_path), ["abcde"], reads(6))


@needs_tokenizers
def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    """An index that is too large reads the last row: all texts would say the same."""
    write_tokenizer(tmp_path / "tokenizer")
    known = vocabulary()
    end = known[prompts.END]  # the last one
    assert prompts.tokenise(str(tmp_path), NAMES, reads(10)).max() == end == len(known) - 1
    few = f"makes token {end} of 'tench', and the text encoder knows {end}, from 0 on: they are of"
    with pytest.raises(UserError, match=few):
        prompts.tokenise(str(tmp_path), NAMES, reads(10, vocabulary=end))
    file = tmp_path / "tokenizer" / "vocab.json"
    file.write_text(json.dumps({word: number + 5000 for word, number in known.items()}))
    with pytest.raises(UserError, match="Download tokenizer/ and text_encoder/ of one repository"):
        prompts.tokenise(str(tmp_path), NAMES, reads(10))


@needs_tokenizers
def test_an_end_that_the_encoder_does_not_look_for_is_refused(tmp_path):
    """Its embedding would be the start's, the same of every text."""
    write_tokenizer(tmp_path / "tokenizer")
    end = vocabulary()[prompts.END]
    for form in ({"end": end, "projection": 8}, {"projection": 8}, {"end": 7}):  # 7: none is read
        prompts.tokenise(str(tmp_path), NAMES, reads(10, **form))
    with pytest.raises(UserError, match=f"ends texts with token {end}, .* at token 7: they are"):
        prompts.tokenise(str(tmp_path), NAMES, reads(10, end=7, projection=8))


@needs_tokenizers
def test_a_damaged_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer.*needs vocab.json and merges.txt"):
        prompts.tokenise(str(tmp_path), ["a"], reads(6))
    write_tokenizer(tmp_path / "tokenizer", "<pad>")
    with pytest.raises(UserError, match="lacks .* or its padding token"):
        prompts.tokenise(str(tmp_path), ["a"], reads(6))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version\nq z\n")
    with pytest.raises(UserError, match="is damaged.*download vocab.json and merges.txt"):
        prompts.tokenise(str(tmp_path), ["a"], reads(6))


def test_without_the_package_one_message_says_what_to_install(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers; or take them over with --from="):
        prompts.tokenise(str(tmp_path), ["a"], reads(6))


@needs_tokenizers
def test_states_are_kept_and_a_run_needs_neither_tokenizer_nor_encoder(tmp_path, monkeypatch):
    source, folder = tmp_path / "sd", tmp_path / "kept"
    write_pipeline(source)
    monkeypatch.setattr(prompts, "BATCH", 3)  # the second batch is not full
    made = prompts.conditions(folder, str(source), NAMES, "dog")
    assert made["texts"].shape == (3, 12, 16) and made["null"].shape == (12, 16)
    module, params = huggingface.load(str(source), "text_encoder")
    tokens = prompts.tokenise(str(source), [*NAMES, "dog"], module)
    states = module.encode(params, tokens)[0]
    np.testing.assert_allclose(made["texts"], states[:3], atol=1e-5)
    np.testing.assert_allclose(made["null"], states[3], atol=1e-5)

    monkeypatch.setattr(prompts, "encode", None)  # nothing is encoded again
    again = prompts.conditions(folder, str(source), NAMES, "dog")
    source.rename(tmp_path / "gone")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    alone = prompts.conditions(folder, str(source), NAMES, "dog")
    for found in (again, alone):
        assert found.keys() == made.keys()
        assert all(np.array_equal(found[key], made[key]) for key in made)
    with pytest.raises(UserError, match="there is no text_encoder at"):
        prompts.conditions(folder, str(source), NAMES, "cat")  # other prompts
    data = (folder / prompts.TENSORS).read_bytes()
    (folder / prompts.TENSORS).write_bytes(data[:-1] + b"\1")
    with pytest.raises(UserError, match="is damaged.*Remove"):
        prompts.conditions(folder, str(source), NAMES, "dog")


@needs_tokenizers
def test_another_encoder_makes_other_states(tmp_path):
    source, folder = tmp_path / "sd", tmp_path / "kept"
    write_pipeline(source)
    made = prompts.conditions(folder, str(source), NAMES)
    file = source / "text_encoder" / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["final_layer_norm.bias"] += 1
    safetensors.numpy.save_file(tensors, file)
    other = prompts.conditions(folder, str(source), NAMES)
    np.testing.assert_allclose(other["texts"], made["texts"] + 1, atol=1e-5)


@needs_tokenizers
def test_embeddings_are_kept_as_states_are(tmp_path, monkeypatch):
    source, folder = str(write_clip(tmp_path / "clip")), tmp_path / "kept"
    made = prompts.embeddings(folder, source, NAMES)
    module, params = huggingface.load(source, "text_encoder")
    tokens = prompts.tokenise(source, NAMES, module)
    np.testing.assert_allclose(made, module.encode(params, tokens)[1], atol=1e-5)
    assert made.shape == (3, module.projection) and made.dtype == np.float32
    monkeypatch.setattr(prompts, "encode", None)  # nothing is encoded again
    np.testing.assert_array_equal(prompts.embeddings(folder, source, NAMES), made)
    with pytest.raises(TypeError):
        prompts.embeddings(folder, source, NAMES[:2])


def test_the_condition_of_a_text():
    params = {"texts": jnp.arange(12.0).reshape(3, 2, 2), "null": jnp.full((2, 2), -1.0)}
    condition = prompts.TextCondition()
    found = condition.of_labels(params, jnp.array([2, 0, 2]))
    np.testing.assert_array_equal(found, params["texts"][np.array([2, 0, 2])])
    np.testing.assert_array_equal(condition.null(params, 3), np.full((3, 2, 2), -1.0))


@needs_tokenizers
@pytest.mark.parametrize("written", ["<html>", "[1]", '{"pad_token": {"id": 3}}'])
def test_a_damaged_file_beside_the_tokenizer_is_named(tmp_path, written):
    write_tokenizer(tmp_path / "tokenizer", None)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(written)
    with pytest.raises(UserError, match="tokenizer_config.json is damaged .* download it again"):
        prompts.tokenise(str(tmp_path), NAMES, reads(10))
