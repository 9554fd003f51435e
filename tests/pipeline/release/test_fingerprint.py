"""What a stage's fingerprint covers: the modules that the stage can reach, each list a golden file, and no more."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.release import fingerprint
from tests.pipeline.chain import QUICK, STAGES, TINY

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("pipeline", "exporters", "validators", "foundation")
CONES = Path(__file__).with_name("cones")
NAMES = sorted(path.stem for path in (ROOT / "pipeline" / "stages").glob("s[0-9]_*.py"))


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The project's packages once more, for a test to edit; fingerprints are read off them."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for cached in (fingerprint.cone, fingerprint.project_digest, fingerprint._face, fingerprint._imports):
        cached.cache_clear()


def edit(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "\n# a changed word\n", encoding="utf-8")
    forget()


def digests() -> dict[str, str]:
    return {name: fingerprint.code_digest(f"pipeline.stages.{name}") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_each_stage_reaches_what_its_list_says(name):
    """`LEANORT_WRITE_GOLDEN=1 pytest` on this file writes the lists anew; read the difference before you commit it."""
    reached = "\n".join(fingerprint.cone(f"pipeline.stages.{name}")) + "\n"
    golden = CONES / f"{name}.txt"
    if os.environ.get("LEANORT_WRITE_GOLDEN"):
        golden.write_text(reached)
    assert reached == golden.read_text()


def test_folding_reaches_twelve_modules_at_most():
    assert len(fingerprint.cone("pipeline.stages.s3_fold")) <= 12


def test_no_stage_reaches_words_commands_or_what_moves_the_current_version():
    barred = ("pipeline.cli", "pipeline.report", "pipeline.inquiry", "pipeline.release.promotion", "pipeline.runner")
    for name in NAMES:
        assert not [m for m in fingerprint.cone(f"pipeline.stages.{name}") if m.startswith(barred)], name


def test_an_edit_changes_the_stages_that_can_reach_it_and_no_other(copied):
    before = digests()
    edit(copied / "pipeline" / "selection" / "criteria.py")
    after = digests()
    assert {name for name in NAMES if before[name] != after[name]} == {"s1_prune"}


def test_what_a_package_imports_when_it_is_imported_counts_and_type_checking_does_not(copied):
    (copied / "pipeline" / "stages" / "s9_made_up.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from exporters import describe\n"
        "if TYPE_CHECKING:\n    from pipeline.cli import main\n"
        "def run():\n    from pipeline.channels.operators import values\n"
    )
    reached = fingerprint.cone("pipeline.stages.s9_made_up")
    assert "exporters.summary" in reached  # where the face says that `describe` comes from
    assert not [name for name in reached if name.startswith("pipeline.cli")]
    assert "pipeline.channels.operators.values" in reached  # imported inside a function
    assert "pipeline.channels.operators.products" in reached  # imported by the package around it


def test_an_edited_report_command_or_promotion_reuses_every_stage(artifacts, copied):
    edit(copied / "pipeline" / "report" / "pages.py")
    edit(copied / "pipeline" / "cli" / "building.py")
    edit(copied / "pipeline" / "release" / "promotion.py")
    words = ["deploy", f"{TINY}:build", *QUICK, "--out", str(artifacts)]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], cwd=copied, capture_output=True, text=True, check=True
    )
    for number, stage in enumerate(STAGES):
        assert f"{number}-{stage}: reused from v0001" in done.stderr
