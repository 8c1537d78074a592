"""The study of M-FALCON: both ways of a request mean the same, what differs is refused, and what its report shows."""

from typing import Any

import pytest
import torch

from steps.common.cli import StepError
from steps.models.history_cache import HistoryCache
from steps.studies import m_falcon
from steps.studies.m_falcon import Request, cached, cases, differs, latencies, random_encoder, recomputed, worse
from steps.studies.m_falcon_report import micro_batches_table, published_table, rates_table, report, requests_table
from steps.studies.rows import row

CPU = torch.device("cpu")
CASE = {"model": "deep", "precision": "float32", "users": 2, "history": 9, "new": 3, "candidates": 5}
SIZES = {"blocks": 3, "dim": 8, "heads": 2, "dqk": 4, "dv": 6}
BIASES = [(True, "next"), (True, "self"), (False, "none")]


def made(position: bool, time: str) -> tuple[Any, Request]:
    torch.manual_seed(1)
    encoder = random_encoder(SIZES | {"position": position, "time": time}, 17, CPU).double()
    request = Request.random(CASE, 8, CPU)
    return encoder, Request(request.tokens.double(), request.times, request.candidates.double(), request.asked, 3)


@pytest.mark.parametrize(("position", "time"), BIASES)
def test_a_recomputed_request_is_a_pass_of_its_own_for_each_candidate(position: bool, time: str) -> None:
    encoder, request = made(position, time)
    expected = []
    with torch.no_grad():
        for tokens, times, candidates, asked in zip(
            request.tokens, request.times, request.candidates, request.asked, strict=True
        ):
            for candidate in candidates:
                x = encoder.embed(torch.cat([tokens, candidate[None]]), torch.arange(13))
                at = torch.cat([times, asked[None]])
                query_time = torch.cat([at[1:], asked[None]]) if time == "next" else at
                for layer in encoder.blocks:
                    u, q, k, v = layer.project(x, torch.float64)
                    x = layer.finish(
                        x, u, layer.attend(q, k, v, torch.tensor([0, 13]), 13, query_time, at), torch.float64
                    )
                expected.append(x[-1])
        found = recomputed(encoder, request, torch.float64)()
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("position", "time"), BIASES)
def test_both_ways_have_the_same_hidden_states_request_after_request(position: bool, time: str) -> None:
    encoder, request = made(position, time)
    prepare, answer = cached(HistoryCache(encoder, 4), request, 3)
    with torch.no_grad():
        expected = recomputed(encoder, request, torch.float64)()
    for _ in range(3):
        prepare()
        torch.testing.assert_close(answer(), expected, rtol=1e-12, atol=1e-12)


def test_hidden_states_that_differ_keep_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SIZES | {"position": True, "time": "next"}
    settings = {"models": {"deep": model}, "page": 4, "percentiles": [50, 99], "warm_up": 1}
    settings["timed"] = {"seconds": 0, "fewest": 2, "most": 2}
    plan = {"device": "cpu", "settings": settings}
    ways = [{"way": "recomputed"}, {"way": "cached", "micro_batch": 4}]
    whole = HistoryCache.encode

    def wrong(*arguments: Any) -> torch.Tensor:
        found = whole(*arguments)
        found[-1, -1] += shares[precision] * found.abs().max()
        return found

    shares = {"float32": 3e-5, "bf16": 0.3}
    for precision in shares:
        for way in ways:
            case = CASE | {"precision": precision} | way
            found = {one["metric"]: one["value"] for one in m_falcon.measure(case, plan, None)}  # type: ignore[arg-type]
            assert found["requests"] == 2
            assert 0 < found["p50"] <= found["p99"]
            assert ("kept" in found) == (way["way"] == "cached")
            with monkeypatch.context() as patch:
                patch.setattr(HistoryCache, "encode", wrong)
                with pytest.raises(
                    StepError, match=r"candidates 5.*are not the recomputed ones \(largest .*no time is"
                ):
                    m_falcon.measure(case, plan, None)  # type: ignore[arg-type]


def test_an_error_twice_as_large_is_allowed_and_no_more() -> None:
    exact, plain = torch.zeros(4), torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert worse(plain * 2, plain, exact) == ""
    assert worse(plain * 2.1, plain, exact) == "largest error 2.1, allowed 2"
    assert worse(torch.ones(4) * 1.5, plain, exact) == "mean error 1.5, allowed 1"
    assert worse(plain * torch.nan, plain, exact) == "some are not finite"
    assert differs(plain * (1 + 9e-6), plain) == ""
    assert differs(plain * 1.001, plain) == "largest difference 0.001, allowed 1e-05"
    assert differs(plain * torch.nan, plain)


@pytest.mark.parametrize(
    ("timed", "count"),
    [
        ({"seconds": 0.0, "fewest": 3, "most": 9}, 3),
        ({"seconds": 1e9, "fewest": 3, "most": 9}, 9),
    ],
)
def test_as_many_requests_are_timed_as_settings_say(timed: dict[str, Any], count: int) -> None:
    calls: list[str] = []

    def answer() -> torch.Tensor:
        calls.append("answer")
        return torch.zeros(1)

    assert len(latencies(lambda: calls.append("prepare"), answer, 2, timed, CPU)) == count
    assert calls == ["prepare", "answer"] * (count + 2)


def test_what_is_recomputed_is_one_case_for_all_micro_batches() -> None:
    entry = CASE | {"history": [4, 8], "way": ["recomputed", "cached"], "micro_batch": [1, 2, 3]}
    found = cases({"settings": {"requests": [entry, entry]}})
    assert [(case["history"], case["way"], case.get("micro_batch")) for case in found] == [
        *((4, "recomputed", None), (4, "cached", 1), (4, "cached", 2), (4, "cached", 3)),
        *((8, "recomputed", None), (8, "cached", 1), (8, "cached", 2), (8, "cached", 3)),
    ]


def line(way: str, p50: float, **changes: Any) -> dict[str, Any]:
    found = (
        CASE | SIZES | {"position": True, "time": "next", "way": way, "p50": p50, "p99": 2 * p50, "rate": 1000 / p50}
    )
    if way == "cached":
        found |= {"micro_batch": 1024, "kept": 2**21}
    return (
        found | {"peak": 3 * 2**20, "busy": p50 / 2, "attention": p50 / 4, "requests": 50, "device": "H200"} | changes
    )


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in one.split("|")[1:-1]] for one in table.splitlines()[2:]]


def test_a_request_stands_beside_the_same_without_a_cache() -> None:
    lines = [line("recomputed", 8.0), line("cached", 2.0), line("cached", 1.0, history=1)]
    (only,) = cells(requests_table(lines, ["p50", "p99"]))
    shown = ["50 / 50", "8.00", "16.00", "2.00", "4.00", "4.00x", "4.00 / 2.00", "1.00 / 0.50", "3", "3", "2"]
    assert only == ["deep", "float32", "2", "9", "3", "5", "1,024", *shown]


def test_speed_is_set_beside_that_of_the_fewest_candidates() -> None:
    lines = [
        one
        for count, plain, cached_ms in ((64, 10.0, 5.0), (1024, 20.0, 4.0))
        for one in (line("recomputed", plain, candidates=count), line("cached", cached_ms, candidates=count))
    ]
    lines += [line("recomputed", 1.0, users=1), line("cached", 1.0, users=1)]
    first, second = cells(rates_table(lines, [{"candidates": 1024, "ratio": 1.5}]))
    assert first[5:] == ["64", "100", "1.00x", "200", "1.00x", ""]
    assert second[5:] == ["1,024", "50", "0.50x", "250", "1.25x", "1.50"]


def test_micro_batches_are_in_order() -> None:
    lines = [line("cached", 3.0, micro_batch=64), line("cached", 1.0), line("cached", 2.0, micro_batch=16, users=9)]
    assert [(one[6], one[7]) for one in cells(micro_batches_table(lines[1::-1], ["p50"]))] == [
        ("64", "3.00"),
        ("1,024", "1.00"),
    ]


def test_published_figures_are_shown_as_published_also_before_ours_are_there() -> None:
    theirs = {"source": "x", "model": "deep", "users": 2, "history": 9, "new": 3, "candidates": 5}
    published = {"sources": {"x": "a card"}, "rows": [theirs | {"recomputed": 4.0, "cached": 0.51}]}
    table = published_table([line("recomputed", 8.0), line("cached", 2.0)], published, "p50")
    assert [one[5:] for one in cells(table.split("\n\n")[1])] == [
        ["recomputed", "4.00", "8.00", "4.00", "x"],
        ["cached", "0.51", "2.00", "1.00", "x"],
    ]
    assert published_table([], published, "p50") == ""


def test_a_report_of_one_case_is_a_report() -> None:
    case = {key: value for key, value in line("cached", 1.0).items() if key not in ("p50", "p99", "rate", "device")}
    metrics = {"requests": 1, "peak": 1, "busy": 1, "attention": 1, "kept": 1}
    axes = {key: value for key, value in case.items() if key not in metrics}
    rows = [row(axes, name, 1.0, "ms") | {"device": "H200", "commit": "0123456789"} for name in ("p50", "p99", "rate")]
    text, figure, lines = report(rows, {"title": "T", "measure": {"settings": {"percentiles": [50, 99]}}})
    assert text.startswith("# T\n")
    assert "Commits 012345678." in text
    assert len(lines) == 1
    assert len(figure.axes) == 2
