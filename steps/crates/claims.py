"""Claims of the paper, and what became of them here, as schema.org has it: a `Claim`, and the `ClaimReview` of it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rocrate.rocrate import ROCrate

from steps.common.cli import StepError
from steps.crates.entities import add

_KEYS = ("claim", "text", "place", "experiment", "verdict", "why", "files")


def add_claims(crate: ROCrate, claims: Iterable[Mapping[str, Any]], reports: Path, source: Path) -> None:
    """Add claims with their verdicts, figures, and the files that decided them, by their hashes.

    claims: as `source` holds them. reports: the folder whose files the crate has at its top. Raises StepError if a
    claim lacks a key, or was decided from another file than the crate has.
    """
    for claim in claims:
        lacking = [key for key in _KEYS if key not in claim]
        if lacking:
            raise StepError(f"{source}, claim {claim.get('claim')!r}, lacks {', '.join(lacking)}; run claims again")
        _add(crate, claim, reports, source)


def _add(crate: ROCrate, claim: Mapping[str, Any], reports: Path, source: Path) -> None:
    name, place, root = claim["claim"], quote(claim["claim"], safe="/@"), crate.root_dataset
    decided_from = []
    for path, digest in claim["files"].items():
        inside = Path(path).relative_to(reports).as_posix() if Path(path).is_relative_to(reports) else ""
        entity = crate.get(inside) if inside else None
        if entity is None:
            entity = add(crate, f"#file-{digest[:16]}", "CreativeWork", name=path, sha256=digest)
        elif entity["sha256"] != digest:
            raise StepError(f"{source}: claim {name!r} was decided from another {path}; run claims again")
        decided_from.append(entity)
    about = {"name": name, "text": claim["text"], "description": f"In the paper: {claim['place']}"}
    stated = add(crate, f"#claim-{place}", "Claim", **about, appearance=root["citation"])
    why = "; ".join([claim["why"], *(claim.get("explained") or [])])
    verdict = {"ratingValue": claim["verdict"], "ratingExplanation": why}
    review = add(
        crate,
        f"#verdict-{place}",
        "ClaimReview",
        name=f"{name}: {claim['verdict']}",
        claimReviewed=claim["text"],
        itemReviewed=stated,
        author=root["author"],
        reviewRating=add(crate, f"#rating-{place}", "Rating", **verdict),
        isBasedOn=[crate.get("#experiment"), *decided_from],
    )
    figures = [
        add(crate, f"#verdict-{place}/{kind}", "PropertyValue", name=kind, **values)
        for kind, values in (
            ("ours", _given(claim, value="ours", minValue="low", maxValue="high")),
            ("published", _given(claim, value="published")),
        )
        if values
    ]
    if figures:
        review["additionalProperty"] = figures
    root.append_to("mentions", review)


def _given(claim: Mapping[str, Any], **keys: str) -> dict[str, Any]:
    """The values of a claim that are known, under other names."""
    return {ours: claim[theirs] for ours, theirs in keys.items() if claim.get(theirs) is not None}
