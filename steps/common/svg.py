"""Drawings of matplotlib at a third of their bytes, and with the same bytes in every process."""

import re
from collections import Counter
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_PLACED = {f"{_SVG}{name}" for name in ("use", "text", "rect")}
_SMALL = 20  # points: a marker, whose form needs hundredths; a line's place needs tenths
_NUMBER = re.compile(r"-?[\d.]+")
_REFERENCE = re.compile(r"(?<=url\(#)[^)]+|(?<=^#).+")  # or a colour, which is no id


def smaller(svg: str) -> str:
    """The svg element alone, drawn alike to a twentieth of a point, a line for each element.

    What nothing refers to goes. What is referred to is numbered in its order: matplotlib names clip paths by addresses
    in memory. Styles become classes of the drawing's own style element: a page may hold one such drawing.
    """
    root = ElementTree.fromstring(svg)  # noqa: S314  (matplotlib wrote it)
    for parent in list(root.iter()):
        parent[:] = _children(parent)
    _number(root)
    for element in root.iter():
        _shorten(element)
    _classes(root)
    ElementTree.register_namespace("", _SVG[1:-1])
    return ElementTree.tostring(root, encoding="unicode").replace(" />", "/>")


def _children(parent: Element) -> Iterator[Element]:
    """Of an element, with those of groups that say nothing in the place of these."""
    for child in parent:
        if child.tag == f"{_SVG}g" and not set(child.attrib) - {"id"}:
            yield from _children(child)
        elif child.tag != f"{_SVG}metadata":
            yield child


def _number(root: Element) -> None:
    """Name what is referred to m1, m2, ... in the order of the document, and nothing else."""
    for element in root.iter():
        if _XLINK in element.attrib:
            element.set("href", element.attrib.pop(_XLINK))
    texts = [text for element in root.iter() for text in element.attrib.values()]
    wanted = {name for text in texts for name in _REFERENCE.findall(text)}
    ids = [element.attrib["id"] for element in root.iter() if element.get("id") in wanted]
    names = {name: f"m{place}" for place, name in enumerate(ids, start=1)}
    for element in root.iter():
        for key, text in list(element.attrib.items()):
            if key != "id":
                element.set(key, _REFERENCE.sub(lambda found: names.get(found[0], found[0]), text))
            elif text in names:
                element.set(key, names[text])
            else:
                del element.attrib[key]


def _shorten(element: Element) -> None:
    """Tenths in its numbers, no turn by nothing, and no white space around elements."""
    for name in ("x", "y", "width", "height"):
        if name in element.attrib and element.tag in _PLACED:
            element.set(name, _digits(float(element.attrib[name]), 1))
    if "d" in element.attrib:
        element.set("d", _path(element.attrib["d"]))
    if element.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]
    elif element.get("transform", "").startswith("rotate("):
        numbers = " ".join(_digits(float(number), 1) for number in element.attrib["transform"][7:-1].split())
        element.set("transform", f"rotate({numbers})")
    if len(element):
        element.text = "\n"
    element.tail = "\n"


def _path(d: str) -> str:
    """The same path by the differences between its points, which are rounded before: errors do not add up."""
    digits = 2 if max((abs(float(number)) for number in _NUMBER.findall(d)), default=0) < _SMALL else 1
    parts, last, at, begin = [], "", (0.0, 0.0), (0.0, 0.0)
    for command, rest in re.findall(r"([MLQCz])([^MLQCz]*)", d):
        numbers = [round(float(number), digits) for number in _NUMBER.findall(rest)]
        letter, steps = command.lower(), [number - at[place % 2] for place, number in enumerate(numbers)]
        if command == "M":
            letter, steps, begin = "M", numbers, (numbers[0], numbers[1])
        elif command == "L":
            moved = [bool(round(step, digits)) for step in steps]
            letter = {(True, True): "l", (True, False): "h", (False, True): "v"}.get((moved[0], moved[1]), "")
            steps = [step for step, there in zip(steps, moved, strict=True) if there]
        if letter:
            text = re.sub(" -", "-", " ".join(_digits(step, digits) for step in steps))
            parts.append(("" if text.startswith("-") else " ") + text if letter == last else letter + text)
            at, last = (numbers[-2], numbers[-1]) if numbers else begin, letter
    return "".join(parts)


def _digits(number: float, digits: int) -> str:
    """Without zeros that say nothing."""
    text = f"{number:.{digits}f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else re.sub(r"^(-?)0\.", r"\1.", text)


def _classes(root: Element) -> None:
    """Styles that several elements have become classes, in the order of the document."""
    styled = [element for element in root.iter() if "style" in element.attrib]
    for element in styled:
        element.set("style", re.sub(r"([:;]) ", r"\1", element.attrib["style"]))
    times = Counter(element.attrib["style"] for element in styled)
    names = {style: f"s{place}" for place, style in enumerate((s for s in times if times[s] > 1), start=1)}
    for element in styled:
        if element.attrib["style"] in names:
            element.set("class", names[element.attrib.pop("style")])
    sheet = next(root.iter(f"{_SVG}style"))
    sheet.attrib.clear()
    sheet.text = (sheet.text or "").strip() + "".join(f"\n.{name}{{{style}}}" for style, name in names.items())
