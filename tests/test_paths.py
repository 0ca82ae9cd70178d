"""`~` is the home directory in every path that a person gives."""

from __future__ import annotations

import os
import pathlib
import pwd
import shutil

import pytest
from helpers.command import ROOT, TINY, call

from configs import digits_ipc10
from prism_jax import main
from prism_jax.config import resolve
from prism_jax.errors import UserError
from prism_jax.paths import at_home
from prism_jax.tools import export, prepare, results
from prism_jax.tools.teachers import __main__ as teachers


@pytest.fixture
def home(tmp_path, monkeypatch) -> pathlib.Path:
    """A home directory, and beside it the folder to run in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_only_a_leading_tilde_is_the_home_directory(home):
    assert at_home("~") == str(home)
    assert at_home("~/a/~/b") == f"{home}/a/~/b"
    user = pwd.getpwuid(os.getuid())
    assert at_home(f"~{user.pw_name}/a") == os.path.join(user.pw_dir, "a")
    for path in ("./~", "a/~", "gs://~/a", "$HOME/a", "/~", "", "a~"):
        assert at_home(path) == path
    with pytest.raises(UserError, match=r"~nobody_here/a begins .* of that name is ./~nobody_here"):
        at_home("~nobody_here/a")


def test_every_path_of_a_config(home):
    config = digits_ipc10.get_config()
    config.dataset.source, config.dataset.path = "tar", "~/data_{split}.tar"
    config.recover.initialise, config.recover.initialise_from = "folder", "~/set"
    name = config.squeeze.teachers[0]
    with config.networks[name].unlocked():
        config.networks[name].checkpoint = "~/x.pth"
    found = resolve(config)
    assert found.dataset.path == f"{home}/data_{{split}}.tar"
    assert found.recover.initialise_from == f"{home}/set"
    assert found.network(name).checkpoint == f"{home}/x.pth"
    config.dataset.path = "~nobody_here"
    with pytest.raises(UserError, match="dataset.path: ~nobody_here begins with"):
        resolve(config)


def test_flags_of_the_command(home):
    shutil.copy(ROOT / "tests" / "configs" / "tiny.py", home / "mine.py")
    for dashes in ("--", "-"):
        _, given = main.parse(["--config=~/mine.py", f"{dashes}workdir=~/a", "--from=~/b"], [])
        assert (given.workdir, getattr(given, "from")) == (f"{home}/a", f"{home}/b")
    _, given = main.parse(["--config=~/mine.py", "--workdir", "~/a"], [])
    assert given.workdir == f"{home}/a"
    _, given = main.parse(["--config=~/mine.py", "--workdir=./~"], [])
    assert given.workdir == "./~"


def test_the_command_makes_no_folder_of_that_name(home):
    (home / "a").write_text("")
    status, _, err = call(TINY, "--workdir=~/a", "--plan")
    assert status == 2 and f"--workdir={home}/a is a file" in err
    assert not os.listdir(".")


def test_flags_of_the_tools(home):
    options = export._parser().parse_args(["--workdir=~/a", "--to=~/b"])
    assert (options.workdir, options.to) == (f"{home}/a", f"{home}/b")
    options = prepare._parser().parse_args(
        ["--dataset=x", "--from=~/a", "--to=~/b", "--downloads=~/c"]
    )
    assert [options.source, options.to, options.downloads] == [f"{home}/{x}" for x in "abc"]
    (home / "order.json").write_text("[2, 0, 1]")
    network = ["~/x.pth", "--architecture=resnet18"]
    options = teachers.parser().parse_args(
        ["evaluate", *network, "--dataset=x", "--source=folder", "--path=~/a", "--save-order=~/b"]
        + ["--class-indices=~/order.json"]
    )
    found = options.file, options.path, options.save_order
    assert found == (f"{home}/x.pth", f"{home}/a", f"{home}/b")
    assert options.class_indices == (2, 0, 1)
    options = teachers.parser().parse_args(["import", *network, "--out=~/a"])
    assert (options.file, options.out) == (f"{home}/x.pth", f"{home}/a")


def test_an_unknown_home_is_a_message(home, capsys):
    for tool, arguments in {
        export: ["--workdir=~nobody_here/a", "--to=b"],
        prepare: ["--dataset=x", "--to=~nobody_here"],
        teachers: ["import", "~nobody_here", "--architecture=resnet18"],
        results: ["~nobody_here"],
    }.items():
        assert tool.main(arguments) == 2
        assert "error: ~nobody_here" in capsys.readouterr().err
