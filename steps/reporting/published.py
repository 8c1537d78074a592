"""Which of the figures that others published stand beside ours."""

from typing import Any

from steps.common import params


def published_figures(paper: dict[str, Any], dataset: str, protocol: str) -> dict[str, dict[str, Any]]:
    """The figures of a data set, by the row, from the sources whose rules the protocol follows; none beside others.

    paper: params/paper.yaml.
    """
    sources = params.entry("protocols", protocol).get("published", [])
    figures = paper["public_datasets"].get(dataset, {})
    return {row: reported for row, reported in figures.items() if reported["source"] in sources}
