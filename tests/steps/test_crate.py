"""Crates: whole, true to their files, the same bytes from the same records; and the repository's own metadata."""

import json
import re
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from rocrate.rocrate import ROCrate

from steps.common import params, yaml_files
from steps.common.files import read_json, sha256, write_json
from steps.crates.entities import read_project
from steps.crates.repository import codemeta_text, crate_text
from tests.conftest import ROOT, step
from tests.steps.runs import seal
from tests.steps.test_reporting import experiment, fake_run, record_all, tabulate

ENDED = "2024-02-17T09:40:00.000+00:00"
METADATA = "ro-crate-metadata.json"


@pytest.fixture
def runs(project: Path, monkeypatch: pytest.MonkeyPatch) -> list[params.Run]:
    """The runs of a tabulated experiment: two seeds, of which the first says when it was trained."""
    monkeypatch.chdir(project)
    axes = {"datasets": ["ml-1m"], "models": ["sasrec", "hstu"], "protocols": ["strict"], "seeds": [0, 1]}
    found = experiment(project, "mine", **axes)
    for run in found:
        fake_run(project, run)
    folder = Path("runs/mine", found[0].path)
    times = {"started": "2024-02-17T09:30:00.500+00:00", "ended": ENDED}
    write_json(folder / "metrics.json", read_json(folder / "metrics.json") | times)
    seal(folder)
    tabulate(project, "mine")
    return found


def make(project: Path, name: str = "crate", runs: str = "runs/mine", *more: str) -> Path:
    arguments = (
        "--experiment",
        "mine",
        "--runs",
        runs,
        "--reports",
        "reports/mine",
        "--output",
        f"reports/mine/{name}",
    )
    step("crate", *arguments, *more, cwd=project)
    return project / "reports/mine" / name


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def entities(folder: Path) -> dict[str, dict[str, Any]]:
    """The entities of a crate by their identifiers, of which each is there once."""
    graph = json.loads((folder / METADATA).read_text())["@graph"]
    found = {entity["@id"]: entity for entity in graph}
    assert len(found) == len(graph)
    return found


def references(value: Any) -> Iterator[str]:
    """The identifiers that an entity refers to."""
    if isinstance(value, dict) and set(value) == {"@id"}:
        yield value["@id"]
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from references(part)


def check(folder: Path) -> dict[str, dict[str, Any]]:
    """A crate refers to nothing that is not there, and is true to its files, of which it names all."""
    found = entities(folder)
    outside = ("https://w3id.org/ro/crate/", "https://w3id.org/workflowhub/", "https://doi.org/", "https://snakemake.")
    missing = {name for entity in found.values() for name in references(entity)} - found.keys()
    assert {name for name in missing if not name.startswith(outside)} == set()
    named = {name: entity for name, entity in found.items() if "File" in entity["@type"]}
    for name, entity in named.items():
        assert entity["sha256"] == sha256(folder / name)
        assert int(entity["contentSize"]) == (folder / name).stat().st_size
    assert named.keys() | {METADATA} == contents(folder).keys()
    crate = ROCrate(folder)
    assert crate.mainEntity.id == "Snakefile"
    assert {entity.id for entity in crate.data_entities} == named.keys()
    return found


def test_a_crate_is_whole_and_names_what_ran(project: Path, runs: list[params.Run]) -> None:
    found = check(make(project))
    actions = {name: entity for name, entity in found.items() if entity["@type"] == "CreateAction"}
    expected = {f"#{step}/{run.path}" for step in ("train", "evaluate") for run in runs}
    assert actions.keys() == expected | {"#experiment", "#tabulate", "#compare"}
    assert set(references(found["./"]["mentions"])) == actions.keys()
    metrics = read_json(Path("runs/mine", runs[0].path, "metrics.json"))
    training = actions[f"#train/{runs[0].path}"]
    tool = found[training["instrument"]["@id"]]
    assert tool["softwareVersion"] == metrics["commit"]
    assert [found[name]["softwareVersion"] for name in references(tool["softwareRequirements"])] == ["2.13.0"]
    objects = [found[name] for name in references(training["object"])]
    assert {entity["value"] for entity in objects if entity["@type"] == "PropertyValue"} == {
        *("ml-1m", "sasrec", "strict", 0)
    }
    assert metrics["data_sha256"] in {entity.get("sha256") for entity in objects}
    results = [found[name] for name in references(training["result"])]
    recorded = sha256(project / "reports/mine/crate/runs" / runs[0].path / "history.jsonl")
    hashes = {metrics["weights_sha256"], metrics["history_sha256"], recorded}
    assert {entity["sha256"] for entity in results} == hashes
    assert len(hashes) == 3
    usage = {found[name]["name"]: found[name]["value"] for name in references(training["resourceUsage"])}
    assert usage == {"device": "CPU, 2 threads", "seconds": 1.5}
    assert (training["startTime"], training["endTime"]) == ("2024-02-17T09:30:00.500+00:00", ENDED)
    assert "endTime" not in actions[f"#train/{runs[1].path}"]  # what is not recorded is not said
    assert found["./"]["datePublished"] == ENDED
    steps = [found[name]["name"] for name in references(found["Snakefile"]["step"])]
    assert steps == ["train", "evaluate", "tabulate", "compare"]


def test_a_crate_has_the_same_bytes_again_and_from_records(project: Path, runs: list[params.Run]) -> None:
    first = contents(make(project))
    assert contents(make(project, "again")) == first
    records = record_all(project)
    assert contents(make(project, "recorded", str(records))).keys() == first.keys()
    assert contents(make(project, "recorded", str(records))) == first


def claims(project: Path, digest: str) -> Path:
    """A hand-made claims.json of two experiments."""
    claim = {
        "claim": "hstu-over-sasrec",
        "text": "HSTU is better than SASRec",
        "place": "Table 4",
        "experiment": "mine",
    }
    claim |= {"ours": 0.21, "low": 0.2, "high": 0.22, "published": 0.1720, "verdict": "holds", "why": "p < 0.05"}
    files = {"reports/mine/comparisons.csv": digest, "params/paper.yaml": "e" * 64}
    others = claim | {"claim": "other", "experiment": "demo"}, claim | {"claim": "whole", "experiment": None}
    content = [claim | {"files": files}, *(other | {"files": {}} for other in others)]
    path = project / "reports/claims.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.usefixtures("runs")
def test_a_crate_has_the_verdicts_on_claims_of_its_experiment(project: Path) -> None:
    decided_from = sha256(project / "reports/mine/comparisons.csv")
    found = check(make(project, "crate", "runs/mine", "--claims", str(claims(project, decided_from))))
    reviews = [entity for entity in found.values() if entity["@type"] == "ClaimReview"]
    assert [review["@id"] for review in reviews] == ["#verdict-hstu-over-sasrec"]
    review = reviews[0]
    assert review["@id"] in references(found["./"]["mentions"])
    claim, rating = found[review["itemReviewed"]["@id"]], found[review["reviewRating"]["@id"]]
    assert (claim["@type"], claim["text"]) == ("Claim", "HSTU is better than SASRec")
    assert found[claim["appearance"]["@id"]]["@type"] == "ScholarlyArticle"
    assert (rating["ratingValue"], rating["ratingExplanation"]) == ("holds", "p < 0.05")
    basis = {found[name].get("sha256") for name in references(review["isBasedOn"])}
    assert basis == {None, decided_from, "e" * 64}  # the experiment has none
    figures = {found[name]["name"]: found[name] for name in references(review["additionalProperty"])}
    assert (figures["ours"]["value"], figures["ours"]["minValue"], figures["ours"]["maxValue"]) == (0.21, 0.2, 0.22)
    assert figures["published"]["value"] == 0.1720


@pytest.mark.usefixtures("runs")
def test_what_does_not_belong_together_gets_no_crate(project: Path) -> None:
    arguments = ["--experiment", "mine", "--runs", "runs/mine", "--reports", "reports/mine", "--output", "out"]
    stale = step("crate", *arguments, "--claims", claims(project, "d" * 64), cwd=project, check=False)
    assert "was decided from another reports/mine/comparisons.csv; run claims again" in stale.stderr
    (project / "reports/mine/table.md").unlink()
    incomplete = step("crate", *arguments, cwd=project, check=False)
    assert "reports/mine lacks table.md; run tabulate and compare first" in incomplete.stderr
    assert (stale.returncode, incomplete.returncode) == (1, 1)
    assert not (project / "out").exists()


def test_the_metadata_of_the_repository_are_those_of_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    project = read_project()
    assert (ROOT / METADATA).read_text() == crate_text(project, Path()), "run `make tables`"
    assert (ROOT / "codemeta.json").read_text() == codemeta_text(project, Path()), "run `make tables`"
    found = entities(ROOT)
    missing = {name for entity in found.values() for name in references(entity)} - found.keys()
    assert [name for name in missing if not name.startswith("https://")] == []
    named = [name for name, entity in found.items() if {"File", "Dataset"} & set(as_list(entity["@type"]))]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert sorted(name for name in found if name.endswith(".smk")) == sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "workflow/rules").glob("*.smk")
    )


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_citation_and_package_agree() -> None:
    citation = yaml_files.read(ROOT / "CITATION.cff")
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "authors"} <= citation.keys()  # which the format requires
    assert str(citation["version"]) == package["version"]
    assert citation["license"] == package["license"]
    assert date.fromisoformat(str(citation["date-released"])) <= date.today()
    assert citation["type"] == "software"


#: Of CodeMeta 3.0's context, what is used here: keys, and types.
CODEMETA = {
    *("name", "description", "version", "license", "author", "datePublished", "dateModified", "keywords", "url"),
    *("programmingLanguage", "runtimePlatform", "operatingSystem", "softwareRequirements", "readme", "hasPart"),
    *("developmentStatus", "referencePublication"),
}
CODEMETA_TYPES = {"Organization", "SoftwareApplication", "SoftwareSourceCode", "schema:ScholarlyArticle"}
#: Whose values the context makes addresses, or entities.
ADDRESSES = ("license", "softwareRequirements", "readme", "developmentStatus", "url")


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """The objects in a JSON value, itself included."""
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from objects(part)
    if isinstance(value, dict):
        yield value


def test_codemeta_has_terms_of_its_context_alone_and_agrees_with_the_package() -> None:
    found = read_json(ROOT / "codemeta.json")
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found["@context"] == "https://w3id.org/codemeta/3.0"
    for part in objects(found):
        assert part.keys() - {"@context", "@type"} <= CODEMETA
        assert part["@type"] in CODEMETA_TYPES
        for value in [value for key in ADDRESSES if key in part for value in as_list(part[key])]:
            assert isinstance(value, dict) or re.fullmatch(r"https://\S+|README\.md", value)
    assert (found["hasPart"]["name"], found["version"]) == (package["name"], package["version"])
    assert [part["name"] + part["version"] for part in found["softwareRequirements"]] == package["dependencies"]
    assert found["license"] == f"https://spdx.org/licenses/{package['license']}"
    assert found["hasPart"]["description"] == package["description"]
    assert package["requires-python"] in found["runtimePlatform"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", found["datePublished"])
