"""The pictures of frontiers: nothing is cut off, names are shown as they are, and the sentence counts what is drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from klas_zoo.building.plot import Mark, describe, picture_of
from klas_zoo.catalogue.frontier_plot import describe as describe_overview
from klas_zoo.catalogue.frontier_plot import picture_of as picture_of_overview
from klas_zoo.page.pictures import save_picture, top1_interval
from klas_zoo.registry.overview import Overview, Point

LONG = "a-family-with-a-very-long-name-that-somebody-took-from-a-checkpoint of $many$ words and_underscores " * 2
SHORT = "deit"


def mark(name: str, ms: float, top1: float, is_anchor: bool = False) -> Mark:
    return Mark(name=name, latency_ms=ms, top1=top1, is_anchor=is_anchor)


ANCHORS = [mark("tiny", 1.0, 70.0, True), mark("small", 2.0, 80.0, True), mark("base", 4.0, 84.0, True)]


def texts_outside(figure: Figure) -> list[str]:
    """Texts of which a part lies outside of the figure, by more than a pixel."""
    figure.canvas.draw()
    page = figure.bbox
    outside = []
    both = (figure.axes[0].xaxis, figure.axes[0].yaxis)
    ticks = [label for axis in both for label in axis.get_ticklabels(which="both")]
    for text in figure.findobj(Text):
        # matplotlib keeps labels of ticks beyond the axes, which it does not draw
        if text.get_text().strip() and text.get_visible() and text not in ticks:
            box = text.get_window_extent()
            if box.x0 < -1 or box.y0 < -1 or box.x1 > page.width + 1 or box.y1 > page.height + 1:
                outside.append(text.get_text())
    return outside


def drawn(figure: Figure) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in figure.findobj(Text))


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e-4])
@pytest.mark.parametrize("name", [SHORT, LONG, "_hidden", "a$b$c\\frac"])
def test_nothing_is_cut_off_however_long_names_are(name: str, scale: float) -> None:
    marks = [mark(f"{name}{one.name}", one.latency_ms * scale, one.top1, True) for one in ANCHORS]
    marks += [mark("x", 1.5 * scale, 78.0), mark("y", 3.9 * scale, 79.0)]
    figure = picture_of(marks, title=f"{name} on cpu", subtitle=f"a machine of {name}", axis="latency, ms", images=200)
    assert texts_outside(figure) == []


@pytest.mark.parametrize("name", [SHORT, LONG, "_hidden"])
def test_nor_in_the_picture_of_several_families(name: str) -> None:
    points = [
        Point(
            family=f"{name}{k % 9}", route=f"{name}{k}", runtime="onnxruntime", precision="fp32", plain=k % 2 == 0,
            latency_ms=1.0 + k, top1=50.0 + k, size_bytes=k, origin="measured", images=100, on_frontier=True,
            dominated_by="z" if k == 3 else "",
        )
        for k in range(20)
    ]  # fmt: skip
    found = Overview(points=tuple(points), hardware=name * 2, percentile="p50", batch=1, left_out=())
    figure = picture_of_overview(found)
    assert texts_outside(figure) == []
    assert len(figure.legends[0].get_texts()) == 10  # nine families and the frontier
    assert "(1 of 10 stitches)" in describe_overview(found)


def test_stitches_below_the_line_are_hollow_and_counted() -> None:
    above, below = mark("above", 1.5, 76.0), mark("below", 3.0, 81.9)
    marks = [*ANCHORS, above, below, mark("worse than tiny", 1.2, 60.0)]
    figure = picture_of(marks, title="t", subtitle="s", axis="x", images=1000)
    places = {one.get_label(): one.get_offsets().tolist() for one in figure.axes[0].collections}
    assert places["stitches"] == [[1.5, 76.0]]
    assert places["stitches below a line"] == [[3.0, 81.9], [1.2, 60.0]]
    assert "2 of 3 stitches are on it; 2 lie below the straight line between two anchors" in describe(marks)
    assert "2 of 3 stitches are on it" in drawn(figure)


def test_every_mark_has_its_confidence_interval() -> None:
    marks = [*ANCHORS, mark("x", 1.5, 78.0)]
    figure = picture_of(marks, title="t", subtitle="s", axis="x", images=1000)
    bars = [one for one in figure.axes[0].containers if type(one).__name__ == "ErrorbarContainer"]
    found = {
        round(float(value), 6)
        for bar in bars for line in bar.lines[2] for segment in line.get_segments() for _, value in segment
    }  # fmt: skip
    expected = {round(bound, 6) for one in marks for bound in top1_interval(one.top1, 1000)}
    assert found == expected


def test_a_single_anchor_is_a_picture_too(tmp_path: Path) -> None:
    figure = picture_of(ANCHORS[:1], title="t", subtitle="s", axis="x", images=3)
    save_picture(figure, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.format == "PNG" and picture.width > 800
    assert "stitches are" not in describe(ANCHORS[:1])
