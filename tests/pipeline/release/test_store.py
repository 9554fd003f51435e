"""Versions on disk: sealing, linking, the pointer, locks, damage."""

import multiprocessing
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from foundation.errors import StoreError, VersionError
from pipeline.release import store


def version(folder: Path, text: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    partial = store.open_partial(folder)
    (partial / "0-baseline").mkdir()
    (partial / "0-baseline" / "file").write_text(text)
    return store.seal(folder, partial)


def test_versions_are_numbered_sealed_and_read_only(tmp_path):
    first, second = version(tmp_path / "m"), version(tmp_path / "m")
    assert [first.name, second.name] == ["v0001", "v0002"]
    for path in (first, first / "0-baseline", first / "0-baseline" / "file"):
        assert not path.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH), path
    assert not (tmp_path / "m" / store.PARTIAL).exists()


def test_versions_sort_by_number_past_ten_thousand(tmp_path):
    for name in ("v10000", "v9999", "v0002", "notes", "v1x"):
        (tmp_path / name).mkdir()
    assert [p.name for p in store.versions(tmp_path)] == ["v0002", "v9999", "v10000"]


def test_a_link_shares_the_bytes_and_does_not_copy_them(tmp_path):
    source = tmp_path / "a"
    source.write_text("x")
    store.link(source, tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").stat().st_ino == source.stat().st_ino


def test_current_moves_in_one_step_while_others_read(tmp_path):
    one, two = version(tmp_path / "m"), version(tmp_path / "m")
    folder = tmp_path / "m"
    store.point_current(folder, one)
    stop, broken = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                if (folder / "current" / "0-baseline" / "file").read_text() != "weights":
                    broken.append("content")
            except OSError as error:
                broken.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for turn in range(300):
        store.point_current(folder, (one, two)[turn % 2])
    stop.set()
    for reader in readers:
        reader.join()
    assert broken == []
    assert store.current(folder) == two


def test_resolve_names_the_versions_there_are(tmp_path):
    version(tmp_path / "resnet50")
    assert store.resolve(tmp_path, "resnet50").name == "v0001"
    assert store.resolve(tmp_path, "resnet50/v0001").name == "v0001"
    with pytest.raises(VersionError, match="v0001"):
        store.resolve(tmp_path, "resnet50/v0007")
    with pytest.raises(VersionError, match="resnet50"):
        store.resolve(tmp_path, "resnet5")
    with pytest.raises(VersionError, match="has been promoted"):
        store.resolve(tmp_path, "resnet50/current")


@pytest.mark.parametrize("name", ["../m", "..", "", "/etc", "m/../../x"])
def test_a_version_name_cannot_leave_the_artifacts_folder(tmp_path, name):
    version(tmp_path / "m")
    inner = tmp_path / "artifacts"
    inner.mkdir()
    with pytest.raises(VersionError):
        store.resolve(inner, name)


def test_a_link_inside_a_version_is_refused(tmp_path):
    (tmp_path / "f").symlink_to("/etc/hostname")
    with pytest.raises(StoreError, match="link"):
        store.files_in(tmp_path)


def test_the_lock_lets_one_run_in_and_tells_the_other_that_it_waits(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from pipeline.release import store\n"
        "with store.locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "m")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "in\n"
    waited: list[bool] = []

    def waiting() -> None:
        waited.append(True)
        holder.kill()  # a killed run must not leave the lock behind

    with store.locked(tmp_path / "m", waiting):
        assert waited == [True]
    holder.wait()


def test_a_folder_that_cannot_be_made_is_said_in_one_line_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="not a folder"), store.locked(tmp_path / "file" / "m"):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path):
    with store.locked(tmp_path / "artifacts" / "m"):
        pass
    assert not (tmp_path / "artifacts").exists()


def _fill(folder: str) -> None:
    try:
        with store.disk_errors(Path(folder)), (Path(folder) / "big").open("wb") as file:
            while True:
                file.write(os.urandom(1 << 16))
    except StoreError as error:
        os._exit(0 if "full" in str(error) else 3)
    os._exit(4)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk_is_said_in_one_line(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.strip()}")
    try:
        process = multiprocessing.get_context("spawn").Process(target=_fill, args=(str(tmp_path),))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_a_library_says_of_a_full_disk_becomes_our_error(tmp_path):
    with pytest.raises(StoreError, match="full"), store.disk_errors(tmp_path):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(ZeroDivisionError), store.disk_errors(tmp_path):
        raise ZeroDivisionError


def test_two_may_delete_the_same_tree_at_once(tmp_path):
    for attempt in range(10):
        tree = tmp_path / str(attempt)
        for number in range(40):
            (tree / str(number)).mkdir(parents=True)
            (tree / str(number) / "file").write_text("x")
        errors = []

        def delete(tree=tree, errors=errors):
            try:
                store.remove(tree)
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=delete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert not tree.exists()
