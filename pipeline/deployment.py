"""`deploy`: what was asked before is answered from the stored version, at once; anything else goes to the runner.

A request is a recipe, the user's own files that it names, this project's code, the tools and the host. Where all of
that is as it was when a version was sealed, and no byte of the version has changed since, running the stages again
would reuse every one of them; so neither torch nor the model is loaded to find that out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from foundation.files import sha256
from pipeline.artifacts.verdict import Validated
from pipeline.progress import Progress
from pipeline.recipe.config import Config, to_toml
from pipeline.recipe.section import Section
from pipeline.release import checks, fingerprint, journal, records, store
from pipeline.release.opening import Release, open_release
from pipeline.release.reuse import candidates, compared_with, folder_of, make_current, matches
from pipeline.training import launched

if TYPE_CHECKING:
    from torch import nn

    Model = str | nn.Module | Callable[[], nn.Module]


def deploy(
    model: Model,
    data: object = None,
    config: Config | None = None,
    *,
    start: str | None = None,
    until: str | None = None,
    promote: bool = True,
    progress: Progress | None = None,
) -> Release | None:
    """Run the whole chain for one model and return the release; None when `until` stopped it before the end.

    `model` is a spec or a module, `data` a spec or data sets; both default to the recipe's. `start` names the first
    stage that must run although it could be reused. A version whose gate has passed becomes the current one, unless
    `promote` is False. A bad model, data set or recipe raises UserError before anything
    is written; a stage that fails raises its own error and leaves the stages before it for the next run to go on from.

    Where a launcher (torchrun, accelerate launch) started several processes, each of them calls this: the first one
    does all of it, the others take their parts of training and get None.
    """
    progress = progress or Progress()
    config = config or Config()
    place = launched.place()
    request = request_of(model, data, config) if place is None else ""
    if promote and (place is None or place.rank == 0):
        journal.whole(config.artifacts)  # what could not be promoted afterwards is not built
    if start is None and until is None and place is None:
        release = _answered(folder_of(config, model), request)
        if release is not None:
            for record in release.manifest.stages:
                origin = next(
                    p for p in candidates(release.folder.parent, record.stage) if matches(p, record.fingerprint)
                )
                progress.say(f"{record.stage}: reused from {origin.parent.name}")
            progress.say(f"Nothing changed since {release.folder.name}.")
            make_current(release, promote, True, progress)
            return release
    from pipeline import runner

    return runner.run(
        model, data, config, start=start, until=until, promote=promote, request=request, progress=progress
    )


def request_of(model: Model, data: object, config: Config) -> str:
    """Digest of everything that decides a run; "" where that is not known before model and data are loaded.

    It is known for models by a library's name on embedded data or a file of arrays; own code may read anything.
    """
    given = config.data.source if data is None else data
    if not isinstance(model, str) or not isinstance(given, str) or not re.fullmatch(r"(timm:)?[\w.-]{1,200}", model):
        return ""
    arrays = Path(given.removeprefix("npz:")).expanduser()
    if given != "digits" and not (given.startswith("npz:") and arrays.is_file()):
        return ""
    if model.endswith(".py") or Path(model).exists():
        return ""
    files = {given: "" if given == "digits" else sha256(arrays)}
    for section in _sections(config):
        files |= section.code()
    return records.digest(
        {
            "recipe": to_toml(config.model_copy(update={"model": model, "artifacts": Path("artifacts")})),
            "files": files,
            "code": fingerprint.project_digest(),
            "tools": fingerprint.tools(),
            "host": fingerprint.host_facts(),
            "devices": launched.accelerators(),
        }
    )


def _sections(config: Config) -> Iterator[Section]:
    return (value for _, value in config if isinstance(value, Section))


def _answered(folder: Path, request: str) -> Release | None:
    """The newest version that was made for this very request, if it is as it was sealed; None where a run is due."""
    if not request or (folder / store.PARTIAL).exists():
        return None
    for version in reversed(store.versions(folder)):
        made = records.read_if_whole(version)
        if made is None or made.request != request:
            continue
        compared = compared_with(folder, {record.stage: record.digest for record in made.stages})
        if made.stages[-1].inputs.get("promoted") != compared.sha256 or checks.faults(version):
            return None
        release = open_release(version)
        # What broke off may have had a reason that is gone by now.
        return release if release[Validated].complete else None
    return None
