from pathlib import Path

import pytest

from tests.pipeline.chain import deploy


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    """A folder with one passed version."""
    folder = tmp_path_factory.mktemp("artifacts")
    done = deploy(folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


@pytest.fixture(scope="module")
def version(artifacts) -> Path:
    return artifacts / "tiny" / "v0001"
