"""What a score of two models on the same samples shows; light, so that commands that only read can load it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from validators.gates import Measured


class ScoreLost(BaseModel):
    """A score of two models on the same samples.

    `drop`: what is lost, positive where the second is worse, in points where the score is a share, else in per cent of
    the first's; with the interval of the paired percentile bootstrap over samples (Efron 1979), seeded. `p_value`: how
    often chance alone would make the two differ so much, from the same resamples.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    dense: float
    shipped: float
    samples: int
    share: bool
    higher_is_better: bool
    drop: Measured
    p_value: float
    unit: str = ""

    def words(self, value: float) -> str:
        """A value of the score as people read it."""
        return f"{value:.1%}" if self.share else f"{value:.4g}{f' {self.unit}' if self.unit else ''}"

    def change(self, lost: float) -> str:
        """What was lost, as a change: "-0.3 points", "+1.2 % of dense"."""
        return f"{0.0 - lost:+.1f} {'points' if self.share else '% of dense'}"
