"""Answers as text and back: every class, none, and damage that is seen."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath

from prism_jax.data import answers
from prism_jax.errors import UserError


@pytest.mark.parametrize("classes", [2, 10, 255, 256, 1000, 65535, 65536, 70000])
def test_answers_come_back(classes, tmp_path):
    said = np.array([0, classes - 1, answers.NONE, 1, 0], np.int32)
    folder = epath.Path(tmp_path)
    answers.write(folder, {"test": said, "held_out": said[:2]}, classes)
    found = answers.read(folder)
    assert list(found) == ["test", "held_out"]
    np.testing.assert_array_equal(found["test"], said)
    np.testing.assert_array_equal(found["held_out"], said[:2])
    # A byte an image, up to 255 classes and none.
    assert len(answers.pack(np.zeros(300, int), classes)) == (
        400 if classes < 1 << 8 else 800 if classes < 1 << 16 else 1600
    )


def test_no_answers_are_none_and_damage_is_said(tmp_path):
    folder = epath.Path(tmp_path)
    assert answers.read(folder) == {}
    answers.write(folder, {"test": np.arange(8)}, 10)
    file = tmp_path / answers.FILE
    file.write_text(file.read_text().replace("AAEC", "AAED"))
    with pytest.raises(UserError, match="damaged"):
        answers.read(folder)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1017])
def test_right_answers_are_a_bit_each(count):
    right = np.random.default_rng(count).random(count) < 0.5
    packed = answers.pack_right(right)
    assert len(packed) < 12 + 4 * (count / 24)
    np.testing.assert_array_equal(answers.unpack_right(packed), right)
