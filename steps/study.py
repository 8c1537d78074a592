"""Measure a study on the device at hand: a row per number, by `steps/studies/<module>.py`.

Reads the `settings.json` that plan_study resolved. A study is measured on the kind of device that it names, and refused
elsewhere. Writes this machine's rows alone; report_study puts them beside those of other devices. Until all cases are
measured, the rows so far are in `<output>.partial.json`: the same command goes on from there, if commit, versions,
device, card and sequences are the same. Needs what the module needs: torch, triton, numpy and safetensors, for all but
preprocessing.
"""

import argparse
import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from steps.common.cli import StepError, run_step
from steps.common.device import card, device_name
from steps.common.files import read_json
from steps.common.provenance import commit, versions
from steps.studies.rows import Row, case_of, read_rows, write_rows


def chosen(cases: list[dict[str, Any]], only: list[str]) -> list[dict[str, Any]]:
    """The cases that have every KEY=VALUE. Raises StepError if there are none."""
    wanted = dict(pair.partition("=")[::2] for pair in only)
    found = [case for case in cases if all(str(case.get(key)) == value for key, value in wanted.items())]
    if not found:
        raise StepError(f"--only {' '.join(only)}: no case is so; the first is {_words(cases[0])}")
    return found


def partial_of(output: Path) -> Path:
    """Where the rows are until all cases are measured."""
    return output.with_name(f"{output.stem}.partial.json")


def kept(
    path: Path, study: str, cases: list[dict[str, Any]], origin: dict[str, Any], digests: Collection[str]
) -> list[Row]:
    """Rows of these cases that an earlier run, which was cut, left at `path`, if it was of the same origin.

    Of data only those whose hashes are among `digests`, as they may be others now; none of code that no commit names.
    """
    if not path.exists() or origin["commit"] == "unknown" or origin["commit"].endswith("-dirty"):
        return []
    same = ("device", "card", "commit", "versions")
    return [
        one
        for one in read_rows(path, study)
        if all(one.get(key) == origin.get(key) for key in same)
        and one.get("data_sha256") in (None, *digests)
        and any(is_of(one, case) for case in cases)
    ]


def digests_of(plan: dict[str, Any], data: Path) -> list[str]:
    """The hashes of the sequences that the study reads, as far as they are there."""
    names = plan.get("data", {}).get("processed", {})
    manifests = [data / "processed" / name / "manifest.json" for name in names]
    return [read_json(path, remedy="run preprocess again")["sequences_sha256"] for path in manifests if path.is_file()]


def is_of(row: Row, case: dict[str, Any]) -> bool:
    """Whether a row is of a case: it has all of the case's axes."""
    return case.items() <= case_of(row).items()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--settings", required=True, type=Path, help="settings.json, which plan_study writes")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that raw/ and processed/ are in")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="measure these cases alone")
    parser.add_argument("--output", required=True, type=Path, help="rows.json to write")


def main(args: argparse.Namespace) -> None:
    plan = read_json(args.settings, remedy="run plan_study")
    device = torch.device(plan["device"])
    if device.type == "cuda" and not torch.cuda.is_available():
        raise StepError(
            f"study {plan['study']} is measured on a CUDA device, and there is none here; "
            "`make tables` makes its report of the rows that are committed"
        )
    torch.backends.cuda.matmul.allow_tf32 = True  # as in training
    module = importlib.import_module(f"steps.studies.{plan['module']}")
    every = module.cases(plan)
    cases = chosen(every, args.only)
    if hasattr(module, "require"):
        module.require(cases, plan)
    # Of a CPU no threads: a module whose figures depend on their number has it as an axis.
    origin: dict[str, Any] = {"device": "CPU", "commit": commit(), "versions": versions()}
    if device.type == "cuda":
        origin |= {"device": device_name(device), "card": card(device)}
    partial = partial_of(args.output)
    rows = kept(partial, plan["study"], every, origin, digests_of(plan, args.data))
    for number, case in enumerate(cases, start=1):
        found = any(is_of(one, case) for one in rows)
        if not found:
            rows += [one | origin for one in module.measure(case, plan, args.data)]
            write_rows(partial, plan["study"], rows)
        print(f"{number}/{len(cases)}  {_words(case)}{', measured before' * found}", flush=True)
    partial.replace(args.output)
    print(f"study {plan['study']}: {len(rows)} rows on {origin['device']}")


def _words(case: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in case.items() if not isinstance(value, dict))


if __name__ == "__main__":
    run_step("study", __doc__, add_arguments, main)
