"""Which candidates the recipe asks for: where its words meet the table of `exporters.candidates`."""

from __future__ import annotations

from exporters.candidates import CANDIDATES, CandidateSpec
from foundation.errors import ConfigError, nearest
from pipeline.recipe.race import OptimizeSection


def entrants(cfg: OptimizeSection) -> tuple[CandidateSpec, ...]:
    """Every candidate to make, once, in the order of the race.

    Raises ConfigError for a name that is not in the table; cheap, so that a run can ask before it spends anything.
    """
    named = cfg.candidates or tuple(name for name, spec in CANDIDATES.items() if spec.races == "by default")
    for name in named:
        if name not in CANDIDATES:
            hint = nearest(name, CANDIDATES) or f"There are {', '.join(CANDIDATES)}."
            raise ConfigError(f"optimize.candidates: there is no candidate {name!r}.", hint)
    int8 = (name for name, spec in CANDIDATES.items() if cfg.int8 and spec.races == "with int8")
    return tuple(CANDIDATES[name] for name in dict.fromkeys((*named, *int8)))
