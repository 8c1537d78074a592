"""Drawings made small: alike, and the same bytes whatever matplotlib named."""

import re
from io import StringIO

from matplotlib.figure import Figure

from steps.common.svg import smaller

DRAWING = """<?xml version="1.0" encoding="utf-8"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="72pt" height="36pt" viewBox="0 0 72 36" \
xmlns="http://www.w3.org/2000/svg" version="1.1">
 <metadata>
  <other/>
 </metadata>
 <defs>
  <style type="text/css">*{stroke-linecap: butt}</style>
 </defs>
 <g id="figure_1">
  <g id="text_1">
   <!-- a > b -->
   <text style="fill: #1f2328" x="36.04" y="30" transform="rotate(-0 36.04 30)">a &gt; b  c</text>
   <text style="fill: #1f2328" x="9.871" y="30" transform="rotate(-90 9.871 30)">up</text>
  </g>
  <defs>
   <path id="mfa" d="M 0 2.254
C 0.5 2 0.5 1 0 0
z
" style="stroke: #0072b2"/>
  </defs>
  <g clip-path="url(#pab)">
   <use xlink:href="#mfa" x="10.04" y="20.16" style="fill: #0072b2"/>
  </g>
  <path d="M 0.04 30.04
L 10.08 20.01
L 10.08 25.5
L 40.1 25.51
L 40.1 25.52
L 50.2 -1
z
M 1 2
L 3 44
" clip-path="url(#pab)" style="fill: url(#hff)"/>
 </g>
 <defs>
  <pattern id="hff" width="72" height="72">
   <rect x="0" y="0" width="73" height="73" fill="#6e7781"/>
  </pattern>
  <clipPath id="pab">
   <rect x="1.04" y="2" width="70.96" height="30"/>
  </clipPath>
 </defs>
</svg>
"""
SMALL = """<svg xmlns="http://www.w3.org/2000/svg" width="72pt" height="36pt" viewBox="0 0 72 36" version="1.1">
<defs>
<style>*{stroke-linecap: butt}
.s1{fill:#1f2328}</style>
</defs>
<text x="36" y="30" class="s1">a &gt; b  c</text>
<text x="9.9" y="30" transform="rotate(-90 9.9 30)" class="s1">up</text>
<defs>
<path id="m1" d="M0 2.25c.5-.25 .5-1.25 0-2.25z" style="stroke:#0072b2"/>
</defs>
<g clip-path="url(#m3)">
<use x="10" y="20.2" style="fill:#0072b2" href="#m1"/>
</g>
<path d="M0 30l10.1-10v5.5h30l10.1-26.5zM1 2l2 42" clip-path="url(#m3)" style="fill:url(#m2)"/>
<defs>
<pattern id="m2" width="72" height="72">
<rect x="0" y="0" width="73" height="73" fill="#6e7781"/>
</pattern>
<clipPath id="m3">
<rect x="1" y="2" width="71" height="30"/>
</clipPath>
</defs>
</svg>
"""


def test_a_drawing_made_small_by_hand() -> None:
    assert smaller(DRAWING) == SMALL


def test_names_of_what_is_referred_to_change_no_byte() -> None:
    other = DRAWING.replace("pab", "h0").replace("mfa", "pab").replace("hff", "m9")
    assert smaller(other) == smaller(DRAWING)


def drawn() -> str:
    """Bars in stripes, a band and markers: patterns, clip paths and shapes that are referred to."""
    figure, text = Figure(), StringIO()
    axis = figure.subplots()
    axis.bar([1, 2], [3, 4], hatch="/")
    axis.stairs([1, 2, 3], fill=True)
    axis.fill_between([0, 1, 2], [0, 1, 0], [2, 3, 2])
    axis.plot([0, 1, 2], [1, 3, 2], "o-")
    axis.set_aspect("auto")
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def test_two_drawings_of_the_same_have_the_same_bytes() -> None:
    """Though without a salt all of matplotlib's names are others each time."""
    one, other = drawn(), drawn()
    assert one != other
    assert smaller(one) == smaller(other)


def test_all_that_is_referred_to_is_there() -> None:
    small = smaller(drawn())
    wanted = set(re.findall(r"(?:url\(|href=\")#(\w+)", small))
    assert wanted == set(re.findall(r' id="(\w+)"', small))
    assert len(wanted) > 3
    assert set(re.findall(r'class="(\w+)"', small)) == set(re.findall(r"^\.(\w+){", small, re.M))
