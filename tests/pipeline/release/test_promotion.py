"""Which version is live: promoted, rolled back, forced, collected; never half, never without a line in the log."""

import json
import threading
import time
from pathlib import Path

import pytest

from foundation.errors import ConfigError, StoreError, VersionError
from pipeline.release import journal, promotion, records, store
from tests.pipeline.release.fabricated import made


def log(artifacts: Path) -> list[tuple[str, str, str, bool]]:
    entries, faults = journal.read(artifacts)
    assert faults == []
    assert all(entry.state == "done" for entry in entries)
    return [(e.action, e.version, e.previous, e.forced) for e in entries if e.action != "seal"]


def test_promote_and_rollback_move_the_pointer_and_are_logged(tmp_path):
    one, two, three = (made(tmp_path) for _ in range(3))
    assert promotion.promote(one) == ""
    assert promotion.promote(three) == "v0001"
    assert promotion.promote(two) == "v0003"
    assert promotion.rollback(tmp_path / "m", reason="slow") == ("v0002", "v0003")
    assert promotion.rolled_back(two)
    assert not promotion.rolled_back(three)
    assert promotion.rollback(tmp_path / "m") == ("v0003", "v0001")
    assert store.current(tmp_path / "m") == one
    with pytest.raises(VersionError, match="nothing to roll m back to"):
        promotion.rollback(tmp_path / "m")
    assert log(tmp_path) == [
        ("promote", "v0001", "", False),
        ("promote", "v0003", "v0001", False),
        ("promote", "v0002", "v0003", False),
        ("rollback", "v0003", "v0002", False),
        ("rollback", "v0001", "v0003", False),
    ]
    assert promotion.promote(one) == "v0001"
    assert len(log(tmp_path)) == 5


@pytest.mark.parametrize("outcome", ["fail", "unmeasured"])
def test_what_has_not_passed_is_refused_unless_forced_with_a_reason(tmp_path, outcome):
    version = made(tmp_path, outcome)
    with pytest.raises(VersionError, match="its verdict is fail"):
        promotion.promote(version)
    with pytest.raises(ConfigError, match="needs a reason"):
        promotion.promote(version, forced=True, reason=" ")
    assert store.current(tmp_path / "m") is None
    assert log(tmp_path) == []
    promotion.promote(version, forced=True, reason="the gate measured on the wrong machine")
    entry = journal.read(tmp_path)[0][-1]
    assert (entry.forced, entry.verdict, entry.reason) == (True, "fail", "the gate measured on the wrong machine")
    assert "@" in entry.by


def test_a_damaged_version_is_refused_even_when_forced(tmp_path):
    version = made(tmp_path, weights="good")
    damaged = version / "7-validate" / "weights"
    damaged.chmod(0o644)
    damaged.write_text("evil")
    with pytest.raises(StoreError, match="weights was changed"):
        promotion.promote(version, forced=True, reason="hurry")
    good = made(tmp_path)
    promotion.promote(good)
    assert store.current(tmp_path / "m") == good


def test_rollback_refuses_a_damaged_target(tmp_path):
    one, two = made(tmp_path, weights="good"), made(tmp_path)
    promotion.promote(one)
    promotion.promote(two)
    (one / "7-validate" / "weights").chmod(0o644)
    (one / "7-validate" / "weights").write_text("evil")
    with pytest.raises(StoreError, match="damaged"):
        promotion.rollback(tmp_path / "m")
    assert store.current(tmp_path / "m") == two


def test_a_pointer_from_before_there_was_a_log_can_be_rolled_back_to(tmp_path):
    one, two = made(tmp_path), made(tmp_path)
    store.point_current(tmp_path / "m", one)
    promotion.promote(two)
    assert promotion.rollback(tmp_path / "m") == ("v0002", "v0001")


def test_twenty_readers_never_see_half_a_release(tmp_path):
    one, two = (made(tmp_path, left=text, right=text) for text in ("one", "two"))
    promotion.promote(one)
    stop, broken, reads = threading.Event(), [], []

    def read():
        while not stop.is_set():
            try:
                release = (tmp_path / "m" / "current").resolve(strict=True) / "7-validate"
                left, right = ((release / name).read_text() for name in ("left", "right"))
                reads.append(left)
                if left != right or records.read(release.parent).model != "m":
                    broken.append((left, right))
            except Exception as error:
                broken.append(error)
            time.sleep(0.01)  # else the one that promotes hardly gets its turn

    readers = [threading.Thread(target=read) for _ in range(20)]
    for reader in readers:
        reader.start()
    for _ in range(40):
        promotion.promote(two)
        promotion.rollback(tmp_path / "m")
    stop.set()
    for reader in readers:
        reader.join()
    assert broken == []
    assert {"one", "two"} <= set(reads)
    assert len(log(tmp_path)) == 81


def test_a_line_taken_out_of_the_log_or_changed_shows(tmp_path):
    for version in [made(tmp_path) for _ in range(3)]:
        promotion.promote(version)
    path = tmp_path / journal.FILE
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    assert "taken out" in journal.read(tmp_path)[1][0]
    path.write_text(lines[0].replace("v0001", "v0009") + lines[1] + lines[2])
    assert "changed" in journal.read(tmp_path)[1][0]
    path.write_text(lines[0] + "garbage\n")
    assert "line 2, cannot be read" in journal.read(tmp_path)[1][0]


def test_gc_keeps_the_newest_the_current_the_previous_and_parents(tmp_path):
    versions = [made(tmp_path) for _ in range(6)]
    versions.append(made(tmp_path, parent="v0003"))
    promotion.promote(versions[1])
    promotion.promote(versions[0])
    folder = tmp_path / "m"
    gone = promotion.removable(folder, keep=1)
    assert [p.name for p in gone] == ["v0004", "v0005", "v0006"]
    assert promotion.removable(folder, keep=10) == []
    assert promotion.collect(folder, gone) > 0
    assert [p.name for p in store.versions(folder)] == ["v0001", "v0002", "v0003", "v0007"]
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []
    assert [entry[:2] for entry in log(tmp_path)[-3:]] == [("remove", p.name) for p in gone]
    assert made(tmp_path).name == "v0008"


def test_gc_leaves_what_was_promoted_after_it_was_chosen(tmp_path):
    one, _two = made(tmp_path), made(tmp_path)
    gone = promotion.removable(tmp_path / "m", keep=1)
    assert gone == [one]
    promotion.promote(one)
    promotion.collect(tmp_path / "m", gone)
    assert one.is_dir()


def test_what_a_killed_gc_left_is_swept_by_the_next(tmp_path):
    version = made(tmp_path)
    made(tmp_path)
    store.discard(version)
    assert [p.name for p in store.versions(tmp_path / "m")] == ["v0002"]
    promotion.collect(tmp_path / "m", [])
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["v0002"]


def test_log_lines_are_json_that_anything_reads(tmp_path):
    promotion.promote(made(tmp_path))
    for line in (tmp_path / journal.FILE).read_text().splitlines():
        assert json.loads(line)["model"] == "m"
