"""Drawings of matplotlib at a third of their bytes."""

import re


def smaller(svg: str) -> str:
    """The svg element alone: without what nothing refers to, and with hundredths of a point."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r' id="[A-Za-z.]\w*[._]\w+"', "", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)
    return re.sub(r"\s*\n\s*", "\n", svg)
