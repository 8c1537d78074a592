"""The repository's own metadata: a Workflow RO-Crate with its tests, and CodeMeta."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from rocrate.model.testdefinition import TestDefinition
from rocrate.model.testsuite import TestSuite

from steps.crates.entities import Project, add, add_workflow, media_type, new_crate, text

_TEST_TERMS = "https://w3id.org/ro/terms/test"
_TESTS = "tests/test_pipeline.py"
_FILES = {
    "README.md": "What the project is, and its two commands",
    "ARTIFACT.md": "What to run for each badge of artifact evaluation",
    "LICENSE": "The licence",
    "CITATION.cff": "How to cite",
    "codemeta.json": "Software metadata",
    "config/README.md": "What the workflow is configured by",
    "dvc.yaml": "The demo for DVC",
    "workflow/dvc.yaml": "The same graph as the Snakefile's, for DVC",
    "environment.yml": "The pinned environment, for conda",
    "constraints.txt": "The pinned environment, for pip",
    "Makefile": "The environment, the demo, the tests, the tables",
}
_FOLDERS = {
    "docs/": "Pages",
    "findings/": "Surprises of public libraries, one script each",
    "kernels/": "Operations on jagged sequences",
    "params/": "Data sets, models, protocols, experiments, studies, and their schemas",
    "reports/": "Tables, figures, and the records that they are rebuilt from",
    "steps/": "The steps, each a command line",
    "tests/": "Tests",
}


def crate_text(project: Project, root: Path) -> str:
    """The ro-crate-metadata.json of the repository. It changes when its list of files, or the version, does."""
    crate = new_crate(project, project.title, project.abstract, project.released)
    crate.metadata.extra_contexts.append(_TEST_TERMS)
    crate.root_dataset["version"], crate.root_dataset["keywords"] = project.version, project.keywords
    workflow = add_workflow(crate, project, root / "Snakefile")
    rules = [
        crate.add_file(path, path.relative_to(root).as_posix(), properties=_about(path.name, "Rules"))
        for path in sorted((root / "workflow/rules").glob("*.smk"))
    ]
    workflow["hasPart"] = rules
    for name, description in _FILES.items():
        crate.add_file(root / name, name, properties=_about(name, description))
    crate.get("README.md")["about"] = crate.root_dataset
    for name, description in _FOLDERS.items():
        crate.add_dataset(root / name, name, properties={"name": name, "description": description})
    engine = add(
        crate, "https://docs.pytest.org/", "SoftwareApplication", name="pytest", url="https://docs.pytest.org/"
    )
    suite = crate.add(TestSuite(crate, "#tests", properties={"name": "The demo under both orchestrators"}))
    suite["mainEntity"] = workflow
    definition = TestDefinition(crate, root / _TESTS, _TESTS, properties=_about(_TESTS, "Runs with `make test`"))
    definition["conformsTo"], definition["engineVersion"] = engine, _pinned(root, "pytest")
    suite["definition"] = crate.add(definition)
    crate.root_dataset["mentions"] = [suite]
    return text(crate)


def codemeta_text(project: Project, root: Path) -> str:
    """The codemeta.json of the repository, from CITATION.cff and pyproject.toml."""
    package = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    spdx = f"https://spdx.org/licenses/{project.licence}"
    content: dict[str, Any] = {
        "@context": "https://w3id.org/codemeta/3.0",
        "@type": "SoftwareSourceCode",
        "name": project.title,
        "description": project.abstract,
        "version": project.version,
        "license": spdx,
        "author": [{"@type": "Organization", "name": name} for name in project.authors],
        "datePublished": project.released,
        "dateModified": project.released,
        "keywords": project.keywords,
        "programmingLanguage": "Python",
        "runtimePlatform": f"Python {package['requires-python']}",
        "operatingSystem": "Linux",
        "softwareRequirements": [_requirement(dependency) for dependency in package["dependencies"]],
        "readme": "README.md",
        "developmentStatus": "https://www.repostatus.org/#active",
        "hasPart": {
            "@type": "SoftwareSourceCode",
            "name": package["name"],
            "description": package["description"],
            "version": package["version"],
            "license": spdx,
        },
        "referencePublication": {
            "@type": "schema:ScholarlyArticle",
            "name": project.paper["title"],
            "url": project.paper["url"],
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _requirement(dependency: str) -> dict[str, str]:
    """A dependency as CodeMeta has it: an object, as a bare string would be an address."""
    name = re.split(r"[<>=!~ ]", dependency)[0]
    return {"@type": "SoftwareApplication", "name": name, "version": dependency.removeprefix(name)}


def _about(name: str, description: str) -> dict[str, str]:
    return {"name": name, "description": description, "encodingFormat": media_type(name)}


def _pinned(root: Path, package: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))
