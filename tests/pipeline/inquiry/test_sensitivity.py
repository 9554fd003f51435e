"""What a choice by curves shows: before a deploy (sensitivity, plan) and after it (why)."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pipeline.artifacts.eager import Baseline
from pipeline.cli import main
from pipeline.selection.criteria import CRITERIA
from pipeline.selection.curves import SHARES, Curve
from tests.pipeline.chain import QUICK, TINY, deploy, figures, said

SPEC = f"{TINY}:build"
CURVES = [
    "--set", "prune.scope=curves", "--set", "prune.criterion=wanda", "--set", "prune.align=4", "--ratio", "0.3",
    "--set", "prune.allocation=exact",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with one version whose widths follow curves."""
    folder = tmp_path_factory.mktemp("artifacts")
    done = deploy(folder, *CURVES)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "curves: blocks.2.conv1" in done.stderr
    return folder


@pytest.fixture(scope="module")
def version(folder) -> Path:
    return folder / "tiny" / "v0001"


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# ── before ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sensitivity_shows_the_curves_worst_first_on_the_weights_of_the_baseline(folder, version):
    words = ["sensitivity", SPEC, *QUICK, *CURVES, "--json"]
    found = json.loads(CliRunner().invoke(main, [*words, "--out", str(folder)]).stdout)
    assert found["weights"] == "the baseline of v0001"
    assert found["shares"] == found["measured_at"] == list(SHARES)
    halves = [row["divergence"][SHARES.index(1 / 2)] for row in found["layers"]]
    assert halves == sorted(halves, reverse=True) and halves[0] > 2 * halves[-1] > 0
    kept = {row["cluster"]: row for row in table(version / "1-prune" / "prices.csv")}
    corners: dict[str, list[tuple[float, float]]] = {}
    for row in table(version / "1-prune" / "curves.csv"):
        corners.setdefault(row["cluster"], []).append((int(row["removed"]), float(row["divergence"])))
    assert {row["cluster"] for row in found["layers"]} == set(corners) == set(kept)
    for row in found["layers"]:  # the very curves that the deploy has decided by
        curve = Curve(*zip(*corners[row["cluster"]], strict=True))
        assert row["divergence"] == pytest.approx([curve.at(s * row["groups"]) for s in SHARES], rel=1e-6)
        assert 0 < row["macs_saved"] < 1


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_sensitivity_prints_a_table_and_draws(folder, tmp_path, ending):
    picture = tmp_path / f"curves{ending}"
    told = said(folder, "sensitivity", SPEC, *QUICK, *CURVES, "--picture", str(picture))
    assert "blocks.2.conv1" in told and "64 samples" in told and "lowest norms weighted by activations go" in told
    if ending == ".svg":
        text = picture.read_text()
        assert ElementTree.fromstring(text).tag.endswith("svg")
        assert "blocks.2.conv1" in text
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_sensitivity_needs_weights_groups_and_a_place_for_the_picture(folder, tmp_path):
    untrained = said(tmp_path, "sensitivity", SPEC, "--input-size", "3,16,16", code=2)
    assert "has no weights yet" in untrained and "--until baseline" in untrained
    single = said(folder, "sensitivity", SPEC, *QUICK, "--set", "prune.method=unstructured", code=2)
    assert "whole groups" in single
    other = said(folder, "sensitivity", SPEC, *QUICK, "--picture", str(tmp_path / "curves.txt"), code=2)
    assert ".svg or .png" in other
    nowhere = said(folder, "sensitivity", SPEC, *QUICK, "--picture", str(tmp_path / "no" / "curves.svg"), code=2)
    assert "cannot be written" in nowhere


def test_sensitivity_takes_a_checkpoint_and_says_what_a_short_time_left_out(folder, version, tmp_path):
    place = tmp_path / "given.pt"
    torch.save(Baseline.load(version / "0-baseline").weights(), place)
    words = ["--input-size", "3,16,16", "--weights", str(place), "--set", "prune.seconds=1e-9"]
    told = said(tmp_path / "none", "sensitivity", SPEC, *words)
    assert "given.pt" in told.replace(" ", "")
    assert "measured at 0.5 only" in told and "8 samples" in told


def test_plan_shows_the_widths_and_the_divergence_to_expect(folder, version):
    words = ["plan", SPEC, *QUICK, *CURVES]
    found = json.loads(CliRunner().invoke(main, [*words, "--json", "--out", str(folder)]).stdout)
    widths = {row["cluster"]: int(row["after"]) for row in table(version / "1-prune" / "widths.csv")}
    assert {row["name"]: row["kept"] for row in found["clusters"]} == widths
    prices = {row["cluster"]: float(row["divergence"]) for row in table(version / "1-prune" / "prices.csv")}
    assert found["expected"][0]["divergence"] == pytest.approx(sum(prices.values()), rel=1e-6)
    told = said(folder, *words)
    assert "divergence" in told and "nats" in told and "weights: the baseline of v0001" in told
    assert "initial weights say little" in said(folder / "none", *words)
    assert "nats" not in said(folder, "plan", SPEC, *QUICK)


def test_help_tells_of_every_criterion():
    told = CliRunner().invoke(main, ["plan", "--help"]).output
    assert all(name in told for name in CRITERIA)


# ── afterwards ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_tables_hold_what_was_chosen(version):
    removed = json.loads((version / "1-prune" / "removed.json").read_text())
    rows = table(version / "1-prune" / "scores.csv")
    for cluster, gone in removed.items():
        mine = [row for row in rows if row["cluster"] == cluster]
        assert [int(row["group"]) for row in mine if row["gone"] == "True"] == gone
        assert [int(row["group"]) for row in mine] == list(range(len(mine)))
        assert sorted(int(row["rank"]) for row in mine) == list(range(1, len(mine) + 1))
        by_rank = sorted(mine, key=lambda row: int(row["rank"]))
        assert [float(row["score"]) for row in by_rank] == sorted(float(row["score"]) for row in mine)
        assert {int(row["group"]) for row in by_rank[: len(gone)]} == set(gone)
        assert {row["criterion"] for row in mine} == {"wanda"}
    assert figures(version, "1-prune")["curves"] == {
        "shares": list(SHARES), "samples": 64, "refit": True,
        "seconds": figures(version, "1-prune")["curves"]["seconds"],
    }  # fmt: skip


def test_why_tells_scores_the_cut_off_and_the_price(folder, version):
    rows = table(version / "1-prune" / "scores.csv")
    cluster = next(row["cluster"] for row in rows if row["gone"] == "True")
    mine = [row for row in rows if row["cluster"] == cluster]
    went = [float(row["score"]) for row in mine if row["gone"] == "True"]
    told = said(folder, "why", "tiny", cluster)
    assert "scored by wanda" in told
    assert f"the {len(went)} of {len(mine)} chosen score {min(went):.4g} to {max(went):.4g}" in told
    price = next(row for row in table(version / "1-prune" / "prices.csv") if row["cluster"] == cluster)
    assert f"the last block that went cost {float(price['last']):.3g} nats per million MACs" in told
    found = json.loads(said(folder, "why", "tiny", cluster, "--json"))["scores"][cluster]
    assert [group["score"] for group in found["groups"]] == [float(row["score"]) for row in mine]
    assert found["price"]["divergence"] == float(price["divergence"])


def test_why_tells_of_one_group(folder, version):
    rows = [row for row in table(version / "1-prune" / "scores.csv") if row["cluster"] == "blocks.0.conv1"]
    for group in (0, 31):
        row, went = rows[group], "went" if rows[group]["gone"] == "True" else "stayed"
        told = said(folder, "why", "tiny", "blocks.0.conv1", "--group", str(group))
        assert f"group {group} of blocks.0.conv1 {went}: score {float(row['score']):.4g} by wanda" in told
        assert f"rank {row['rank']} of 32" in told
        plain = json.loads(said(folder, "why", "tiny", "blocks.0.conv1", "--group", str(group), "--json"))
        one = plain["blocks.0.conv1"]
        assert (one["score"], one["rank"], one["gone"]) == (float(row["score"]), int(row["rank"]), went == "went")
    assert "blocks.0.conv1 has 32" in said(folder, "why", "tiny", "blocks.0.conv1", "--group", "32", code=2)
    assert "--group needs a LAYER" in said(folder, "why", "tiny", "--group", "1", code=2)
