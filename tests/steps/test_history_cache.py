"""Candidates scored against kept histories have the hidden states of a forward pass of their own."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kernels.jagged.naive import offsets_from_lengths, sequence_and_position
from steps.common.cli import StepError
from steps.data.sequences import Batch, Sequences
from steps.models import history_cache
from steps.models.history_cache import HistoryCache
from steps.models.hstu import HSTU, BiasConfig, HSTUConfig
from steps.models.repeated import Repeated
from tests.conftest import ROOT
from tests.kernels.tolerance import assert_no_worse

DIM, MAX_LEN, SLOTS, PAGE = 6, 17, 3, 4
#: The users' histories, one empty, one of a token, one of whole pages, and one as long as it may be with a candidate.
LENGTHS = {40: 0, 7: 1, 23: 8, 5: MAX_LEN + SLOTS - 1, 11: 6}
CANDIDATES = {40: 3, 7: 2, 23: 5, 5: 0, 11: 4}
KINDS = list(product(["next", "self", "none"], ["silu", "softmax"], [True, False]))


def make(
    time: str = "next",
    attention: str = "silu",
    position: bool = True,
    dtype: torch.dtype = torch.float64,
    **changes: Any,
) -> HSTU:
    """An encoder in eval mode whose weights are large enough that every term matters."""
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "dim": DIM, "blocks": 3, "heads": 2, "dqk": 3, "dv": 5, "output_slots": SLOTS, "attention": attention,
        "alpha": 0.7, "attention_scale": "max_len", "bias": BiasConfig(position, time),
    }  # fmt: skip
    encoder = HSTU(HSTUConfig(**settings | changes), MAX_LEN, dropout=0.2).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3)
    return encoder.to(dtype)


@dataclass
class Case:
    """Histories and candidates of users, and when they are asked for."""

    history: dict[int, torch.Tensor]
    times: dict[int, torch.Tensor]
    candidates: dict[int, torch.Tensor]
    asked: dict[int, int]


@pytest.fixture
def case() -> Case:
    return case_of(LENGTHS, CANDIDATES, DIM)


def case_of(lengths: dict[int, int], candidates: dict[int, int], dim: int) -> Case:
    torch.manual_seed(2)

    def seconds(n: int) -> torch.Tensor:  # gaps of all sizes, and times that go back
        return 10**9 + (torch.rand(n) * 19).exp().long() * (1 - 2 * torch.randint(2, (n,)))

    return Case(
        {user: torch.randn(n, dim, dtype=torch.float64) for user, n in lengths.items()},
        {user: seconds(n) for user, n in lengths.items()},
        {user: torch.randn(n, dim, dtype=torch.float64) for user, n in candidates.items()},
        {user: int(seconds(1)) for user in lengths},
    )


def plain(encoder: HSTU, case: Case, users: list[int]) -> torch.Tensor:
    """The last hidden state of a forward pass of history and candidate, a window for each candidate."""
    dtype = encoder.position.weight.dtype
    tokens, times, next_times = [], [], []
    for user in users:
        asked = torch.tensor([case.asked[user]])
        for candidate in case.candidates[user]:
            tokens.append(torch.cat([case.history[user], candidate[None]]))
            times.append(torch.cat([case.times[user], asked]))
            next_times.append(torch.cat([case.times[user][1:], asked, asked])[-len(times[-1]) :])
    offsets = offsets_from_lengths(torch.tensor([len(own) for own in tokens]))
    total = int(offsets[-1])
    sequence_id, position = sequence_and_position(offsets, total)
    none = torch.zeros(total, dtype=torch.int64)
    batch = Batch(
        item=none, timestamp=torch.cat(times), next_item=none, next_timestamp=torch.cat(next_times), offsets=offsets,
        sequence_id=sequence_id, position=position, max_len=int(offsets.diff().max()), user=none[: len(tokens)],
        sequences=Sequences(torch.zeros(1, dtype=torch.int64), none[:0], none[:0], 0), index=none,
    )  # fmt: skip
    with torch.no_grad():
        return encoder(torch.cat(tokens).to(dtype), batch)[offsets[1:] - 1]


def append(cache: HistoryCache, case: Case, users: list[int], start: int = 0, end: int | None = None) -> None:
    """The tokens from `start` to before `end` of each user's history, in one call."""
    part = slice(start, end)
    rows = [case.history[user][part] for user in users]
    offsets = offsets_from_lengths(torch.tensor([len(own) for own in rows]))
    times = torch.cat([case.times[user][part] for user in users])
    table = cache._encoder.position.weight
    cache.append(users, torch.cat(rows).to(table), times.to(table.device), offsets)


def filled(encoder: HSTU, case: Case) -> HistoryCache:
    cache = HistoryCache(encoder, PAGE)
    append(cache, case, list(LENGTHS))
    return cache


def encode(cache: HistoryCache, case: Case, users: list[int], micro_batch: int = 1024) -> torch.Tensor:
    offsets = offsets_from_lengths(torch.tensor([len(case.candidates[user]) for user in users]))
    table = cache._encoder.position.weight
    candidates = torch.cat([case.candidates[user] for user in users]).to(table)
    asked = torch.tensor([case.asked[user] for user in users], device=table.device)
    return cache.encode(users, candidates, offsets, asked, micro_batch)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_hidden_states_are_those_of_a_forward_pass_of_each_candidate(
    time: str, attention: str, position: bool, dtype: torch.dtype, tolerance: float, case: Case
) -> None:
    encoder = make(time, attention, position, dtype)
    found = encode(filled(encoder, case), case, list(LENGTHS))
    assert found.dtype == dtype
    close(found, plain(encoder, case, list(LENGTHS)), tolerance)


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (3, 2), (6, 1)])
def test_semi_local_hidden_states_are_those_of_a_forward_pass(
    window: int, sinks: int, time: str, attention: str, position: bool, case: Case
) -> None:
    encoder = make(time, attention, position, max_attn_len=window, num_sink_tokens=sinks)
    cache = HistoryCache(encoder, PAGE)
    append(cache, case, list(LENGTHS), 0, 5)
    append(cache, case, list(LENGTHS), 5)
    close(encode(cache, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_low_precision_is_no_worse_than_that_of_a_forward_pass(
    time: str, attention: str, position: bool, case: Case
) -> None:
    """Stored keys have the type that is computed with; the exact weights and inputs are those of float32."""
    for tensors in (case.history, case.candidates):
        tensors.update({user: tensor.float().double() for user, tensor in tensors.items()})
    encoder = make(time, attention, position, torch.float32)
    exact = plain(make(time, attention, position, torch.float32).double(), case, list(LENGTHS))
    encoder.compute_dtype = torch.bfloat16
    found, low = encode(filled(encoder, case), case, list(LENGTHS)), plain(encoder, case, list(LENGTHS))
    assert found.dtype == torch.float32
    assert not torch.equal(low.double(), exact)
    assert_no_worse([found], [low], [exact], ["hidden states"])


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_candidates_have_the_ranks_of_forward_passes(time: str, attention: str, position: bool, case: Case) -> None:
    case.candidates[11] = torch.randn(300, DIM, dtype=torch.float64)
    encoder = make(time, attention, position)
    towards = torch.randn(DIM, dtype=torch.float64)
    found = encode(filled(encoder, case), case, [11], micro_batch=128) @ towards
    assert torch.equal(found.argsort(descending=True), (plain(encoder, case, [11]) @ towards).argsort(descending=True))


class PretendedGraph:
    """What a CUDA graph does: each replay reads the same inputs, and writes the same output."""

    captured = 0

    def __init__(self, work: Callable[..., Any], inputs: list[torch.Tensor]) -> None:
        PretendedGraph.captured += 1
        self.work, self.inputs, self.output = work, inputs, work(*inputs)
        if self.output is not None:
            self.output.fill_(torch.nan)

    def replay(self) -> None:
        found = self.work(*self.inputs)
        if found is not None:
            self.output.copy_(found)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[PretendedGraph]:
    """Requests of a shape that comes again are captured, as on CUDA, and their sizes rounded up."""

    def captured(_: Repeated, work: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[Any, Any, Any]:
        graph = PretendedGraph(work, inputs)
        return graph, inputs, graph.output

    monkeypatch.setattr(history_cache, "runs_in_triton", lambda *_: True)
    monkeypatch.setattr(Repeated, "_captured", captured)
    monkeypatch.setattr(PretendedGraph, "captured", 0)
    return PretendedGraph


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_requests_that_come_again_have_the_same_hidden_states(
    time: str, attention: str, position: bool, case: Case, graphs: type[PretendedGraph]
) -> None:
    """Through graphs, whatever else was asked for in between, at other times, and of other users of like lengths."""
    encoder = make(time, attention, position)
    cache = filled(encoder, case)
    everybody = list(LENGTHS)
    first = encode(cache, case, everybody, 7)
    close(first, plain(encoder, case, everybody))
    assert graphs.captured == 0
    assert torch.equal(encode(cache, case, everybody, 7), first)
    made = 2 if time == "next" else 1  # a graph for all micro-batches, but the first has the tokens that wait
    assert graphs.captured == made
    for users in ([23, 11], [11, 23], [7], [40], [7]):
        close(encode(cache, case, users), plain(encoder, case, users))
    case.asked = {user: at + 10**7 for user, at in case.asked.items()}
    case.candidates = {user: tokens.flip(0) for user, tokens in case.candidates.items()}
    captured = graphs.captured
    for users in (everybody, everybody[::-1]):
        close(encode(cache, case, users, 7), plain(encoder, case, users))
    assert graphs.captured == captured


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_histories_that_go_on_in_graphs_are_the_same(
    time: str, attention: str, position: bool, case: Case, graphs: type[PretendedGraph]
) -> None:
    """Token by token, of two users, with a request after each; and semi-local."""
    for changes in ({}, {"max_attn_len": 3, "num_sink_tokens": 2}):
        encoder = make(time, attention, position, **changes)
        cache, users = HistoryCache(encoder, PAGE), [5, 23]
        for end in range(1, 9):
            append(cache, case, users, end - 1, end)
            part = Case(
                {user: case.history[user][:end] for user in users},
                {user: case.times[user][:end] for user in users},
                {5: case.candidates[11], 23: case.candidates[23]},
                case.asked,
            )
            close(encode(cache, part, users), plain(encoder, part, users))
        assert graphs.captured >= 2
        graphs.captured = 0


def test_a_request_reads_what_its_append_has_just_laid_out(
    case: Case, graphs: type[PretendedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """But not after another append, another request, or an eviction, which may have changed it."""
    encoder = make("next")
    cache, users, copied = HistoryCache(encoder, PAGE), [11, 23], []
    original = cache._collected
    monkeypatch.setattr(cache, "_collected", lambda *given: copied.append(len(given[0])) or original(*given))

    def from_the_start(end: int) -> None:
        if 11 in cache:
            cache.evict(users)
        append(cache, case, users, 0, 4)
        append(cache, case, users, 4, end)

    def states(asked_for: list[int]) -> None:
        part = Case(case.history | {23: case.history[23][:6]}, case.times | {23: case.times[23][:6]},
                    case.candidates, case.asked)  # fmt: skip
        close(encode(cache, part, asked_for), plain(encoder, part, asked_for))

    for _ in range(2):
        from_the_start(6)
        states(users)
    copied.clear()
    from_the_start(6)
    states(users)
    assert copied == []
    states(users)
    from_the_start(6)
    states(users[::-1])
    states(users)
    from_the_start(6)
    append(cache, case, [7])
    append(cache, case, [40])
    cache.evict([23])
    append(cache, case, [23], 0, 6)
    states(users)
    assert copied == [2] * 4


def test_a_graph_goes_when_many_others_came_or_histories_outgrow_the_buffer(
    case: Case, graphs: type[PretendedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = make("self")
    cache = filled(encoder, case)
    expected = {users: plain(encoder, case, list(users)) for users in ((11,), (11, 23), (5, 23, 11))}
    monkeypatch.setattr(cache._repeated, "_most", 1)
    for users, count in (((11,), 0), ((11,), 1), ((11,), 1), ((11, 23), 1), ((11, 23), 2), ((11,), 3), ((11,), 3)):
        close(encode(cache, case, list(users)), expected[users])
        assert graphs.captured == count, users
    rows = len(cache._buffer.time)
    for _ in range(2):
        close(encode(cache, case, [5, 23, 11]), expected[5, 23, 11])
    assert len(cache._buffer.time) > rows
    assert graphs.captured == 4
    close(encode(cache, case, [11]), expected[(11,)])
    assert graphs.captured == 5  # the old one read the old buffer


def test_a_call_that_failed_is_not_captured_next(graphs: type[PretendedGraph]) -> None:
    """Its kernels may not be compiled, which cannot be done in a capture."""
    calls, one = Repeated(torch.device("cpu")), [torch.ones(2)]

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        calls.run("a", fail, one)
    for captured in (0, 1, 1):
        assert torch.equal(calls.run("a", torch.neg, one), -one[0])
        assert graphs.captured == captured


def test_after_a_capture_that_failed_the_next_has_another_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, one, pools = Repeated(torch.device("cpu")), [torch.ones(2)], iter("ab")
    failed: list[Any] = []

    def captured(self: Repeated, work: Callable[..., Any], inputs: list[torch.Tensor]) -> tuple[Any, Any, Any]:
        self._pool = self._pool or next(pools)
        if not failed:
            failed.append(self._pool)
            raise RuntimeError("operation not permitted when stream is capturing")
        assert self._pool not in failed
        graph = PretendedGraph(work, inputs)
        return graph, inputs, graph.output

    monkeypatch.setattr(Repeated, "_captured", captured)
    calls.run("a", torch.neg, one)
    with pytest.raises(RuntimeError, match="not permitted"):
        calls.run("a", torch.neg, one)
    assert torch.equal(calls.run("a", torch.neg, one), -one[0])


@pytest.mark.parametrize("count", [0, 1, 16, 17, 112, 128, 129, 1000, 1024, 1025, 8192, 8193, 10**6])
def test_sizes_are_rounded_up_by_a_quarter_at_most(count: int, graphs: type[PretendedGraph]) -> None:
    rounded = HistoryCache(make())._rounded(count)
    assert count <= rounded <= max(1.25 * count, count + 15)
    assert HistoryCache(make())._rounded(rounded) == rounded


def token_by_token(cache: HistoryCache, case: Case) -> None:
    for at in range(max(LENGTHS.values())):
        append(cache, case, [user for user, n in LENGTHS.items() if n > at] or [40], at, at + 1)
    append(cache, case, [40])


def in_three_parts(cache: HistoryCache, case: Case) -> None:
    for start, end in ((0, 5), (5, 7), (7, None)):
        append(cache, case, list(LENGTHS), start, end)


def user_by_user(cache: HistoryCache, case: Case) -> None:
    for user in reversed(LENGTHS):
        append(cache, case, [user])


def after_eviction(cache: HistoryCache, case: Case) -> None:
    """Into pages that others have used, and not in their order."""
    append(cache, case, [11, 5, 23, 7])
    pages = cache.pool_bytes
    cache.evict([7, 5])
    append(cache, case, [7, 40])
    cache.evict([11, 23])
    append(cache, case, [23, 5, 11])
    assert cache.pool_bytes == pages


WAYS = [token_by_token, in_three_parts, user_by_user, after_eviction]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_it_does_not_matter_how_histories_came_in(
    time: str, attention: str, position: bool, way: Callable[[HistoryCache, Case], None], case: Case
) -> None:
    encoder = make(time, attention, position)
    cache = HistoryCache(encoder, PAGE)
    way(cache, case)
    assert cache.lengths == LENGTHS
    close(encode(cache, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))


@pytest.mark.parametrize("time", ["next", "self", "none"])
def test_histories_go_on_after_candidates_were_scored(time: str, case: Case) -> None:
    """Candidates leave nothing behind: neither keys of theirs nor those of a last token at the time of the request."""
    encoder = make(time)
    cache = HistoryCache(encoder, PAGE)
    append(cache, case, [5, 23], 0, 6)
    before = cache.bytes
    shorter = Case(
        {user: tokens[:6] for user, tokens in case.history.items()},
        {user: times[:6] for user, times in case.times.items()},
        case.candidates,
        case.asked,
    )
    close(encode(cache, case, [23]), plain(encoder, shorter, [23]))
    assert cache.bytes == before
    append(cache, case, [5, 23], 6)
    close(encode(cache, case, [23]), plain(encoder, case, [23]))


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
@pytest.mark.parametrize("micro_batch", [1, 3, 5, 13])
def test_it_does_not_matter_how_many_candidates_are_scored_at_once(
    time: str, attention: str, position: bool, micro_batch: int, case: Case
) -> None:
    encoder = make(time, attention, position)
    found = encode(filled(encoder, case), case, list(LENGTHS), micro_batch)
    close(found, plain(encoder, case, list(LENGTHS)))


@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_neither_other_users_nor_the_order_matter(time: str, attention: str, position: bool, case: Case) -> None:
    encoder = make(time, attention, position)
    cache = filled(encoder, case)
    for users in ([23], [11, 23, 7], [5, 40, 5, 7], [40]):
        if any(CANDIDATES[user] for user in users):
            close(encode(cache, case, users), plain(encoder, case, users))
    case.candidates = {user: tokens.flip(0) for user, tokens in case.candidates.items()}
    close(encode(cache, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))


def test_a_user_may_be_asked_for_at_two_times_in_one_call(case: Case) -> None:
    encoder = make("next")
    cache = filled(encoder, case)
    candidates, asked = case.candidates[23][:1], [10**9 + 7, 10**9 + 7 * 10**6]
    found = cache.encode([23, 23], candidates.repeat(2, 1), torch.tensor([0, 1, 2]), torch.tensor(asked))
    case.candidates[23] = candidates
    for state, time in zip(found, asked, strict=True):
        case.asked[23] = time
        close(state[None], plain(encoder, case, [23]))
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_a_saved_cache_is_the_cache(
    time: str, attention: str, position: bool, dtype: torch.dtype, case: Case, tmp_path: Path
) -> None:
    """It holds the tokens alone: pages in use, and nothing that evicted users left in them."""
    encoder = make(time, attention, position, torch.float32 if dtype == torch.bfloat16 else dtype)
    encoder.compute_dtype = dtype if dtype == torch.bfloat16 else None
    cache = HistoryCache(encoder, PAGE)
    after_eviction(cache, case)
    cache.save(tmp_path / "cache.safetensors")
    cache.save(tmp_path / "again.safetensors")
    assert (tmp_path / "cache.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*.safetensors*")) == ["again.safetensors", "cache.safetensors"]
    stored = sum(LENGTHS.values()) - (sum(n > 0 for n in LENGTHS.values()) if time == "next" else 0)
    assert load_file(tmp_path / "cache.safetensors")["keys"].shape == (3, stored, 2, 3)
    loaded = HistoryCache.load(tmp_path / "cache.safetensors", encoder)
    assert (loaded.lengths, loaded.bytes) == (cache.lengths, cache.bytes)
    assert loaded.pool_bytes <= cache.pool_bytes
    assert torch.equal(encode(loaded, case, list(LENGTHS)), encode(cache, case, list(LENGTHS)))
    if dtype == torch.float64:
        more = Case({11: torch.randn(7, DIM, dtype=torch.float64)}, {11: torch.tensor([5, 3, 9, 9, 2, 80, 7])}, {}, {})
        append(loaded, more, [11])
        for name in ("history", "times"):
            getattr(case, name)[11] = torch.cat([getattr(case, name)[11], getattr(more, name)[11]])
        close(encode(loaded, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))


def test_a_cache_of_nobody_is_saved_and_scores_nothing(tmp_path: Path) -> None:
    encoder = make()
    HistoryCache(encoder).save(tmp_path / "cache")
    cache = HistoryCache.load(tmp_path / "cache", encoder)
    nothing, offsets = torch.zeros(0, DIM, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
    cache.append([], nothing, offsets[:0], offsets)
    assert cache.encode([], nothing, offsets, offsets[:0]).shape == (0, DIM)
    assert (cache.lengths, cache.bytes, cache.pool_bytes) == ({}, 0, 0)


def test_bytes_go_back_when_users_go(case: Case) -> None:
    """A token of 3 layers has 2 heads of 3 + 5 numbers of 8 bytes in each, and a time."""
    page = PAGE * (3 * 2 * (3 + 5) * 8 + 8)
    cache = HistoryCache(make("self"), PAGE)
    append(cache, case, [23])
    assert cache.bytes == 2 * page
    append(cache, case, [11, 5])
    assert cache.bytes == (2 + 2 + 5) * page
    most = cache.pool_bytes
    assert most >= cache.bytes
    for _ in range(20):
        cache.evict([5, 23])
        assert cache.bytes == 2 * page
        assert list(cache.lengths) == [11]
        assert (5 in cache, 11 in cache) == (False, True)
        append(cache, case, [23, 5])
    assert (cache.bytes, cache.pool_bytes) == ((2 + 2 + 5) * page, most)


def test_a_token_that_waits_is_counted(case: Case) -> None:
    cache = HistoryCache(make("next"), PAGE)
    append(cache, case, [7])
    assert (cache.lengths, cache.bytes, cache.pool_bytes) == ({7: 1}, DIM * 8 + 8, 0)
    append(cache, case, [23])
    assert cache._users[23].waiting.untyped_storage().nbytes() == DIM * 8  # not a view of all that came with it


LONG = {3: 0, 8: 64, 2: 261, 6: 150}, {3: 2, 8: 1, 2: 9, 6: 6}
WIDE: dict[str, Any] = {"dim": 32, "blocks": 2, "heads": 2, "dqk": 32, "dv": 16, "output_slots": 1000}


@pytest.mark.gpu
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", ["short", "long"])
@pytest.mark.parametrize(("time", "attention", "position"), KINDS)
def test_a_gpu_finds_what_the_cpu_finds_in_float64(
    time: str, attention: str, position: bool, size: str, low: bool, case: Case, tmp_path: Path
) -> None:
    """Histories that come in parts, into pages that others had; candidates in two sizes; a saved cache; evictions."""
    changes = WIDE if size == "long" else {}
    if size == "long":
        case = case_of(*LONG, dim=WIDE["dim"])
    for tensors in (case.history, case.candidates):
        tensors.update({user: tensor.float().double() for user, tensor in tensors.items()})
    users = list(case.history)
    exact = plain(make(time, attention, position, torch.float32, **changes).double(), case, users)
    encoder = make(time, attention, position, torch.float32, **changes)
    if low:
        encoder.compute_dtype = torch.bfloat16
        on_cpu = plain(encoder, case, users)
    encoder = encoder.cuda()

    def as_exact(found: torch.Tensor) -> None:
        if low:
            assert_no_worse([found.cpu()], [on_cpu], [exact], ["hidden states"])
        else:
            close(found.cpu().double(), exact, 1e-5)

    cache = HistoryCache(encoder, PAGE)
    append(cache, case, users[:2])
    cache.evict(users[:1])
    for start, end in ((0, 5), (5, 70), (70, None)):
        append(cache, case, [users[0], *users[2:]], start, end)
    first = encode(cache, case, users)
    as_exact(first)
    for _ in range(2):  # captured, and replayed
        assert torch.equal(encode(cache, case, users), first)
    as_exact(encode(cache, case, users, micro_batch=7))
    as_exact(encode(cache, case, users, micro_batch=7))
    cache.save(tmp_path / "cache")
    loaded = HistoryCache.load(tmp_path / "cache", encoder)
    assert loaded.lengths == cache.lengths == {user: len(case.history[user]) for user in cache.lengths}
    as_exact(encode(loaded, case, users))
    loaded.evict(users[1:])
    append(loaded, case, users[:0:-1])
    as_exact(encode(loaded, case, users))


@pytest.mark.gpu
@pytest.mark.parametrize("time", ["next", "none"])
def test_a_request_does_not_wait_for_the_gpu(time: str, case: Case) -> None:
    encoder = make(time, dtype=torch.float32).cuda()
    cache = HistoryCache(encoder, PAGE)
    append(cache, case, list(LENGTHS), 0, 2)
    append(cache, case, list(LENGTHS), 2, 4)
    history = torch.cat([case.history[user][4:] for user in LENGTHS]).float().cuda()
    seconds = torch.cat([case.times[user][4:] for user in LENGTHS]).cuda()
    candidates = torch.cat([case.candidates[user] for user in LENGTHS]).float().cuda()
    asked = torch.tensor([case.asked[user] for user in LENGTHS]).cuda()
    new = offsets_from_lengths(torch.tensor([len(case.history[user][4:]) for user in LENGTHS]))
    own = offsets_from_lengths(torch.tensor([len(case.candidates[user]) for user in LENGTHS]))
    for _ in range(2):
        encode(cache, case, list(LENGTHS))  # now all kernels are compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.append(list(LENGTHS), history, seconds, new)
        cache.encode(list(LENGTHS), candidates, own, asked, micro_batch=5)
        torch.cuda.set_sync_debug_mode("default")
        cache.encode(list(LENGTHS), candidates, own, asked, micro_batch=5)  # captured
        assert cache._repeated._graphs
        torch.cuda.set_sync_debug_mode("error")
        cache.encode(list(LENGTHS), candidates, own, asked, micro_batch=5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_without_a_time_bias_no_times_are_needed(case: Case) -> None:
    encoder = make("none")
    cache = HistoryCache(encoder, PAGE)
    n, m = LENGTHS[23], CANDIDATES[23]
    cache.append([23], case.history[23], None, torch.tensor([0, n]))
    close(cache.encode([23], case.candidates[23], torch.tensor([0, m])), plain(encoder, case, [23]))


def of_one(**changes: Any) -> dict[str, Any]:
    given = {"users": [23], "embeddings": torch.zeros(1, DIM, dtype=torch.float64), "timestamps": torch.tensor([5])}
    return given | {"offsets": torch.tensor([0, 1])} | changes


APPENDED: dict[str, tuple[dict[str, Any], str]] = {
    "too long": (
        {"users": [5], "embeddings": torch.zeros(2, DIM).double(), "timestamps": torch.tensor([5, 6]),
         "offsets": torch.tensor([0, 2])},
        "user 5 has 19 tokens and would get 2 more, but the encoder has 20 positions: evict the user and append the "
        "latest tokens alone",
    ),
    "twice": (
        {"users": [23, 23], "offsets": torch.tensor([0, 1, 1])},
        "user 23 is named twice: give each user's new tokens together",
    ),
    "width": (
        {"embeddings": torch.zeros(1, 5).double()},
        "embeddings must be a tensor (T, 6) float64, as the encoder's are, not (1, 5) float64",
    ),
    "type": (
        {"embeddings": torch.zeros(1, DIM)},
        "embeddings must be a tensor (T, 6) float64, as the encoder's are, not (1, 6) float32",
    ),
    "offsets' shape": (
        {"offsets": torch.tensor([0, 1, 1])},
        "offsets must be a tensor (2,) int64, one more than the users, not (3,) int64",
    ),
    "offsets' end": ({"offsets": torch.tensor([0, 2])}, "offsets must rise from 0 to the 1 embeddings, not be [0, 2]"),
    "falling offsets": (
        {"users": [23, 11, 5], "offsets": torch.tensor([0, 1, 0, 1])},
        "offsets must rise from 0 to the 1 embeddings, not be [0, 1, 0, 1]",
    ),
    "no times": (
        {"timestamps": None},
        "timestamps is missing: the encoder has a time bias, so give seconds for every token",
    ),
    "times' shape": (
        {"timestamps": torch.tensor([5, 6])},
        "timestamps must be a tensor (1,) int64, seconds for every token, not (2,) int64",
    ),
    "times' type": (
        {"timestamps": torch.tensor([5.0])},
        "timestamps must be a tensor (1,) int64, seconds for every token, not (1,) float32",
    ),
    "a list": ({"embeddings": [[0.0]]}, "embeddings must be a tensor (T, 6) float64, as the encoder's are, not a list"),
    "a list of times": (
        {"timestamps": [5]}, "timestamps must be a tensor (1,) int64, seconds for every token, not a list"
    ),
    "a list of offsets": (
        {"offsets": [0, 1]}, "offsets must be a tensor (2,) int64, one more than the users, not a list"
    ),
    "no offsets": ({"offsets": None}, "offsets must be a tensor (2,) int64, one more than the users, not None"),
    "elsewhere": (
        {"users": [99], "embeddings": torch.zeros(1, DIM).double().to("meta")},
        "embeddings must be on cpu, as the encoder is, not on meta",
    ),
    "nothing elsewhere": (
        {"users": [99], "embeddings": torch.zeros(0, DIM).double().to("meta"),
         "timestamps": torch.zeros(0).long().to("meta"), "offsets": torch.tensor([0, 0])},
        "embeddings must be on cpu, as the encoder is, not on meta",
    ),
    "times elsewhere": (
        {"users": [99], "timestamps": torch.tensor([5]).to("meta")},
        "timestamps must be on cpu, as the encoder is, not on meta",
    ),
    **{
        f"user {name!r}": ({"users": [name]}, f"users must be whole numbers of 64 bits, not {name!r}")
        for name in (7.9, "7", True, None, 2**63, -(2**63) - 1, torch.tensor(True))
    },
    "users that are one": ({"users": 7}, "users must be a sequence of whole numbers, not 7"),
    "users in a text": ({"users": "7"}, "users must be whole numbers of 64 bits, not '7'"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), APPENDED.values(), ids=APPENDED)
def test_what_cannot_be_appended_is_said_and_changes_nothing(changes: dict[str, Any], message: str, case: Case) -> None:
    encoder = make()
    cache = filled(encoder, case)
    before = cache.bytes
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cache.append(**of_one(**changes))
    assert (cache.lengths, cache.bytes) == (LENGTHS, before)
    close(encode(cache, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))


@pytest.mark.parametrize("time", ["next", "self", "none"])
def test_a_full_history_without_candidates_is_no_hindrance(time: str, case: Case, graphs: type[PretendedGraph]) -> None:
    """Alone, and beside others; with graphs too, which read a history for each user."""
    encoder = make(time)
    cache = filled(encoder, case)
    cache.append(**of_one(users=[5]))
    assert cache.lengths[5] == encoder.num_positions
    assert cache.encode([5], torch.zeros(0, DIM).double(), torch.tensor([0, 0]), torch.tensor([9])).shape == (0, DIM)
    for _ in range(3):
        close(encode(cache, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))
    assert graphs.captured
    assert cache.lengths[5] == encoder.num_positions


def test_users_are_the_widest_whole_numbers_of_any_kind(case: Case, tmp_path: Path) -> None:
    cache = HistoryCache(make(), PAGE)
    for user in (-(2**63), 2**63 - 1, torch.tensor(7)):
        cache.append(**of_one(users=[user]))
    cache.save(tmp_path / "cache")
    assert HistoryCache.load(tmp_path / "cache", make()).lengths == {-(2**63): 1, 2**63 - 1: 1, 7: 1}


@pytest.mark.gpu
def test_tensors_of_the_cpu_are_refused_on_a_gpu() -> None:
    cache = HistoryCache(make(dtype=torch.float32).cuda(), PAGE)
    one = torch.zeros(1, DIM)
    for embeddings, what in ((one, "embeddings"), (one.cuda(), "timestamps")):
        with pytest.raises(ValueError, match=rf"^{what} must be on cuda:\d, as the encoder is, not on cpu$"):
            cache.append(**of_one(embeddings=embeddings))
    assert not cache.lengths


ENCODED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": (
        {"users": [99]},
        "user 99 is not in the cache: append the user's history first, if only of 0 tokens",
    ),
    "no position left": (
        {"users": [5]},
        "user 5 has 20 tokens, and a candidate would be beyond the encoder's 20 positions: evict the user and append "
        "the latest tokens alone",
    ),
    "width": (
        {"candidates": torch.zeros(1, 5).double()},
        "candidates must be a tensor (T, 6) float64, as the encoder's are, not (1, 5) float64",
    ),
    "offsets": ({"offsets": torch.tensor([1, 1])}, "offsets must rise from 0 to the 1 candidates, not be [1, 1]"),
    "no time": ({"time": None}, "time is missing: the encoder has a time bias, so give seconds for every user"),
    "time": ({"time": torch.tensor(5)}, "time must be a tensor (1,) int64, seconds for every user, not () int64"),
    "micro-batch": ({"micro_batch": 0}, "micro_batch must be a whole number of candidates, at least 1, not 0"),
    "micro-batch of a half": (
        {"micro_batch": 1.5},
        "micro_batch must be a whole number of candidates, at least 1, not 1.5",
    ),
    "no micro-batch": ({"micro_batch": None}, "micro_batch must be a whole number of candidates, at least 1, not None"),
    "time elsewhere": ({"time": torch.tensor([5]).to("meta")}, "time must be on cpu, as the encoder is, not on meta"),
    "candidates elsewhere": (
        {"users": [40], "candidates": torch.zeros(0, DIM).double().to("meta"), "offsets": torch.tensor([0, 0])},
        "candidates must be on cpu, as the encoder is, not on meta",
    ),
    "a list of times": ({"time": [5]}, "time must be a tensor (1,) int64, seconds for every user, not a list"),
    "no candidates": (
        {"candidates": None},
        "candidates must be a tensor (T, 6) float64, as the encoder's are, not None",
    ),
    "user": ({"users": [23.5]}, "users must be whole numbers of 64 bits, not 23.5"),
}


@pytest.mark.parametrize(("changes", "message"), ENCODED.values(), ids=ENCODED)
def test_what_cannot_be_encoded_is_said(changes: dict[str, Any], message: str, case: Case) -> None:
    cache = filled(make(), case)
    cache.append(**of_one(users=[5]))
    given = of_one(candidates=torch.zeros(1, DIM, dtype=torch.float64), time=torch.tensor([5]))
    del given["embeddings"], given["timestamps"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cache.encode(**given | changes)


def test_an_append_that_fails_midway_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make()
    cache = HistoryCache(encoder, PAGE)
    append(cache, case, list(LENGTHS), 0, 6)

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(cache._layers[1], "finish", fail)
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            append(cache, case, [11, 23, 40, 5], 6)
    append(cache, case, list(LENGTHS), 6)
    close(encode(cache, case, list(LENGTHS)), plain(encoder, case, list(LENGTHS)))


def test_a_pool_that_does_not_grow_has_no_more_pages(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make()
    cache = HistoryCache(encoder, PAGE)
    append(cache, case, [11])
    joined = torch.cat

    def fail(tensors: Any, dim: int = 0) -> torch.Tensor:
        if dim == 1:
            raise RuntimeError("out of memory")
        return joined(tensors, dim)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", fail)
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            append(cache, case, [23])
    append(cache, case, [23, 5])
    close(encode(cache, case, [11, 23, 5]), plain(encoder, case, [11, 23, 5]))


@pytest.mark.parametrize("first", [True, False], ids=["in it first", "out of it first"])
def test_calls_in_and_out_of_inference_mode_mix(first: bool, case: Case, graphs: type[PretendedGraph]) -> None:
    """What a call keeps, and what graphs read, the next may write to, whatever the mode."""
    encoder, users = make("next"), [23, 5]
    part = Case(case.history, case.times, {5: case.candidates[11], 23: case.candidates[23]}, case.asked)
    part.history[5], part.times[5] = part.history[5][:8], part.times[5][:8]
    with torch.inference_mode(first):
        cache = HistoryCache(encoder, PAGE)
    for end in range(1, 9):
        with torch.inference_mode(first == bool(end % 2)):
            append(cache, part, users, end - 1, end)
    for number in range(4):
        with torch.inference_mode(first == bool(number % 2)):
            found = encode(cache, part, users)
        close(found, plain(encoder, part, users))
    assert graphs.captured >= 2
    assert not found.is_inference()


CHANGES: dict[str, Callable[[HSTU], Any]] = {
    "converted": lambda encoder: encoder.float(),
    "other weights": lambda encoder: encoder.load_state_dict(make("self").double().state_dict(), strict=False),
    "computes otherwise": lambda encoder: setattr(encoder, "compute_dtype", torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_encoder_that_changed_is_refused(change: Callable[[HSTU], Any], case: Case, tmp_path: Path) -> None:
    encoder = make()
    cache = filled(encoder, case)
    change(encoder)
    message = r"^the encoder's weights were changed, converted or moved .*: append the histories to a new cache$"
    for call in (
        lambda: append(cache, case, [23], 0, 0),
        lambda: encode(cache, case, [23]),
        lambda: cache.save(tmp_path / "cache"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "cache").exists()


def test_weights_that_no_request_looks_at_are_compared_when_the_cache_is_saved(case: Case, tmp_path: Path) -> None:
    encoder = make()
    encoder.position.requires_grad_(False)
    cache = filled(encoder, case)
    cache.save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()
    optimizer = torch.optim.SGD([weight for weight in encoder.parameters() if weight.requires_grad], lr=0.1)
    sum(weight.square().sum() for weight in encoder.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    with pytest.raises(
        ValueError, match=r"^the encoder's weights were changed, .*: append the histories to a new cache$"
    ):
        cache.save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before


def test_nobody_is_evicted_with_somebody_unknown(case: Case) -> None:
    cache = filled(make(), case)
    with pytest.raises(ValueError, match=r"^user 99 is not in the cache"):
        cache.evict([11, 99])
    assert cache.lengths == LENGTHS
    for users, wrong in (([7, 11.5], "11.5"), ("79", "'7'"), ([7, True], "True")):
        with pytest.raises(ValueError, match=f"^users must be whole numbers of 64 bits, not {wrong}$"):
            cache.evict(users)  # type: ignore[arg-type]
    assert cache.lengths == LENGTHS
    cache.evict([11, 11])
    assert 11 not in cache


def test_an_encoder_in_training_mode_is_refused(case: Case) -> None:
    cache = filled(make(), case)
    cache._encoder.train()
    with pytest.raises(ValueError, match=r"^the encoder is in training mode.*: call encoder.eval\(\) first$"):
        cache.append(**of_one())


def test_a_length_that_grows_in_the_attention_is_refused(case: Case) -> None:
    with pytest.raises(ValueError, match=r"^attention_scale true_len divides .* use an encoder .* max_len$"):
        HistoryCache(make(attention_scale="true_len"))
    softmax = make(attention="softmax", attention_scale="true_len")  # which divides by nothing
    close(encode(filled(softmax, case), case, list(LENGTHS)), plain(softmax, case, list(LENGTHS)))
    for page in (0, 4.0, True, None):
        with pytest.raises(ValueError, match=f"^page must be a whole number of tokens, at least 1, not {page}$"):
            HistoryCache(make(), page=page)  # type: ignore[arg-type]


def test_histories_are_kept_of_hstu_alone(case: Case, tmp_path: Path) -> None:
    filled(make(), case).save(tmp_path / "cache")
    linear: Any = torch.nn.Linear(2, 2)
    for call in (lambda: HistoryCache(linear), lambda: HistoryCache.load(tmp_path / "cache", linear)):
        with pytest.raises(ValueError, match=r"^encoder must be an HSTU, .* not a Linear$"):
            call()


def test_a_path_may_be_a_text(case: Case, tmp_path: Path) -> None:
    filled(make(), case).save(str(tmp_path / "cache"))
    assert HistoryCache.load(str(tmp_path / "cache"), make()).lengths == LENGTHS


OTHERS: dict[str, tuple[Callable[[], HSTU], str]] = {
    "heads": (lambda: make(heads=1), "is of an encoder with heads 2, this one has 1"),
    "blocks": (lambda: make(blocks=2), "is of an encoder with blocks 3, this one has 2"),
    "positions": (lambda: make(output_slots=4), "is of an encoder with positions 20, this one has 21"),
    "time": (lambda: make("self"), "is of an encoder with time bias next, this one has self"),
    "scale": (
        lambda: make(attention_scale="true_len"), "is of an encoder with attention scale 20.0, this one has None"
    ),
    "type": (lambda: make().float(), "is of an encoder with type torch.float64, this one has torch.float32"),
    "weights": (lambda: make().apply(shifted), "is of an encoder with other weights than this one's"),
}  # fmt: skip


def shifted(module: torch.nn.Module) -> None:
    if isinstance(module, torch.nn.Embedding):
        module.weight.data += 1e-9


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_another_encoders_file_is_refused(other: Callable[[], HSTU], message: str, case: Case, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    filled(make(), case).save(path)
    with pytest.raises(StepError) as raised:
        HistoryCache.load(path, other())
    assert str(raised.value) == f"{path} {message}: append the histories to a new cache"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def changed(path: Path, **changes: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name]) for name, change in changes.items()}, path, about)


def fewer_times(path: Path) -> None:
    changed(path, times=lambda times: times[:-1])


def user_twice(path: Path) -> None:
    changed(path, users=lambda users: torch.where(users == users[0], users[1], users))


def two_that_wait(path: Path) -> None:
    def twice(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.repeat_interleave(2, dim=0)

    changed(path, num_waiting=lambda counts: 2 * counts, waiting=twice, waiting_times=twice)


def of_users_in_float(path: Path) -> None:
    changed(path, users=torch.Tensor.double)


def of_counts_in_float(path: Path) -> None:
    changed(path, lengths=torch.Tensor.double, num_waiting=torch.Tensor.double)


def of_waiting_times_in_float(path: Path) -> None:
    changed(path, waiting_times=torch.Tensor.double)


def of_waiting_in_another_type(path: Path) -> None:
    changed(path, waiting=torch.Tensor.float)


def of_waiting_of_another_width(path: Path) -> None:
    changed(path, waiting=lambda waiting: waiting[:, 1:].contiguous())


def of_no_page(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["history_cache"])
    save_file(load_file(path), path, {"history_cache": json.dumps(about | {"page": 0})})


@pytest.mark.parametrize(
    "damage",
    [
        *(Path.unlink, cut, without_metadata, fewer_times, user_twice, two_that_wait, of_no_page, of_users_in_float),
        *(of_counts_in_float, of_waiting_times_in_float, of_waiting_in_another_type, of_waiting_of_another_width),
    ],
)
def test_a_damaged_file_is_refused(damage: Callable[[Path], None], case: Case, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    filled(make(), case).save(path)
    damage(path)
    with pytest.raises(StepError) as raised:
        HistoryCache.load(path, make())
    assert re.fullmatch(
        f"{path} does not hold a cache of histories .*: append the histories to a new cache", str(raised.value)
    )


def test_the_pages_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/models.md").read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 1
    exec(blocks[0], {})  # noqa: S102
    promised = re.findall(r"^print\(.*\)  # (.*)$", blocks[0], re.MULTILINE)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised
