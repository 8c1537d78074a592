"""Figures as files."""

from io import BytesIO
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from PIL import Image

from steps.common.files import atomic_path


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path`.svg and `path`.png, of at most 256 colours; the same figure gives the same bytes."""
    rcParams["svg.hashsalt"] = "hstu"
    with atomic_path(path.with_name(f"{path.name}.svg")) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    drawn = BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    with Image.open(drawn) as image, atomic_path(path.with_name(f"{path.name}.png")) as temporary:
        # A third of the bytes, and the eye sees no difference: committed figures are most of what the tree weighs.
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, "PNG", optimize=True)
