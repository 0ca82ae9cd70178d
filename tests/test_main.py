"""What a person types wrong costs one clear message and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import typing
import warnings

import pytest
from helpers.command import ROOT, TINY, call, environment, run, snapshot

from prism_jax import config, main
from prism_jax import environment as prepared
from prism_jax.config import STAGES
from prism_jax.stages import coordination


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The command runs in an empty folder, which stays empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


def field(name, value):
    return f"--config.{name}={value}"


WRONG = {
    "misspelt field": (
        [field("recover.itertions", 5)],
        ["--config.recover.itertions=5", "no field", "did you mean recover.iterations"],
    ),
    "unknown network": (
        [field("networks.lenet.architecture", "lenet")],
        ["no field networks.lenet.architecture", "c.networks.lenet = base.network(architecture="],
    ),
    "wrong type": ([field("recover.iterations", "many")], ["'many'", "a whole number"]),
    "value apart from its flag": (["--config.seed", "x"], ["seed is 'x'", "a whole number"]),
    "not a number": ([field("recover.learning_rate", "nan")], ["nan", "a number"]),
    "not a bool": ([field("recover.flip", "perhaps")], ["'perhaps'", "True or False"]),
    "group as value": ([field("recover", 5)], ["recover is '5'", "a group of fields"]),
    "too few values": ([field("recover.betas", "(0.5,)")], ["recover.betas", "needs 2 values"]),
    "unknown flag": (["--frm=x"], ["unknown flag --frm", "did you mean --from?", "--workdir"]),
    "stray argument": (["digits"], ["unexpected argument 'digits'", "--help"]),
    "unknown stage": (["--stages=validte"], ["'validte'", "did you mean validate?", "squeeze"]),
    "no stage": (["--stages="], ["--stages is empty", "squeeze, recover"]),
    "negative": ([field("recover.iterations", -1)], ["recover.iterations is -1", "zero or posi"]),
    "zero": ([field("validate.accumulate", 0)], ["validate.accumulate is 0", "positive"]),
    "out of range": ([field("relabel.crop_min", 2.0)], ["relabel.crop_min is 2.0", "(0, 1]"]),
    "no such choice": ([field("relabel.mix", "mix")], ["relabel.mix is 'mix'", "cutmix, mixup"]),
    "primary outside": ([field("recover.primary", "third")], ["'third'", "(first, second)"]),
    "unknown architecture": (
        [field("networks.first.architecture", "resnet19")],
        ["the architecture of first is 'resnet19'", "did you mean resnet18?", "convnet_d1_bn"],
    ),
    "no such network": ([field("recover.pool", "first,thrid")], ["recover.pool", "thrid"]),
    "batch does not divide": ([field("recover.batch_size", 5)], ["is 5", "these do: 4"]),
    "too small images": ([field("dataset.image_size", 3)], ["second", "needs 4 or more"]),
    "too many classes": ([field("dataset.num_classes", 12)], ["is 12", "has 10 classes"]),
    "no labels": ([field("relabel.epochs", 0)], ["relabel.epochs is 0", "must be positive"]),
    "seed twice": ([field("validate.seeds", "(0, 0)")], ["validate.seeds is (0, 0)", "different"]),
    "no seed": ([field("validate.seeds", "()")], ["validate.seeds", "one or more"]),
    "no such workdir": (["--from=nowhere"], ["--from=nowhere", "no working directory"]),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_mistake_is_one_message_and_nothing_else(mistake):
    arguments, said = WRONG[mistake]
    status, out, err = call(TINY, "--workdir=run", *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and "Traceback" not in err and err.count("error:") == 1
    assert [part for part in said if part not in err] == [], err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdir=run"], ["no --config=FILE was given", "--help"]),
        (["--config", "x.py"], ["--config=FILE"]),
        (["--config=x.py"], ["no config file at x.py"]),
        ([f"--config={ROOT}/configs/digts_ipc10.py"], ["no config file at", "digits_ipc10.py"]),
        (
            [f"--config={ROOT}/configs/imagenet_ipc10.py:smok"],
            ["imagenet_ipc10.py:smok cannot be loaded", "unknown argument smok; allowed: smoke"],
        ),
    ],
)
def test_a_config_that_cannot_be_loaded(arguments, said):
    status, out, err = call(*arguments)
    assert status == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and [part for part in said if part not in err] == []


def test_everything_wrong_is_said_at_once_by_the_real_command(tmp_path):
    wrong = (
        field("recover.itertions", 5), field("recover.iterations", "x"), field("relabel.mix", "y"),
        field("recover.ipc", -2), field("validate.accumulate", 0), field("recover.primary", "z"),
        "--bogus", "stray", "--stages=first",
    )  # fmt: skip
    done = run(TINY, f"--workdir={tmp_path / 'run'}", *wrong)
    assert done.returncode == 2 and done.stdout == ""
    first, *lines = done.stderr.strip().splitlines()
    assert first == "error: 9 things cannot be used:"
    assert len(lines) == 9 and all(line.startswith("  - ") for line in lines)
    for part in ("itertions", "'x'", "'y'", "-2", "accumulate", "'z'", "bogus", "stray", "'first'"):
        assert part in done.stderr


def test_imagenet_without_its_files(tmp_path):
    before = snapshot(ROOT / "runs") if (ROOT / "runs").exists() else None
    nowhere = field("dataset.path", tmp_path / "imagenet")
    done = run("--config=configs/imagenet_ipc10.py", nowhere)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in ("10,000 (10 per class, 1000 classes, 224 px)", "resnet18 (primary)", "disk"):
        assert part in done.stdout  # the plan
    for part in (
        str(tmp_path / "imagenet"), "train", "val",
        "resnet18-f37072fd.pth", "mobilenet_v2-b0353104.pth",
        "efficientnet_b0_rwightman-7f5810bc.pth", "shufflenetv2_x0.5-f707e7126e.pth",
    ):  # fmt: skip
        assert part in done.stderr
    assert before == (snapshot(ROOT / "runs") if (ROOT / "runs").exists() else None)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            "cifar10_ipc10",
            ["data/cifar-10-batches-py", "data/teachers/resnet44-014dd654.th",
             "--config.networks.resnet20.checkpoint=FILE"],
        ),
        (
            "imagenette_ipc10:cpu",
            ["data/imagenette2-320", "train/<class>/<image>", "mobilenet_v2-b0353104.pth"],
        ),
        (
            "imagenet_ipc10:folder",
            ["data/imagenet", "resnet18-f37072fd.pth", "there is no folder published/set"],
        ),
    ],
)  # fmt: skip
def test_a_config_without_its_files_says_what_it_needs(config, said):
    name, _, argument = config.partition(":")
    more = [field("recover.initialise_from", "published/set")] if argument == "folder" else []
    path = f"{ROOT}/configs/{name}.py" + (f":{argument}" if argument else "")
    status, _, err = call(f"--config={path}", *more)
    assert status == 2 and "needs what is not there" in err
    assert [part for part in said if part not in err] == [], err
    if argument == "folder":
        assert "mobilenet" not in err  # one teacher labels, no other is needed


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], [TINY, "--help"]])
def test_help(arguments):
    status, out, err = call(*arguments)
    assert status == 0 and err == ""
    assert all(f"\n    {stage} " in out for stage in STAGES)
    assert out.count("python -m prism_jax.main --config=") >= 5
    for flag in ("--config=FILE", "--workdir=DIR", "--from=DIR", "--stages=A,B", "--plan"):
        assert flag in out


def test_the_examples_of_help_name_configs_that_are_there():
    _, out, _ = call("--help")
    files = {w.split("=", 1)[1].split(":")[0] for w in out.split() if w.startswith("--config=conf")}
    assert len(files) >= 3 and all((ROOT / file).is_file() for file in files)


def test_none_unsets_a_field():
    given = [TINY, "--config.validate.ema=None", "--config.recover.priors=None"]
    config, _ = main.parse(given, problems := [])
    assert config.validate.ema is None and config.recover.priors is None and not problems
    for values in (("None", "0.9"), ("0.9", "None")):  # of a field that is named twice, the last
        twice = [f"--config.validate.ema={value}" for value in values]
        found = main.parse([TINY, *twice], problems)[0].validate.ema
        assert found == (None if values[1] == "None" else 0.9) and not problems
    status, _, err = call(TINY, "--config.parallel=None")
    assert status == 2 and "parallel" in err and "Traceback" not in err, err
    main.parse([TINY, "--config.validate.emma=None"], problems)
    assert "no field validate.emma; did you mean validate.ema" in problems[0]
    status, _, err = call(TINY, "--config.recover.ipc=None")
    assert status == 2 and "recover.ipc is None; it must be a whole number" in err


def test_plan_writes_nothing():
    status, out, err = call(TINY, "--workdir=run", "--plan")
    assert status == 0 and err == ""
    for part in ("8 (2 per class, 4 classes, 8 px)", "first (primary), second", "4 units of 2"):
        assert part in out
    for measured in ("recover takes", "memory", "relabel takes"):
        assert measured in out


def test_plan_is_of_the_whole_run():
    _, out, _ = call(TINY, "--plan", "--stages=validate", "--from=elsewhere")
    assert "of the whole run, whatever is there: --stages and --from set aside" in out
    status, _, err = call(TINY, "--from=")
    assert status == 2 and "--from= names no working directory" in err


def test_plan_of_a_teacher_without_batch_norm():
    """What is matched of it are its convolutions."""
    pool = ("--config.recover.pool=first,outside", "--config.recover.match=bn,conv")
    status, out, err = call(TINY, *pool, "--config.recover.count_no_bn=True", "--plan")
    assert status == 0 and "an iteration" in out, err


def test_a_workdir_that_is_a_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "file"
    path.write_text("mine")
    status, _, err = call(TINY, f"--workdir={path}")
    assert status == 2 and f"--workdir={path} is a file" in err
    assert path.read_text() == "mine"


def test_nproc_must_be_a_number(monkeypatch):
    monkeypatch.setitem(os.environ, "NPROC", "many")
    status, _, err = call(TINY, "--workdir=run")
    assert status == 2 and "NPROC in the environment is 'many'" in err


def test_a_full_disk_is_no_traceback(monkeypatch):
    from prism_jax.data import workdir

    def full(self):
        raise OSError(28, "No space left on device", "run/.lock")

    monkeypatch.setattr(workdir.Lock, "acquire", full)
    status, _, err = call(TINY, "--workdir=run")
    assert status == 2
    assert err.startswith("error: run/.lock cannot be used: No space left on device.")


def test_another_error_keeps_its_traceback(monkeypatch):
    """The twin: only what a person can mend is shortened to a message."""
    from prism_jax.data import workdir

    def broken(self):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(workdir.Lock, "acquire", broken)
    with pytest.raises(OSError, match="Input/output error"):
        call(TINY, "--workdir=run")


def test_ctrl_c_before_any_work(monkeypatch):
    from prism_jax import main

    def interrupt(config, problems):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "prepare_environment", interrupt)
    status, _, err = call(TINY, "--workdir=run")
    assert status == 130 and err.startswith("stopped by SIGINT")


def test_a_plan_needs_no_signals():
    """In another thread none are handled."""
    found, before = [], warnings.formatwarning
    thread = threading.Thread(target=lambda: found.append(main.main(["--help"])))
    thread.start()
    thread.join()
    assert found == [0] and warnings.formatwarning is before


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "twin, none came"])
def test_a_ctrl_c_that_a_callback_swallows_still_stops(monkeypatch, lost):
    """What is raised in a callback of the collector, JAX's among them, is printed and lost."""
    worked = []

    def at_work(argv):
        try:
            if lost:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            pass
        coordination.StopSignal().install()
        worked.append(argv)
        return 0

    monkeypatch.setattr(main, "_main", at_work)
    # Where the tests run in the background of a shell, SIGINT is ignored.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    try:
        status = main.main(["--config=x"])
        assert (status, len(worked)) == ((130, 0) if lost else (0, 1))
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGINT, outside)


LATE = {"grain", "jinja2", "matplotlib", "orbax", "scipy", "sklearn", "tensorflow_datasets"}


@pytest.mark.parametrize(
    ("module", "found"),
    [("prism_jax.pipeline", set()), ("prism_jax.analysis.figures", {"matplotlib"})],
)
def test_what_takes_long_to_import_is_imported_where_it_is_used(module, found):
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert LATE & set(json.loads(done.stdout)) == found


def test_the_command_is_there_before_jax():
    """What the environment says of devices counts only where JAX comes later."""
    program = "import sys, prism_jax.main; sys.exit('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment()).returncode == 0
    )


@pytest.mark.parametrize(("libc", "told"), [("glibc", {-1, -3}), ("", set())])
def test_glibc_alone_is_told_to_keep_freed_memory(monkeypatch, libc, told):
    options = set()

    class Library:
        @staticmethod
        def mallopt(option, value):
            options.add(option)

    monkeypatch.setattr(prepared.platform, "libc_ver", lambda: (libc, ""))
    monkeypatch.setattr(prepared.ctypes, "CDLL", lambda name: Library)
    prepared.keep_freed_memory()
    assert options == told


def test_what_float32_is_on_each_platform():
    choices = typing.get_args(typing.get_type_hints(config.Parallel)["matmul_precision"])
    assert set(choices) == set(prepared.FLOAT32)
    assert {prepared.float32_of("cpu", choice) for choice in choices} == {"float32"}
    assert prepared.float32_of("gpu", "high") == prepared.float32_of("cuda", None) == "TF32"
    assert prepared.float32_of("tpu", "default") == "bfloat16" != prepared.float32_of("tpu", "high")


def test_our_warnings_are_one_line_each_and_others_name_their_place():
    def run(argv):
        for _ in range(2):
            said.append(warnings.formatwarning("ours", UserWarning, main.__file__, 7))
            said.append(warnings.formatwarning("theirs", UserWarning, "elsewhere.py", 7))
        return 0

    said, form = [], warnings.formatwarning
    assert main.guarded(run, ["x"], "") == 0
    theirs = form("theirs", UserWarning, "elsewhere.py", 7)
    assert said == ["warning: ours\n", theirs, "", theirs] and "elsewhere.py:7" in theirs
    assert warnings.formatwarning is form


def test_the_commit_is_that_of_the_checkout_with_a_mark_for_changes(tmp_path_factory, monkeypatch):
    checkout = tmp_path_factory.mktemp("checkout")

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", "-C", checkout, *who, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    package = checkout / "prism_jax"
    package.mkdir()
    (package / "environment.py").write_text("one\n")
    monkeypatch.setattr(prepared, "__file__", str(package / "environment.py"))
    assert prepared.commit() is None
    git("init", "--quiet")
    (checkout / "theirs.txt").write_text("a project that has it installed below\n")
    git("add", "theirs.txt")
    git("commit", "--quiet", "--message=theirs")
    assert prepared.commit() is None
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    head = git("rev-parse", "HEAD")[:12]
    assert prepared.commit() == head
    (checkout / "notes.txt").write_text("not tracked\n")
    assert prepared.commit() == head
    (package / "environment.py").write_text("two\n")
    assert prepared.commit() == f"{head}+"
