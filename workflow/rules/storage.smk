# A bucket that keeps data, runs and logs (--default-storage-provider), and names of files in it.

import os
import re
import sys
from pathlib import Path

from snakemake.path_modifier import PathModifier

from steps.common.provenance import commit

STORAGE = workflow.storage_settings.default_storage_provider  # of --default-storage-provider: s3, or None
STORED = ("data/", "runs/", "logs/")  # what it holds; code and reports are in the checkout
if STORAGE:

    localrules:
        card,  # its reports are read from the checkout


def only_what_is_stored(apply):
    """Snakemake's own application of the default storage, which takes every path for one that is there."""
    return lambda modifier, path: apply(modifier, path) if str(path).startswith(STORED) else path


def link_to_storage(name):
    """Let `data` and `runs`, which commands name, be what Snakemake fetches from the storage, and brings there."""
    query = f"{workflow.storage_settings.default_storage_prefix.rstrip('/')}/{name}"
    local = workflow.storage_registry.default_storage_provider.object(query).local_path()
    local.mkdir(parents=True, exist_ok=True)
    link = Path(name)
    if not link.is_symlink() and not link.exists():
        link.symlink_to(local)
    if link.resolve() != local.resolve():
        relink = "`rm data runs` if nothing runs here, or " if link.is_symlink() else ""
        sys.exit(
            f"snakemake: {name}/ is here, and --default-storage-provider keeps it in {query}: {relink}take a new checkout"
        )


def refuse_without_storage(name):
    """Here the folder is a copy of a part of the storage, which would later count as fetched from there."""
    if Path(name).is_symlink() and os.readlink(name).startswith(".snakemake/storage/"):
        sys.exit(
            f"snakemake: {name} is a link to what a bucket keeps: "
            "name the bucket again (--default-storage-provider, --default-storage-prefix), or take a new checkout"
        )


if STORAGE:
    if not re.match("s3://[^/]" if STORAGE == "s3" else ".", workflow.storage_settings.default_storage_prefix or ""):
        sys.exit(
            f"snakemake: --default-storage-provider {STORAGE} wants --default-storage-prefix, as s3://BUCKET/FOLDER"
        )
    PathModifier.apply_default_storage = only_what_is_stored(PathModifier.apply_default_storage)
    link_to_storage("data")
    link_to_storage("runs")
    os.environ.setdefault("HSTU_COMMIT", commit())  # machines that fetch the code from the storage have no git

    envvars:
        "HSTU_COMMIT",

else:
    refuse_without_storage("data")
    refuse_without_storage("runs")


def fetched(*paths):
    """What a step reads besides its small inputs, which have the hashes of it: storage has to be told."""
    return list(paths) if STORAGE else []


def folder_or(folder, *files):
    """The files of a data set's folder. In storage the folder is one object, and has what some data sets have beside
    them: Snakemake takes a folder for fetched as soon as one file of it is there, so both do not go together."""
    return [folder] if STORAGE else [f"{folder}/{name}" for name in files]


def made_folder_or(folder, *files):
    """The same, of an output."""
    return [directory(folder)] if STORAGE else folder_or(folder, *files)
