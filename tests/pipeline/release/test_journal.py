"""The log and the pointer under kills, cut writes, full disks and hands that move things."""

import os
import shutil

import pytest

from foundation.errors import StoreError, VersionError
from pipeline.release import checks, journal, promotion, store
from tests.pipeline.release.fabricated import made

KILLS = {
    "before the pointer moves": (store, "point_current"),
    "after it moved": (journal, "finish"),
    "before the first line": (journal, "append"),
}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("when", KILLS)
@pytest.mark.parametrize("action", ["promote", "rollback"])
def test_a_kill_leaves_log_and_pointer_at_odds_only_until_the_next_command(tmp_path, monkeypatch, when, action):
    one, two, three = (made(tmp_path) for _ in range(3))
    folder = tmp_path / "m"
    promotion.promote(one)
    promotion.promote(two)

    def killed(*_args, **_named):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(*KILLS[when], killed)
        with pytest.raises(Killed):
            promotion.promote(three) if action == "promote" else promotion.rollback(folder)
    now = store.current(folder)
    moved = when == "after it moved"
    assert now == ({"promote": three, "rollback": one}[action] if moved else two)
    with journal.locked(tmp_path):
        promotion.settle(tmp_path)
    assert store.current(folder) == now
    assert journal.unfinished(tmp_path) == []
    assert promotion.history(folder)[-1] == now.name
    assert promotion.history(folder) == {
        (True, "promote"): ["v0001", "v0002", "v0003"], (True, "rollback"): ["v0001"],
    }.get((moved, action), ["v0001", "v0002"])  # fmt: skip


def test_a_full_disk_at_the_first_line_moves_nothing_and_at_the_second_is_mended(tmp_path, monkeypatch):
    one, two = made(tmp_path), made(tmp_path)
    promotion.promote(one)
    write = os.write

    def full(descriptor, content):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StoreError, match="No space left"):
            promotion.promote(two)
    assert store.current(tmp_path / "m") == one
    count = []

    def full_later(descriptor, content):
        count.append(1)
        return full(descriptor, content) if len(count) == 2 else write(descriptor, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full_later)
        with pytest.raises(StoreError, match="No space left"):
            promotion.promote(two)
    assert store.current(tmp_path / "m") == two
    assert promotion.promote(two) == "v0002"
    assert [e.version for e in journal.read(tmp_path)[0] if e.action == "promote"] == ["v0001", "v0002"]
    assert journal.unfinished(tmp_path) == []


def test_a_write_that_is_cut_short_goes_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:7]))
    promotion.promote(made(tmp_path))
    entries, faults = journal.read(tmp_path)
    assert faults == []
    assert [e.action for e in entries] == ["seal", "promote"]


@pytest.mark.parametrize("mark", ["\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n", "é", "\U0001f600"])
def test_a_reason_may_hold_any_character(tmp_path, mark):
    one, two = made(tmp_path), made(tmp_path)
    promotion.promote(one, reason=f"a{mark}b")
    promotion.promote(two)
    entries, faults = journal.read(tmp_path)
    assert faults == []
    assert [e.reason for e in entries if e.action == "promote"] == [f"a{mark}b", ""]


@pytest.mark.parametrize("half", [b'{"time":"20', b"\xff\xfe", b"\x00"])
def test_half_a_line_swallows_nothing_and_is_no_tampering(tmp_path, half):
    one, two = made(tmp_path), made(tmp_path)
    promotion.promote(one)
    with (tmp_path / journal.FILE).open("ab") as log:
        log.write(half)
    assert journal.read(tmp_path)[1] == []
    promotion.promote(two)
    entries, faults = journal.read(tmp_path)
    assert faults == []
    assert [e.version for e in entries if e.action == "promote"] == ["v0001", "v0002"]


@pytest.mark.parametrize("tampering", ["changed", "taken out", "garbage", "no utf-8", "two bad lines"])
def test_nothing_is_built_on_a_log_that_was_tampered_with(tmp_path, tampering):
    one, two, three = (made(tmp_path) for _ in range(3))
    promotion.promote(one)
    promotion.promote(two)
    log = tmp_path / journal.FILE
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(
        {
            "changed": b"".join(lines).replace(b'"v0001"', b'"v0009"'),
            "taken out": b"".join(lines[:2] + lines[3:]),
            "garbage": b"".join(lines) + b"garbage\n",
            "no utf-8": b"".join(lines) + b"\xff\n",
            "two bad lines": b"".join(lines) + b"a\nb",
        }[tampering]
    )
    before = log.read_bytes()
    for attempt in (
        lambda: promotion.promote(three),
        lambda: promotion.rollback(tmp_path / "m"),
        lambda: promotion.removable(tmp_path / "m", keep=0),
        lambda: promotion.collect(tmp_path / "m", [three]),
    ):
        with pytest.raises(StoreError, match=r"tampered with.*begin a new log"):
            attempt()
    assert store.current(tmp_path / "m") == two
    assert three.is_dir()
    assert log.read_bytes() == before


def test_a_lost_link_is_put_back_and_rollback_goes_to_the_version_before(tmp_path):
    one, two = made(tmp_path), made(tmp_path)
    promotion.promote(one)
    promotion.promote(two)
    (tmp_path / "m" / "current").unlink()
    promotion.promote(two)
    assert store.current(tmp_path / "m") == two
    assert promotion.rollback(tmp_path / "m") == ("v0002", "v0001")
    (tmp_path / "m" / "current").unlink()
    promotion.promote(two)
    (tmp_path / "m" / "current").unlink()
    assert promotion.rollback(tmp_path / "m") == ("v0002", "v0001")
    assert store.current(tmp_path / "m") == one


@pytest.mark.parametrize("kind", ["text", "folder"])
def test_a_link_that_a_copy_turned_into_text_or_a_folder_is_understood_and_mended(tmp_path, kind):
    one, two = made(tmp_path), made(tmp_path)
    promotion.promote(one)
    promotion.promote(two)
    link = tmp_path / "m" / "current"
    link.unlink()
    link.write_text("v0002\n") if kind == "text" else shutil.copytree(two, link)
    assert store.current(tmp_path / "m") == two
    assert store.resolve(tmp_path, "m/current") == two
    assert "stands for v0002" in store.pointer_fault(tmp_path / "m")
    assert promotion.rollback(tmp_path / "m") == ("v0002", "v0001")
    assert link.is_symlink()
    assert store.pointer_fault(tmp_path / "m") == ""
    assert sorted(p.name for p in link.parent.iterdir()) == ["current", "v0001", "v0002"]


def test_a_folder_that_is_no_version_is_left_alone_with_the_reason(tmp_path):
    one = made(tmp_path)
    own = tmp_path / "m" / "current"
    own.mkdir()
    (own / "thesis.txt").write_text("all my work")
    with pytest.raises(StoreError, match=r"no link, and none of these versions.*mv "):
        promotion.promote(one)
    assert (own / "thesis.txt").read_text() == "all my work"
    with pytest.raises(VersionError, match="stands for none of these"):
        store.resolve(tmp_path, "m/current")
    own.rename(tmp_path / "m" / "old")
    promotion.promote(one)
    assert store.current(tmp_path / "m") == one


@pytest.mark.parametrize("target", ["../elsewhere/v0001", "/etc", "v0009", "../m/v0001"])
def test_a_pointer_that_leads_elsewhere_is_none(tmp_path, target):
    made(tmp_path)
    made(tmp_path, model="elsewhere")
    (tmp_path / "m" / "current").symlink_to(target)
    assert store.current(tmp_path / "m") is None
    assert target in store.pointer_fault(tmp_path / "m")
    with pytest.raises(VersionError, match="points to"):
        store.resolve(tmp_path, "m/current")


def test_what_a_kill_left_is_tidied_by_the_next_command(tmp_path):
    one = made(tmp_path)
    (tmp_path / "m" / ".current.0123").symlink_to("v0001")
    one.chmod(0o755)
    promotion.promote(one)
    assert not list((tmp_path / "m").glob(".current.*"))
    assert one.stat().st_mode & 0o777 == 0o555


def test_a_pointer_moved_by_hand_gets_its_line(tmp_path):
    one, two = made(tmp_path), made(tmp_path)
    promotion.promote(one)
    store.point_current(tmp_path / "m", two)
    with journal.locked(tmp_path):
        promotion.settle(tmp_path)
    last = journal.read(tmp_path)[0][-1]
    assert (last.action, last.version, last.previous) == ("promote", "v0002", "v0001")
    assert "no line that says how" in last.reason


def test_a_removal_that_was_killed_is_said_to_have_happened_only_if_it_did(tmp_path, monkeypatch):
    versions = [made(tmp_path) for _ in range(3)]

    def killed(*_args, **_named):
        raise Killed

    for place, gone in ((store, False), (journal, True)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(place, {store: "discard", journal: "finish"}[place], killed)
            promotion.collect(tmp_path / "m", versions[:1])
        if not gone:  # it is as it was, and whoever looks at it sees that, before anything is settled
            assert checks.faults(versions[0]) == []
        with journal.locked(tmp_path):
            promotion.settle(tmp_path)
        assert journal.read(tmp_path)[0][-1].state == ("done" if gone else "void")
        assert versions[0].exists() is not gone
