# What a command begins with: which of its targets are known, what must be made again, who else is at work, and its words.

import fcntl
import os
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from steps.common import params
from steps.common.cli import StepError
from steps.common.files import read_json
from steps.tracking.store import LOCAL, shown_uri, tracking_uri
from workflow.display import Display


def prepared(prepare):
    """Snakemake's own making of the graph, preceded by what has to know the command line.

    That is known only after this file is read, which is why a method of Snakemake's is wrapped (tests hold it to this).
    """

    def settled(*args, **kwargs):
        settings = workflow.dag_settings
        if workflow.is_main_process:
            check_targets(settings.targets)
            wanted = set(settings.targets) or {"demo"}
            WANTED.extend(name for name in (*EXPERIMENTS, *STUDIES) if name in wanted)
            check_parameters(name for name in EXPERIMENTS if name in wanted)
            settings.forcerun = {*settings.forcerun, *lost_from_the_store(settings.targets)}
            settings.force_incomplete = True  # what a killed Snakemake did not finish is made again
            settings.max_checksum_file_size = 2**40  # files are compared by content: generated archives are large
        prepare(*args, **kwargs | {"nolock": True})  # its locks outlive it; see refuse_to_share
        workflow.persistence.incomplete = begun

    return settled


async def begun(job):
    """The outputs of a job that was begun and not ended, also those that are not there.

    Snakemake asks for those that are there, and takes what was made of an earlier training for valid where a killed one
    had begun anew; its orphan then removes them.
    """
    keys = {workflow.persistence._get_key(file): file for file in job.output}
    return [keys[key] for key in workflow.persistence._filter_incomplete_keys(keys)]


def check_parameters(experiments):
    """Say in one line which parameter no run of these experiments can have; Snakemake would show a trace besides."""
    try:
        for experiment in experiments:
            for run in params.runs(experiment):
                config_of(run)
    except StepError as error:
        sys.exit(f"snakemake: {error}")


def check_targets(targets):
    """Say which names there are where a target is neither one of them nor a file."""
    for target in targets:
        path = workflow.modifier.path_modifier.modify(os.path.relpath(target))
        if workflow.is_rule(target) or os.path.isfile(path) or any(made.is_producer(path) for made in workflow.rules):
            continue
        sys.exit(
            f"snakemake: {target} is no experiment, study, step or file that can be made. "
            f"Experiments: {', '.join(EXPERIMENTS)}. Studies: {', '.join(STUDIES)}. Data sets: {', '.join(DATASETS)}."
        )


LOCKS = []


def refuse_to_share(dag):
    """Hold each experiment, study and data set that has jobs to do; refuse those that another Snakemake holds.

    The kernel drops these locks when the process ends, however it ends. Jobs do not inherit them.
    """
    wildcards = [job.wildcards for job in dag.needrun_jobs()]
    names = {given.get("experiment") or given.get("study") or given.get("dataset") for given in wildcards} - {None}
    for name in sorted(names):
        LOCKS.append(Path(".snakemake", f"{name}.lock").open("a"))
        try:
            fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"snakemake: another one is making {name} in this folder; wait until it ends")


def is_tracked(experiment):
    """Whether the MLflow store has the runs that were brought there; true before they are.

    A server is not asked. It lacks them where it did not answer, or where MLFLOW_TRACKING_URI names another store.
    """
    made = Path("reports", experiment, "mlflow.json")
    if not made.is_file():
        return True
    content = read_json(made)
    if "pending" in content or content["store"] != shown_uri(tracking_uri()):
        return False
    if content["store"] != LOCAL:
        return True
    try:
        with closing(sqlite3.connect("file:mlflow.db?mode=ro", uri=True)) as store:
            there = {row[0] for row in store.execute("SELECT run_uuid FROM runs WHERE lifecycle_stage = 'active'")}
    except sqlite3.Error:
        return False
    return there.issuperset([content.get("parent"), *content["runs"].values()])


def lost_from_the_store(targets):
    """The mlflow.json files to make again, as the MLflow store, no output of one experiment, lost their runs."""
    made = {name: f"reports/{name}/mlflow.json" for name in EXPERIMENTS}
    wanted = set(targets) or {"demo"}
    return [path for name, path in made.items() if wanted & {name, path} and not is_tracked(name)]


display = Display(workflow.output_settings.quiet or (), dry=lambda: workflow.dryrun)
if workflow.is_main_process:
    logger.addFilter(display)
    signal.signal(signal.SIGINT, display.interrupt)
    if display.brief:
        shell.prefix("set -euo pipefail; exec >/dev/null; ")  # the steps' words go to their logs
