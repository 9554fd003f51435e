import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from sklearn.datasets import load_digits

from pipeline import data
from pipeline.tasks import classification
from pipeline.training import loop
from pipeline.training.defaults import default_settings
from tests.pipeline.chain import QUICK, TINY, command
from tests.pipeline.tiny import TinyNet


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
def knows_digits() -> TinyNet:
    """A tiny net that knows the digits."""
    torch.manual_seed(0)
    net = TinyNet()
    settings = default_settings(net, seed=0).model_copy(update={"epochs": 3, "lr": 0.1})
    task = classification.task("classification", "output")
    assert loop.train(net, data.load("digits", input_size=(3, 16, 16)), task, settings).best_score > 0.85
    return net.eval()


@pytest.fixture(scope="module")
def unlabelled_digits(tmp_path_factory) -> Path:
    """The digits without their labels."""
    path = tmp_path_factory.mktemp("images") / "digits.npz"
    np.savez(path, x=(load_digits().images[:600] / 16).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def version(artifacts) -> Path:
    return artifacts / "tiny" / "v0001"
