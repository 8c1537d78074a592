"""The Provenance Run Crate of an experiment (https://w3id.org/ro/wfrun/provenance/0.5).

It has the workflow's files, the small files of every run as records have them, and the tables. A training and an
evaluation are an action each: their tool at its commit, what they were made of, what they made. Large files (sequences,
weights, ranks) and whole histories are named by their hash. Which orchestrator or shell started the steps is not
recorded, so no action says it.
"""

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from rocrate.model.entity import Entity
from rocrate.rocrate import ROCrate

from steps.common.params import Run
from steps.crates.entities import WORKFLOW, Project, add, add_file, add_workflow, conform, fixity, new_crate, slug
from steps.reporting.records import Record

PROFILES = (
    ("https://w3id.org/ro/wfrun/process/0.5", "Process Run Crate", "0.5"),
    ("https://w3id.org/ro/wfrun/workflow/0.5", "Workflow Run Crate", "0.5"),
    ("https://w3id.org/ro/wfrun/provenance/0.5", "Provenance Run Crate", "0.5"),
    ("https://w3id.org/workflowhub/workflow-ro-crate/1.0", "Workflow RO-Crate", "1.0"),
)
CONTEXT = "https://w3id.org/ro/terms/workflow-run/context"
_AXES = ("dataset", "model", "protocol", "seed")
_STEPS = {
    "train": "Train a run; its weights, and a line of its history for each epoch.",
    "evaluate": "Rank or predict everything that is held out, and count the metrics.",
    "tabulate": "Tables and learning curves of all runs.",
    "compare": "Intervals, paired tests and published orderings.",
}
#: What compare writes, of what a crate holds.
OF_COMPARE = ("comparisons.csv", "comparisons.md", "intervals.csv", "intervals.svg", "parity.md")
_UNITS = {"seconds": "SEC", "peak bytes": "BYTE"}
_README = """# {title}

{description} `ro-crate-metadata.json` says what ran, on what, at which commit, and with which result; it has the
SHA-256 of every file. [The tables](table.md).
"""
_PYTHON = "https://docs.python.org/release/{}/"
_PACKAGE = "https://pypi.org/project/{}/{}/"


class ExperimentCrate:
    """The crate of an experiment while it is made."""

    def __init__(self, project: Project, name: str, title: str, records: list[Record], rules: Mapping[str, bytes]):
        """title: the experiment's. rules: the workflow's files by their path, Snakefile first."""
        ended = [record.metrics["ended"] for record in records if "ended" in record.metrics]
        description = f"Experiment {name} of a reproduction of HSTU: {len(records)} runs, with what they were made of."
        self.crate = new_crate(project, title, description, max(ended, default=project.released))
        self.crate.metadata.extra_contexts.append(CONTEXT)
        conform(self.crate, PROFILES)
        self.agent, self.version = self.crate.root_dataset["author"], project.version
        readme = _README.format(title=title, description=description)
        add_file(self.crate, "README.md", readme.encode("utf-8"), about=self.crate.root_dataset)
        self._values: dict[str, Entity] = {}
        self._tools: dict[tuple[str, ...], Entity] = {}
        (main, content), *others = rules.items()
        about = {"@type": [*WORKFLOW, "HowTo"], "name": f"{main} of {project.title}"}
        self.workflow = add_workflow(self.crate, project, BytesIO(content), **about, **fixity(content))
        for path, text in others:
            about = {"@type": ["File", "SoftwareSourceCode"], "isPartOf": self.workflow, "version": project.version}
            add_file(self.crate, path, text, **about)
        self.workflow["input"] = [self._parameter(axis) for axis in _AXES]
        self.metrics, objects = [], []
        for record in records:
            objects.append(self._sequences(record))
            self.metrics.append(self._run(record))
        self.objects = list({entity.id: entity for entity in objects}.values())

    def add_reports(self, files: Mapping[str, bytes]) -> None:
        """The tables and figures by their names, and the actions that made them."""
        added = {name: add_file(self.crate, name, content) for name, content in files.items()}
        for step, made in (
            ("compare", [entity for name, entity in added.items() if name in OF_COMPARE]),
            ("tabulate", [entity for name, entity in added.items() if name not in OF_COMPARE]),
        ):
            self._act(f"#{step}", step, self._tool(step), self.metrics, made)

    def finish(self) -> ROCrate:
        """The crate, whole: with the run of the whole workflow, and its steps."""
        steps = [step for step in _STEPS if any(key[0] == step for key in self._tools)]
        self.workflow["step"] = [
            add(
                self.crate,
                f"#step-{step}",
                "HowToStep",
                name=step,
                position=str(place),
                workExample=[tool for key, tool in self._tools.items() if key[0] == step],
            )
            for place, step in enumerate(steps, 1)
        ]
        self.workflow["hasPart"] = list(self._tools.values())
        actions = [action for action in self.crate.get_entities() if action.type == "CreateAction"]
        reports = [made for action in actions if action.id in ("#compare", "#tabulate") for made in action["result"]]
        whole = self._act(
            "#experiment",
            "the whole experiment",
            self.workflow,
            [*self.objects, *self._values.values()],
            [*reports, *self.metrics],
        )
        for axis in _AXES:
            values = [value for value in self._values.values() if value["name"] == axis]
            self._parameter(axis)["workExample"] = values
        self.crate.root_dataset["mentions"] = [whole, *actions]
        return self.crate

    def _run(self, record: Record) -> Entity:
        """The actions of a run and their files; returns its metrics.json."""
        run, about = record.run, record.metrics
        folder = f"runs/{run.path}"
        files = {
            name: add_file(self.crate, f"{folder}/{name}", text.encode("utf-8"))
            for name, text in record.light_texts().items()
        }
        files["history.jsonl"]["description"] = "What reports show of every epoch."
        values = [self._value(axis, getattr(run, axis)) for axis in _AXES]
        whole_history = self._by_hash(record, "history", "history.jsonl")
        weights = self._by_hash(record, "weights", "model.safetensors")
        outcomes = self._by_hash(record, "outcomes", "outcomes.safetensors")
        outcomes += self._by_hash(record, "ranks", "ranks.safetensors")  # its name in runs of earlier commits
        where = f"{run.path}: {about['device']}, products in {about.get('precision', 'unknown precision')}"
        training = self._act(
            f"#train/{run.path}",
            f"train {where}",
            self._tool("train", about["commit"], about["versions"]),
            [files["config.json"], self._sequences(record), *values],
            [files["history.jsonl"], *whole_history, *weights],
        )
        usage = {"device": about["device"], "seconds": about["train_seconds"], "peak bytes": about["peak_bytes"]}
        training["resourceUsage"] = [
            self._usage(name, value, run) for name, value in usage.items() if value is not None
        ]
        for key, ours in (("startTime", "started"), ("endTime", "ended")):
            if about.get(ours):
                training[key] = about[ours]
        evaluated = {"commit": about["commit"], "device": about["device"]} | about.get("evaluated", {})
        self._act(
            f"#evaluate/{run.path}",
            f"evaluate {run.path}: {evaluated['device']}",
            self._tool("evaluate", evaluated["commit"], about["versions"]),
            [files["config.json"], self._sequences(record), *weights],
            [files["metrics.json"], *outcomes],
        )
        return files["metrics.json"]

    def _act(self, identifier: str, name: str, tool: Entity, objects: list[Entity], results: list[Entity]) -> Entity:
        about: dict[str, Any] = {
            "name": name,
            "description": _STEPS.get(tool["name"], "All runs, and the tables of them."),
        }
        about |= {"agent": self.agent, "instrument": tool, "object": objects, "result": results}
        return add(self.crate, identifier, "CreateAction", **about)

    def _tool(self, step: str, commit: str = "", versions: Mapping[str, str] | None = None) -> Entity:
        """A step at a commit with the libraries it ran with. What is not recorded is not said."""
        key = (step, commit, *(f"{name} {version}" for name, version in (versions or {}).items()))
        if key not in self._tools:
            place = sum(other[0] == step for other in self._tools) + 1
            about: dict[str, Any] = {"name": step, "description": f"python -m steps.{step}"}
            about |= {"softwareVersion": commit or self.version}
            if versions:
                about["softwareRequirements"] = self._libraries(versions)
            self._tools[key] = add(self.crate, f"#steps.{step}-{place}", "SoftwareApplication", **about)
        return self._tools[key]

    def _libraries(self, versions: Mapping[str, str]) -> list[Entity]:
        found = []
        for name, version in versions.items():
            url = _PYTHON.format(version) if name == "python" else _PACKAGE.format(name, version.split("+")[0])
            about = {"name": name, "softwareVersion": version, "url": url}
            found.append(add(self.crate, url, "SoftwareApplication", **about))
        return found

    def _sequences(self, record: Record) -> Entity:
        """The processed sequences that a run was trained on."""
        dataset, digest = record.run.dataset, record.metrics["data_sha256"]
        name = f"processed sequences of {dataset}"
        return add(self.crate, f"#sequences-{digest[:16]}", "CreativeWork", name=name, sha256=digest)

    def _by_hash(self, record: Record, what: str, file: str) -> list[Entity]:
        """A file of a run that is too large for the crate; none where its hash is not recorded."""
        digest = record.metrics.get(f"{what}_sha256")
        if not digest:
            return []
        name = f"{record.run.path}/{file}"
        return [add(self.crate, f"#{what}/{record.run.path}", "CreativeWork", name=name, sha256=digest)]

    def _parameter(self, axis: str) -> Entity:
        kind = "Integer" if axis == "seed" else "Text"
        bioschemas = "https://bioschemas.org/profiles/FormalParameter/1.0-RELEASE"
        profile = add(self.crate, bioschemas, "CreativeWork", name="Bioschemas FormalParameter", version="1.0")
        about = {"name": axis, "additionalType": kind, "valueRequired": "True", "conformsTo": profile}
        return add(self.crate, f"#parameter-{axis}", "FormalParameter", **about)

    def _value(self, axis: str, value: str | int) -> Entity:
        identifier = f"#{axis}-{value}"
        if identifier not in self._values:
            about = {"name": axis, "value": value, "exampleOfWork": self._parameter(axis)}
            self._values[identifier] = add(self.crate, identifier, "PropertyValue", **about)
        return self._values[identifier]

    def _usage(self, name: str, value: str | float, run: Run) -> Entity:
        """A device, or how much of a run's means it took."""
        place = slug(str(value)) if name == "device" else str(run.path)
        about: dict[str, Any] = {"name": name, "value": value, "propertyID": f"#{slug(name)}"}
        about["unitCode"] = f"http://qudt.org/vocab/unit/{_UNITS.get(name, 'UNITLESS')}"
        return add(self.crate, f"#{slug(name)}/{place}", "PropertyValue", **about)


def workflow_files(root: Path) -> dict[str, bytes]:
    """The workflow by the paths of its files, Snakefile first."""
    paths = [root / "Snakefile", *sorted((root / "workflow/rules").glob("*.smk"))]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
