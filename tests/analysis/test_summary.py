"""The summary: its schema against an independent checker, and its tables word for word."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from configs.digits import config as digits
from prism_jax.analysis import summary as summaries
from prism_jax.analysis import tables, words
from prism_jax.config import resolve, to_dict
from prism_jax.errors import UserError
from prism_jax.stages import analyse
from prism_jax.tools import results


def drop(*path):
    def change(value):
        *to, last = path
        for key in to:
            value = value[key]
        del value[last]

    return change


def put(new, *path):
    def change(value):
        *to, last = path
        for key in to:
            value = value[key]
        value[last] = new

    return change


GOOD = {
    "whole": lambda value: None,
    "no stage ran": lambda value: [
        value.pop(k)
        for k in ("teachers", "recover", "relabel", "validate", "controls", "analyse", "dataset")
    ],
    "nothing known": put(None, "recover", "seconds"),
    "whole number for a float": put(1, "validate", "resnet18", "top1"),
    "float for a whole number": put(100.0, "recover", "images"),
    "no commit": put(None, "commit"),
    "guided": put({"start": 0.9, "end": 0.1234}, "recover", "clip"),
    "another control": put({}, "controls", "my_own"),
}
BAD = {
    "schema of the future": (put(2, "schema"), "summary.schema is 2; it must be 1"),
    "no config": (drop("config"), "summary.config is missing"),
    "per cent": (put(94.0, "validate", "resnet18", "top1"), "summary.validate.resnet18.top1 is 94"),
    "truth as a number": (put(True, "recover", "images"), "summary.recover.images is True"),
    "zero for unknown in words": (put("?", "recover", "seconds"), "number or null"),
    "half an image": (put(0.5, "recover", "images"), "integer or null"),
    "negative size": (put(-1, "relabel", "bytes"), "must be in [0, inf]"),
    "a misspelt key": (put(1, "recover", "second"), "summary.recover.second is not a key"),
    "in a list": (put([0.5, 1.5], "validate", "resnet18", "top1_per_seed"), "top1_per_seed[1]"),
    "half a guide": (put({"end": 0.1}, "recover", "clip"), "recover.clip.start is missing"),
    "half a protocol": (drop("protocol", "ema"), "summary.protocol.ema is missing"),
    "in a reference": (put(None, "recover", "terms", "resnet18", "end"), "resnet18.end is None"),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_summary_is_accepted(summary, name):
    GOOD[name](summary)
    summaries.validate(summary)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_summary_is_refused_with_the_key_named(summary, name):
    change, words = BAD[name]
    change(summary)
    with pytest.raises(UserError) as error:
        summaries.validate(summary)
    assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_every_violation_is_named_at_once(summary):
    put(2, "schema")(summary)
    put(94.0, "validate", "resnet18", "top1")(summary)
    assert len(list(summaries.violations(summary))) == 2


@pytest.mark.parametrize("name", [*GOOD, *BAD])
def test_the_check_agrees_with_an_independent_one(summary, name):
    jsonschema = pytest.importorskip("jsonschema", reason="the independent checker")
    (GOOD[name] if name in GOOD else BAD[name][0])(summary)
    jsonschema.Draft202012Validator.check_schema(summaries.SCHEMA)
    independent = jsonschema.Draft202012Validator(summaries.SCHEMA).is_valid(summary)
    assert independent == (name in GOOD)


def test_not_a_number_is_no_number_of_a_summary(summary):
    put(math.nan, "recover", "seconds")(summary)
    with pytest.raises(UserError, match="recover.seconds is nan"):
        summaries.validate(summary)


def test_a_summary_survives_its_file(summary):
    summaries.validate(json.loads(json.dumps(summary, allow_nan=False)))


def test_over_seeds_by_hand():
    records = [
        {"top1": 0.90, "top5": 0.99, "best_top1": 0.93, "seconds": 10.0},
        {"top1": 0.94, "top5": 0.97, "best_top1": 0.95, "seconds": 12.0},
        {"top1": 0.95, "top5": 0.98, "best_top1": 0.97, "seconds": 14.0},
    ]
    found = summaries.over_seeds(records)
    assert found["top1"] == pytest.approx(0.93)
    assert found["top1_std"] == pytest.approx(math.sqrt((9 + 1 + 4) / 2) / 100)
    assert found["top1_std"] != pytest.approx(math.sqrt((9 + 1 + 4) / 3) / 100, rel=1e-3)
    assert found["top1_per_seed"] == [0.90, 0.94, 0.95]
    assert found["top5"] == pytest.approx(0.98)
    assert found["best_top1"] == pytest.approx(0.95)
    assert found["seconds"] == pytest.approx(36.0)

    assert summaries.over_seeds(records[:1])["top1_std"] is None
    unknown = summaries.over_seeds([*records, {"top1": 0.9}])
    assert unknown["top5"] is None and unknown["top1"] is not None


def test_the_table_word_for_word(summary):
    assert tables.text(summary) == (
        "digits_ipc10, preset prism, method prism, IPC 10\n"
        "\n"
        "top-1 on real test images, %    resnet18     convnet\n"
        "synthetic                     94.0 ± 1.0  90.0 ± 1.0\n"
        "random real, soft labels      91.0 ± 1.0  88.7 ± 1.2\n"
        "random real, hard labels      81.0 ± 1.0           –\n"
        "full real training set        98.5 ± 0.2           –\n"
        "mean ± standard deviation over 3 student seeds of one synthetic set\n"
        "mse_gt + 0.1 cross entropy; adamw at 0.001, cos2; 300 epochs in batches of 50; "
        "BatchNorm over 25 images\n"
        "\n"
        "teacher             top-1  drawn   CE start → end  BN start → end\n"
        "resnet18 (primary)   98.6  100 %  0.412 → 0.00213     21.3 → 4.12\n"
        "mobilenet_v2         97.2   50 %   0.510 → 0.0350     30.4 → 9.70\n"
        "efficientnet_b0      96.9   40 %   0.600 → 0.0410     18.9 → 7.20\n"
        "shufflenet_v2_x0_5   95.8   60 %   0.710 → 0.0880        44.1 → –\n"
        "\n"
        "images                 100 (10 per class)\n"
        "recover                0.964 s per image\n"
        "distance from initial  0.213 (RMS of pixels in [0, 1])\n"
        "soft labels            3.06 MB on disk\n"
        "best test on the way   resnet18 95.0, convnet 91.0\n"
        "intra-class cosine     synthetic 0.812, initial 0.775, real 0.768\n"
    )


def test_tables_of_an_unfinished_run_say_nothing_of_stages_that_did_not_run(summary):
    for stage in ("recover", "relabel", "validate", "controls", "analyse"):
        del summary[stage]
    text = tables.text(summary)
    assert "resnet18" in text and "98.6" in text
    for absent in ("synthetic", "soft labels", "per image", "cosine", "0.0", "None"):
        assert absent not in text


def test_what_guides_is_said_where_it_does(summary):
    assert "CLIP" not in words.facts(summary)
    summary["recover"]["clip"] = {"start": 0.9, "end": 0.1234}
    assert words.facts(summary)["CLIP"].startswith("0.900 → 0.123 (1 - cosine")


def test_unknown_is_a_dash_and_never_zero(summary):
    put(None, "teachers", "resnet18", "top1")(summary)
    put(None, "recover", "seconds_per_image")(summary)
    put(None, "analyse", "intra_class_cosine", "real")(summary)
    put(None, "relabel", "bytes")(summary)
    text = tables.text(summary)
    assert "None" not in text
    assert "– per image" in text and "real –" in text and "– on disk" in text


def test_classes_over_seeds_by_hand():
    records = [
        {"top1": 0.5, "per_class": [1.0, 0.0, None]},
        {"top1": 0.5, "per_class": [0.5, 0.2, None]},
    ]
    assert summaries.over_seeds(records)["per_class"] == [0.75, 0.1, None]
    assert summaries.over_seeds([*records, {"top1": 0.5}])["per_class"] is None


def test_the_protocol_is_said_and_what_does_not_matter_is_not(summary):
    text = (
        "mse_gt + 0.1 cross entropy; adamw at 0.001, cos2; 300 epochs in batches of 50; "
        "BatchNorm over 25 images"
    )
    assert words.protocol(summary) == text
    assert text in tables.text(summary)
    summary["protocol"] |= {"loss": "kl", "temperature": 20.0, "ce_weight": 0.0, "bn_group": 50}
    assert (
        words.protocol(summary) == "kl (T = 20); adamw at 0.001, cos2; 300 epochs in batches of 50"
    )
    summary["protocol"]["ema"] = 0.99
    assert words.protocol(summary).endswith("; weights and statistics averaged (0.99)")
    summary["protocol"]["ema_statistics"] = False  # EDC, as released
    assert words.protocol(summary).endswith("; weights averaged (0.99)")
    del summary["protocol"]
    assert words.protocol(summary) == ""


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "adamw at 0.001, cos2, weight decay 0.01"),  # no momentum, no warm-up
        ({"zeta": 2.0, "decay": "kernels"}, "cos2 (zeta 2), weight decay 0.01 of kernels"),
        (
            {"optimiser": "sgd", "nesterov": True, "weight_decay": 0.0},
            "sgd at 0.001 with Nesterov momentum 0.9, cos2",
        ),
        (
            {"schedule": "multistep", "milestones": (0.5, 0.8), "gamma": 0.2},
            "multistep at 0.5, 0.8 (gamma 0.2), weight decay 0.01",
        ),
        ({"warmup_epochs": 5, "warmup_start": 0.1}, "cos2, 5 epochs of warm-up from 0.1, weight"),
    ],
)
def test_all_that_decides_the_rate_is_in_the_protocol(summary, changes, said):
    config = resolve(digits(10))
    usual = {"weight_decay": 0.01, "decay": "all", **changes}
    validate = dataclasses.replace(config.validate, **usual)
    context = SimpleNamespace(config=dataclasses.replace(config, validate=validate))
    summary["protocol"] = analyse.protocol(context)
    summaries.validate(summary)
    assert said in words.protocol(summary)


def test_last_best_and_top5_are_told_apart(summary):
    entry = summary["validate"]["resnet18"]
    assert words.accuracy(entry) == "94.0 ± 1.0"
    assert words.more(entry) == "best 95.0"  # of two classes
    several = {k: v for k, v in entry.items() if k != "per_class"}
    assert words.more(several) == "best 95.0, top-5 99.0"
    assert words.more({"top1": 0.5, "top5": 0.75}) == "top-5 75.0"
    assert words.more(None) == words.more({"top1": None}) == ""
    assert "resnet18 95.0, convnet 91.0" in tables.text(summary)


def test_classes_are_listed_or_the_extremes_of_many(summary):
    rows = words.class_rows(summary, ["zero", "one"])
    assert rows == [("zero", ("94.0", "90.0")), ("one", ("50.0", "50.0"))]
    many = [(37 * c % 100) / 100 for c in range(100)]  # every accuracy once
    many[13] = None
    summary["validate"] = {"a": {"top1": 0.5, "per_class": many}}
    rows = words.class_rows(summary)
    order = sorted((x, c) for c, x in enumerate(many) if x is not None)
    assert [r.name for r in rows] == [f"class {c}" for _, c in order[:10] + order[-10:]]
    summary["validate"]["b"] = {"top1": 0.5, "per_class": None}
    assert words.class_rows(summary) == words.class_rows({}) == []


def test_the_spread_is_said(summary):
    assert "over 3 student seeds" in words.spread_note(summary)
    one = {**summary, "controls": {}, "validate": {"resnet18": {"top1": 0.5, "top1_std": None}}}
    assert words.spread_note(one) == "one student seed, no spread"
    assert "±" not in tables.text(one)
    assert words.spread_note({}) == "no student was trained"
    runs = {**summary, "runs": 2}  # of three students each: not six runs
    for entry in runs["validate"].values():
        entry["top1_per_seed"] = [0.5] * 6
    assert "over 2 runs, 6 students of a kind in all (recover," in words.spread_note(runs)


def test_markdown_compares_runs_and_repeats_no_shared_control(summary):
    other = json.loads(json.dumps(summary))
    other |= {"config": "digits_sre2l_ipc10", "method": "sre2l"}
    other["validate"]["resnet18"] |= {"top1": 0.915, "top1_std": 0.004}
    del other["validate"]["convnet"]
    found = tables.markdown([summary, other]).splitlines()
    assert found[:8] == [
        "| IPC | trained on | resnet18 | convnet |",
        "|:--|:--|--:|--:|",
        "| 10 | **prism** | 94.0 ± 1.0 | 90.0 ± 1.0 |",
        "| 10 | random real, soft labels | 91.0 ± 1.0 | 88.7 ± 1.2 |",
        "| 10 | random real, hard labels | 81.0 ± 1.0 | – |",
        "| 10 | **sre2l** | 91.5 ± 0.4 | – |",
        "| – | full real training set | 98.5 ± 0.2 | – |",
        "",
    ]
    assert "over 3 student seeds" in found[8]
    assert found[-1] == "| `digits_sre2l_ipc10` | 10 | 0.964 s | 3.06 MB | 0.812 | 0.775 | 0.768 |"

    other["controls"]["random_real"]["resnet18"]["top1"] = 0.8  # no longer shared
    found = tables.markdown([summary, other])
    assert "random real, soft labels (`digits_ipc10`) | 91.0" in found
    assert "random real, soft labels (`digits_sre2l_ipc10`) | 80.0" in found


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (5.67e9, "5.67 GB"),
     (2e16, "20000 TB"), (None, "–")],
)  # fmt: skip
def test_sizes(value, text):
    assert words.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00213, "0.00213"), (0.0, "0.00"), (12, "12.0"), (123.4, "123"), (999.7, "1000"),
     (4321.9, "4322"), (None, "–")],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        (put([7], "seeds"), True),
        (put(100, "recover", "ipc"), False),
        (put("sre2l", "method"), False),
        (put(0.5, "protocol", "learning_rate"), False),
    ],
)
def test_runs_of_one_name_are_merged_where_only_seeds_differ(summary, change, alike, tmp_path):
    """Flags may have changed anything: two sizes of a set have no mean."""
    for students in (summary["validate"], *summary["controls"].values()):
        for entry in students.values():
            entry.setdefault("top1_per_seed", [entry["top1"]])
    other = json.loads(json.dumps(summary))
    change(other)
    for name, content in (("one", summary), ("other", other)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(content))
    assert (summaries.what_is_equal(summary) == summaries.what_is_equal(other)) == alike
    text = results.compared([str(tmp_path / name) for name in ("one", "other")])
    assert ("over 2 runs" in text) == alike


def _write(folder, summary, experiment=None):
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps(summary))
    if experiment:
        ran = {"experiment": experiment, "provenance": {}}
        (folder / "config.json").write_text(json.dumps(ran))
    return str(folder)


def test_runs_whose_settings_differ_have_rows_of_their_own(summary, tmp_path):
    """The summary does not say how many iterations there were, nor who labelled."""
    for students in (summary["validate"], *summary["controls"].values()):
        for entry in students.values():
            entry.setdefault("top1_per_seed", [entry["top1"]])
    other = json.loads(json.dumps(summary))
    other["validate"]["convnet"]["top1"] = other["validate"]["convnet"]["top1_per_seed"][0] = 0.5
    experiment = to_dict(resolve(digits(10)))
    seeds = json.loads(json.dumps(experiment))
    seeds["seed"], seeds["validate"]["seeds"], seeds["dataset"]["path"] = 7, [8], "elsewhere"
    fewer = json.loads(json.dumps(experiment))
    fewer["recover"]["iterations"] = 7
    one = _write(tmp_path / "one", summary, experiment)
    alike = results.compared([one, _write(tmp_path / "seeds", other, seeds)])
    assert "over 2 runs" in alike
    apart = results.compared([one, _write(tmp_path / "fewer", other, fewer)])
    assert "over 2 runs" not in apart
    assert f"{summary['config']}, {tmp_path / 'fewer'}" in apart
    elsewhere = json.loads(json.dumps(summary))
    elsewhere["dataset"]["name"] = "shapes"
    both = results.compared([one, _write(tmp_path / "shapes", elsewhere)])
    for name in ("digits", "shapes"):  # whose numbers do not compare
        assert f"{summary['config']} on {name}" in both
    assert " on digits" not in alike
    with pytest.raises(UserError, match="named twice"):
        results.compared([one, f"{one}/"])
    assert results.main([str(tmp_path)]) == 2


def _with_students(summary, experiment, seed, students):
    """A summary of some students, each of accuracy 0.5, and the settings of its run."""
    entry = summaries.over_seeds([{"top1": 0.5, "seconds": 12.0}] * len(students))
    run = json.loads(json.dumps({**summary, "seeds": students, "validate": {"net": entry}}))
    settings = json.loads(json.dumps(experiment | {"seed": seed}))
    settings["validate"]["seeds"] = students
    return run | {"controls": {}}, settings


def test_a_run_and_its_copy_are_one_result(summary, tmp_path):
    """Their deviation would be of nothing."""
    run, settings = _with_students(summary, to_dict(resolve(digits(10))), 0, [0, 1])
    one, copy = (_write(tmp_path / name, run, settings) for name in ("one", "copy"))
    with pytest.raises(UserError, match=f"{one} and {copy} have equal settings and seeds"):
        results.compared([one, copy])
    for folder in (one, copy):  # of which the summaries alone are left
        (tmp_path / folder / "config.json").unlink()
    with pytest.raises(UserError, match="as a folder and its copy have"):
        results.compared([one, copy])
    # One student of two is the same.
    more = _write(tmp_path / "more", *_with_students(summary, settings, 0, [1, 2]))
    again = _write(tmp_path / "again", run, settings)
    with pytest.raises(UserError, match=r"seeds \(students 1\)"):
        results.compared([again, more])
    assert results.main([again, more]) == 2


def test_runs_on_one_seed_of_images_say_that_students_alone_vary(summary, tmp_path):
    settings = to_dict(resolve(digits(10)))
    folders = [
        _write(tmp_path / name, *_with_students(summary, settings, seed, students))
        for name, seed, students in (("a", 0, [0, 1]), ("b", 0, [2, 3]), ("c", 1, [0, 1]))
    ]  # fmt: skip
    alone, both, whole = (results.compared(folders[at]) for at in (slice(2), slice(3), slice(1, 3)))
    of = "over 2 runs of 1 seed(s) of images, 4 students of a kind in all (students alone vary)"
    assert of in alone
    assert "over 3 runs of 2 seed(s) of images, 6 students of a kind in all (recover," in both
    assert "over 2 runs, 4 students of a kind in all (recover," in whole


def test_seconds_of_merged_runs_are_those_of_all_of_their_students(summary):
    entry = summaries.over_seeds([{"top1": 0.5, "seconds": 12.0}] * 3)
    runs = [summary | {"validate": {"net": entry}, "controls": {}} for _ in range(2)]
    assert summaries.merge(runs)["validate"]["net"]["seconds"] == 6 * 12.0
    runs[1] = runs[1] | {"validate": {"net": entry | {"seconds": None}}}
    assert summaries.merge(runs)["validate"]["net"]["seconds"] is None


def test_two_sets_with_equal_numbers_are_two_rows(summary):
    """Where controls with equal numbers are one."""
    found = tables.markdown([summary, summary | {"config": "other"}])
    for name in ("digits_ipc10", "other"):
        assert f"| 10 | **prism** (`{name}`) | 94.0 ± 1.0 | 90.0 ± 1.0 |" in found
    assert found.count("random real, soft labels") == 1


def test_a_set_that_not_all_runs_have_is_named(summary, tmp_path):
    for students in (summary["validate"], *summary["controls"].values()):
        for entry in students.values():
            entry.setdefault("top1_per_seed", [entry["top1"]])
    other = json.loads(json.dumps(summary)) | {"seeds": [7]}
    del other["controls"]["full_real"]
    folders = [_write(tmp_path / name, s) for name, s in (("one", summary), ("two", other))]
    text = results.compared(folders)
    assert f"Left out: full real training set, which {folders[1]} did not train on." in text


def test_classes_without_test_images_crowd_nobody_out(summary):
    summary["validate"] = {"a": {"per_class": [k / 25 if k < 12 else None for k in range(25)]}}
    assert [row.name for row in words.class_rows(summary)] == [f"class {k}" for k in range(12)]
