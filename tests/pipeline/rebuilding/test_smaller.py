"""A version's shrunk model as a module: what ships, saved and loaded, refused where its files were touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner

import pipeline
from foundation.errors import ModelError, StoreError, UserError
from pipeline.cli import main
from pipeline.rebuilding.restore import save_smaller
from tests.pipeline.tiny import TinyNet, build


def current(folder: Path) -> Path:
    return (folder / "tiny" / "current").resolve()


def test_it_is_the_original_class_and_gives_what_ships(deployed: Path) -> None:
    small = pipeline.smaller(deployed / "tiny" / "current")
    assert type(small).__name__ == "TinyNet"
    assert small.leanort_structure.original
    release = pipeline.open_release(current(deployed))
    assert sum(p.numel() for p in small.parameters()) == release[pipeline.Shrunk].params_after
    images = torch.randn(4, 3, 16, 16)
    session = onnxruntime.InferenceSession(str(release[pipeline.Exported].onnx))
    (shipped,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    np.testing.assert_allclose(small(images).detach().numpy(), shipped, rtol=1e-4, atol=1e-4)


def test_an_instance_of_ones_own_takes_its_place(deployed: Path) -> None:
    mine = build()
    small = pipeline.smaller(current(deployed), model=mine)
    assert small is mine
    assert type(small) is TinyNet
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(small(images), pipeline.smaller(current(deployed))(images))
    with pytest.raises(ModelError, match="built as the one|without"):
        pipeline.smaller(current(deployed), model=torch.nn.Linear(2, 2))


def test_saved_trained_and_loaded(deployed: Path, tmp_path: Path) -> None:
    small = pipeline.smaller(current(deployed), model=build())
    torch.optim.SGD(small.train().parameters(), 0.1).step(
        lambda: small(torch.randn(4, 3, 16, 16)).square().sum().backward()
    )
    pipeline.save_smaller(small, tmp_path / "small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["model.safetensors", "structure.json"]
    again = pipeline.load_smaller(tmp_path / "small", model=build())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), small.eval()(images))
    with pytest.raises(UserError, match="not made by smaller"):
        save_smaller(build(), tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        save_smaller(small, tmp_path / "file")
    (tmp_path / "small" / "structure.json").write_text("{}")
    with pytest.raises(StoreError):
        pipeline.load_smaller(tmp_path / "small")


@pytest.mark.parametrize("name", ["4-shrink/structure.json", "4-shrink/shrunk.pt2", "3-fold/weights.safetensors"])
def test_a_file_that_was_touched_is_refused(deployed: Path, tmp_path: Path, name: str) -> None:
    version = shutil.copytree(current(deployed), tmp_path / "v0001")
    path = next(version.glob(name.replace("weights", "*")))
    path.chmod(0o644)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match="not as it was written"):
        pipeline.smaller(version)


def test_the_command_writes_a_folder_and_nothing_over_another(deployed: Path, tmp_path: Path) -> None:
    words = ["smaller", "tiny", "--out", str(deployed), "-o", str(tmp_path / "small")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert "TinyNet" in done.output
    again = pipeline.load_smaller(tmp_path / "small")
    assert type(again).__name__ == "TinyNet"
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "there already" in refused.output
