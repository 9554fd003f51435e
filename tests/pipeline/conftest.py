import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tests.pipeline.chain import QUICK, TINY, command


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A folder that all workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def home(shared) -> Path:
    folder = shared / "home"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def environment(home) -> dict[str, str]:
    """Of somebody who has never heard of telemetry, on a disk of his own."""
    # Where it sees a CI's variables, onnxruntime reports nothing by itself, and nothing would be proven.
    silenced = ("ORT_DISABLE_TELEMETRY", "CI", "GITHUB_ACTIONS", "GITLAB_CI", "TF_BUILD", "BUILDKITE", "JENKINS_URL")
    kept = {key: value for key, value in os.environ.items() if key not in silenced}
    return {**kept, "HOME": str(home), "TMPDIR": str(home), "XDG_CACHE_HOME": str(home / ".cache")}


@pytest.fixture(scope="session")
def deployed(shared, environment) -> Path:
    """A folder with one passed version, deployed once for all workers, in a process of its own. To read only."""
    folder = shared / "deployed"
    with FileLock(shared / "deployed.lock"):
        if not (folder / "tiny" / "current").exists():
            shutil.rmtree(folder, ignore_errors=True)
            words = command(folder, "deploy", f"{TINY}:build", *QUICK)
            done = subprocess.run(words, capture_output=True, text=True, timeout=280, env=environment, check=False)
            assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture(scope="module")
def artifacts(deployed, tmp_path_factory) -> Path:
    """A copy of that folder for the tests of one file, which may deploy into it."""
    return shutil.copytree(deployed, tmp_path_factory.mktemp("own") / "artifacts", symlinks=True)


@pytest.fixture(scope="module")
def version(artifacts) -> Path:
    return artifacts / "tiny" / "v0001"
