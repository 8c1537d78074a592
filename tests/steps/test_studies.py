"""Studies: their parameters, their rows, a small run of each through the step, and reports that rest on rows alone."""

import importlib
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from steps.common import gpu_record, params, studies, yaml_files
from steps.common.cli import StepError
from steps.common.files import read_json, write_json
from steps.data.generators.stream import Stream
from steps.data.streamed import write_stream
from steps.studies import kernels, scaling_law_report
from steps.studies.rows import FIELDS, Row, case_of, cases, merged, read_rows, row, write_rows
from steps.study import digests_of, kept
from tests.conftest import ROOT, run, step, write_processed
from tests.steps.runs import add_tables

FIGURE = (".svg", ".png", "-dark.svg", "-dark.png")
STUDIES = params.studies(ROOT / "params")
#: Those whose rows are committed. docs/studies.md names the others as not measured yet.
MEASURED = [name for name in STUDIES if (ROOT / f"reports/studies/{name}/rows.json").is_file()]
WITHOUT_DATA = ("cost", "encoder-efficiency", "kernels", "m-falcon", "time-maps")
MACHINE = {"device": "H200", "commit": "a" * 40}


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    versions = {"torch": "2.13.0"}
    seen = {"device": "H200", "card": "0a1b2c3d", "commit": "a" * 40}
    rows = [
        row({"dim": 50, "captured": True}, "step", 1.5, "ms") | MACHINE,
        row({"dim": 50, "captured": True}, "peak", 2**40, "B") | MACHINE,
        row({"data": "x"}, "hr@10", 0.25, "fraction", low=0.0, high=0.5, data_sha256="b" * 64) | MACHINE,
        row({"data": "x"}, "total", 3.0, "s", repetition=2) | MACHINE | {"versions": versions},
        row({"dim": 64}, "failed", 1, "of 1", seen="torch 2.11.0: it does not compile") | seen,
        *(row({"dim": dim}, f"kernel: {name}", 0.5, "ms") | MACHINE for dim in (7, 9) for name in ("gemm", "sort")),
    ]
    write_rows(tmp_path / "rows.json", "speed", rows)
    assert (tmp_path / "rows.json").read_text().count("gemm") == 1
    assert read_rows(tmp_path / "rows.json", "speed") == rows
    first, second, third, fourth, *_ = cases(rows)
    assert (first["step"], first["peak"], first["dim"]) == (1.5, 2**40, 50)
    assert (second["hr@10/low"], second["hr@10/high"]) == (0.0, 0.5)
    assert (third["repetition"], third["versions"]) == (2, versions)
    assert (fourth["failed/seen"], fourth["card"]) == ("torch 2.11.0: it does not compile", "0a1b2c3d")


def test_measuring_again_replaces_the_same_case_of_the_same_device_alone() -> None:
    def measured(ms: float, dim: int = 50, device: str = "H200", metric: str = "step") -> Row:
        return row({"dim": dim}, metric, ms, "ms") | {"device": device, "commit": "c"}

    old = [measured(1.0), measured(0.5, metric="part: loss"), measured(2.0, dim=256), measured(9.0, device="CPU")]
    new = [measured(0.7), measured(4.0, device="H100")]
    assert merged(old, new) == [measured(0.7), *old[2:], measured(4.0, device="H100")]
    assert merged([], old) == old


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda content: content.update(study="other"), "rows of study 'other', not of 'speed'"),
        (lambda content: content.update(cases=[]), "holds no rows"),
        (lambda content: content["cases"].append(content["cases"][0]), "case 2 measures 'step' as case 1 does"),
        (lambda content: content["cases"][0].update(origin=7), "case 1 does not fit"),
        (lambda content: content["cases"][0].update(case={"unit": 1}), "an axis is called like a field"),
        (lambda content: content["cases"][0].update(measured=[["step", "fast", "ms"]]), "case 1 does not fit"),
        (lambda content: content["cases"][0].update(measured=[["step", True, "ms"]]), "True is no number"),
        (lambda content: content["cases"][0].update(measured=[[0, 1.5, "ms"]]), "case 1 does not fit"),
        (lambda content: content["origins"][0].update(device=None), "device and commit are texts"),
    ],
)
def test_a_file_of_rows_that_does_not_fit_is_named(tmp_path: Path, edit: Any, said: str) -> None:
    path = tmp_path / "rows.json"
    write_rows(path, "speed", [row({"dim": 50}, "step", 1.5, "ms") | MACHINE])
    content = read_json(path)
    edit(content)
    write_json(path, content)
    with pytest.raises(StepError, match=f"{re.escape(str(path))}.*{re.escape(said)}"):
        read_rows(path, "speed")


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_planned_and_has_cases(study: str) -> None:
    plan = studies.plan(study, ROOT / "params")
    assert json.loads(json.dumps(plan)) == plan
    module = importlib.import_module(f"steps.studies.{plan['module']}")
    found = [json.dumps(case, sort_keys=True) for case in module.cases(plan)]
    assert len(found) == len(set(found)) > 0


def test_a_study_without_rows_is_said_to_be_not_measured_yet() -> None:
    page, remedy = (ROOT / "docs/studies.md").read_text(), "link to the tables of measured studies, and of no other"
    assert set(re.findall(r"^\| `([a-z-]+)`, not measured yet \|", page, re.M)) == set(STUDIES) - set(MEASURED), remedy
    assert set(re.findall(r"^\| \[`([a-z-]+)`\]", page, re.M)) == set(MEASURED), remedy
    assert not [path for name in set(STUDIES) - set(MEASURED) for path in (ROOT / f"reports/studies/{name}").glob("*")]


def test_the_code_of_a_study_is_what_its_figures_rest_on() -> None:
    def files(module: str) -> set[str]:
        return {str(path.relative_to(ROOT)) for path in studies.code_of(module)}

    assert {"kernels/tools/benchmark.py", "kernels/common.py", "kernels/configurations.json"} < files("kernels")
    assert "kernels/hstu_attention/launch.py" in files("kernels")  # by relative imports
    assert not any(file.startswith("steps/data") for file in files("kernels"))
    assert {"steps/training/loop.py", "steps/data/sequences.py"} < files("training_speed")
    assert "steps/validate.py" in files("preprocessing")
    assert not any(file.endswith("_report.py") for study in ("kernels", "null_models") for file in files(study))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"module": "nothing"}, "key module: steps/studies/nothing.py does not exist"),
        ({"titel": "x"}, "'titel' was unexpected"),
        ({"measure": {"device": "tpu"}}, r"key measure.device: 'tpu' is not one of"),
        ({"measure": {"protocols": ["strictly"]}}, r"key measure.protocols.0: .*no entry 'strictly'; it has strict"),
        ({"measure": {"data": {"processed": ["ml-2m"]}}}, r"key measure.data.processed.0: .*no entry 'ml-2m'"),
        ({"measure": {"settings": {}}}, r"key measure.settings: 'max_len' is a required property"),
    ],
)
def test_a_wrong_study_is_named_with_its_key(project: Path, change: dict[str, Any], said: str) -> None:
    path = project / "params/studies/null-models.yaml"
    content = yaml_files.read(path)
    nested = {key: content[key] | value for key, value in change.items() if isinstance(value, dict)}
    path.write_text(yaml_files.dump(content | change | nested))
    with pytest.raises(StepError, match=f"null-models.yaml.*{said}"):
        studies.plan("null-models", project / "params")


def test_a_run_of_a_study_that_does_not_resolve_is_named(project: Path) -> None:
    path = project / "params/studies/training-speed.yaml"
    text = path.read_text()
    path.write_text(text.replace("model.dqk: 32", "model.qk: 32"))
    with pytest.raises(StepError, match=r"key measure.runs.2.set: model hstu-large has no parameter 'model.qk'"):
        studies.plan("training-speed", project / "params")
    path.write_text(text.replace("[hstu, hstu-large]", "[hstu, hstv]"))
    with pytest.raises(StepError, match=r"key measure.runs.3.models.1: .*no entry 'hstv'"):
        studies.plan("training-speed", project / "params")


def test_studies_and_experiments_share_their_names(project: Path) -> None:
    shutil.copyfile(project / "params/experiments/demo.yaml", project / "params/experiments/kernels.yaml")
    with pytest.raises(StepError, match="a study is called 'kernels'; rename the file"):
        params.experiments(project / "params")
    shutil.copyfile(project / "params/studies/kernels.yaml", project / "params/studies/train.yaml")
    with pytest.raises(StepError, match="a study cannot be called 'train', as a step or folder is"):
        params.studies(project / "params")
    with pytest.raises(
        StepError, match=r"no study 'kernel'; there are .*kernels, long-sequences, m-falcon, null-models"
    ):
        params.load("studies/kernel", ROOT / "params")


def test_where_the_wanted_device_is_not_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    write_json(tmp_path / "settings.json", studies.plan("kernels", ROOT / "params"))
    refused = step(
        "study", "--settings", tmp_path / "settings.json", "--output", tmp_path / "rows.json", cwd=tmp_path, check=False
    )
    assert refused.returncode == 1
    assert "kernels is measured on a CUDA device, and there is none here; `make tables`" in refused.stderr
    assert not (tmp_path / "rows.json").exists()


def small(study: str, data: Path) -> dict[str, Any]:
    """The plan of a study, on a CPU in seconds; its data are put below `data`."""
    plan = studies.plan(study, ROOT / "params") | {"device": "cpu"}
    settings = plan["settings"]
    if study == "kernels":
        settings["ceilings"] = {"copied": 4096, "product": 16}
        sizes = {"dtype": "float32", "tokens": 8, "dim": 8}
        attention = {"n": 8, "batch": 2, "heads": 1, "dqk": 8, "dv": 8, "dtype": "float32"}
        kinds = [{"lengths": "ragged", "bias": "both"}, {"lengths": "full", "bias": "none"}]
        settings["operations"] = {
            "layer_norm": [sizes | {"dim": [8, 16]}],
            "norm_gate": [sizes],
            "projection": [sizes | {"columns": 16}],
            "sampled_softmax": [sizes | {"items": 20, "negatives": 4}],
            "linear_cross_entropy": [sizes | {"items": 20}],
            "hstu_attention": [attention | kind for kind in kinds],
        }
    if study == "cost":
        settings["gpus"]["value"] = [2]
    if study == "encoder-efficiency":
        settings["encoder"] = {"dim": 16, "dqk": 8, "dtype": "float32"}
        settings["speed"] |= {"lengths": [8, 16], "tokens": 64, "alphas": [1.6], "draws": 4, "compiled": []}
        settings["memory"] |= {"dims": [16], "compiled": [], "rows": 2, "n": 8}
        settings["optimiser"] = {"rows": 20, "dim": 16}
    if study == "time-maps":
        settings |= {"tokens": 64, "lengths": [8, 16], "ragged": [16], "compiled": []}
        settings["encoder"] = {"dim": 16, "heads": 2, "dqk": 8, "dv": 8, "dtype": "float32"}
    if study == "training-speed":
        settings |= {"steps": 2, "ceilings": {"copied": 4096, "product": 16}}
        write_processed(data / "processed/ml-1m", [9] * 12, 30)
        plan["runs"] = [plan["runs"][0], next(group for group in plan["runs"] if group.get("whole"))]
        plan["runs"][0] |= {"items": 40, "configs": [plan["runs"][0]["configs"][3]]}
        plan["runs"][1]["configs"] = plan["runs"][1]["configs"][:1]
        for config in (group["configs"][0] for group in plan["runs"]):
            config["training"] |= {"max_len": 8, "batch": 4, "negatives": 4, "epochs": 2}
            config["model"] |= {"dim": 8, "blocks": 1, "dqk": 8, "dv": 8}
    if study == "serving":
        plan["runs"] = plan["runs"][:1]  # a server starts in ten seconds
        add_tables(write_processed(data / "processed/demo", [9] * 12, 30), [*"abcdefghijkl"], [*map(str, range(30))])
        (config,) = plan["runs"][0]["configs"]
        config["training"] |= {"max_len": 8, "batch": 4, "negatives": 4, "epochs": 1}
        config["model"] |= {"dim": 8, "blocks": 1, "dqk": 8, "dv": 8}
        loads = [{"histories": 2, "at_once": 1, "requests": 3}, {"histories": 1, "at_once": 3, "requests": 6}]
        settings |= {"warm_up": 1, "loads": loads}
    if study == "m-falcon":
        settings |= {"page": 4, "warm_up": 1, "timed": {"seconds": 0, "fewest": 2, "most": 3}}
        for model in settings["models"].values():
            model |= {"blocks": 2, "dim": 8, "heads": 2, "dqk": 4, "dv": 4}
        sizes = {"users": 2, "history": [7, 12], "new": 0, "candidates": [3, 5], "precision": "bf16"}
        settings["requests"] = [
            sizes | {"model": ["deep", "deep-no-bias"], "way": ["recomputed", "cached"], "micro_batch": [2, 4]},
            sizes
            | {"model": "shallow", "new": 3, "precision": "float32", "way": ["recomputed", "cached"]}
            | {"micro_batch": 64},
        ]
    if study == "long-sequences":
        for runs in plan["runs"]:
            write_processed(data / "processed" / runs["configs"][0]["dataset"], [9, 30, 14, 5, 24, 12], 40)
            runs["configs"] = runs["configs"][:2]
            for config in runs["configs"]:
                config["training"] |= {"max_len": 24, "batch": 4, "negatives": 4, "epochs": 1}
                config["model"] |= {"dim": 8, "blocks": 1, "dqk": 8, "dv": 8}
        settings |= {"longer_than": 12, "timed": 1, "stochastic_length": {"alphas": [1.4], "rules": ["random"]}}
        settings["semi_local"] = {"windows": [2], "first": [0, 3], "alone": [5]}
    if study == "convergence":
        write_processed(data / "processed/ml-1m", [30] * 40, 60, ratings=True)
        plan["runs"] = plan["runs"][:2]
        plan["runs"][0] |= {"target": 0.1, "every": 200, "evaluations": 3}
        plan["runs"][1] |= {"target": 1.0, "every": 100, "evaluations": 2}  # which no seed reaches
        for runs in plan["runs"]:
            runs["configs"] = runs["configs"][:2]
            for config in runs["configs"]:
                config["training"] |= {"max_len": 8, "batch": 8, "negatives": 4}
                config["model"] |= {"dim": 8, "blocks": 1, "dqk": 8, "dv": 8}
    if study == "scaling-law":
        write_processed(data / "processed/ml-1m", [30] * 40, 60)
        # Of each data set two sizes of two encoders, from two seeds; one size of the stream alone, the others together.
        plan["runs"] = [plan["runs"][index] for index in (0, 1, 9, -3)]
        for number, runs in enumerate(plan["runs"]):
            runs |= {"log10_flops": 7 + number % 2 / 2, "levels": 3}
            runs["configs"] = [config for config in runs["configs"] if config["row"] != "sasrec" and config["seed"] < 2]
            for config in runs["configs"]:
                config["training"] |= {"max_len": 16, "batch": 8, "negatives": 4}
                config["model"] |= {"dim": 8, "blocks": 1 + number % 2, "heads": 1, "dqk": 8, "dv": 8}
        settings |= {"held_out": 1, "draws": 20}
        made = plan["generated"]["stream"]["synthesize"]
        made |= {"records": 80, "length": 17, "items": 300, "categories": 6}
        write_stream(Stream(**{key: made[key] for key in made if key != "form"}), data / "processed/stream")
    if study == "stream-sensitivity":
        plan["generated"]["stream"]["synthesize"] |= {"length": 12, "items": 300, "categories": 6}
        settings |= {"records": 80, "opened": [30, 60], "concentrations": [[500, 500]]}
        (runs,) = plan["runs"]
        runs["configs"] = [config for config in runs["configs"] if config["seed"] < 2]
        for config in runs["configs"]:
            config["training"] |= {"max_len": 12, "batch": 8, "negatives": 4}
            config["model"] |= {"dim": 8, "blocks": 1, "heads": 1, "dqk": 8, "dv": 8}
    if study == "null-models":
        write_processed(data / "processed/ml-1m", [30] * 40, 300)
        settings |= {"seeds": 2, "generated": settings["generated"] | {"users": 60}}
    if study == "stochastic-length":
        for name in settings["longest"]:
            write_processed(data / "processed" / name, [9] * 12, 30)
        settings |= {"draws": 2, "nearest": settings["nearest"] | {"step": 512, "sequences": 1000}}
        settings["balance"] |= {"ranks": [2], "batch": 4, "steps": 2}
    if study == "table-load":
        write_processed(data / "processed/ml-1m", [9] * 12, 30)
        settings |= {"dim": 8, "length": 20, "users": 2, "processes": [1, 2], "steps": 2}
        settings["expansions"] = [{"rows": 2, "columns": 5, "by": ["ours"]}]
    if study == "distributed":
        write_processed(data / "processed/ml-1m", [9] * 12, 30)
        plan["generated"]["ml-20m-form"]["synthesize"] |= {"rows": 6000, "users": 60, "movies": 3000} | {
            "rated_movies": 1500,
            "largest_id": 9000,
        }
        for config in (config for group in plan["runs"] for config in group["configs"]):
            config["training"] |= {"max_len": 8, "negatives": 4}
            config["model"] |= {"dim": 8, "blocks": 1, "heads": 1, "dqk": 8, "dv": 8}
        settings |= {"processes": [2], "users": 60, "windows_each": 4, "windows": 8, "steps": 2}
        settings |= {"balance": {"max_len": 32, "windows_each": 4}}
        settings["quality"] |= {"target": 0.0, "epochs": 2}
        plan["runs"][2]["configs"] = plan["runs"][2]["configs"][:2]
    if study == "preprocessing":
        settings["repetitions"] = 2
        plan["data"]["raw"]["ml-1m"]["checks"] = {"min_user_interactions": 1}
        (data / "raw/ml-1m/ml-1m").mkdir(parents=True)
        (data / "raw/ml-1m/ml-1m/ratings.dat").write_text("".join(f"{n % 3}::{n}::5::{n}\n" for n in range(1, 30)))
        (data / "raw/ml-1m/ml-1m/movies.dat").write_text("".join(f"{n}::Film (1990)::Drama\n" for n in range(1, 30)))
        (data / "raw/ml-1m/ml-1m/users.dat").write_text("".join(f"{n}::F::25::4::02139\n" for n in range(3)))
        write_json(data / "raw/ml-1m/manifest.json", {"files": {}})
    if study == "data-growth":
        made = {"ml-20m-form": {"movies": 3000, "rated_movies": 1500, "largest_id": 9000}, "amzn-books-form": {}}
        for name, changes in made.items():
            plan["generated"][name]["synthesize"] |= changes
        settings["rows"] = {"ml-20m-form": [4000], "amzn-books-form": [6000]}
        settings["pandas"] = {"ml-20m-form": [4000]}
    return plan


def test_a_bare_gpu_machine_can_measure() -> None:
    """All but those of preprocessing, whose measurements are of libraries that are not there."""
    code = """
import sys
for name in ("yaml", "jsonschema", "polars", "pandera", "pyarrow", "matplotlib", "tabulate"):
    sys.modules[name] = None  # an import of it fails
import steps.study, steps.studies.encoder_efficiency, steps.studies.kernels, steps.studies.long_sequences
import steps.studies.m_falcon, steps.studies.null_models, steps.studies.table_load, steps.studies.time_maps
import steps.studies.convergence, steps.studies.scaling_law, steps.studies.training_speed, steps.studies.distributed
import steps.studies.stream_sensitivity
"""
    run("python", "-c", code, cwd=ROOT)


def test_a_bare_gpu_machine_can_run_the_tests_that_need_one() -> None:
    marked = [path for path in (ROOT / "tests").glob("*/test_*.py") if "pytest.mark.gpu" in path.read_text("utf-8")]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in marked if path != Path(__file__)}
    assert modules > {"tests.kernels.test_hstu_attention", "tests.steps.test_distributed_faults"}
    code = f"""
import importlib, sys
sys.path.append("tests/kernels")  # as pytest does
for name in ("jsonschema", "polars", "pandera", "pyarrow", "mlflow", "rapidfuzz", "rocrate"):
    sys.modules[name] = None
for name in {sorted(modules)}:
    importlib.import_module(name)
"""
    run("python", "-c", code, cwd=ROOT)


@pytest.mark.parametrize("study", STUDIES)
def test_a_small_run_of_every_study_becomes_a_report(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if study == "scaling-law":  # whose report refuses runs that the study does not plan, as these small ones
        monkeypatch.setattr(scaling_law_report, "require_planned", lambda *_: None)
    write_json(tmp_path / "settings.json", small(study, tmp_path / "data"))
    rows, report = tmp_path / "rows.json", tmp_path / "report"
    arguments = ("--settings", "settings.json", "--output", str(rows))
    paths = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    # In a process of its own, as Triton's interpreter is chosen when Triton is imported.
    run("python", "-m", "steps.study", *arguments, cwd=tmp_path, **paths)
    measured = read_rows(rows, study)
    assert {one["device"] for one in measured} == {"CPU"}
    assert all(set(one) & {"versions", "commit"} == {"versions", "commit"} for one in measured)
    assert any("data_sha256" in one for one in measured) == (study not in WITHOUT_DATA)
    for _ in range(2):  # the second time changes nothing
        step("report_study", "--study", study, "--rows", rows, "--output", report, cwd=ROOT)
        assert read_rows(report / "rows.json", study) == measured
    made = {path.name: path.read_bytes() for path in report.iterdir()}
    assert set(made) == {"rows.json", "table.md", "table.csv", *(f"figure{end}" for end in FIGURE)}
    step("report_study", "--study", study, "--output", report, cwd=ROOT)
    assert {path.name: path.read_bytes() for path in report.iterdir()} == made
    if study not in MEASURED:
        return
    # Rows of another machine stay as they are, and have places of their own in the report.
    kept = ROOT / f"reports/studies/{study}"
    shutil.copyfile(kept / "rows.json", report / "rows.json")
    said = step("report_study", "--study", study, "--rows", rows, "--output", report, cwd=ROOT).stdout
    before, after = read_rows(kept / "rows.json", study), read_rows(report / "rows.json", study)
    assert [one for one in before if one not in after] == []
    assert (", beside those of NVIDIA" in said) == (before[0]["device"] != "CPU")


def test_some_cases_are_measured_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "settings.json", small("kernels", tmp_path))
    arguments = ["--settings", "settings.json", "--output", "rows.json", "--only"]
    step("study", *arguments, "operation=layer_norm", "dim=16", cwd=tmp_path)
    assert {(one["operation"], one["dim"]) for one in read_rows(tmp_path / "rows.json", "kernels")} == {
        ("layer_norm", 16)
    }
    refused = step("study", *arguments, "operation=layer", cwd=tmp_path, check=False)
    assert "no case is so; the first is operation roofs, copied 4096" in refused.stderr


def test_kernels_are_not_measured_before_their_tests_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_record, "REPORT", str(tmp_path / "gpu.json"))
    write_json(tmp_path / "settings.json", studies.plan("kernels", ROOT / "params"))
    arguments = ("--settings", "settings.json", "--output", "rows.json")
    refused = step("study", *arguments, cwd=tmp_path, check=False)
    assert refused.returncode == 1
    assert "gpu.json does not exist; run pytest -o addopts= --gpu-report" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not list(tmp_path.glob("rows*"))


def test_a_study_that_was_cut_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "settings.json", small("kernels", tmp_path))
    arguments = ("--settings", "settings.json", "--output", "rows.json", "--only", "operation=layer_norm")
    begun: list[int] = []

    def measure(case: dict[str, Any], *_: Any) -> list[Row]:
        begun.append(case["dim"])
        if len(begun) == 2:
            raise KeyboardInterrupt
        return [row(case | {"implementation": name}, "ms", len(begun), "ms") for name in ("ours", "torch")]

    def dims_measured(commit: str) -> list[int]:
        begun.clear()
        step("study", *arguments, cwd=tmp_path, check=False, HSTU_COMMIT=commit)
        return begun

    monkeypatch.setattr(kernels, "measure", measure)
    assert dims_measured("a" * 40) == [8, 16]
    partial = tmp_path / "rows.partial.json"
    first = read_rows(partial, "kernels")
    assert [one["implementation"] for one in first] == ["ours", "torch"]
    assert not (tmp_path / "rows.json").exists()
    for other in ("b" * 40, "unknown", f"{'a' * 40}-dirty"):  # another one measures all
        assert dims_measured(other) == [8, 16]
    write_rows(partial, "kernels", [one | {"card": "0a1b2c3d"} for one in first])
    assert dims_measured("a" * 40) == [8, 16]
    assert dims_measured("a" * 40) == [16]
    rows = read_rows(tmp_path / "rows.json", "kernels")
    assert rows[:2] == first
    assert [one["dim"] for one in rows] == [8, 8, 16, 16]
    assert not partial.exists()


def test_rows_of_data_are_kept_where_the_data_are_the_same(tmp_path: Path) -> None:
    case = {"data": "ml-1m", "group": "full attention"}
    there = read_json(write_processed(tmp_path / "processed/ml-1m", [9, 4], 20) / "manifest.json")["sequences_sha256"]
    origin = {"device": "H200", "card": "0a1b2c3d", "commit": "a" * 40, "versions": {"torch": "2.13.0"}}
    rows = [row(case, "ndcg@10", 0.2, "fraction", data_sha256=digest) | origin for digest in (there, "b" * 64)]
    digests = digests_of({"data": {"processed": {"ml-1m": {}, "demo-long": {}}}}, tmp_path)
    assert digests == [there]
    for one, expected in zip(rows, ([rows[0]], []), strict=True):
        write_rows(tmp_path / "rows.json", "long-sequences", [one])
        assert kept(tmp_path / "rows.json", "long-sequences", [case], origin, digests) == expected


@pytest.mark.parametrize("study", MEASURED)
def test_committed_reports_are_those_of_the_committed_rows(study: str, tmp_path: Path) -> None:
    kept = ROOT / "reports/studies" / study
    step("report_study", "--study", study, "--rows", kept / "rows.json", "--output", tmp_path, cwd=ROOT)
    made = {path.name for path in tmp_path.iterdir()}
    ignored = run("git", "check-ignore", *made, cwd=kept, check=False).stdout.splitlines()
    assert made - set(ignored) <= {path.name for path in kept.iterdir()} <= made
    for name in {"rows.json", "table.md", "table.csv"} - set(ignored):
        assert (tmp_path / name).read_text() == (kept / name).read_text(), f"run `make tables`: {kept / name}"


def texts_and_numbers(rows: list[Row], study: dict[str, Any]) -> tuple[list[str], set[str]]:
    """What a report may show that is not measured: axes and origins of rows, how many repetitions they are of, and the
    study's own settings and names of parts, as a report may name those to come."""
    found: list[Any] = [value for one in rows for key, value in one.items() if key not in FIELDS[:3]]
    found += [one["commit"][:9] for one in rows]
    found += Counter(json.dumps([case_of(one), one["metric"]]) for one in rows if "repetition" in one).values()
    groups = [group for group in study["measure"].get("runs", []) if "together" in group.get("with", {})]
    found += [group["with"]["together"].format(row=model) for group in groups for model in group["models"]]
    queue: list[Any] = [study.get("published", {}), study["measure"]["settings"], *found]
    texts, numbers = {study["title"], "1 MB = 10^6 bytes", "1.00x", "100.0%", "figure.svg"}, {"0"}
    while queue:
        value = queue.pop()
        if isinstance(value, dict):
            queue += [*value, *value.values()]
        elif isinstance(value, list):
            queue += value
        elif isinstance(value, str):
            texts |= {value, value.upper()}
        else:
            numbers.add(f"{value:g}" if isinstance(value, float) else str(value))
    return sorted(texts, key=len, reverse=True), numbers


@pytest.mark.parametrize("study", MEASURED)
def test_every_number_of_a_report_comes_from_its_rows(study: str) -> None:
    """Other values make every number another one, but for names of cases, and flags: 0 and 1 `of 1`."""
    rows = read_rows(ROOT / "reports/studies" / study / "rows.json", study)
    require_numbers_of_rows(rows, params.load(f"studies/{study}", ROOT / "params"))


def require_numbers_of_rows(rows: list[Row], content: dict[str, Any]) -> None:
    """Fail at the first part of a study's report that has a number of neither the rows nor the settings."""
    report = importlib.import_module(f"steps.studies.{content['module']}_report").report
    texts, numbers = texts_and_numbers(rows, content)

    def parts(values: list[Row]) -> list[str]:
        lines = report(values, content)[0].splitlines()
        return [part.strip() for line in lines for part in (line.split("|") if line.startswith("|") else [line])]

    def changed(seed: int) -> list[Row]:
        factor = random.Random(seed)
        found = []
        for one in rows:
            scale = math.exp(factor.uniform(-3, 3))
            flag = one["unit"] == "of 1" and one["value"] in (0, 1)
            keys = [key for key in ("value", "low", "high") if key in one and not flag]
            found.append(one | {key: one[key] * scale for key in keys})
        return found

    others = [parts(changed(seed)) for seed in range(4)]
    for index, part in enumerate(parts(rows)):
        if all(part == other[index] for other in others):
            rest = part
            for text in texts:
                rest = rest.replace(text, "")
            left = {f"{float(number):g}" for number in re.findall(r"\d+(?:\.\d+)?", rest.replace(",", ""))}
            assert left <= {f"{float(number):g}" for number in numbers - {"True", "False"}}, part
