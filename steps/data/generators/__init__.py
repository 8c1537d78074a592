"""Generated archives: the demo, files in the form and size of data sets that are not to be had, the paper's stream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from steps.data.generators.amazon import AmazonRatings
from steps.data.generators.demo import Demo
from steps.data.generators.movielens import MovieLens
from steps.data.generators.stream import Stream


class Generator(Protocol):
    """The settings of an archive."""

    def write(self, path: Path) -> None:
        """Write the archive to `path`; what it keeps meanwhile has names that begin with the path's."""


FORMS: dict[str, Callable[..., Generator]] = {
    "demo": Demo,
    "movielens-csv": MovieLens,
    "amazon-ratings": AmazonRatings,
    "stream": Stream,
}


def generator(form: str, **settings: Any) -> Generator:
    """The generator of an entry's `synthesize` in params/datasets.yaml.

    Raises ValueError, which names settings that do not fit.
    """
    return FORMS[form](**settings)
