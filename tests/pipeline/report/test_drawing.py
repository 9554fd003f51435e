"""The drawing is well-formed, to scale, and says why what stays has to stay."""

from xml.etree import ElementTree

from pipeline.channels import Layer
from pipeline.drawing.widths import BAR_COLUMN, widths_svg

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = (
    Layer("stem", "conv2d", 64, 32, "stem", "channel", ""),
    Layer("a.conv1", "conv2d", 128, 32, "a.conv1", "channel", ""),
    Layer("a.conv2", "conv2d", 64, 32, "stem", "channel", ""),
    Layer("a.qkv", "linear", 96, 48, "a.qkv", "head", ""),
    Layer("head<1>", "linear", 10, 10, "", None, "an output of the model (output at output)"),
)


def test_bars_are_to_scale_ties_join_and_reasons_are_there():
    root = ElementTree.fromstring(widths_svg(LAYERS, "a <net> & more"))
    rows = [g for g in root.iter(f"{SVG}g") if len(g.findall(f"{SVG}rect")) == 2]
    assert len(rows) == len(LAYERS)
    for layer, row in zip(LAYERS, rows, strict=True):
        after, before = (float(rect.get("width")) for rect in row.findall(f"{SVG}rect"))
        assert abs(after / before - layer.after / layer.before) < 0.02
        assert abs(before - BAR_COLUMN * layer.before / 128) < 1
    assert "an output of the model" in rows[-1].find(f"{SVG}title").text
    assert rows[1].findall(f"{SVG}text")[1].text == "128 → 32"
    (tie,) = root.iter(f"{SVG}path")
    assert tie.get("d").count("h5") == 2, "stem and a.conv2 have one width"
    classes = {rect.get("class") for rect in root.iter(f"{SVG}rect")}
    assert {"channel", "head", "stays"} <= classes


def test_an_empty_network_is_still_a_drawing():
    assert ElementTree.fromstring(widths_svg((), "nothing")).tag == f"{SVG}svg"
