"""Items by what a person types: a title, spelt nearly right, or an id.

Titles are compared without case, accents, punctuation and article ("Matrix, The (1999)" is MovieLens' way to write
"the matrix"), with the year and without, and by the other title that stands in brackets. What is no title then is taken
for a misspelt one if exactly one title is near enough and has the same numbers.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property

from rapidfuzz import fuzz, process

from steps.common.cli import StepError

#: What an item's id begins with where items have titles, so that it is not taken for one: "187" is a film.
ID = "id:"
#: The least similarity, of 100, of a misspelt title.
_NEAR = 80
_LISTED = 5  # titles in an error
_ARTICLES = {"the", "a", "an", "le", "la", "les", "l", "il", "lo", "gli", "i", "el", "los", "las", "der", "die", "das"}
_YEAR = re.compile(r"\s*\((\d{4})[^)]*\)\s*$")
_BRACKETS = re.compile(r"\(([^)]*)\)")
_ALSO = re.compile(r"^a\.?k\.?a\.?\s", re.IGNORECASE)


class Catalogue:
    """The items of a data set: ids as the raw data has them, and titles, both (num_items,) from item 1 on."""

    def __init__(self, ids: Sequence[str], titles: Sequence[str]) -> None:
        """titles: empty texts where the data set has none."""
        self.ids, self.titles = ids, titles

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def has_titles(self) -> bool:
        """Whether any item has a title."""
        return any(self.titles)

    def prepare(self) -> None:
        """Make the tables of titles beforehand, which the first search makes otherwise."""
        for table in (self._by_id, self._as_written, self._all_names, self._owners):
            len(table)

    def name(self, item: int) -> str:
        """What an item is called: its title, else its id."""
        return self.titles[item - 1] or self.ids[item - 1]

    def typed(self, item: int) -> str:
        """A text that `find` takes for the item: its title, where no other item has it, else its id."""
        title = self.titles[item - 1]
        alone = title and len(self._as_written[title]) == 1
        return title if alone else f"{ID if self.has_titles else ''}{self.ids[item - 1]}"

    def find(self, text: str) -> int:
        """The item, from 1, that a text means: a title, or `id:` and an id; of data without titles an id alone.

        Raises StepError if there is none, which lists the nearest titles, or if several are meant alike.
        """
        if text.startswith(ID) or not self.has_titles:
            return self.with_id(text.removeprefix(ID))
        folded = _folded(text)
        if not folded:
            raise StepError(f"{text!r} is no title")
        for items in (self._as_written.get(text), self._by_title.get(folded), self._by_other_title.get(folded)):
            if items:
                return self._only(text, items)
        return self._only(text, self._near(text))

    def understood(self, texts: Iterable[str | int], items: Iterable[int]) -> dict[str, str]:
        """The title that a text was taken for, of each that is neither a title as it stands nor an id.

        items: what `find` gave for the texts.
        """
        pairs = zip(texts, items, strict=True)
        named = [(text, self.titles[item - 1]) for text, item in pairs if isinstance(text, str)]
        return {text: title for text, title in named if title and text != title and not text.startswith(ID)}

    def with_id(self, raw_id: str) -> int:
        """The item, from 1, with an id of the raw data. Raises StepError if there is none."""
        if raw_id not in self._by_id:
            raise StepError(f"no item has the id {raw_id!r}")
        return self._by_id[raw_id]

    def _only(self, text: str, found: Sequence[int]) -> int:
        if len(found) == 1:
            return found[0]
        if found:
            raise StepError(f"{text!r} may be {self._listed(found)}; write one of these ids, or the whole title")
        near = process.extract(_folded(text), self._all_names, scorer=fuzz.WRatio, limit=4 * _LISTED)
        items = list(dict.fromkeys(self._owners[place] for _, _, place in near))
        raise StepError(f"no title is like {text!r}; the nearest are {self._listed(items)}")

    def _near(self, text: str) -> list[int]:
        """The items of the most similar titles that are near enough, as those of a misspelt title are."""
        year = _YEAR.search(text)
        wanted = _folded(_YEAR.sub("", text))
        near = [
            (score, self._owners[place])
            for name, score, place in process.extract(
                wanted, self._all_names, scorer=fuzz.ratio, score_cutoff=_NEAR, limit=None
            )
            if _numbers(name) == _numbers(wanted)
            and (not year or f"({year[1]}" in self.titles[self._owners[place] - 1])
        ]
        best = max((score for score, _ in near), default=0)
        return sorted({item for score, item in near if score == best})

    def _listed(self, items: Sequence[int]) -> str:
        shown = [f"{self.titles[item - 1]} ({ID}{self.ids[item - 1]})" for item in items[:_LISTED]]
        return "; ".join(shown) + ("; ..." if len(items) > _LISTED else "")

    @cached_property
    def _by_id(self) -> dict[str, int]:
        return {raw_id: item for item, raw_id in enumerate(self.ids, start=1)}

    @cached_property
    def _as_written(self) -> dict[str, list[int]]:
        return _grouped((title, item) for item, title in enumerate(self.titles, start=1))

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        return _grouped(
            (name, item)
            for item, title in enumerate(self.titles, start=1)
            for name in _names(title, _YEAR.search(title))
        )

    @cached_property
    def _by_other_title(self) -> dict[str, list[int]]:
        """By what stands in brackets: the title in another language, as a rule."""
        return _grouped(
            (name, item)
            for item, title in enumerate(self.titles, start=1)
            for part in _BRACKETS.findall(_YEAR.sub("", title))
            for name in _names(_ALSO.sub("", part), _YEAR.search(title))
        )

    @cached_property
    def _all_names(self) -> list[str]:
        return [
            name for names in (self._by_title, self._by_other_title) for name, items in names.items() for _ in items
        ]

    @cached_property
    def _owners(self) -> list[int]:
        """The item of each of `_all_names`."""
        return [item for names in (self._by_title, self._by_other_title) for items in names.values() for item in items]


def _grouped(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, item in pairs:
        if name and item not in found.setdefault(name, []):
            found[name].append(item)
    return found


def _names(title: str, year: re.Match[str] | None) -> list[str]:
    """How a title may be written, folded: with what stands in brackets and without, with the year and without."""
    bare = _YEAR.sub("", title)
    names = dict.fromkeys(_folded(part) for part in (bare, _BRACKETS.sub("", bare)))
    return [text for name in names if name for text in ([name, f"{name} {year[1]}"] if year else [name])]


def _folded(title: str) -> str:
    """Without case, accents, punctuation and article; "Matrix, The" and "the matrix" are both "matrix"."""
    year = _YEAR.search(title)
    name = _YEAR.sub("", title)
    main, comma, last = name.rpartition(",")
    if comma and _plain(last) in _ARTICLES:
        name = main
    words = _plain(name).split()
    if len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join([*words, *([year[1]] if year else [])])


def _plain(text: str) -> str:
    letters = unicodedata.normalize("NFKD", text.casefold().replace("&", " and "))
    spelt = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return " ".join(re.sub(r"[^\w]+", " ", re.sub(r"['’`]", "", spelt)).split())


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)
