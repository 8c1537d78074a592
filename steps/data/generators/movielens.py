"""Files in the form of MovieLens-20M: `ratings.csv`, sorted by user and movie, and `movies.csv`.

Users walk through a catalogue (`walks.py`). About half of a user's ratings share the timestamp of the one before. The
rarer a movie, the higher its id, as in MovieLens.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from steps.data.generators.draws import Array, Law, below, bits
from steps.data.generators.lines import digits, lines, write_archive
from steps.data.generators.walks import Gaps, Walks

_HOUR, _DAY = 3600, 86400
_BEGIN, _END = 789_652_009, 1_427_784_002  # MovieLens-20M's first and last timestamp: January 1995, March 2015
_TIME_BITS = (_END - _BEGIN).bit_length()
_SHORTEST = 20
_GAPS = Gaps(
    weights=(500, 430, 40, 20, 10),
    shortest=(0, 3, 300, _DAY, 30 * _DAY),
    longest=(0, 60, 2 * _HOUR, 7 * _DAY, 90 * _DAY),
    session=2,
)
_NOISE = (-4, -3, -2, -2, -1, -1, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3)  # half stars
_QUALITY = (-2, -1, 0, 0, 0, 1, 1)
_RATINGS = np.array([list(b"%d.%d" % divmod(5 * level, 10)) for level in range(11)], dtype=np.uint8)
_WIDTHS = (10, 10, 3, 10)  # the most bytes of each field
_TITLE_BYTES = 100
_YEARS = Law.of([1 + place for place in range(100)])
# fmt: off
_WORDS = (
    "Amber", "Autumn", "Bandit", "Bridge", "Café", "Captain", "Carnival", "Castle", "Château", "City", "Comet",
    "Dancer", "Daughter", "Desert", "Dragon", "Empire", "Falcon", "Fiancé", "Fountain", "Garden", "Ghost", "Harbour",
    "Horizon", "Hotel", "Island", "Journey", "Júlia", "Lantern", "Letter", "Lion", "Market", "Midnight", "Mirror",
    "Mountain", "Ocean", "Orchard", "Paper", "Piano", "Prince", "Railway", "Rebel", "River", "Sailor", "Señor",
    "Shadow", "Silence", "Station", "Storm", "Summer", "Theatre", "Tower", "Valley", "Violin", "Widow", "Winter", "Zoë",
)
_ARTICLES = ("The", "A", "An", "Les", "Der")
_GENRES = (
    "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy", "Film-Noir",
    "Horror", "IMAX", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
# The streams of draws, beyond those of the walks.
_NEVER, _USER, _MOVIE, _RATING, _WHOLE = range(100, 105)
_YEAR, _FORM, _ARTICLE, _FIRST, _SECOND, _SORT, _GENRE_1, _GENRE_2 = range(110, 118)


@dataclass(frozen=True)
class MovieLens:
    """The settings of the archive, whose files are in `folder`.

    `rows` ratings of `users` users, 20 at least of each; `rated_movies` of `movies` have ratings; `largest_id` is the
    last movie's. Raises ValueError, which names the settings that do not fit.
    """

    seed: int
    folder: str
    rows: int
    users: int
    movies: int
    rated_movies: int
    largest_id: int

    def __post_init__(self) -> None:
        if not self.rated_movies <= self.movies <= self.largest_id:
            raise ValueError("rated_movies, movies and largest_id: each is at most the next one")
        if (self.walks.chunk_users * self.movies).bit_length() + _TIME_BITS > 63:
            raise ValueError(f"movies: {self.movies} are too many for a row's 64 bits")

    @cached_property
    def walks(self) -> Walks:
        """The sequences, of rated movies by their place in the catalogue's order."""
        return Walks(
            seed=self.seed,
            rows=self.rows,
            users=self.users,
            items=self.rated_movies,
            shortest=_SHORTEST,
            longest=max(_SHORTEST + 1, self.rated_movies * 9254 // 26744),  # MovieLens-20M's longest
            region_items=400,
            popular_items=8,
            gaps=_GAPS,
            period=_END - _BEGIN,
        )

    def write(self, path: Path) -> None:
        """Write the archive to `path`."""
        name = f"{self.folder}/{{}}.csv"
        most = self.rows * (sum(_WIDTHS) + len(_WIDTHS)), self.movies * _TITLE_BYTES
        write_archive(path, [(name.format("ratings"), most[0], self._ratings()),
                             (name.format("movies"), most[1], [self._movies()])])  # fmt: skip

    def _ratings(self) -> Iterator[bytes]:
        yield b"userId,movieId,rating,timestamp\n"
        for number in range(self.walks.chunks):
            yield self.part(number)

    def part(self, number: int) -> bytes:
        """The lines of ratings.csv of chunk `number`, which need no other chunk."""
        chunk = self.walks.chunk(number)
        movie = self.movie_of_item[chunk.item]
        first = int(chunk.user[0])
        packed = ((chunk.user - first) * self.movies + movie) << _TIME_BITS | chunk.time
        packed.sort()
        key, time = packed >> _TIME_BITS, (packed & ((1 << _TIME_BITS) - 1)) + _BEGIN
        user, movie = key // self.movies + first, key % self.movies
        users = np.arange(first, int(user[-1]) + 1)
        return lines(
            digits(users + 1, _WIDTHS[0])[user - first],
            b",",
            self._id_texts[movie],
            b",",
            _RATINGS[self._levels(user, movie)],
            b",",
            digits(time, _WIDTHS[3]),
            b"\n",
        )

    def _levels(self, user: Array, movie: Array) -> Array:
        """Ratings in half stars, 1 to 10; whole stars are more frequent, as in MovieLens."""
        pair = user * self.movies + movie
        level = 7 + below(bits(self.seed, _USER, user), 3) - 1
        level += np.array(_QUALITY)[below(bits(self.seed, _MOVIE, movie), len(_QUALITY))]
        level += np.array(_NOISE)[below(bits(self.seed, _RATING, pair), len(_NOISE))]
        level += (level % 2) & below(bits(self.seed, _WHOLE, pair), 2)
        return np.clip(level, 1, 10)

    @cached_property
    def movie_of_item(self) -> Array:
        """The movie, counted from 0 by id, of each item: those of a low rank first, whatever the region."""
        region, rank = self.walks.places()
        order = np.lexsort((region, rank))
        never = np.argsort(bits(self.seed, _NEVER, np.arange(self.movies - 1)), kind="stable")
        rated = np.setdiff1d(np.arange(self.movies), never[: self.movies - self.rated_movies])
        found = np.empty_like(order)
        found[order] = rated
        return found

    @cached_property
    def ids(self) -> list[int]:
        """The ids of the movies, ascending: without gaps at first, then with ever larger ones up to the largest."""
        last = max(1, self.movies - 1)
        return [1 + place + (self.largest_id - self.movies) * place**2 // last**2 for place in range(self.movies)]

    @cached_property
    def _id_texts(self) -> Array:
        return np.ascontiguousarray(digits(np.array(self.ids), len(str(self.largest_id))))

    def _movies(self) -> bytes:
        """The content of movies.csv. As there, an article follows the title, and quotes are where they have to be."""
        place = np.arange(self.movies)

        def drawn(stream: int, number: int) -> list[int]:
            return below(bits(self.seed, stream, place), number).tolist()

        region = below(bits(self.seed, _GENRE_1, place), len(_GENRES))
        region[self.movie_of_item] = self.walks.places()[0] % len(_GENRES)
        year = _YEARS.draw(bits(self.seed, _YEAR, place)).tolist()
        form, article, sort = drawn(_FORM, 100), drawn(_ARTICLE, len(_ARTICLES)), drawn(_SORT, 100)
        words = zip(drawn(_FIRST, len(_WORDS)), drawn(_SECOND, len(_WORDS)), strict=True)
        more = drawn(_GENRE_2, len(_GENRES))
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["movieId", "title", "genres"])
        for one, (first, second) in enumerate(words):
            title = f"{_WORDS[first]} {_WORDS[second]}"
            if form[one] < 20:
                title += f", {_ARTICLES[article[one]]}"
            elif form[one] == 99:
                title = f'"{_WORDS[first]}" {_WORDS[second]}'
            genres = sorted({_GENRES[region[one]], *([_GENRES[more[one]]] if sort[one] < 60 else [])})
            shown = "|".join(genres) if sort[one] < 99 else "(no genres listed)"
            table.writerow([self.ids[one], f"{title} ({1915 + year[one]})", shown])
        return text.getvalue().encode()
