"""Which channels of a stored version went, and why, for a person who asks."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foundation.errors import StoreError, UserError, nearest
from foundation.files import sha256
from pipeline.artifacts.eager import FITTED, PRICES, SCORES, Finetuned, Pruned
from pipeline.artifacts.program import Shrunk
from pipeline.channels.ledger import Ledger
from pipeline.release import records

SHOWN = 24  # indices written out before a range is cut short


@dataclass(frozen=True)
class Removal:
    """The ledger of a version, and what pruning chose.

    `chosen`: cluster -> groups. `blocked`: what could not go at all, with operator and reason. `fitted`: weight -> what
    the closed form made of it, as its table says (all text); empty where none was tried. `scores`: cluster -> how its
    groups rank, and `prices`: cluster -> what its width costs, as the tables of stage 1 say (all text); empty for
    versions that are older than these, or where no groups or no curves were chosen by.
    """

    ledger: Ledger
    pruned: Pruned
    chosen: Mapping[str, Sequence[int]]
    blocked: Sequence[Mapping[str, Any]]
    fitted: Mapping[str, Mapping[str, str]]
    scores: Mapping[str, Sequence[Mapping[str, str]]]
    prices: Mapping[str, Mapping[str, str]]

    def why(self, layer: str) -> dict[str, Any]:
        """As plain values: what went from `layer`, by which cluster and whose choice; what stayed, and why.

        Raises UserError, with the nearest names, if the model has no such layer or tensor.
        """
        if layer not in self.names:
            raise UserError(f"The model has no layer '{layer}'.", nearest(layer, self.names) or "Leave LAYER out.")
        found = self.ledger.why(layer)
        for cluster, groups in found["groups"].items():
            by_choice = sorted(set(groups) & set(self.chosen.get(cluster, ())))
            found.setdefault("cause", {})[cluster] = {
                "chosen by pruning": by_choice,
                "dead in the weights": sorted(set(groups) - set(by_choice)),
            }
        fitted = {name: dict(row) for name, row in self.fitted.items() if name in self._shapes(layer)}
        clusters = [c for c in self.scores if c in found["groups"] or c == layer]
        scores = {cluster: self._weighed(cluster) for cluster in clusters}
        return {
            "layer": layer,
            "shapes": self._shapes(layer),
            **{"cause": {}},
            **found,
            "fitted": fitted,
            "scores": scores,
        }

    def group(self, layer: str, group: int) -> dict[str, Any]:
        """One group of each cluster of `layer`, as plain values: its score, rank, and what it was weighed against.

        Raises UserError where the version holds no scores for it.
        """
        scores = self.why(layer)["scores"]
        weighed = {cluster: one for cluster, one in scores.items() if 0 <= group < len(one["groups"])}
        if not weighed:
            sizes = ", ".join(f"{cluster} has {len(one['groups'])}" for cluster, one in scores.items())
            raise UserError(
                f"No group {group} of '{layer}' was scored.",
                f"Groups are numbered from 0: {sizes}."
                if sizes
                else "Scores are kept for whole groups, of layers that lost some; see `leanort why MODEL`.",
            )
        return {cluster: {**one["groups"][group], **one} for cluster, one in weighed.items()}

    def group_sentences(self, layer: str, group: int) -> list[str]:
        """`group` in words."""
        lines = []
        for cluster, one in self.group(layer, group).items():
            lines.append(
                f"group {group} of {cluster} {'went' if one['gone'] else 'stayed'}: score {one['score']:.4g} by "
                f"{one['criterion']}, rank {one['rank']} of {len(one['groups'])}; {_cut_off(one)}"
            )
            lines += [f"  {line}" for line in self._priced(cluster, one)]
        return lines

    def _weighed(self, cluster: str) -> dict[str, Any]:
        """The scores of a cluster's groups, in order, by which criterion; and the price of its width."""
        rows = self.scores[cluster]
        groups = [
            {"score": float(row["score"]), "rank": int(row["rank"]), "gone": row["gone"] == "True"} for row in rows
        ]
        told = self.prices.get(cluster, {})
        price: dict[str, Any] = {
            name: value if name == "unit" else float(value) if value else None for name, value in told.items()
        }
        return {"criterion": rows[0]["criterion"], "reason": rows[0]["reason"], "groups": groups, "price": price}

    def _priced(self, cluster: str, one: Mapping[str, Any]) -> list[str]:
        """The price of a cluster's width in words; nothing where no curves decided."""
        price = one["price"]
        if not price:
            return []
        facts = self.pruned.curves
        how = f", measured on {facts.samples} samples" if facts else ""
        dearest = max((float(row["last"]) for row in self.prices.values() if row["last"]), default=0.0)
        parts = [
            f"its curve{how}: without {price['gone']:.0f} groups the outputs move by {price['divergence']:.3g} nats"
        ]
        if price["last"] is not None:
            parts.append(
                f"the last block that went cost {price['last']:.3g} nats per {price.get('unit') or 'million MACs'}"
            )
        if price["next"] is not None:
            parts.append(f"the next would cost {price['next']:.3g}")
        return [f"cluster {cluster}: {'; '.join(parts)}; the dearest that went anywhere cost {dearest:.3g}"]

    @property
    def names(self) -> list[str]:
        """Layers and tensors that can be asked for."""
        return sorted({n for tensor in self.ledger.shapes for n in (tensor, tensor.rpartition(".")[0]) if n})

    def _shapes(self, layer: str) -> dict[str, dict[str, list[int]]]:
        """Tensor -> shape before and after."""
        return {
            name: {
                "before": list(shape),
                "after": [len(self.ledger.kept.get(name, {}).get(d, range(n))) for d, n in enumerate(shape)],
            }
            for name, shape in self.ledger.shapes.items()
            if name == layer or name.rpartition(".")[0] == layer
        }

    def overview(self) -> list[dict[str, Any]]:
        """One row per layer that has a matrix."""
        rows = []
        for name in sorted({t.rpartition(".")[0] for t in self.ledger.shapes if t.endswith(".weight")}):
            shape = self.ledger.shapes[f"{name}.weight"]
            if len(shape) < 2:
                continue
            kept = self.ledger.kept.get(f"{name}.weight", {})
            asked = self.ledger.why(name)
            rows.append(
                {
                    "layer": name,
                    "outputs gone": f"{shape[0] - len(kept.get(0, range(shape[0])))} of {shape[0]}",
                    "inputs gone": f"{shape[1] - len(kept.get(1, range(shape[1])))} of {shape[1]}",
                    "folded": len(asked["folded"]),
                    "refused": sum(len(r["groups"]) for r in asked["refused"]),
                }
            )
        return rows

    def sentences(self, layer: str) -> list[str]:
        """`why` in words."""
        found = self.why(layer)
        lines = [f"{layer}: " + ", ".join(f"{n} {s['before']} -> {s['after']}" for n, s in found["shapes"].items())]
        for place, indices in found["removed"].items():
            lines.append(f"  {place} lost {len(indices)}: {spans(indices)}")
        for cluster, cause in found["cause"].items():
            chosen, dead = cause["chosen by pruning"], cause["dead in the weights"]
            if chosen:
                took = self.pruned.chosen_by or "the groups with the lowest norms"
                method = f"{self.pruned.method} pruning took {took}"
                lines.append(f"  cluster {cluster}: {method}: {spans(chosen)}")
            if dead:
                lines.append(f"  cluster {cluster}: dead in the weights without being chosen: {spans(dead)}")
        for cluster, one in found["scores"].items():
            instead = f" ({one['reason']})" if one["reason"] else ""
            lines.append(f"  cluster {cluster}: scored by {one['criterion']}{instead}: {_cut_off(one)}")
            lines += [f"  {line}" for line in self._priced(cluster, one)]
        for fold in found["folded"]:
            told = "; ".join(
                f"{cluster} " + ", ".join(f"{group} = {number:.4g}" for group, number in list(groups.items())[:SHOWN])
                for cluster, groups in fold["constants"].items()
            )
            made = " (made for it)" if fold["created"] else ""
            lines.append(f"  constants went into {fold['parameter']}{made} at {fold['op']} {fold['node']}: {told}")
        for refusal in found["refused"]:
            at = f"{refusal['op']} at {refusal['node']}"
            lines.append(f"  {spans(refusal['groups'])} of {refusal['cluster']} stayed: {at}: {refusal['reason']}")
        for cluster, groups in found["spared"].items():
            lines.append(f"  {spans(groups)} of {cluster} stayed: without them a tensor would be empty")
        for name, row in found["fitted"].items():
            if row["reason"]:
                lines.append(f"  {name} was not fitted to the dense layer: {row['reason']}")
            elif float(row["strength"]) == 0.0:
                lines.append(
                    f"  {name} was not fitted to the dense layer: on samples held back its old values did best"
                )
            else:
                left = f"{float(row['error_before']):.1%} -> {float(row['error_after']):.1%}"
                lines.append(f"  {name} was fitted to the dense layer on {int(row['rows']):,} rows: error {left}")
        if not found["removed"]:
            lines.append("  Nothing went. What stays in this model, and why:")
            lines += [f"    {b['op']} at {b['node']}: {b['reason']} ({b['params']:,} parameters)" for b in self.blocked]
        elif not found["groups"]:
            lines.append("  These indices live with other layers' channels: its inputs are their outputs.")
        return lines


def read(version: Path) -> Removal:
    """The removal of a stored version, its files checked against the manifest. Raises StoreError where they differ."""
    made = records.read(version)
    sealed = {f"{record.stage}/{name}": file.sha256 for record in made.stages for name, file in record.files.items()}

    def text(stage: str, name: str) -> str:
        place = f"{stage}/{name}"
        file = version / place
        if not file.is_file() or sha256(file) != sealed.get(place):
            raise StoreError(f"{file} is not what was sealed.", "Run `leanort verify` on the version.")
        return file.read_text(encoding="utf-8")

    def table(stage: str, name: str) -> list[dict[str, str]]:
        """The rows of a table, none where the version has no such."""
        return list(csv.DictReader(text(stage, name).splitlines())) if f"{stage}/{name}" in sealed else []

    scores: dict[str, list[dict[str, str]]] = {}
    for row in table(Pruned.STAGE, SCORES):
        scores.setdefault(row.pop("cluster"), []).append(row)
    return Removal(
        ledger=Ledger.from_json(text(Shrunk.STAGE, Shrunk.LEDGER)),
        pruned=Pruned.load(version / Pruned.STAGE),
        chosen=json.loads(text(Pruned.STAGE, "removed.json")),
        blocked=json.loads(text(Shrunk.STAGE, "blocked.json")),
        fitted={row["name"]: row for row in table(Finetuned.STAGE, FITTED)},
        scores=scores,
        prices={row.pop("cluster"): row for row in table(Pruned.STAGE, PRICES)},
    )


def _cut_off(one: Mapping[str, Any]) -> str:
    """Between which scores the line was drawn."""
    went = [group["score"] for group in one["groups"] if group["gone"]]
    stayed = [group["score"] for group in one["groups"] if not group["gone"]]
    if not went:
        return f"none of {len(stayed)} was chosen"
    parts = [f"the {len(went)} of {len(one['groups'])} chosen score {min(went):.4g} to {max(went):.4g}"]
    if stayed:
        parts.append(f"those that stayed {min(stayed):.4g} to {max(stayed):.4g}")
    return ", ".join(parts)


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers, runs of them as ranges, cut short where there are many."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    words = [f"{a}" if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(words[:SHOWN]) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")
