"""Attacks on a run of several processes: one of them is killed, and the next run must go on to the same weights."""

from __future__ import annotations

import random
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.faults.outcome import NET, QUICK, SURROUNDINGS, Outcome, command

SLOW = ("--set", "baseline.train={epochs=12, lr=0.1}", "--set", "finetune.train={epochs=8, lr=0.02}")
STAGES = ("0-baseline", "2-finetune")
LINE = "error: Process {} of 2 has ended: it was killed, or its machine was lost."
BEFORE_IT_CAME = "error: Process {} of 2: {} come within 15 s, killed or never started."


def kills(folder: Path, tries: int, chance: random.Random) -> Outcome:
    """SIGKILL of one of two processes at a random moment, then the same command, which must end as an undisturbed one.

    What is left must end within 30 s, with one line and the exit code of a failed stage, or by the first one's error.
    """
    outcome = Outcome()
    (folder / "net.py").write_text(NET, encoding="utf-8")
    began = time.monotonic()
    started = _start(folder, folder / "undisturbed")
    said = [process.communicate()[1] for process in started]
    lasts = time.monotonic() - began
    wanted = _weights(folder / "undisturbed")
    if any(process.returncode for process in started) or len(wanted) < len(STAGES):
        raise RuntimeError("".join(said))
    for number in range(tries):
        artifacts, victim, after = folder / f"try{number}", chance.randrange(2), chance.uniform(1.0, lasts)
        found = []
        started = _start(folder, artifacts)
        time.sleep(after)
        started[victim].kill()
        killed = time.monotonic()
        left = started[1 - victim]
        said = [process.communicate()[1] for process in started]
        if time.monotonic() - killed > 30:
            found.append(f"what is left ends after {time.monotonic() - killed:.0f} s")
        over = left.returncode == 0  # it had nothing more to do with the one that was killed
        errors = [line for line in said[1 - victim].splitlines() if line.startswith("error:")]
        who = "the first one has not" if victim == 0 else "not all others have"
        lines = ([LINE.format(victim)], [BEFORE_IT_CAME.format(1 - victim, who)])
        if "Traceback" in said[1 - victim] or (not over and (left.returncode != 3 or errors not in lines)):
            found.append(f"what is left ends with {left.returncode}: {said[1 - victim][-300:]}")
        started = _start(folder, artifacts)
        said = [process.communicate()[1] for process in started]
        if any(process.returncode for process in started):
            found.append(f"the next run ends with {[one.returncode for one in started]}: {said[0][-300:]}")
        elif _weights(artifacts) != wanted:
            found.append("the next run ends with other weights")
        outcome.expect(not found, True, f"kill {number} of process {victim} after {after:.1f} s: {'; '.join(found)}")
    return outcome


def _start(folder: Path, artifacts: Path) -> list[subprocess.Popen[str]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    words = command("deploy", f"{folder / 'net.py'}:build", *QUICK, *SLOW, "--until", "finetune", "--out", artifacts)
    surroundings: dict[str, Any] = dict(SURROUNDINGS)
    given = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=surroundings["cwd"],
            env={**surroundings["env"], **given, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


def _weights(artifacts: Path) -> list[bytes]:
    folders = (artifacts / "tiny" / ".partial" / stage for stage in STAGES)
    return [(one / "weights.safetensors").read_bytes() for one in folders if (one / "weights.safetensors").is_file()]
