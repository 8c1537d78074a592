"""Recommendations: those that evaluation ranks, for typed histories, from files, and served by MLflow over HTTP."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from safetensors.numpy import load_file

from steps.common.cli import StepError
from steps.common.files import read_json, write_json
from steps.serving.mlflow_model import save_model
from steps.serving.recommender import History, Recommender
from steps.serving.run import Users, load_run
from steps.serving.titles import Catalogue
from steps.serving.together import Together
from tests.conftest import ROOT, step, write_processed
from tests.steps.runs import PAPER, STRICT, add_tables, config, planned

NUM_ITEMS, NUM_USERS, MAX_LEN = 60, 40, 9
MODELS = ["hstu", "hstu-rowwise", "sasrec", "bert4rec", "gru4rec", "popular", "markov", "item-knn"]
TITLES = {1: "Matrix, The (1999)", 2: "Cité des enfants perdus, La (1995)", 3: "Amélie (2001)", 4: "Heat (1995)"}


def item_id(item: int) -> int:
    return 1000 + item


def user_id(user: int) -> str:
    return f"u{user}"


def describe(data: Path, titles: bool = True) -> Path:
    """Put items and users beside sequences."""
    numbers = range(1, NUM_ITEMS + 1)
    names = [
        TITLES.get(item, f"Film {'ABCDEFGHIJ'[item % 10] * 3} {item} (1990)") if titles else "" for item in numbers
    ]
    return add_tables(data, [user_id(user) for user in range(NUM_USERS)], names)


def train(run: Path, data: Path, model: str, protocol: dict[str, Any] = STRICT, **changes: Any) -> Path:
    settings = config(model, protocol, epochs=2) | changes
    settings["training"] = settings["training"] | {"max_len": MAX_LEN}
    write_json(run / "config.json", planned(settings, data))
    step("train", "--run", run, "--data", data, "--device", "cpu", cwd=ROOT)
    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lengths = [4 + user % 13 for user in range(NUM_USERS)]  # of which some are longer than a window
    return describe(write_processed(tmp_path_factory.mktemp("data") / "t", lengths, NUM_ITEMS))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "hstu", data, "hstu")


@pytest.fixture(scope="module")
def loaded(run: Path, data: Path) -> tuple[Recommender, Users]:
    return load_run(run, data)


def raw(data: Path) -> dict[str, np.ndarray]:
    return load_file(data / "sequences.safetensors")


def sequence(data: Path, user: int) -> tuple[list[int], list[int]]:
    """Items and times of a user."""
    tensors = raw(data)
    begin, end = tensors["offsets"][user : user + 2]
    return tensors["item"][begin:end].tolist(), tensors["timestamp"][begin:end].tolist()


def recommend(run: Path, data: Path, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return step("recommend", "--run", run, "--data", data, *arguments, cwd=ROOT, check=check)


def failure(run: Path, data: Path, *arguments: object) -> str:
    result = recommend(run, data, *arguments, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize("protocol", [STRICT, PAPER], ids=["strict", "paper"])
@pytest.mark.parametrize("model", MODELS)
def test_a_target_has_the_place_that_evaluation_gives_it(
    model: str, protocol: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", data, model, protocol)
    step("evaluate", "--run", run, "--data", data, "--device", "cpu", cwd=ROOT)
    ranks = load_file(run / "outcomes.safetensors")
    recommender, _ = load_run(run, data)
    targets, histories = [], []
    for user in ranks["test_users"]:
        items, times = sequence(data, user)
        targets.append(items[-1])
        histories.append(History(items[:-1], times[:-1], times[-1]))
    found = recommender.recommend(histories, NUM_ITEMS)
    rated = set(raw(data)["item"].tolist())
    for user, target, history, scored in zip(ranks["test_users"], targets, histories, found, strict=True):
        place = [one.item for one in scored].index(target) + 1
        assert ranks["test"][user] <= place <= ranks["test"][user] + ranks["test_ties"][user]
        left_out = history.items if protocol is STRICT else history.items[-MAX_LEN:]
        candidates = rated if protocol is STRICT else set(range(1, NUM_ITEMS + 1))
        assert {one.item for one in scored} == candidates - set(left_out)
        assert sorted((one.score for one in scored), reverse=True) == [one.score for one in scored]


def test_most_popular_items_are_counted_by_hand(data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", data, "popular")
    trained_on = [item for user in range(NUM_USERS) for item in sequence(data, user)[0][:-2]]
    counts = {item: trained_on.count(item) for item in set(raw(data)["item"].tolist()) - {7, 8}}
    best = sorted(counts, key=lambda item: (-counts[item], item))[:5]
    recommender, _ = load_run(run, data)
    (found,) = recommender.recommend([History([7, 8])], 5)
    assert [(one.item, one.score) for one in found] == [(item, counts[item]) for item in best]


def test_seen_items_come_back_when_they_are_asked_for(loaded: tuple[Recommender, Users]) -> None:
    recommender, _ = loaded
    history = History([5, 6, 7])
    without, with_seen = (recommender.recommend([history], NUM_ITEMS, seen)[0] for seen in (False, True))
    assert [one for one in with_seen if one.item not in history.items] == without
    assert {one.item for one in with_seen} - {one.item for one in without} == {5, 6, 7}


def test_where_repeats_are_recommended_seen_items_are(data: Path, tmp_path: Path) -> None:
    recommender, _ = load_run(train(tmp_path / "run", data, "popular", repeats="recommend"), data)
    (found,) = recommender.recommend([History([5, 6])], NUM_ITEMS)
    assert {5, 6} <= {one.item for one in found}


def test_a_history_is_the_same_whoever_types_it(loaded: tuple[Recommender, Users], data: Path, run: Path) -> None:
    """A user's own items and times in a file, and a history among others, give what the user is given."""
    recommender, users = loaded
    items, times = sequence(data, 12)
    assert len(items) > MAX_LEN
    own = users.history(user_id(12))
    assert (list(own.items), list(own.timestamps or [])) == (items, times)
    others = [History([1]), own, History(list(range(1, 31)))]
    (alone,) = recommender.recommend([own], 4)
    among = recommender.recommend(others, 4)[1]
    assert [one.item for one in among] == [one.item for one in alone]
    np.testing.assert_allclose([one.score for one in among], [one.score for one in alone], rtol=1e-5)
    assert recommender.recommend([History(items, times)], 4) == [alone]


def test_a_history_without_times_goes_at_the_pace_of_the_data(loaded: tuple[Recommender, Users], data: Path) -> None:
    recommender, _ = loaded
    gaps = np.concatenate([np.diff(sequence(data, user)[1]) for user in range(NUM_USERS)])
    later = np.sort(gaps[gaps > 0])
    gap = int(later[(len(later) - 1) // 2])
    items = [3, 9, 4]
    timed = [
        History(items),
        History(items, [0, gap, 2 * gap]),
        History(items, [0, gap, 2 * gap], 3 * gap),
        History(items, [0, gap, 2 * gap], 10**8),
    ]
    untimed, without_at, paced, late = (recommender.recommend([history], 5)[0] for history in timed)
    assert untimed == without_at == paced
    assert [one.score for one in late] != [one.score for one in paced]  # HSTU is told when the next item comes


def test_requests_at_once_get_what_each_gets_alone(loaded: tuple[Recommender, Users]) -> None:
    recommender, _ = loaded
    calls: list[int] = []

    class Slow:
        def recommend(self, histories: list[History], top: int, seen: bool) -> Any:
            calls.append(len(histories))
            time.sleep(0.05)  # meanwhile the others come
            return recommender.recommend(histories, top, seen)

    together = Together(Slow())  # type: ignore[arg-type]
    asked = [
        ([History([1 + place, 2]), History([3])][: 1 + place % 2], 1 + place % 4, place % 5 == 0) for place in range(40)
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        found = list(pool.map(lambda one: together.recommend(*one), asked))
    for one, answer in zip(asked, found, strict=True):
        alone = recommender.recommend(*one)
        assert [[scored.item for scored in each] for each in answer] == [
            [scored.item for scored in each] for each in alone
        ]
    assert sum(calls) == sum(len(histories) for histories, _, _ in asked)
    assert len(calls) < len(asked)


def test_a_failure_is_that_of_every_request_that_was_computed_with_it() -> None:
    class Failing:
        def recommend(self, *_: Any) -> Any:
            time.sleep(0.05)
            raise StepError("scores are not finite")

    together = Together(Failing())  # type: ignore[arg-type]
    with ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(together.recommend, [History([1])], 3, False) for _ in range(5)]
    assert [str(one.exception()) for one in asked] == ["scores are not finite"] * 5


@pytest.mark.parametrize(
    ("items", "timestamps", "at", "said"),
    [
        ([], None, None, "the history is empty"),
        ([1], [5, 6], None, "2 are given for 1 items"),
        ([1, 2], [6, 5], None, "they fall"),
        ([1, 2], [5, 6], 4, "they fall"),
        ([1], [-1], None, "whole seconds since 1970"),
        ([1], [2**63], None, "whole seconds since 1970"),
        ([1], None, 4, "a time is given for the recommendation"),
    ],
)
def test_a_wrong_history_is_refused(items: list[int], timestamps: Any, at: Any, said: str) -> None:
    with pytest.raises(StepError, match=said):
        History(items, timestamps, at)


@pytest.mark.parametrize("model", ["hstu", "hstu-rowwise"])
def test_similar_items_are_those_of_the_nearest_embeddings(model: str, data: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", data, model)
    recommender, _ = load_run(run, data)
    weights = load_file(run / "model.safetensors")["items.weight"].astype(np.float64)
    unit = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    candidates = sorted(set(raw(data)["item"].tolist()) - {4})
    best = sorted(candidates, key=lambda item: -(unit[item] @ unit[4]))[:6]
    found = recommender.similar(4, 6)
    assert [one.item for one in found] == best
    np.testing.assert_allclose([one.score for one in found], unit[best] @ unit[4], atol=1e-5)


FILMS = Catalogue(
    [str(number) for number in range(1, 14)],
    [
        "Matrix, The (1999)",
        "Cité des enfants perdus, La (1995)",
        "Seven (Se7en) (1995)",
        "Professional, The (a.k.a. Leon: The Professional) (1994)",
        "Postino, Il (The Postman) (1994)",
        "Postman, The (1997)",
        "Sabrina (1954)",
        "Sabrina (1995)",
        "Rocky III (1982)",
        "Fast & Furious 2 (2003)",
        "187 (1997)",
        "Hamlet (2000)",
        "Hamlet (2000)",
    ],
)


@pytest.mark.parametrize(
    ("typed", "item"),
    [
        ("Matrix, The (1999)", 1),
        ("the matrix", 1),
        ("MATRIX", 1),
        ("Matrix 1999", 1),
        ("The Matrix (1999)", 1),
        ("The Matirx", 1),
        ("la cite des enfants perdus", 2),
        ("Cité des Enfants Perdus", 2),
        ("cite des enfants perdu", 2),
        ("seven", 3),
        ("se7en", 3),
        ("Leon - the professional", 4),
        ("il postino", 5),
        ("the postman", 6),  # the title itself goes before what stands in brackets
        ("the postman (1994)", 5),
        ("sabrina (1995)", 8),
        ("Sabrinna (1954)", 7),
        ("fast and furious 2", 10),
        ("187", 11),
        ("id:9", 9),
    ],
)
def test_a_title_need_not_be_spelt_as_the_data_has_it(typed: str, item: int) -> None:
    assert FILMS.find(typed) == item


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("sabrina", r"'sabrina' may be Sabrina \(1954\) \(id:7\); Sabrina \(1995\) \(id:8\)"),
        ("Hamlet (2000)", r"may be Hamlet \(2000\) \(id:12\); Hamlet \(2000\) \(id:13\)"),
        ("the matrix (2003)", r"no title is like 'the matrix \(2003\)'; the nearest are Matrix, The \(1999\) \(id:1\)"),
        ("fast and furious 3", r"no title is like .* nearest are Fast & Furious 2 \(2003\) \(id:10\)"),
        ("187b8", "no title is like"),
        ("id:99", "no item has the id '99'"),
        ("", "'' is no title"),
        (" ?! ", "is no title"),
    ],
)
def test_what_is_no_title_or_several_is_said_with_the_nearest(typed: str, said: str) -> None:
    with pytest.raises(StepError, match=said):
        FILMS.find(typed)


def test_every_title_that_is_its_own_finds_its_item() -> None:
    for item in range(1, len(FILMS) + 1):
        assert FILMS.find(FILMS.typed(item)) == item
    assert FILMS.typed(12) == "id:12"


def test_without_titles_ids_name_items(data: Path, run: Path, tmp_path: Path) -> None:
    untitled = describe(shutil.copytree(data, tmp_path / "t"), titles=False)
    shown = recommend(run, untitled, "--history", item_id(5), "id:1006", "--top", "2").stdout
    recommender, _ = load_run(run, untitled)
    (found,) = recommender.recommend([History([5, 6])], 2)
    assert [line.split()[2] for line in shown.splitlines()[-2:]] == [str(item_id(one.item)) for one in found]
    assert "no item has the id 'Heat'" in failure(run, untitled, "--history", "Heat")


def test_the_step_prints_what_titles_are_taken_for_and_a_table(
    loaded: tuple[Recommender, Users], data: Path, run: Path
) -> None:
    shown = recommend(run, data, "--history", "the matrix", "amelie", "--top", "3").stdout
    recommender, _ = loaded
    (found,) = recommender.recommend([History([1, 3])], 3)
    assert "'the matrix' is Matrix, The (1999)" in shown
    assert "'amelie' is Amélie (2001)" in shown
    rows = [line.split() for line in shown.splitlines()[-3:]]
    assert [(row[0], row[-2]) for row in rows] == [
        (str(rank), str(item_id(one.item))) for rank, one in enumerate(found, start=1)
    ]
    similar = recommend(run, data, "--similar", "heat", "--top", "3").stdout
    assert [line.split()[-2] for line in similar.splitlines()[-3:]] == [
        str(item_id(one.item)) for one in recommender.similar(4, 3)
    ]


def test_csv_and_json_go_in_and_come_out(
    loaded: tuple[Recommender, Users], data: Path, run: Path, tmp_path: Path
) -> None:
    recommender, users = loaded

    def expected(histories: list[History], names: list[str]) -> list[list[str]]:
        return [
            [name, str(rank), str(item_id(one.item)), recommender.catalogue.titles[one.item - 1]]
            for name, scored in zip(names, recommender.recommend(histories, 2), strict=True)
            for rank, one in enumerate(scored, start=1)
        ]

    def written(text: str, suffix: str, output: str) -> Any:
        (tmp_path / f"in{suffix}").write_text(text, encoding="utf-8")
        out = tmp_path / f"out{output}"
        recommend(run, data, "--input", tmp_path / f"in{suffix}", "--top", 2, "--output", out)
        return json.loads(out.read_text()) if output == ".json" else list(csv.reader(out.open()))

    timed = "history,item,timestamp\nann,1005,10\nben,1001,7\nann,1006,20\n"
    (head, *rows) = written(timed, ".csv", ".csv")
    assert head == ["query", "rank", "item", "title", "score"]
    assert [row[:4] for row in rows] == expected([History([5, 6], [10, 20]), History([1], [7])], ["ann", "ben"])
    rows = written("title,history\nHeat,x\nthe matrix,x\n", ".csv", ".csv")[1:]
    assert [row[:4] for row in rows] == expected([History([4, 1])], ["x"])
    rows = written("user\nu3\nu12\n", ".csv", ".csv")[1:]
    assert [row[:4] for row in rows] == expected([users.history("u3"), users.history("u12")], ["u3", "u12"])
    objects = [{"user": "u3"}, {"history": ["heat", 1001], "timestamps": [5, 6], "at": 9}, {"history": ["id:1002"]}]
    histories = [users.history("u3"), History([4, 1], [5, 6], 9), History([2])]
    for text, suffix in ((json.dumps(objects), ".json"), ("\n".join(map(json.dumps, objects)), ".jsonl")):
        answers = written(text, suffix, ".json")
        assert [answer["understood"] for answer in answers] == [{}, {"heat": "Heat (1995)"}, {}]
        rows = [
            [one["query"], str(rank), found["item"], found["title"]]
            for one in answers
            for rank, found in enumerate(one["recommendations"], start=1)
        ]
        assert rows == expected(histories, ["u3", "2", "3"])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("in.txt", "user\nu3\n", ".csv, .json and .jsonl are read"),
        ("in.csv", "user\n", "asks for nothing"),
        ("in.csv", "user\nu3\nu99\n", "in.csv, line 3: no user has the id 'u99'"),
        ("in.csv", "history,title\na,heat\na,zzzzz\n", "in.csv, line 3: no title is like 'zzzzz'"),
        ("in.csv", "history,item\na,heat\n", "in.csv, line 2: no item has the id 'heat'"),
        ("in.csv", "history,item,title\na,1001,heat\n", "in.csv, line 1: a column user, or the columns history"),
        ("in.csv", "history,item,timestamp\na,1001,x\n", "in.csv, line 2: timestamp 'x': whole seconds"),
        ("in.csv", "history,item,timestamp\na,1001,5\na,1002,4\n", "in.csv, history 'a': timestamps: they fall"),
        ("in.csv", "history,item\na\n", "in.csv, line 2: it has not as many fields"),
        ("in.json", '{"user": "u3"}', "holds a dict where a list belongs"),
        ("in.json", '[{"user": "u3", "history": []}]', "in.json, entry 1: a user's history is that of the data"),
        ("in.jsonl", '{"user": "u3"}\n{"history": []}\n', "in.jsonl, entry 2: the history is empty"),
        (
            "in.jsonl",
            '{"history": ["heat"], "times": [1]}\n',
            "entry 1: key 'times' is none of history, timestamps, at",
        ),
        ("in.jsonl", '{"history": [true]}\n', "entry 1: history: a list of titles is wanted"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(
    name: str, text: str, said: str, data: Path, run: Path, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert said in failure(run, data, "--input", tmp_path / name, "--output", tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_what_does_not_belong_together_is_refused(data: Path, run: Path, tmp_path: Path) -> None:
    other = describe(write_processed(tmp_path / "other", [6] * NUM_USERS, NUM_ITEMS, seed=1))
    assert "was trained on other sequences than" in failure(run, other, "--user", "u3")
    items = shutil.copytree(data, tmp_path / "items")
    shutil.copyfile(items / "users.parquet", items / "items.parquet")
    assert "items.parquet is not the file that" in failure(run, items, "--user", "u3")
    untrained = tmp_path / "untrained"
    write_json(untrained / "config.json", read_json(run / "config.json"))
    assert "is not trained; run train first" in failure(untrained, data, "--user", "u3")
    assert "no user has the id ''" in failure(run, data, "--user", "")
    assert "ask for at most as many" in failure(run, data, "--user", "u3", "--top", "1000000000")
    assert "does not exist; it is runs/" in failure(tmp_path / "nothing", data, "--user", "u3")
    changed = shutil.copytree(run, tmp_path / "changed")
    shutil.copyfile(changed / "history.jsonl", changed / "model.safetensors")
    assert "model.safetensors is not the file that" in failure(changed, data, "--user", "u3")
    popular = train(tmp_path / "popular", data, "popular")
    assert "counts and has no embeddings of items" in failure(popular, data, "--similar", "heat")
    assert "--top 0: at least 1" in failure(run, data, "--user", "u3", "--top", 0)
    assert "out.txt: .csv or .json" in failure(run, data, "--user", "u3", "--output", tmp_path / "out.txt")
    missing = step("recommend", "--run", run, "--user", "u3", cwd=tmp_path, check=False)
    assert "data/processed/t does not exist; run preprocess, or name the run's data with --data" in missing.stderr


@pytest.fixture(scope="module")
def saved(run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("models") / "model"
    recommend(run, data, "--save", model)
    return model


def test_a_saved_model_is_the_same_bytes_and_has_nothing_of_users(
    saved: Path, run: Path, data: Path, tmp_path: Path
) -> None:
    save_model(run, data, tmp_path / "again")
    files = {path.relative_to(saved): path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    again = tmp_path / "again"
    assert {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()} == files
    kept = [path for path in files if path.parts[0] == "data"]
    assert sorted(map(str, kept)) == [
        f"data/recommender/{name}" for name in ("catalogue.json", "config.json", "model.safetensors")
    ]
    weights = load_file(saved / "data/recommender/model.safetensors")
    assert weights.keys() == load_file(run / "model.safetensors").keys()
    catalogue = read_json(saved / "data/recommender/catalogue.json")
    assert set(catalogue) == {"gap", "ids", "titles", "candidate"}
    assert str(ROOT).encode() not in b"".join(files.values())


#: What a model says that is loaded by MLflow, of a request.
LOADED = """
import json, sys, mlflow.pyfunc
model = mlflow.pyfunc.load_model(sys.argv[1])
import steps
assert steps.__file__.startswith(sys.argv[1]), steps.__file__
print(json.dumps(model.predict([{"history": ["the matrix", "id:1005"]}], params={"k": 3})))
"""


def outside(folder: Path) -> dict[str, str]:
    """An environment for a process that is not to find this clone."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return variables | {"PATH": path, "HOME": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the saved model, which does not find this clone."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(saved), "--env-manager", "local"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "-p", str(port)],
            cwd=folder,
            env=outside(folder),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        until = time.monotonic() + 120
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/ping", timeout=5)
                break
            except requests.ConnectionError:
                if process.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"no server: {(folder / 'log').read_text()[-2000:]}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"inputs": [{"history": ["heat"]}, {"history": ["zzzzz"]}]}, "inputs[1]: no title is like 'zzzzz'"),
    ({"inputs": [{"history": []}]}, "inputs[0]: the history is empty"),
    ({"inputs": [{"history": "heat"}]}, "inputs[0]: history: a list of titles is wanted"),
    ({"inputs": [{"history": [None]}]}, "inputs[0]: history: a list of titles is wanted"),
    ({"inputs": [{}]}, 'inputs[0]: an object with the key "history" is wanted'),
    ({"inputs": []}, "inputs: a list of histories is wanted"),
    ({"inputs": "heat"}, "inputs: a list of histories is wanted"),
    ({"inputs": [{"history": ["heat"]}], "params": {"k": 0}}, "params.k: 0 is no whole number from 1 to 60"),
    ({"inputs": [{"history": ["heat"]}], "params": {"k": 61}}, "params.k: 61 is no whole number from 1 to 60"),
    ({"inputs": [{"history": ["heat"], "timestamps": ["x"]}]}, "inputs[0]: timestamps: a list of whole seconds"),
    ({"inputs": [{"history": ["heat"], "at": 5}]}, "inputs[0]: at: a time is given"),
    ({"inputs": [{"history": ["heat"], "top": 5}]}, "inputs[0]: key 'top' is none of history, timestamps, at"),
]
#: What MLflow refuses before it asks the model.
REFUSED_BY_MLFLOW = [
    '{"inputs": [{"history": ["heat"]}], "params": {"k": "ten"}}',
    '{"inputs": [{"history": ["heat"]}], "params": 3}',
    '{"dataframe_records": [{"history": ["heat"]}]}',
    "[1]",
    "{",
]


@pytest.mark.slow  # one test, so that one server is started, however many processes test
def test_a_saved_model_answers_outside_this_clone_as_the_run_does(
    saved: Path, server: str, loaded: tuple[Recommender, Users], tmp_path: Path
) -> None:
    recommender, _ = loaded
    (found,) = recommender.recommend([History([1, 5])], 3)
    python = subprocess.run(
        [sys.executable, "-c", LOADED, str(saved)], cwd=tmp_path, env=outside(tmp_path), capture_output=True, text=True
    )
    (answer,) = json.loads(python.stdout)
    assert answer["understood"] == {"the matrix": "Matrix, The (1999)"}
    assert [one["item"] for one in answer["recommendations"]] == [str(item_id(one.item)) for one in found]
    np.testing.assert_allclose([one["score"] for one in answer["recommendations"]], [one.score for one in found])

    def ask(**request: Any) -> Any:
        response = requests.post(server, json=request, timeout=30)
        assert response.status_code == 200, response.text
        return response.json()["predictions"]

    assert ask(inputs=[{"history": ["the matrix", "id:1005"]}], params={"k": 3}) == [answer]
    histories = [History([1 + place % 50, 3]) for place in range(100)]
    many = ask(inputs=[{"history": [item_id(item) for item in history.items]} for history in histories])
    assert [[one["item"] for one in each["recommendations"]] for each in many] == [
        [str(item_id(one.item)) for one in each] for each in recommender.recommend(histories, 10)
    ]
    (seen,) = ask(inputs=[{"history": [1001]}], params={"k": NUM_ITEMS, "seen": True})
    assert "1001" in [one["item"] for one in seen["recommendations"]]
    example = read_json(saved / "serving_input_example.json")
    assert len(ask(**example)[0]["recommendations"]) == 3

    for wrong, said in WRONG:
        response = requests.post(server, json=wrong, timeout=30)
        assert response.status_code == 400, wrong
        message = response.json()["message"]
        assert message.startswith(said)
        assert "\n" not in message
    for body in REFUSED_BY_MLFLOW:
        response = requests.post(server, data=body, headers={"Content-Type": "application/json"}, timeout=30)
        assert response.status_code == 400, body
        assert response.json()["message"]
