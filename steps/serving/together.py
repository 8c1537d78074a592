"""Requests that come while another is computed are computed together.

A request alone costs a hundred small operations, each of which costs as much for a few histories more.
"""

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from steps.serving.recommender import History, Recommender, Scored


@dataclass
class _Request:
    histories: Sequence[History]
    top: int
    seen: bool
    found: list[list[Scored]] = field(default_factory=list)
    failure: Exception | None = None
    done: bool = False


class Together:
    """A recommender that several threads may ask at once. Scores depend, in their last digits, on who else asks."""

    def __init__(self, recommender: Recommender) -> None:
        self._recommender = recommender
        self._waiting: deque[_Request] = deque()  # whose methods are safe among threads
        self._alone = threading.Lock()

    def recommend(self, histories: Sequence[History], top: int, seen: bool) -> list[list[Scored]]:
        """What `Recommender.recommend` gives."""
        request = _Request(histories, top, seen)
        self._waiting.append(request)
        with self._alone:
            if not request.done:  # else whoever had the lock did it too
                waiting = [self._waiting.popleft() for _ in range(len(self._waiting))]
                self._waiting.extend(one for one in waiting if one.seen != seen)
                self._compute([one for one in waiting if one.seen == seen])
        if request.failure is not None:
            raise request.failure
        return request.found

    def _compute(self, requests: list[_Request]) -> None:
        histories = [history for request in requests for history in request.histories]
        try:
            found = iter(self._recommender.recommend(histories, max(one.top for one in requests), requests[0].seen))
            for request in requests:
                request.found = [next(found)[: request.top] for _ in request.histories]
        except Exception as error:  # each of them raises it
            for request in requests:
                request.failure = error
        for request in requests:
            request.done = True
