"""Names of columns that tell what a column is, whoever gave them."""

import re
from collections.abc import Iterable

from steps.data.schemas import shown

#: Names of columns without case, signs and a last `id`; of several in a table the first counts.
_NAMES: dict[str, tuple[str, ...]] = {
    "user": (
        *("user", "u", "customer", "cust", "reviewer", "visitor", "member", "account", "client", "person", "buyer"),
        *("shopper", "household", "reader", "listener", "profile", "device", "session"),
    ),
    "item": (
        *("item", "i", "parentasin", "movie", "asin", "product", "prod", "sku", "book", "isbn", "song", "track"),
        *("article", "video", "anime", "game", "app", "business", "recipe", "news", "artist", "album", "show"),
        *("course", "listing", "place", "poi", "venue", "location", "restaurant", "hotel", "goods", "good", "content"),
        *("stock", "material", "page", "post", "beer", "photo"),
    ),
    "rating": (
        *("rating", "ratings", "score", "stars", "star", "overall", "starrating", "userrating", "bookrating"),
        *("ratingvalue", "ratingscore", "reviewrating", "reviewscore", "reviewoverall", "vote", "votes", "grade"),
    ),
    "timestamp": (
        *("timestamp", "timestamps", "unixreviewtime", "unixtime", "unixtimestamp", "time", "ts", "datetime"),
        *("eventtime", "eventtimestamp", "date", "epoch", "utime"),
    ),
    "title": ("title", "name", "label"),
    "genres": ("genres", "genre", "categories", "category", "tags"),
}
#: The last word of longer names, such as `clicked_at` and `anonymous_user_id`.
_LAST = {
    "user": ("user", "customer", "reviewer", "visitor", "member", "session"),
    "item": ("item", "movie", "product", "book", "song", "track", "article", "sku"),
    "rating": ("rating", "score", "stars"),
    "timestamp": ("timestamp", "time", "date", "datetime", "ts", "at"),
    "title": ("title", "name"),
    "genres": (),
}
_LATER = 1000  # the rank of such a name
#: Words that make it a name of something else than an event's column.
_OF_OTHERS = {"release", "released", "birth", "signup", "registration", "published", "publication", "average", "mean"}


def role_of(name: str) -> tuple[str, int] | None:
    """What a column of this name is, and its rank among several: the least counts."""
    name = re.sub(r":(token|float)(_seq)?$", "", name)  # RecBole's types
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![a-z])|\d+", name)]
    plain = "".join(words)
    short = re.sub(r"(.)(ids?|no|num|number|code|key|idx|index)$", r"\1", plain)
    if len(words) > 1 and words[-1] in ("id", "ids", "code", "utc", "ms", "us", "s", "sec", "unix"):
        words = words[:-1]
    for role, known in _NAMES.items():
        for one in (plain, short, "".join(words)):
            if one in known:
                return role, known.index(one)
    for role, known in _LAST.items():
        if len(words) > 1 and words[-1] in known and not _OF_OTHERS & {*words}:
            return role, _LATER
    return None


def listed(names: Iterable[str], count: int = 8) -> str:
    """Names of columns in a message."""
    texts = [shown(name) for name in names]
    return ", ".join(texts[:count]) + (", ..." if len(texts) > count else "")
