"""The demo: an archive in MovieLens-1M's own format, the same bytes on every machine.

Time and order carry signal. A user has a home genre and a current genre. Ratings come in sessions;
the length of the gap before a session decides the next genre:

- minutes: the user stays with the current genre;
- days: taste drifts to the next genre in a fixed cycle;
- months: back to the home genre.

Within a genre a user walks along the genre's series of movies, a step or two at a time; one rating
in five is any movie of the catalogue, popular ones more often. About half the ratings of a session
share the timestamp of the rating before, as in MovieLens.

Ratings say whether a genre is the user's home. With `taste_drifts` they say what the user likes at the moment, old
movies or new ones, which changes after every gap of months; one rating in six is by the other taste. A liked movie has
4 or 5, another 2 or 3, an old one the higher: so ratings tell which movies are old, and none is liked more often than
others. Neither a mean nor the ratings before foretell the next, without its movie. Which movies are rated, and when, is
the same.

Who comes back to a genre goes on where they were, however long ago that was: in a long history the
next movie may follow from a token hundreds of places before.
"""

import io
import random
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_START = 978_300_000  # seconds since 1970; where MovieLens-1M begins
_SHARE_NOISE = 0.2
_SHARE_SAME_TIMESTAMP = 0.5
_SHARE_NEVER_RATED = 0.05
_SHARE_OTHER_TASTE = 1 / 6
_OLD = 1975  # movies of earlier years
_AGES = (1, 18, 25, 35, 45, 50, 56)


class _Draw:
    """Draws built on `random()` alone, the one generator whose sequence Python promises to keep."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, share: float) -> bool:
        return self._random() < share

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def one_of(self, values: list[int]) -> int:
        return values[self.between(0, len(values) - 1)]

    def popular(self, values: list[int]) -> int:
        """One of `values`, the first ones more often (density falling linearly to zero)."""
        return values[min(self.between(0, len(values) - 1), self.between(0, len(values) - 1))]

    def shuffle(self, values: list[int]) -> None:
        for last in range(len(values) - 1, 0, -1):
            other = self.between(0, last)
            values[last], values[other] = values[other], values[last]


@dataclass(frozen=True)
class Demo:
    """The settings of the archive. Raises ValueError, which names the setting, if there are too few movies.

    gap_divisor: gaps of days and months are so many times shorter, so that a long history is one of years, not of a
    century. taste_drifts: whether what a user likes changes with time.
    """

    seed: int
    users: int
    movies: int
    genres: int
    mean_ratings: int
    gap_divisor: int = 1
    taste_drifts: bool = False

    def __post_init__(self) -> None:
        if self.movies * (1 - _SHARE_NEVER_RATED) < 2 * self.mean_ratings:
            raise ValueError(f"movies: {self.movies} are too few for mean_ratings {self.mean_ratings}")

    def write(self, path: Path) -> None:
        """Write the archive to `path`."""
        path.write_bytes(synthesize(**asdict(self)))


def synthesize(
    seed: int,
    users: int,
    movies: int,
    genres: int,
    mean_ratings: int,
    gap_divisor: int = 1,
    taste_drifts: bool = False,
) -> bytes:
    """The archive's bytes: `demo/users.dat`, `demo/movies.dat`, `demo/ratings.dat`.

    Movie ids have gaps and some movies are never rated, as in MovieLens. Rows of a user are not in
    time order (later sessions first), but rows of one timestamp are in the order they happened.
    """
    draw = _Draw(seed)
    ids = [2 * position + 1 + draw.between(0, 1) for position in range(movies)]
    draw.shuffle(ids)
    genre_of = {movie: position % genres for position, movie in enumerate(ids)}
    rated = ids[: movies - int(movies * _SHARE_NEVER_RATED)]
    series = [[movie for movie in rated if genre_of[movie] == genre] for genre in range(genres)]

    user_lines, rating_lines = [], []
    for user in range(1, users + 1):
        gender = "MF"[draw.between(0, 1)]
        age = _AGES[draw.between(0, len(_AGES) - 1)]
        user_lines.append(f"{user}::{gender}::{age}::{draw.between(0, 20)}::{draw.between(10000, 99999)}")
        rating_lines += _ratings_of_user(draw, user, series, rated, genre_of, mean_ratings, gap_divisor, taste_drifts)
    movie_lines = [f"{movie}::Movie {movie} ({_year(movie)})::Genre{genre_of[movie]}" for movie in sorted(ids)]
    return _archive({"users.dat": user_lines, "movies.dat": movie_lines, "ratings.dat": rating_lines})


def _ratings_of_user(
    draw: _Draw,
    user: int,
    series: list[list[int]],
    rated: list[int],
    genre_of: dict[int, int],
    mean_ratings: int,
    gap_divisor: int,
    taste_drifts: bool,
) -> list[str]:
    """One user's lines of ratings.dat."""
    home = genre = draw.between(0, len(series) - 1)
    taste = user  # of the user's number, not drawn, so that draws are the same without it
    position = [draw.between(0, len(movies) - 1) for movies in series]
    wanted = 20 + draw.between(0, mean_ratings - 20) + draw.between(0, mean_ratings - 20)
    time = _START + draw.between(0, 300 * _DAY)
    seen: set[int] = set()
    sessions: list[list[str]] = []
    while len(seen) < wanted:
        session: list[str] = []
        for _ in range(min(draw.between(1, 6), wanted - len(seen))):
            if draw.chance(_SHARE_NOISE):
                movie = draw.popular(rated)
                while movie in seen:
                    movie = draw.one_of(rated)
            else:
                movies = series[genre]
                position[genre] = (position[genre] + draw.between(1, 2)) % len(movies)
                while movies[position[genre]] in seen and not seen.issuperset(movies):
                    position[genre] = (position[genre] + 1) % len(movies)
                movie = movies[position[genre]]
                if movie in seen:  # the whole series is seen
                    movie = draw.one_of([other for other in rated if other not in seen])
            seen.add(movie)
            if taste_drifts:  # one draw, as without
                old = _year(movie) < _OLD
                likes = (old == (taste % 2 == 0)) != draw.chance(_SHARE_OTHER_TASTE)
                rating = 2 + 2 * likes + old
            else:
                rating = min(5, max(1, 3 + (genre_of[movie] == home) + draw.between(-1, 1)))
            session.append(f"{user}::{movie}::{rating}::{time}")
            if not draw.chance(_SHARE_SAME_TIMESTAMP):
                time += draw.between(5, 50)
        sessions.append(session)
        gap = draw.between(0, 2)
        if gap == 0:
            time += draw.between(5 * _MINUTE, 2 * _HOUR)
        elif gap == 1:
            time += draw.between(2 * _DAY, 10 * _DAY) // gap_divisor
            genre = (genre + 1) % len(series)
        else:
            time += draw.between(60 * _DAY, 200 * _DAY) // gap_divisor
            genre = home
            taste += 1
    return [line for session in reversed(sessions) for line in session]


def _year(movie: int) -> int:
    return 1950 + movie % 50


def _archive(files: dict[str, list[str]]) -> bytes:
    """A zip of `demo/<name>` with fixed dates and no compression, whose bytes vary between zlib builds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, lines in files.items():
            member = zipfile.ZipInfo(f"demo/{name}", date_time=(2000, 1, 1, 0, 0, 0))
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, "".join(line + "\n" for line in lines))
    return buffer.getvalue()
