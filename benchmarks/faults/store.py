"""Attacks on the versions on disk: kills, changed versions, readers while pointers move."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading
import time
from pathlib import Path

from benchmarks.faults.outcome import QUICK, SURROUNDINGS, Outcome, command, crashed, deployed, leanort
from foundation.errors import LeanortError
from foundation.files import sha256
from pipeline.release import checks, journal, opening, promotion, records, store


def kills(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """SIGKILL at a random moment of deploy, promote and rollback, then one command that may finish its work."""
    outcome = Outcome()
    artifacts = deployed(folder)
    model = artifacts / "tiny"
    began = time.perf_counter()
    deployed(folder, "--ratio", "0.3")
    lasts = {"deploy": time.perf_counter() - began, "promote": 1.2, "rollback": 1.2}
    for number in range(tries):
        kind = chance.choice(list(lasts))
        words: tuple[str | Path, ...] = (kind, "tiny", "--out", artifacts)
        if kind == "deploy":
            ratio = f"{chance.uniform(0.1, 0.7):.3f}"
            words = ("deploy", f"{folder / 'net.py'}:build", *QUICK, "--ratio", ratio, "--out", artifacts)
        elif kind == "promote":
            words = ("promote", f"tiny/{chance.choice(store.versions(model)).name}", "--out", artifacts)
        before = {version.name: records.seal_of(version) for version in store.versions(model)}
        with subprocess.Popen(
            command(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **SURROUNDINGS
        ) as process:
            time.sleep(chance.uniform(0, lasts[kind]))
            process.kill()
        done = leanort("gc", "tiny", "--keep", "1000", "--out", artifacts)
        found = _damage(model, before)
        if done.returncode or crashed(done):
            found.append(f"the next command ends with {done.returncode}: {done.stderr[-200:]}")
        outcome.expect(not found, done.returncode == 0, f"kill {number} in {kind}: {'; '.join(found)}")
    return outcome


def _damage(model: Path, before: dict[str, str]) -> list[str]:
    """What is wrong with a model's folder after a kill and the command that followed it."""
    found = [f"{version.name}: {fault}" for version in store.versions(model) for fault in checks.faults(version)]
    found += [f"{name} is gone or another" for name, seal in before.items() if not _is(model / name, seal)]
    entries, faults = journal.read(model.parent)
    found += faults + [f"{entry.action} was never ended" for entry in entries if entry.state == "begun"]
    if fault := store.pointer_fault(model):
        found.append(fault)
    now, stack = store.current(model), promotion.history(model)
    if (now.name if now else None) != (stack[-1] if stack else None):
        found.append(f"the pointer says {now and now.name}, the log {stack[-1:]}")
    found += [f"{path.name} was left behind" for path in model.glob(".current.*")]
    return found


def _is(version: Path, seal: str) -> bool:
    return (version / records.MANIFEST).is_file() and records.seal_of(version) == seal


def versions(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """One change to a copy of a good version; half of the time all hashes in it are made right again."""
    outcome = Outcome()
    good = deployed(folder) / "tiny" / "v0001"
    for number in range(tries):
        artifacts = folder / f"copy{number}"
        version = artifacts / "tiny" / "v0001"
        shutil.copytree(good, version)
        shutil.copy(good.parents[1] / journal.FILE, artifacts)
        for path in (version, *version.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        change = chance.choice(CHANGES)
        version = change(version, chance) or version
        hashes = chance.random() < 0.5
        if hashes:
            _hash_again(version)
        try:
            said = checks.faults(version)
        except LeanortError as error:
            said = [error.message]
        except Exception as error:
            outcome.expect(False, False, f"{number}, {change.__name__}: {type(error).__name__}: {error}")
            continue
        moved = True
        try:
            promotion.promote(version, forced=True, reason="attack")
        except LeanortError:
            moved = False
        words = f"{number}, {change.__name__}{', hashes made right' if hashes else ''}"
        outcome.expect(bool(said) and not moved, not said, words)
        shutil.rmtree(artifacts)
    return outcome


def _some(version: Path, chance: random.Random) -> Path:
    """A file of the version; where hashes are made right again, those that hold them would only be written anew."""
    skip = (records.MANIFEST, records.SEAL, records.RECORD)
    return chance.choice([path for path in sorted(version.rglob("*")) if path.is_file() and path.name not in skip])


def a_byte(version: Path, chance: random.Random) -> None:
    """Another value in one byte of one file."""
    path = _some(version, chance)
    content = bytearray(path.read_bytes() or b"\0")
    content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    path.write_bytes(content)


def a_cut(version: Path, chance: random.Random) -> None:
    """One file cut short."""
    path = _some(version, chance)
    path.write_bytes(path.read_bytes()[: chance.randrange(max(1, path.stat().st_size))])


def a_loss(version: Path, chance: random.Random) -> None:
    """One file gone."""
    _some(version, chance).unlink()


def an_addition(version: Path, chance: random.Random) -> None:
    """A file, an empty folder, a pipe or a link more."""
    place = chance.choice([version, *(path for path in sorted(version.iterdir()) if path.is_dir())]) / "more"
    chance.choice(
        [lambda: place.write_text("x"), place.mkdir, lambda: os.mkfifo(place), lambda: place.symlink_to("/etc/passwd")]
    )()


def an_exchange(version: Path, chance: random.Random) -> None:
    """Two files in each other's place."""
    one, two = _some(version, chance), _some(version, chance)
    while one.read_bytes() == two.read_bytes():
        two = _some(version, chance)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def a_line_of_the_manifest(version: Path, chance: random.Random) -> None:
    """Another value in one place of the manifest."""
    path = version / records.MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    key = chance.choice(sorted(manifest))
    manifest[key] = chance.choice(
        [[], {}, "other", None, 7, manifest[key] * 2 if isinstance(manifest[key], str) else 0]
    )
    path.write_text(json.dumps(manifest), encoding="utf-8")


def another_place(version: Path, chance: random.Random) -> Path:
    """The version under another number, or of another model."""
    target = version.parents[1] / chance.choice(["tiny/v0002", "other/v0001"])
    target.parent.mkdir(exist_ok=True)
    return version.rename(target)


CHANGES = (a_byte, a_cut, a_loss, an_addition, an_exchange, a_line_of_the_manifest, another_place)


def _hash_again(version: Path) -> None:
    """Make stage records, manifest and seal agree with what is there now, as somebody would who hides a change."""
    try:
        manifest = json.loads((version / records.MANIFEST).read_text(encoding="utf-8"))
        for stage in manifest["stages"]:
            for name in list(stage["files"]):
                path = version / stage["stage"] / name
                if path.is_file():
                    stage["files"][name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
            (version / stage["stage"] / records.RECORD).write_text(json.dumps(stage), encoding="utf-8")
        for name in list(manifest["files"]):
            if (version / name).is_file():
                manifest["files"][name] = {"sha256": sha256(version / name), "bytes": (version / name).stat().st_size}
        manifest["version"], manifest["name"] = version.name, version.parent.name
        (version / records.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    except (TypeError, KeyError, AttributeError, ValueError):  # the manifest is what was broken
        pass
    (version / records.SEAL).write_text(f"{records.seal_of(version)}  {records.MANIFEST}\n", encoding="utf-8")


def readers(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """Eight threads that list and read a release while another promotes and rolls back."""
    outcome = Outcome()
    artifacts = deployed(folder)
    deployed(folder, "--ratio", "0.3")
    model = artifacts / "tiny"
    stop, lock = threading.Event(), threading.Lock()

    def read() -> None:
        while not stop.is_set():
            now = store.current(model)
            try:
                release = opening.open_release(model / store.CURRENT)
                whole = release.folder.name == release.manifest.version
            except (LeanortError, OSError) as error:
                whole = False
                print(error)
            with lock:
                outcome.expect(now is not None and whole, whole, "a reader saw no current version, or half of one")

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        while outcome.tries < tries:
            promotion.promote(model / chance.choice(["v0001", "v0002"]))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return outcome
