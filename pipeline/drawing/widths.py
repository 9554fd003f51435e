"""The network as a drawing: one row per layer in dataflow order, its width before (outline) and after (filled)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from jinja2 import Environment, PackageLoader

from pipeline.channels.coupling.layers import Layer

ROW, HEAD, FOOT = 15, 64, 14  # pixels
LETTER, BAR_COLUMN, LABEL_COLUMN, LANE = 6.8, 420, 110, 9  # a name's letter; widest bar; its figures; one tie
MARGIN = 12
NARROWEST = 1.5  # a layer of one channel is still to be seen
TIE_COLOURS = 6

KINDS = {
    "channel": "channels",
    "neuron": "neurons",
    "head": "attention heads",
    "head_position": "positions in heads",
    "residual": "residual stream",
    None: "stays",
}


@dataclass(frozen=True)
class Row:
    """One layer as drawn, in pixels."""

    name: str
    kind: str
    y: int
    before: float
    after: float
    label: str
    tip: str


@dataclass(frozen=True)
class Tie:
    """One line that joins the rows whose widths go together; `stops`: the rows' middles."""

    x: float
    top: int
    bottom: int
    stops: tuple[int, ...]
    colour: int
    tip: str


def widths_svg(found: Sequence[Layer], title: str, caption: str = "") -> str:
    """An SVG document: widths before and after, what is tied (brackets on the right), and why the rest stays
    (tooltips). Dark and light follow the reader's setting.
    """
    widest = max((layer.before for layer in found), default=1)
    left = MARGIN + LETTER * max((len(layer.name) for layer in found), default=1) + 8
    scale = BAR_COLUMN / widest
    rows = [
        Row(
            name=layer.name,
            kind=layer.kind or "stays",
            y=HEAD + ROW * number,
            before=max(layer.before * scale, NARROWEST),
            after=max(layer.after * scale, NARROWEST),
            label=_label(layer),
            tip=_tip(layer),
        )
        for number, layer in enumerate(found)
    ]
    ties = _ties(found, left + BAR_COLUMN + LABEL_COLUMN)
    bands = _bands(found)
    width = max((tie.x for tie in ties), default=left + BAR_COLUMN + LABEL_COLUMN) + MARGIN
    environment = Environment(
        loader=PackageLoader("pipeline.drawing"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    present = {layer.kind for layer in found}
    return environment.get_template("widths.svg.j2").render(
        title=title,
        caption=caption,
        rows=rows,
        ties=ties,
        bands=bands,
        left=left,
        row=ROW,
        margin=MARGIN,
        width=max(width, 640),
        height=HEAD + ROW * len(rows) + FOOT,
        kinds=[(kind or "stays", words) for kind, words in KINDS.items() if kind in present],
    )


def _label(layer: Layer) -> str:
    if layer.kind is None:
        return f"{layer.before} stays"
    return f"{layer.before}" if layer.after == layer.before else f"{layer.before} → {layer.after}"


def _tip(layer: Layer) -> str:
    if layer.kind is None:
        return f"{layer.name} ({layer.op}): all {layer.before} stay: {layer.reason}"
    tied = "" if layer.cluster == layer.name else f", tied to {layer.cluster}"
    return f"{layer.name} ({layer.op}): {layer.before} to {layer.after}, {KINDS[layer.kind]}{tied}"


def _ties(found: Sequence[Layer], start: float) -> list[Tie]:
    """A line for every cluster with several layers, in the first lane that is free over its length."""
    places: dict[str, list[int]] = {}
    for number, layer in enumerate(found):
        if layer.cluster:
            places.setdefault(layer.cluster, []).append(number)
    ties: list[Tie] = []
    lanes: list[int] = []  # the last row that each lane is taken to
    for cluster, numbers in sorted(places.items(), key=lambda item: item[1][0]):
        if len(numbers) < 2:
            continue
        lane = next((k for k, taken in enumerate(lanes) if taken < numbers[0]), len(lanes))
        lanes[lane : lane + 1] = [numbers[-1]]
        middles = tuple(HEAD + ROW * number + ROW // 2 for number in numbers)
        names = ", ".join(found[number].name for number in numbers)
        ties.append(
            Tie(start + LANE * (lane + 1), middles[0], middles[-1], middles, len(ties) % TIE_COLOURS,
                f"{cluster}: one width for {names}")
        )  # fmt: skip
    return ties


def _bands(found: Sequence[Layer]) -> list[tuple[int, int]]:
    """(top, height) of every second block of the model, for a shade behind it."""
    depth = _depth(found)
    blocks = [
        [number for number, _ in members]
        for _, members in groupby(enumerate(found), key=lambda item: item[1].name.split(".")[:depth])
    ]
    return [(HEAD + ROW * numbers[0], ROW * len(numbers)) for numbers in blocks[1::2]]


def _depth(found: Sequence[Layer]) -> int:
    """How many parts of a name make its block: the fewest that tell the layers apart into blocks of a readable size."""
    for depth in range(1, 5):
        counts = Counter(tuple(layer.name.split(".")[:depth]) for layer in found)
        if max(counts.values(), default=0) <= max(len(found) // 3, 1):
            return depth
    return 1
