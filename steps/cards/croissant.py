"""A data set described in Croissant 1.0 (https://docs.mlcommons.org/croissant/docs/croissant-spec.html)."""

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_FORMATS = {
    ".csv": "text/csv",
    ".gz": "application/gzip",
    ".json": "application/json",
    ".jsonl": "application/jsonlines",
    ".parquet": "application/x-parquet",
    ".tsv": "text/tab-separated-values",
    ".zip": "application/zip",
    ".zst": "application/zstd",
}
_KEYS = {"items": "item", "users": "user"}  # of the record sets that have one
_WORDS = {
    "user": "The user, as the raw file has them.",
    "item": "The item, as the raw file has it.",
    "rating": "The rating, empty where one is missing.",
    "row": "The row's place in the raw file.",
    "title": "The item's title, empty where there is none.",
}


def describe(
    card: Mapping[str, Any], tables: Mapping[str, Mapping[str, str]], folder: str, ticks: int
) -> dict[str, Any]:
    """The Croissant metadata of a card, as card.json has it.

    tables: of `interactions`, and of `items` and `users` if there are any, the columns, each with `integer`, `number`
    or `text`. folder: where their files are, from where the metadata will be. ticks: of a timestamp, in a second.
    """
    counts = card["counts"]
    content: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": card["dataset"],
        "description": f"{card['title']}: {counts['interactions']} interactions of {counts['users']} users with "
        f"{counts['items_with_interactions']} items.",
        "distribution": [*_sources(card), *(_table(name, card, folder) for name in tables)],
        "recordSet": [_records(name, columns, card, ticks) for name, columns in tables.items()],
    }
    for name, key in (("url", "url"), ("citeAs", "citation"), ("version", "version"), ("datePublished", "published")):
        if card.get(key):
            content[name] = card[key]
    licence = card.get("licence")
    if licence:
        content["license"] = licence["name"]
        if "url" in licence:
            content["license"] = {"@type": "sc:CreativeWork", "name": licence["name"], "url": licence["url"]}
    return content


def _sources(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The files as published; those without an address cannot be told of."""
    return [_file(source["file"], source["url"], source["sha256"]) for source in card["sources"] if "url" in source]


def _table(name: str, card: Mapping[str, Any], folder: str) -> dict[str, Any]:
    file = f"{name}.parquet"
    about = card["files"]["valid"][file]
    return _file(file, f"{folder}/{file}", about["sha256"]) | {"contentSize": f"{about['bytes']} B"}


def _file(name: str, url: str, sha256: str) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": url,
        "encodingFormat": _FORMATS.get(PurePosixPath(name).suffix, "application/octet-stream"),
        "sha256": sha256,
    }


def _records(name: str, columns: Mapping[str, str], card: Mapping[str, Any], ticks: int) -> dict[str, Any]:
    unit = "seconds" if ticks == 1 else f"1/{ticks} seconds"
    time = f"When, in {unit} since 1970-01-01 UTC." if "time" in card else "0, as the raw file has no times."
    fields = [
        {
            "@type": "cr:Field",
            "@id": f"{name}/{column}",
            "name": column,
            "description": (_WORDS | {"timestamp": time}).get(column, "A feature."),
            "dataType": {"integer": "sc:Integer", "number": "sc:Float", "text": "sc:Text"}[kind],
            "source": {"fileObject": {"@id": f"{name}.parquet"}, "extract": {"column": column}},
        }
        for column, kind in columns.items()
    ]
    records = {"@type": "cr:RecordSet", "@id": name, "name": name, "field": fields}
    return records | ({"key": {"@id": f"{name}/{_KEYS[name]}"}} if name in _KEYS else {})
