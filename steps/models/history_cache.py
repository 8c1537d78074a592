"""M-FALCON (arXiv 2402.17152, algorithm 1): a trained HSTU scores candidates against histories that are kept.

Of every user's history tokens the keys and values of each layer are kept in pages of a pool. New tokens attend to them,
candidates read them: what is calculated is what a forward pass of history and candidate calculates, so the hidden
states are the same up to rounding.
"""

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from kernels.hstu_attention import appended_attention, cached_attention, runs_in_triton
from kernels.jagged.naive import sequence_and_position
from steps.common.cli import StepError
from steps.common.files import atomic_path
from steps.models.arguments import count_of, jagged_counts, require_tensor, user_names
from steps.models.hstu import HSTU, HSTULayer
from steps.models.page_pool import History, PagePool
from steps.models.repeated import Repeated

_CHANGED = (
    "the encoder's weights were changed, converted or moved since the cache was made: append the histories to a new "
    "cache"
)


@dataclass
class _User:
    """Where a user's `length` stored tokens are: in these pages of the pool, in order.

    With query times of the next token the keys of a history's last token depend on what comes next. It waits here until
    then: its item embedding (0 or 1, d), and its time (0 or 1,).
    """

    waiting: torch.Tensor
    waiting_time: torch.Tensor
    pages: list[int] = field(default_factory=list)
    length: int = 0

    @property
    def total(self) -> int:
        return self.length + len(self.waiting)


class HistoryCache:
    """Keys and values of users' histories under one HSTU encoder in eval mode, on the encoder's device.

    A user is a whole number that fits 64 bits. A cache is of the weights that the encoder has when the cache is made:
    after more training, or after other weights were loaded, make a new one. `append` and `encode` look at the position
    embeddings' table alone, and refuse if it changed; `save` compares all weights. Calls in and out of
    `torch.inference_mode` mix; what they return has no gradient, and is no inference tensor.

    Tensors are on the encoder's device, `offsets` on any. A call that is refused changes nothing.
    """

    def __init__(self, encoder: HSTU, page: int = 64) -> None:
        """page: tokens of a page. Reads all weights once.

        Raises ValueError if no cache of this encoder is exact, or it is no HSTU.
        """
        _require_hstu(encoder)
        layer = cast(HSTULayer, encoder.blocks[0])
        if layer.attention_scale is None and not layer.softmax:
            raise ValueError(
                "attention_scale true_len divides every token by a length that grows with the history, "
                "so nothing can be kept: use an encoder with attention_scale max_len"
            )
        page = count_of("page", page, "tokens")
        self._encoder, self._weights, self._sha256 = encoder, _identity(encoder), _digest(encoder)
        table = encoder.position.weight
        self._dtype = encoder.compute_dtype or table.dtype
        self._layers = [_in_type(cast(HSTULayer, block), self._dtype) for block in encoder.blocks]
        self._users: dict[int, _User] = {}
        made: dict[str, Any] = {"dtype": self._dtype, "device": table.device}
        keys, values = (torch.zeros(len(self._layers), 0, layer.heads, size, **made) for size in (layer.dqk, layer.dv))
        time = torch.zeros(0, dtype=torch.int64, device=table.device)
        self._pool = PagePool(page, History(keys, values, time))
        # Where kernels do the work, sizes are rounded up, so that requests have few shapes, and those of a shape that
        # comes again are CUDA graphs. These read the histories in `_buffer`, which stays where it is.
        self._in_kernels = runs_in_triton(keys[0], keys[0], values[0])
        self._repeated = Repeated(table.device)
        self._buffer = self._pool.empty(0)
        self._held: list[_User] = []  # whose histories an append has just left in the buffer

    def __contains__(self, user: int) -> bool:
        return user in self._users

    @property
    def lengths(self) -> dict[int, int]:
        """How many history tokens each user has."""
        return {name: user.total for name, user in self._users.items()}

    @property
    def bytes(self) -> int:
        """Bytes of the pages in use, and of the tokens that wait for the next."""
        pages = sum(len(user.pages) for user in self._users.values())
        waiting = sum(user.waiting.nbytes + user.waiting_time.nbytes for user in self._users.values())
        return pages * self._pool.page_bytes + waiting

    @property
    def pool_bytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return self._pool.num_pages * self._pool.page_bytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(
        self, users: Sequence[int], embeddings: torch.Tensor, timestamps: torch.Tensor | None, offsets: torch.Tensor
    ) -> None:
        """Let the histories of `users` (B) go on; users that are not known are made, with no token too.

        Times may go back, as in a forward pass: they are not compared, which would wait for the device.

        Args:
            embeddings: (T', d), of the new tokens' items, jagged over the users by `offsets` (B + 1,) int64.
            timestamps: (T',) int64 seconds; None where the encoder has no time bias.

        Raises:
            ValueError: a user twice, or with more tokens than the encoder has positions; shapes, types or devices other
                than these. The cache is then as it was.
        """
        names, counts = self._checked(users, "embeddings", embeddings, offsets)
        time = self._checked_time("timestamps", timestamps, len(embeddings), "token")
        if twice := [name for name, times in Counter(names).items() if times > 1]:
            raise ValueError(f"user {twice[0]} is named twice: give each user's new tokens together")
        if not names:
            return
        nobody = _User(embeddings[:0].clone(), time[:0].clone())
        found = [self._users.get(name, nobody) for name in names]
        most = self._encoder.num_positions
        for name, user, count in zip(names, found, counts, strict=True):
            if user.total + count > most:
                raise ValueError(
                    f"user {name} has {user.total} tokens and would get {count} more, but the encoder has {most} "
                    "positions: evict the user and append the latest tokens alone"
                )
        rows, times = list(embeddings.split(counts)), list(time.split(counts))
        query_times, kept = times, [(nobody.waiting, nobody.waiting_time)] * len(names)
        if self._layers[0].time == "next":
            rows = [torch.cat([user.waiting, own]) for user, own in zip(found, rows, strict=True)]
            times = [torch.cat([user.waiting_time, own]) for user, own in zip(found, times, strict=True)]
            kept = [(own[-1:].clone(), at[-1:].clone()) for own, at in zip(rows, times, strict=True)]
            query_times = [at[1:] for at in times]
            rows, times = [own[:-1] for own in rows], [at[:-1] for at in times]
        lengths = [user.length for user in found]
        more = [len(own) for own in rows]
        pages_for = self._pool.pages_for
        pages = self._pool.reserved([pages_for(n + new) - pages_for(n) for n, new in zip(lengths, more, strict=True)])
        tables = [user.pages + own for user, own in zip(found, pages, strict=True)]
        grown = [
            _User(*waiting, table, length + count)
            for table, length, count, waiting in zip(tables, lengths, more, kept, strict=True)
        ]
        if some := [index for index, count in enumerate(more) if count]:
            new = (torch.cat(rows), torch.cat(query_times), torch.cat(times))
            calculate = self._continued if any(lengths[index] for index in some) else self._begun
            slots, keys, values = calculate([grown[index] for index in some], [more[index] for index in some], *new)
            self._pool.write(slots, History(keys, values, new[2]))
        self._users.update(zip(names, grown, strict=True))
        self._pool.take(pages)

    @torch.inference_mode(False)
    @torch.no_grad()
    def encode(
        self,
        users: Sequence[int],
        candidates: torch.Tensor,
        offsets: torch.Tensor,
        time: torch.Tensor | None = None,
        micro_batch: int = 1024,
    ) -> torch.Tensor:
        """Hidden states (T, d) of candidates, each as the next token of its user's history; nothing is kept of them.

        The histories are copied out of their pages once. On CUDA a request whose shape, rounded up, comes a second time
        is captured as CUDA graphs, which are replayed from then on; the results are the same to the bit. The host waits
        for the device only to capture, and to read `offsets`, if they are there.

        Args:
            candidates: (T, d), item embeddings, jagged over `users` (B) by `offsets` (B + 1,) int64, on any device.
            time: (B,) int64 seconds, of each user's request, which may be before the last token's; None where the
                encoder has no time bias.
            micro_batch: so many candidates at once. Fewer take less memory, and read the histories more often.

        Returns:
            What `encoder.forward` gives the last token of history + candidate: not normalised.

        Raises:
            ValueError: an unknown user, a history that has no position left for its candidates; shapes, types or
                devices other than these.
        """
        names, counts = self._checked(users, "candidates", candidates, offsets)
        asked = self._checked_time("time", time, len(names), "user")
        micro_batch = count_of("micro_batch", micro_batch, "candidates")
        found = self._known(names)
        most = self._encoder.num_positions
        for name, user, count in zip(names, found, counts, strict=True):
            if count and user.total >= most:
                raise ValueError(
                    f"user {name} has {user.total} tokens, and a candidate would be beyond the encoder's {most} "
                    "positions: evict the user and append the latest tokens alone"
                )
        if not len(candidates):
            return torch.zeros_like(candidates)
        # A full history has no candidate here, so nobody reads it; it would be longer than kernels are told.
        nobody = _User(candidates[:0], self._pool.stored.time[:0])
        found = [nobody if user.total >= most else user for user in found]
        longest = min(self._rounded(max(user.total for user in found)), most - 1)
        request = ("histories", len(names), longest)
        again = self._repeated.seen(request)
        if self._held and len(self._held) == len(found) and all(map(operator.is_, self._held, found)):
            history = self._buffer
        else:
            history = self._collected(found, again)
        self._held = []
        run = self._run(history)
        # A user's stored tokens, then the one that waits, if one does: as sequences of their own.
        parts = self._parts(found)
        waiting: list[torch.Tensor] = []
        if any(len(user.waiting) for user in found):
            none, never = torch.zeros_like(candidates[:1]), self._pool.stored.time.new_zeros(1)
            waiting.append(torch.cat([user.waiting if len(user.waiting) else none for user in found]))
            waiting.append(torch.cat([user.waiting_time if len(user.waiting) else never for user in found]))
        hidden, most_of_one = torch.empty_like(candidates), self._rounded(max(counts))
        bounds = self._pool.offsets(counts)
        for start in range(0, len(candidates), micro_batch):
            end = min(start + micro_batch, len(candidates))
            size = min(self._rounded(end - start), micro_batch)
            max_len = min(most_of_one, size)
            own = F.pad(candidates[start:end], (0, 0, 0, size - (end - start)))
            states = run(
                ("candidates", request, size, max_len, len(waiting)),
                partial(self._scored, history, longest, max_len),
                [own, bounds.clamp(start, end) - start, parts, asked, *waiting],
            )
            hidden[start:end] = states[: end - start]
            waiting = []  # the first micro-batch has calculated them
        return hidden

    def evict(self, users: Sequence[int]) -> None:
        """Forget these users; others use their pages. Raises ValueError, and forgets nobody, if one is unknown."""
        names = dict.fromkeys(user_names(users))
        self._known(list(names))
        for name in names:
            self._pool.release(self._users.pop(name).pages)

    @torch.no_grad()
    def save(self, path: Path | str) -> None:
        """Write the histories to `path` (safetensors), atomically: of all tokens, and of no page what is not used.

        Raises ValueError if the encoder has other weights than the cache is of.
        """
        self._check_encoder()
        if _digest(self._encoder) != self._sha256:
            raise ValueError(_CHANGED)
        users = list(self._users.values())
        lengths = [user.length for user in users]
        slots, stored = self._pool.slots([user.pages for user in users], lengths), self._pool.stored
        table = self._encoder.position.weight
        tensors = {
            "users": torch.tensor(list(self._users), dtype=torch.int64),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "keys": stored.keys[:, slots],
            "values": stored.values[:, slots],
            "times": stored.time[slots],
            "num_waiting": torch.tensor([len(user.waiting) for user in users], dtype=torch.int64),
            "waiting": torch.cat([table[:0], *(user.waiting for user in users)]),
            "waiting_times": torch.cat([stored.time[:0], *(user.waiting_time for user in users)]),
        }
        # One entry: safetensors writes several in an order that differs from run to run.
        about = {"page": self._pool.page, "encoder": _kind(self._encoder), "weights": self._sha256}
        with atomic_path(Path(path)) as temporary:
            host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            save_file(host, temporary, {"history_cache": json.dumps(about)})

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def load(cls, path: Path | str, encoder: HSTU) -> "HistoryCache":
        """What `save` wrote. Raises StepError if the file is missing, damaged, or of another encoder."""
        _require_hstu(encoder)
        remedy = "append the histories to a new cache"
        try:
            with safe_open(path, framework="pt", device=str(encoder.position.weight.device)) as file:
                about = json.loads(file.metadata()["history_cache"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            for key, ours in _kind(encoder).items():
                if (theirs := about["encoder"][key]) != ours:
                    raise StepError(f"{path} is of an encoder with {key} {theirs}, this one has {ours}: {remedy}")
            cache = cls(encoder, about["page"])
            if about["weights"] != cache._sha256:
                raise StepError(f"{path} is of an encoder with other weights than this one's: {remedy}")
            cache._restore(tensors)
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise StepError(f"{path} does not hold a cache of histories ({error}): {remedy}") from error
        return cache

    def _restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Fill an empty cache with what `save` wrote."""
        self._require(tensors, dict.fromkeys(("users", "lengths", "num_waiting"), (len(tensors["users"]),)))
        names, lengths, counts = (tensors[name].tolist() for name in ("users", "lengths", "num_waiting"))
        most, waiting = self._encoder.num_positions, {0, int(self._layers[0].time == "next")}
        totals = [length + count for length, count in zip(lengths, counts, strict=True)]
        if len(set(names)) < len(names) or min(lengths, default=0) < 0 or max(totals, default=0) > most:
            raise ValueError(f"a user twice, or with fewer tokens than none or more than {most}")
        if not set(counts) <= waiting:
            raise ValueError(f"users with {sorted(set(counts))} tokens that wait, where there are {sorted(waiting)}")
        stored, waits = sum(lengths), sum(counts)
        self._require(tensors, {"times": (stored,), "waiting_times": (waits,)})
        self._require(tensors, {"waiting": (waits, self._encoder.dim)}, self._encoder.position.weight.dtype)
        layers, _, *of_keys = self._pool.stored.keys.shape
        shapes = {"keys": (layers, stored, *of_keys), "values": (layers, stored, *self._pool.stored.values.shape[2:])}
        self._require(tensors, shapes, self._dtype)
        tables = self._pool.reserved([self._pool.pages_for(length) for length in lengths])
        self._pool.write(
            self._pool.slots(tables, lengths), History(tensors["keys"], tensors["values"], tensors["times"])
        )
        tokens = zip(tensors["waiting"].split(counts), tensors["waiting_times"].split(counts), strict=True)
        for name, (own, at), pages, length in zip(names, tokens, tables, lengths, strict=True):
            self._users[name] = _User(own.clone(), at.clone(), pages, length)
        self._pool.take(tables)

    @staticmethod
    def _require(
        tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.int64
    ) -> None:
        for name, shape in shapes.items():
            require_tensor(name, tensors[name], shape, dtype, "as `save` writes it")

    def _checked(
        self, users: Sequence[int], what: str, embeddings: torch.Tensor, offsets: torch.Tensor
    ) -> tuple[list[int], list[int]]:
        """The users' names, and how many of the `embeddings` each has. ValueError if they do not fit together."""
        if self._encoder.training:
            raise ValueError("the encoder is in training mode, where dropout is random: call encoder.eval() first")
        self._check_encoder()
        names, table = user_names(users), self._encoder.position.weight
        require_tensor(what, embeddings, ("T", table.shape[1]), table.dtype, "as the encoder's are", table.device)
        return names, jagged_counts(offsets, len(names), len(embeddings), what)

    def _check_encoder(self) -> None:
        """ValueError for what shows, without a look at the device, that the encoder is not as it was."""
        if _identity(self._encoder) != self._weights:
            raise ValueError(_CHANGED)

    def _checked_time(self, what: str, time: torch.Tensor | None, length: int, one: str) -> torch.Tensor:
        """`time` (length,), or zeros where the encoder reads none."""
        if time is None:
            if self._layers[0].time != "none":
                raise ValueError(f"{what} is missing: the encoder has a time bias, so give seconds for every {one}")
            return self._pool.stored.time.new_zeros(length)
        require_tensor(what, time, (length,), torch.int64, f"seconds for every {one}", self._pool.stored.time.device)
        return time

    def _known(self, names: list[int]) -> list[_User]:
        for name in names:
            if name not in self._users:
                raise ValueError(
                    f"user {name} is not in the cache: append the user's history first, if only of 0 tokens"
                )
        return [self._users[name] for name in names]

    def _begun(
        self,
        users: list[_User],
        more: list[int],
        embeddings: torch.Tensor,
        query_time: torch.Tensor,
        time: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slots (T',) in the pool, keys (layers, T', h, dqk) and values (layers, T', h, dv) of the first tokens of
        histories, (T', d) jagged by their numbers, `more`."""
        offsets, history = self._pool.offsets(more), self._pool.empty(len(embeddings))
        _, position = sequence_and_position(offsets, len(embeddings))
        x = self._encoder.embed(embeddings, position)
        for layer, keys, values in zip(self._layers, history.keys, history.values, strict=True):
            u, q, k, v = layer.project(x, self._dtype)
            keys.copy_(k)
            values.copy_(v)
            if layer is not self._layers[-1]:  # nobody asks for its output: candidates read keys and values alone
                x = layer.finish(x, u, layer.attend(q, k, v, offsets, max(more), query_time, time), self._dtype)
        return self._pool.slots([user.pages for user in users], more), history.keys, history.values

    def _continued(
        self,
        users: list[_User],
        more: list[int],
        embeddings: torch.Tensor,
        query_time: torch.Tensor,
        time: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `_begun`, of tokens behind others. `users` as they are with them."""
        tokens = len(embeddings)
        longest = min(self._rounded(max(user.length for user in users)), self._encoder.num_positions)
        size, max_new = self._rounded(tokens), self._rounded(max(more))
        key = ("append", len(users), longest, size, max_new)
        history, slots = self._collected_with_slots(users, self._repeated.seen(("more", *key)))
        offsets, parts = self._pool.offsets(more), self._parts(users)
        owner, position = sequence_and_position(offsets, tokens)
        position += self._pool.on_device([user.length - count for user, count in zip(users, more, strict=True)])[owner]
        place = parts[0::2][owner] + position
        rest = size - tokens  # rows that belong to nobody go to the history's last row
        inputs = [
            F.pad(embeddings, (0, 0, 0, rest)),
            *(F.pad(numbers, (0, rest)) for numbers in (query_time, time, position)),
            F.pad(place, (0, rest), value=len(history.time) - 1),
            _twice(offsets)[1:],  # no query for what waits
            parts,
        ]
        self._run(history)(key, partial(self._calculate_appended, history, longest, max_new), inputs)
        if history is self._buffer:
            self._held = users
        return slots[place], history.keys.index_select(1, place), history.values.index_select(1, place)

    def _calculate_appended(
        self,
        history: History,
        longest: int,
        max_new: int,
        embeddings: torch.Tensor,
        query_time: torch.Tensor,
        time: torch.Tensor,
        position: torch.Tensor,
        place: torch.Tensor,
        offsets: torch.Tensor,
        parts: torch.Tensor,
    ) -> None:
        """Put keys, values and times of new tokens (T, d) into their places in the history."""
        history.time.index_copy_(0, place, time)
        x = self._encoder.embed(embeddings, position)
        for layer, keys, values in zip(self._layers, history.keys, history.values, strict=True):
            u, q, k, v = layer.project(x, self._dtype)
            keys.index_copy_(0, place, k)
            values.index_copy_(0, place, v)
            if layer is self._layers[-1]:
                break
            attention_output = appended_attention(
                q, keys, values, offsets, parts, max_new, longest, alpha=layer.alpha, softmax=layer.softmax,
                attention_scale=layer.attention_scale, position_bias=layer.position_bias, time_bias=layer.time_bias,
                query_time=query_time, key_time=history.time, **layer.window,
            )  # fmt: skip
            x = layer.finish(x, u, attention_output, self._dtype)

    def _parts(self, users: list[_User]) -> torch.Tensor:
        """Offsets (2 B + 1,) of users' histories: of each the stored tokens, then the one that waits, if one does."""
        return self._pool.offsets([count for user in users for count in (user.length, len(user.waiting))])

    def _collected(self, users: list[_User], keep: bool) -> History:
        """Copies of the whole histories, with room for the tokens that wait, and a row more; in the buffer, if they
        fit. keep: make it larger, if they do not."""
        return self._collected_with_slots(users, keep)[0]

    def _collected_with_slots(self, users: list[_User], keep: bool) -> tuple[History, torch.Tensor]:
        """As `_collected`; and the slots in the pool that the rows were copied from."""
        totals = [user.total for user in users]
        if any(totals) and not self._pool.num_pages:
            self._pool.reserved([1])  # a page 0, see below
        # A token that waits has no slot: its place is copied from any.
        slots, rows, history = self._pool.slots([[*user.pages, 0] for user in users], totals), sum(totals), self._buffer
        if rows >= len(history.time):
            history = self._pool.empty(self._rounded(rows + 1))
            if keep and self._in_kernels:
                self._repeated.forget()
                self._buffer = history
        if history is self._buffer:
            self._held = []
        self._pool.read(slots, history)
        return history, slots

    def _rounded(self, count: int) -> int:
        """A size that is at least the count: at most a quarter more, or 15, so that few sizes occur."""
        if not self._in_kernels:
            return count
        step = max(16, 2 ** ((count - 1).bit_length() - 3))
        return -(-count // step) * step

    def _run(self, history: History) -> Callable[[Hashable, Callable[..., Any], list[torch.Tensor]], Any]:
        """How to call work on a history: graphs can read none but the buffer."""
        return partial(self._repeated.run, capture=self._in_kernels and history is self._buffer)

    def _scored(
        self,
        history: History,
        longest: int,
        max_len: int,
        candidates: torch.Tensor,
        offsets: torch.Tensor,
        parts: torch.Tensor,
        asked: torch.Tensor,
        waiting: torch.Tensor | None = None,
        waiting_time: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of candidates (T, d), at most `max_len` of a user: they see the history and themselves. Those
        of rows behind the last offset mean nothing.

        On the way keys, values and times of the tokens that wait (B, d) are put into their places behind the stored
        ones, for the times `asked` (B,). A user without such a token has any row, which goes to the history's last.
        """
        size, ends, lengths = len(candidates), parts[0::2].contiguous(), parts.diff()
        row = torch.arange(size, device=offsets.device)
        owner = (torch.searchsorted(offsets, row, right=True) - 1).clamp(max=len(asked) - 1)
        x, position = candidates, ends.diff()[owner]
        if waiting is not None and waiting_time is not None:
            place = parts[1::2].masked_fill(lengths[1::2] == 0, len(history.time) - 1)
            history.time.index_copy_(0, place, waiting_time)
            x, position = torch.cat([x, waiting]), torch.cat([position, lengths[0::2]])
            each = torch.arange(1, len(parts) + 1, device=parts.device) // 2  # a query for the stored tokens of each
            times = {"query_time": _twice(asked), "key_time": _twice(waiting_time)}
        x = self._encoder.embed(x, position)
        for layer, keys, values in zip(self._layers, history.keys, history.values, strict=True):
            attend = partial(_attended, layer, keys, values, history.time, longest)
            u, q, k, v = layer.project(x, self._dtype)
            attended = []
            if waiting is not None:
                keys.index_copy_(0, place, k[size:])
                values.index_copy_(0, place, v[size:])
                if layer is self._layers[-1]:  # nobody asks for their output: candidates read keys and values alone
                    x, u = x[:size], u[:size]
                else:
                    attended.append(attend(q[size:], k[size:], v[size:], each, parts, 1, **times))
            own = (q[:size], k[:size], v[:size])
            attended.insert(0, attend(*own, offsets, ends, max_len, query_time=asked, key_time=asked))
            x = layer.finish(x, u, torch.cat(attended) if len(attended) > 1 else attended[0], self._dtype)
        return x


def _attended(
    layer: HSTULayer,
    keys: torch.Tensor,
    values: torch.Tensor,
    time: torch.Tensor,
    longest: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    history_offsets: torch.Tensor,
    max_len: int,
    **times: Any,
) -> torch.Tensor:
    """A layer's attention (T, h, dv) of tokens that see a history and themselves."""
    return cached_attention(
        q, k, v, offsets, keys, values, history_offsets, max_len, longest, alpha=layer.alpha,
        attention_scale=layer.attention_scale, softmax=layer.softmax, position_bias=layer.position_bias,
        time_bias=layer.time_bias, cached_time=time, **(times | layer.window),
    )  # fmt: skip


def _in_type(layer: HSTULayer, dtype: torch.dtype) -> HSTULayer:
    """The layer; a copy whose matrices have the type that is computed with, if theirs is another: every request would
    convert them."""
    if layer.uvqk.dtype == dtype:
        return layer
    layer = deepcopy(layer).eval()
    for matrix in (layer.uvqk, *layer.output.parameters()):
        matrix.data = matrix.data.to(dtype)
    return layer


def _twice(numbers: torch.Tensor) -> torch.Tensor:
    """a, a, b, b, ... of a, b, ..."""
    return torch.stack([numbers, numbers], 1).flatten()


def _require_hstu(encoder: HSTU) -> None:
    if not isinstance(encoder, HSTU):
        raise ValueError(
            f"encoder must be an HSTU, as histories are kept of HSTU alone, not a {type(encoder).__name__}"
        )


def _kind(encoder: HSTU) -> dict[str, Any]:
    """What makes two encoders' keys and values comparable, besides the weights."""
    layer, table = cast(HSTULayer, encoder.blocks[0]), encoder.position.weight
    return {
        "blocks": len(encoder.blocks),
        "dim": encoder.dim,
        "heads": layer.heads,
        "dqk": layer.dqk,
        "dv": layer.dv,
        "positions": encoder.num_positions,
        "attention": "softmax" if layer.softmax else "silu",
        "alpha": layer.alpha,
        "attention scale": layer.attention_scale,
        "position bias": layer.position_bias is not None,
        "time bias": layer.time,
        **layer.window,
        "type": str(encoder.compute_dtype or table.dtype),
    }


def _identity(encoder: HSTU) -> tuple[Any, ...]:
    """What changes with the weights, or where they are: training and loading count a tensor's versions, conversions
    and moves give it another address. One table stands for all, as every request asks."""
    table = encoder.position.weight
    version = None if table.is_inference() else table._version
    return table.data_ptr(), table.dtype, version, encoder.compute_dtype


def _digest(encoder: HSTU) -> str:
    """SHA-256 of the weights."""
    return hashlib.sha256(save({name: w.cpu().contiguous() for name, w in encoder.state_dict().items()})).hexdigest()
