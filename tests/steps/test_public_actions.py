"""KuaiRand and Yambda: small files of the published form, from the archive to sequences, by hand.

Names, columns, their order and types are those that the publishers state; no row is real.
"""

import functools
import hashlib
import io
import random
import tarfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from safetensors.numpy import load_file

from steps import validate
from steps.common import params, yaml_files
from steps.common.cli import StepError
from steps.common.files import read_json, write_json
from steps.common.params import Run
from steps.data import readers
from steps.data.sources import unpack
from steps.preprocess import read_validation, write_sequences
from steps.validate import write_valid
from tests.conftest import ROOT, step
from tests.steps.runs import planned

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
#: User, video, time, click, long view. Two videos are shown to user 0 at one time; user 3 has video 10 twice; user 7
#: has too few rows.
LOG = [
    (3, 10, 1649408076860, 1, 1), (0, 11, 1649467982289, 0, 0), (0, 12, 1649467982289, 1, 0),
    (3, 11, 1649408080100, 0, 1),
    (0, 10, 1650600000999, 1, 1), (3, 10, 1650700000000, 0, 0), (7, 13, 1650800000000, 1, 0),
    (7, 14, 1650800001000, 0, 0),
]  # fmt: skip
USERS_HEADER = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    f"register_days_range,{','.join(f'onehot_feat{number}' for number in range(18))}\n"
)
ENCRYPTED = "1,2,2,1153,,0,0,31,354,3,3,2,,,,,,"  # of 18 features; the files have missing ones
USERS = [
    f'0,full_active,0,-124,0,5,"(0,10]",0,0,0,0,107,91-180,{ENCRYPTED}\n',
    f'3,high_active,0,0,1,612,500+,12,"[10,100)",3,"[1,5)",730,366-730,{ENCRYPTED}\n',
    f'7,UNKNOWN,1,0,0,5,"(0,10]",0,0,0,0,107,91-180,{ENCRYPTED}\n',
]
FILES = {
    "kuairand-1k": ("KuaiRand-1K", "1k", ["4_08_to_4_21_1k", "4_22_to_5_08_1k"]),
    "kuairand-27k": (
        "KuaiRand-27K", "27k",
        ["4_08_to_4_21_27k_part1", "4_08_to_4_21_27k_part2", "4_22_to_5_08_27k_part1", "4_22_to_5_08_27k_part2"],
    ),
}  # fmt: skip


def line(user: int, video: int, time: int, click: int, view: int) -> str:
    return f"{user},{video},20220408,1600,{time},{click},0,0,0,0,0,{view},175045,87433,0,0,0,0,1\n"


def kuairand(name: str, rows: list[str] | None = None, users: list[str] | None = None) -> dict[str, str]:
    """The files of the archive `name`, with the rows in equal parts in its standard logs."""
    folder, size, logs = FILES[name]
    rows = [line(*row) for row in LOG] if rows is None else rows
    users = USERS if users is None else users
    share = -(-len(rows) // len(logs))
    files = {
        f"{folder}/data/log_standard_{log}.csv": LOG_HEADER + "".join(rows[place * share : (place + 1) * share])
        for place, log in enumerate(logs)
    }
    return files | {
        f"{folder}/data/log_random_4_22_to_5_08_{size}.csv": LOG_HEADER + line(0, 99, 1650600000000, 1, 1),
        f"{folder}/data/user_features_{size}.csv": USERS_HEADER + "".join(users),
        f"{folder}/data/video_features_basic_{size}.csv": "video_id,author_id,video_type\n10,441,NORMAL\n",
        f"{folder}/load_data_{size}.py": "raise SystemExit\n",
    }


def packed(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for folder in sorted({str(parent) for name in files for parent in Path(name).parents} - {"."}):
            member = tarfile.TarInfo(folder)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def entry(name: str, **expected: int) -> dict[str, Any]:
    """The data set's entry, with other counts than those of the published files."""
    made: dict[str, Any] = params.entry("datasets", name, ROOT / "params")
    assert made["checks"]["expected"].keys() <= {"raw_rows", "catalogue"}
    checks = made["checks"] | {"expected": expected} if expected else made["checks"]
    return made | {"checks": checks}


def valid(name: str, files: dict[str, str], folder: Path, **changes: Any) -> Path:
    """The validated tables of files that lie where download leaves them."""
    (folder / "packed").write_bytes(packed(files))
    unpack(folder / "packed", "x.tar.gz", folder / "raw")
    (folder / "valid").mkdir()
    write_valid(folder / "raw", entry(name, raw_rows=8) | changes, folder / "valid")
    return folder / "valid"


def run_steps(project: Path, name: str, content: bytes, **expected: int) -> Path:
    """Publish a file as the data set's own in a mirror, and make its sequences, as a user does."""
    path = project / "params/datasets.yaml"
    changed = entry(name, **expected)
    source = {key: value for key, value in changed["source"].items() if key not in ("publisher", "md5", "sha256")}
    kind = "md5" if "md5" in changed["source"] else "sha256"
    changed["source"] = source | {kind: hashlib.new(kind, content, usedforsecurity=False).hexdigest()}
    path.write_text(yaml_files.dump(yaml_files.read(path) | {name: changed}))
    (project / "mirror").mkdir()
    (project / "mirror" / source["file"]).write_bytes(content)
    mirror = {"HSTU_DATA_MIRROR": str(project / "mirror")}
    raw, tables, output = (f"data/{kind}/{name}" for kind in ("raw", "valid", "processed"))
    step("download", "--dataset", name, "--output", raw, cwd=project, **mirror)
    step("validate", "--dataset", name, "--raw", raw, "--output", tables, cwd=project)
    step("preprocess", "--dataset", name, "--valid", tables, "--output", output, cwd=project)
    return project / output


@pytest.mark.parametrize(("name", "rows"), [("kuairand-1k", [2, 3, 4, 5, 7, 8]), ("kuairand-27k", [2, 3, 5, 6, 8, 9])])
def test_kuairand_from_its_archive(name: str, rows: list[int], project: Path) -> None:
    """Ratings: 0 shown, 1 clicked, 2 viewed long, clicked or not. Times are seconds, in the order of milliseconds."""
    made = run_steps(project, name, packed(kuairand(name)), raw_rows=8, rows=6, users=2, items=3, catalogue=5)
    sequences = load_file(made / "sequences.safetensors")
    assert sequences["offsets"].tolist() == [0, 3, 6]
    assert pl.read_parquet(made / "users.parquet")["raw_id"].to_list() == [0, 3]
    assert pl.read_parquet(made / "items.parquet")["raw_id"].to_list() == [10, 11, 12, 13, 14]
    assert sequences["item"].tolist() == [2, 3, 1, 1, 2, 1]
    assert sequences["rating"].tolist() == [0, 1, 2, 2, 2, 0]
    assert sequences["timestamp"].tolist() == [
        1649467982, 1649467982, 1650600000, 1649408076, 1649408080, 1650700000,
    ]  # fmt: skip
    log = pl.read_parquet(project / f"data/valid/{name}/interactions.parquet")
    assert log["row"].to_list() == rows  # of a later file counted on
    validation = read_json(project / f"data/valid/{name}/validation.json")
    assert len({(check["column"], check["check"]) for check in validation["checks"]}) == len(validation["checks"])
    assert list(validation["raw_files"])[: len(FILES[name][2])] == [
        f"{FILES[name][0]}/data/log_standard_{log}.csv" for log in FILES[name][2]
    ]
    manifest = read_json(made / "manifest.json")
    assert manifest["features"]["user"] == {
        "user_active_degree": ["full_active", "high_active"],
        "follow_user_num_range": ["(0,10]", "500+"],
        "fans_user_num_range": ["0", "[10,100)"],
        "friend_user_num_range": ["0", "[1,5)"],
        "register_days_range": ["366-730", "91-180"],
    }
    assert load_file(made / "features.safetensors")["user/register_days_range"].tolist() == [2, 1]


def test_the_published_counts_are_rules(tmp_path: Path) -> None:
    published = entry("kuairand-1k")["checks"]
    with pytest.raises(StepError, match=r"raw_rows 8 \(expected 11713045\), catalogue 5 \(expected 4369953\)"):
        valid("kuairand-1k", kuairand("kuairand-1k"), tmp_path, checks=published)


LATE = "KuaiRand-1K/data/log_standard_4_22_to_5_08_1k.csv"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (",long_view,", ",lv,", ", line 1: has the column 'long_view' not; it has user_id, video_id, date"),
        ("0,10,20220408", "0,10,20220408,1", ": 1 line does not have as many fields as line 1 (line 2)"),
        (",0,0,175045", ",0,7,175045", ": long_view must be 0 or 1: 3 rows are not (row 3: 7, row 4: 7, row 5: 7)"),
        (",1650700000000,0,", ",1650700000000,,", ": is_click must be 0 or 1: 1 row is not (row 3: (empty))"),
        (",1650700000000,", ",now,", ": timestamp must be a time in whole milliseconds: 1 row is not (row 3: now)"),
    ],
)
def test_what_is_wrong_in_the_second_log_is_named(old: str, new: str, said: str, tmp_path: Path) -> None:
    files = kuairand("kuairand-1k")
    assert old in files[LATE]
    files[LATE] = files[LATE].replace(old, new)
    with pytest.raises(StepError) as failed:
        valid("kuairand-1k", files, tmp_path)
    assert f"{tmp_path}/raw/{LATE}{said}" in str(failed.value)
    assert "\n" not in str(failed.value)
    assert LATE.replace("4_22_to_5_08", "4_08_to_4_21") not in str(failed.value)


def test_a_log_that_the_archive_lacks_is_named(project: Path) -> None:
    files = kuairand("kuairand-1k")
    del files[LATE]
    with pytest.raises(pytest.fail.Exception, match=rf"{LATE} is no file of the download"):
        run_steps(project, "kuairand-1k", packed(files), raw_rows=4)


def test_a_user_without_features_is_named(tmp_path: Path) -> None:
    """Rows are counted through both logs."""
    files = kuairand("kuairand-1k", users=[USERS[0], USERS[1]])
    with pytest.raises(
        StepError, match=r"user must be in the users file: 2 rows are not \(row 9: 7, row 10: 7\)"
    ) as failed:
        valid("kuairand-1k", files, tmp_path)
    assert f"4_08_to_4_21_1k.csv, {tmp_path}/raw/{LATE}: user must be" in str(failed.value)


def test_rows_of_one_line_of_two_logs_are_told_apart(tmp_path: Path) -> None:
    """User 3's second row of video 10 is line 3 of the second log; line 3 of the first stays."""
    tables = valid("kuairand-1k", kuairand("kuairand-1k"), tmp_path, filters=[{"first_of": ["user", "item"]}],
                   checks={"min_user_interactions": 1})  # fmt: skip
    log = pl.read_parquet(tables / "interactions.parquet")
    assert log["row"].to_list() == [2, 3, 4, 5, 7, 9, 10]
    assert log["rating"].to_list() == [2, 0, 1, 2, 2, 1, 0]


def test_a_view_can_be_asked_for_by_its_level(tmp_path: Path) -> None:
    tables = valid("kuairand-1k", kuairand("kuairand-1k"), tmp_path, filters=[{"min_rating": 2}],
                   checks={"min_user_interactions": 1})  # fmt: skip
    log = pl.read_parquet(tables / "interactions.parquet")
    assert log.select("user", "item").rows() == [(3, 10), (3, 11), (0, 10)]


def test_blocks_and_parts_of_several_logs_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 27K needs: little is in memory at once."""
    rows = [line(user, 10 + (7 * user + n) % 50, 1650600000000 + 999 * n, n % 2, int(n % 3 == 0)) for user in range(40)
            for n in range(9)]  # fmt: skip
    users = [row.replace("0", str(user), 1) for user, row in enumerate([USERS[0]] * 40)]
    made = []
    for name, block_bytes, rows_in_memory in (("whole", 1 << 24, 10**9), ("parts", 700, 60)):
        monkeypatch.setattr(validate, "read_blocks", functools.partial(readers.read_blocks, block_bytes=block_bytes))
        folder = tmp_path / name
        folder.mkdir()
        tables = valid(
            "kuairand-27k", kuairand("kuairand-27k", rows, users), folder, checks={"min_user_interactions": 3}
        )
        (folder / "made").mkdir()
        told = {
            "files": {"interactions.parquet": "", "items.parquet": "", "users.parquet": ""},
            "ticks_per_second": 1000,
        }
        write_sequences(tables, told, folder / "made", "file-order", rows_in_memory)
        made.append({path.name: path.read_bytes() for path in (folder / "made").iterdir()})
    assert made[0] == made[1]
    assert load_file(tmp_path / "parts/made/sequences.safetensors")["rating"][:9].tolist() == [
        2,
        1,
        0,
        2,
        0,
        1,
        2,
        1,
        0,
    ]


# Yambda

KINDS = {
    "uid": pl.UInt32, "timestamp": pl.UInt32, "item_id": pl.UInt32, "is_organic": pl.UInt8,
    "played_ratio_pct": pl.UInt16, "track_length_seconds": pl.UInt32,
}  # fmt: skip
#: Seconds in steps of 5; user 300 has too few rows.
LISTENS = [
    (100, 0, 22, 1, 100, 170), (100, 0, 9390623, 0, 7, 200), (100, 12345, 22, 1, 159, 170),
    (200, 5, 50, 0, 50, 200), (200, 25999995, 22, 1, 0, 170), (200, 26000000, 50, 1, 49, 200),
    (300, 86400, 7, 1, 100, 5), (300, 86405, 7, 1, 100, 5),
]  # fmt: skip


def listens(rows: list[tuple[int | None, ...]], **changes: Any) -> bytes:
    buffer = io.BytesIO()
    frame = pl.DataFrame(rows, schema=KINDS, orient="row").with_columns(**changes)
    frame.write_parquet(buffer, compression="zstd", row_group_size=3)
    return buffer.getvalue()


def test_yambda_from_its_file(project: Path) -> None:
    made = run_steps(project, "yambda-50m", listens(LISTENS), raw_rows=8, rows=6, users=2, items=3, catalogue=4)
    sequences = load_file(made / "sequences.safetensors")
    assert sequences["offsets"].tolist() == [0, 3, 6]
    assert pl.read_parquet(made / "items.parquet")["raw_id"].to_list() == [7, 22, 50, 9390623]
    assert sequences["item"].tolist() == [2, 4, 2, 3, 2, 3]
    assert sequences["timestamp"].tolist() == [0, 0, 12345, 5, 25999995, 26000000]
    assert sequences["rating"].tolist() == [100, 7, 159, 50, 0, 49]
    listened = sequences["rating"] >= params.load("protocols", ROOT / "params")["temporal-listen"]["positive"]
    assert listened.tolist() == [True, False, True, True, False, False]
    assert read_validation(project / "data/valid/yambda-50m")["repeats"] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (listens([*LISTENS, (300, 86410, 7, 1, None, None)]), "rating must be a number: 1 row is not (row 9: (empty))"),
        (pl.DataFrame({"uid": [1], "timestamp": [0], "item_id": [5], "is_organic": [1]}),
         "listens.parquet has no column 'played_ratio_pct', from which `columns` takes rating; it has uid, timestamp"),
    ],
)  # fmt: skip
def test_another_of_yambda_s_files_is_refused(content: bytes | pl.DataFrame, said: str, tmp_path: Path) -> None:
    """All events have listens and others, which were not played; likes have no column of it."""
    if isinstance(content, pl.DataFrame):
        content.write_parquet(tmp_path / "listens.parquet")
    else:
        (tmp_path / "listens.parquet").write_bytes(content)
    (tmp_path / "valid").mkdir()
    with pytest.raises(StepError) as failed:
        write_valid(tmp_path, entry("yambda-50m", raw_rows=9), tmp_path / "valid")
    assert said in str(failed.value)


# Ranking


@pytest.fixture(scope="module")
def views() -> list[tuple[int, int, int, int, int]]:
    """As LOG, of 60 users; all times differ by seconds. A long view is likelier where the video's number is even."""
    chance = random.Random(3)
    times = chance.sample(range(1649400000, 1652000000), 60 * 20)
    rows = []
    for place, time in enumerate(times):
        video = chance.randrange(100, 140)
        view = int(chance.random() < (0.2 if video % 2 else 0.6))
        rows.append((place % 60, video, time * 1000 + 7, max(view, int(chance.random() < 0.3)), view))
    return sorted(rows, key=lambda row: row[2])


@pytest.mark.slow
def test_the_experiment_of_kuairand_runs_and_predicts_long_views(
    views: list[tuple[int, int, int, int, int]], project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [row.replace("0", str(user), 1) for user, row in enumerate([USERS[0], USERS[1].replace("3", "0", 1)] * 30)]
    content = packed(kuairand("kuairand-1k", [line(*row) for row in views], users))
    data = run_steps(project, "kuairand-1k", content, raw_rows=len(views), catalogue=40)
    path = project / "params/datasets.yaml"
    datasets = yaml_files.read(path)
    small = {"dim": 8, "blocks": 1, "heads": 2, "dqk": 4, "dv": 4}
    datasets["kuairand-1k"]["training"] |= {"max_len": 16, "batch": 16, "base": small}
    path.write_text(yaml_files.dump(datasets))
    monkeypatch.chdir(project)
    start = sorted(row[2] for row in views)[int(len(views) * 0.9)]
    seen: set[int] = set()
    labels = []
    for user, _, time, _, view in views:
        if time >= start and user in seen:
            labels.append((user, time, view))
        seen.add(user)
    expected = [view for _, _, view in sorted(labels)]
    assert len(expected) == 120
    runs = params.check("kuairand-1k-ranking", project / "params")
    for each in runs:
        settings = params.resolve(each, project / "params")
        settings["training"]["epochs"] = 1
        run = project / "runs" / each.path
        write_json(run / "config.json", planned(settings, data))
        for name in ("train", "evaluate"):
            step(name, "--run", run, "--data", data, "--device", "cpu", cwd=project)
        assert load_file(run / "outcomes.safetensors")["test_labels"].tolist() == expected
    settings = params.resolve(Run("kuairand-1k-ranking", "kuairand-1k", "mean-rating", "temporal-ranking", 0))
    write_json(project / "runs/other/config.json", planned(settings, data))
    refused = step("train", "--run", "runs/other", "--data", data, "--device", "cpu", cwd=project, check=False)
    assert refused.returncode == 1
    assert refused.stderr == "train: all ratings that are trained on are below 4.0, or none: nothing to predict\n"
