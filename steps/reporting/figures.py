"""Figures as files."""

from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from steps.common.files import atomic_path


def save_figure(figure: Figure, path: Path) -> None:
    """Write `path`.svg and `path`.png; the same figure gives the same bytes."""
    rcParams["svg.hashsalt"] = "hstu"
    for form, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 120})):
        with atomic_path(path.with_name(f"{path.name}.{form}")) as temporary:
            figure.savefig(temporary, format=form, **options)
