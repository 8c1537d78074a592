"""Figures as files: SVG and PNG, on light and on dark paper, in colours that the colour-blind tell apart."""

import re
from collections.abc import Callable
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from steps.common.files import atomic_path, write_text
from steps.common.svg import smaller

#: Okabe and Ito's colours (jfly.uni-koeln.de/color): black and yellow in tones that show on the paper, the strongest
#: last, as tables go from baselines to the models in question.
_SHARED = ("#cc79a7", "#e69f00", "#009e73", "#d55e00")
_LIGHT = {
    "ink": "#1f2328",
    "paper": "#ffffff",
    "grid": "#d0d7de",
    "colours": ("#6e7781", "#56b4e9", "#8c7a00", *_SHARED, "#0072b2"),
}
_DARK = {
    "ink": "#e6edf3",
    "paper": "#0d1117",
    "grid": "#30363d",
    "colours": ("#9da7b1", "#7cc7f2", "#f0e442", *_SHARED, "#3b96de"),
}
#: So many series have a colour of their own; further ones take the next dashes.
NUM_COLOURS = 8
MARK, OTHERS = "C7", "C6"  # of what is ours and of what others published, where rows have no colours of their own
DASHES = ("-", "--", ":")


def save_figure(draw: Callable[[], Figure], path: Path) -> None:
    """Write `path`.svg, `path`.png, `path`-dark.svg and `path`-dark.png; png has at most 256 colours.

    draw: makes the figure anew for each paper, in the colours C0 to C7 of matplotlib's cycle. The same figure gives the
    same bytes. Text stays text in svg: it can be searched, and is a tenth of the bytes.
    """
    text, light, dark = StringIO(), BytesIO(), BytesIO()
    with rc_context(_style(_LIGHT)):
        figure = draw()
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.set_layout_engine("none")  # it was laid out, which takes as long as drawing
        figure.savefig(light, format="png", dpi=120)
    with rc_context(_style(_DARK)):
        other = draw()
        other.set_layout_engine("none")
        for axis, laid_out in zip(other.axes, figure.axes, strict=True):
            axis.set_position(laid_out.get_position())
        other.savefig(dark, format="png", dpi=120)
    svg = smaller(text.getvalue())
    write_text(path.with_name(f"{path.name}.svg"), svg)
    write_text(path.with_name(f"{path.name}-dark.svg"), _darkened(svg))
    for suffix, drawn in (("", light), ("-dark", dark)):
        with Image.open(drawn) as image, atomic_path(path.with_name(f"{path.name}{suffix}.png")) as temporary:
            # A third of the bytes, and the eye sees no difference.
            image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)


def style_of(place: int) -> dict[str, Any]:
    """Colour and dashes of the series at a place of the legend."""
    return {"color": f"C{place % NUM_COLOURS}", "linestyle": DASHES[place // NUM_COLOURS % len(DASHES)]}


def literal(text: str) -> str:
    """Text in which matplotlib takes no dollar for mathematics."""
    return text.replace("$", r"\$")


def _colours(paper: dict[str, Any]) -> list[str]:
    return [paper["ink"], paper["paper"], paper["grid"], *paper["colours"]]


def _darkened(svg: str) -> str:
    """The same drawing in the colours of dark paper."""
    dark = dict(zip(_colours(_LIGHT), _colours(_DARK), strict=True))
    return re.sub("|".join(dark), lambda colour: dark[colour[0]], svg)


def _style(paper: dict[str, Any]) -> Any:
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    ground = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(ink, paper["ink"]),
        **dict.fromkeys(ground, paper["paper"]),
        "axes.prop_cycle": cycler(color=paper["colours"]),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10,
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 9,
        "grid.color": paper["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "hstu",
    }
