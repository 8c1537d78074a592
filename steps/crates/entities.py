"""What all crates share: the project they are of, their files, and how they are made into bytes.

Every date and version comes from a file, none from the clock, so that the same files make the same crate.
"""

import hashlib
import json
import mimetypes
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rocrate.model import ContextEntity
from rocrate.model.entity import Entity
from rocrate.rocrate import ROCrate

from steps.common import yaml_files
from steps.common.cli import StepError

VERSION = "1.1"  # of RO-Crate, on which the profiles of workflows and runs stand
WORKFLOW = ["File", "SoftwareSourceCode", "ComputationalWorkflow"]
_BIOSCHEMAS = "https://bioschemas.org/profiles/ComputationalWorkflow/1.0-RELEASE"
_TYPES = {
    ".cff": "application/yaml",
    ".json": "application/json",
    ".jsonl": "application/jsonl",
    ".md": "text/markdown",
    ".smk": "text/x-python",
    ".toml": "application/toml",
    ".yaml": "application/yaml",
    ".yml": "application/yaml",
}


@dataclass(frozen=True)
class Project:
    """What CITATION.cff says of the project and of the paper that it reproduces."""

    title: str
    abstract: str
    version: str
    released: str
    licence: str
    keywords: list[str]
    authors: list[str]
    paper: dict[str, Any]


def read_project(path: Path = Path("CITATION.cff")) -> Project:
    """Raises StepError that names the key that the file lacks."""
    content = yaml_files.read(path)
    try:
        return Project(
            title=content["title"],
            abstract=content["abstract"],
            version=str(content["version"]),
            released=str(content["date-released"]),
            licence=content["license"],
            keywords=list(content["keywords"]),
            authors=[author["name"] for author in content["authors"]],
            paper=content["references"][0],
        )
    except (KeyError, IndexError, TypeError) as error:
        raise StepError(f"{path} lacks {error}; add it, as Citation File Format 1.2.0 has it") from error


def new_crate(project: Project, name: str, description: str, published: str) -> ROCrate:
    """A crate without files: its title, its licence, its authors."""
    crate = ROCrate(version=VERSION)
    root = crate.root_dataset
    root["name"], root["description"], root["datePublished"] = name, description, published
    licence = f"https://spdx.org/licenses/{project.licence}"
    root["license"] = add(crate, licence, "CreativeWork", name=project.licence, identifier=licence)
    root["author"] = [add(crate, f"#{slug(name)}", "Organization", name=name) for name in project.authors]
    root["publisher"] = root["author"]
    paper = project.paper
    root["citation"] = add(crate, paper["url"], "ScholarlyArticle", name=paper["title"], url=paper["url"])
    return crate


def add(crate: ROCrate, identifier: str, kind: str | list[str], /, **properties: Any) -> Entity:
    """A contextual entity of the crate; the one that is there if it has this identifier."""
    found = crate.get(identifier)
    if found is None:
        found = crate.add(ContextEntity(crate, identifier, properties={"@type": kind, **properties}))
    return found


def add_file(crate: ROCrate, name: str, content: bytes, /, **properties: Any) -> Entity:
    """A file in the crate, with its size and hash."""
    about = {"name": name, "encodingFormat": media_type(name)} | fixity(content)
    return crate.add_file(BytesIO(content), name, properties=about | properties)


def fixity(content: bytes) -> dict[str, str]:
    """Size and hash of a file, as a crate names them."""
    return {"contentSize": str(len(content)), "sha256": hashlib.sha256(content).hexdigest()}


def add_workflow(crate: ROCrate, project: Project, source: Path | BytesIO, **properties: Any) -> Entity:
    """The Snakefile, as the crate's main entity."""
    about = {
        "@type": WORKFLOW,
        "name": "HSTU: from raw data to tables",
        "description": "Download, validate, preprocess, plan, train, evaluate, tabulate, compare.",
        "version": project.version,
        "encodingFormat": "text/x-python",
        "conformsTo": add(crate, _BIOSCHEMAS, "CreativeWork", name="Bioschemas ComputationalWorkflow", version="1.0"),
        "license": crate.root_dataset["license"],
        "creator": crate.root_dataset["author"],
    }
    return crate.add_workflow(source, "Snakefile", main=True, lang="snakemake", properties=about | properties)


def media_type(name: str) -> str:
    """Of a file, by its name."""
    suffix = Path(name).suffix
    return _TYPES.get(suffix) or mimetypes.types_map.get(suffix) or "text/plain"


def conform(crate: ROCrate, profiles: Iterable[tuple[str, str, str]]) -> None:
    """Say which profiles the crate conforms to: address, name and version of each."""
    crate.root_dataset["conformsTo"] = [
        add(crate, address, "CreativeWork", name=name, version=version) for address, name, version in profiles
    ]


def text(crate: ROCrate) -> str:
    """The crate's metadata, as JSON of a line an entity: readable in a diff, and smaller than indented."""
    content = crate.metadata.generate()
    graph = [{key: _single(value) for key, value in entity.items()} for entity in content["@graph"]]
    lines = ",\n".join(json.dumps(entity, ensure_ascii=False, allow_nan=False) for entity in graph)
    return f'{{"@context": {json.dumps(content["@context"])},\n"@graph": [\n{lines}\n]}}\n'


def _single(value: Any) -> Any:
    """A list of one value as the value, as RO-Crate recommends."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def slug(name: str) -> str:
    """A name as a part of an identifier."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
