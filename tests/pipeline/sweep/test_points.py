"""What a sweep asks for: one list, its values read, a recipe for each; what cannot be is refused before anything."""

import shlex

import pytest
from click.testing import CliRunner

from foundation.errors import ConfigError
from pipeline.cli import main
from pipeline.models import extras
from pipeline.recipe import config
from pipeline.sweep import points
from tests.pipeline.chain import TINY

MODEL = f"{TINY}:build"
NOTHING = dict.fromkeys(points.AXES)

BAD = {
    "no list": ([], "Nothing to sweep was named"),
    "an empty list": (["--latency", ""], "has an empty place"),
    "only a comma": (["--macs", ","], "has an empty place"),
    "a hole": (["--macs", "0.4,,0.5"], "has an empty place"),
    "no number": (["--macs", "0.4,half"], "--macs 'half': must be a share of dense"),
    "not above nothing": (["--params", "0.4,0"], "--params '0': must be above 0"),
    "not below dense": (["--size", "0.4,1.5"], "--size '1.5': is not below dense"),
    "twice": (["--latency", "0.4,0.2,0.40"], "--latency names 0.4 twice"),
    "twice in units": (["--latency", "1ms,1000us"], "--latency names 1ms twice"),
    "two lists": (["--latency", "0.4,0.2", "--macs", "0.4,0.2"], "--latency and --macs were given"),
    "two values and no list": (["--latency", "0.4", "--macs", "0.4"], "--latency and --macs were given"),
    "ratio and a list": (["--latency", "0.4,0.2", "--ratio", "0.4"], "Both --ratio and --latency"),
    "ratio out of range": (["--ratio", "0.4,1.0"], "--ratio '1.0': must be a share of channels in [0, 1)"),
    "ratio that is none": (["--ratio", "nan,0.4"], "--ratio 'nan': must be"),
    "ratio of words": (["--ratio", "0.4,much"], "--ratio 'much': must be"),
    "a setting beside it": (["--macs", "0.4,0.2", "--set", "prune.target.macs=0.3"], "prune.target.macs one value"),
    "a ratio's setting": (["--ratio", "0.4,0.2", "--set", "prune.ratio=0.3"], "prune.ratio one value"),
    "a target in the recipe": (["--ratio", "0.4,0.2", "--set", "prune.target.macs=0.3"], "The recipe has a target"),
    "an unknown key": (["--macs", "0.4,0.2", "--set", "prune.ratoi=0.3"], "Unknown key"),
    "a storage of nowhere": (["--macs", "0.4,0.2", "--storage", "sqlite:////no/such/folder/s.db"], "cannot be reached"),
    "a storage of no kind": (["--macs", "0.4,0.2", "--storage", "sweep.db"], "cannot be reached"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "told"), BAD.values(), ids=BAD)
def test_a_slip_is_one_line_and_nothing_is_spent(tmp_path, words, told):
    out = tmp_path / "artifacts"
    done = CliRunner().invoke(main, ["sweep", MODEL, "--input-size", "3,16,16", *words, "--out", str(out)])
    assert done.exit_code == 2, done.output
    assert sum(line.startswith("error:") for line in done.output.splitlines()) == 1, done.output
    assert told in " ".join(done.output.split())
    assert not out.exists()


def test_a_storage_needs_optuna_and_its_address_is_not_shown(tmp_path, monkeypatch):
    out = ["--out", str(tmp_path / "artifacts")]
    words = ["sweep", MODEL, "--macs", "0.4,0.2", "--storage", "nonesuch://me:secret@host/db", *out]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, "secret" in done.output) == (2, False), done.output
    monkeypatch.setattr(extras, "installed", lambda name: name != "optuna")
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2
    assert 'pip install "leanort[sweep]"' in done.output


def test_a_launcher_of_several_processes_is_refused(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["sweep", MODEL, "--macs", "0.4,0.2", "--out", str(tmp_path / "artifacts")])
    assert done.exit_code == 2
    assert "not by a launcher" in done.output


def test_the_list_is_found_among_single_values():
    assert points.asked(NOTHING | {"latency": "0.5", "macs": "0.4, 600M"}) == ("macs", ("0.4", "600M"))
    assert points.asked(NOTHING | {"ratio": "0.5"}) == ("ratio", ("0.5",))


def test_a_share_and_an_amount_are_not_the_same_value():
    assert points.asked(NOTHING | {"latency": "0.4,0.4ms"})[1] == ("0.4", "0.4ms")


def swept(**more: object) -> points.Sweep:
    given = {"model": "resnet50", **more}
    return points.sweep("macs", ("0.4", "0.2"), lambda value: config.load(None, {**given, "prune.target.macs": value}))


def test_the_points_differ_in_nothing_else():
    first, second = swept().points
    assert first.config.prune.target.macs == "0.4"
    prune = first.config.prune
    again = prune.model_copy(update={"target": prune.target.model_copy(update={"macs": "0.2"})})
    assert first.config.model_copy(update={"prune": again}) == second.config


def test_workers_on_other_machines_ask_for_the_same_and_another_question_is_another_sweep(tmp_path):
    assert swept(artifacts=str(tmp_path)).digest() == swept().digest()
    assert swept(seed=1).digest() != swept().digest()
    assert swept(**{"data.source": "npz:x"}).digest() != swept().digest()


def test_a_users_own_file_is_part_of_the_question(tmp_path):
    file = tmp_path / "net.py"
    file.write_text("one")
    before = swept(model=f"{file}:build").digest()
    file.write_text("two")
    assert swept(model=f"{file}:build").digest() != before


def test_print_gives_the_deploys_of_a_job_array_and_does_nothing(tmp_path):
    out = tmp_path / "my artifacts"
    words = ["my net.py:build", "--latency", "0.4,3.5ms", "--macs", "0.5", "--set", "prune.train={lr=0.1}"]
    words += ["--set", "seed=3", "--input-size", "3,16,16", "--out", str(out), "--print"]
    done = CliRunner().invoke(main, ["sweep", *words])
    assert done.exit_code == 0, done.output
    lines = [shlex.split(line) for line in done.output.splitlines()]
    assert [line[:3] for line in lines] == [["leanort", "deploy", "my net.py:build"]] * 2
    assert [line[line.index("--latency") + 1] for line in lines] == ["0.4", "3.5ms"]
    for line in lines:
        assert line[-1] == "--no-promote"
        assert [line[at + 1] for at, word in enumerate(line) if word == "--set"] == ["prune.train={lr=0.1}", "seed=3"]
        context = main.commands["deploy"].make_context("deploy", line[2:])  # deploy takes every word of it
        assert context.params["out"] == out
        assert context.params["macs"] == "0.5"
    assert not out.exists()


def test_print_refuses_what_the_sweep_would():
    done = CliRunner().invoke(main, ["sweep", MODEL, "--macs", "0.4,0.4", "--print"])
    assert done.exit_code == 2


def test_a_target_that_cannot_be_is_not_a_share():
    with pytest.raises(ConfigError, match="must be a share of dense"):
        points.asked(NOTHING | {"latency": "fast,faster"})
