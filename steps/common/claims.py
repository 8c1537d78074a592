"""Which tables the claims of params/claims.yaml are decided by."""

from steps.common import params

#: The csv files of an experiment that decide claims.
TABLES = ("comparisons", "intervals")


def experiments() -> set[str]:
    """The experiments whose tables decide a claim."""
    claims = params.load("claims")["claims"].values()
    asked = [table for claim in claims for table in claim.get("order", {}).get("tables", [])]
    asked += [claim[kind]["table"] for claim in claims for kind in ("figures", "gains") if kind in claim]
    return {table[0] for table in asked}


def studies() -> set[str]:
    """The studies whose table decides a claim."""
    claims = params.load("claims")["claims"].values()
    return {claim[kind]["table"] for claim in claims for kind in ("study", "runs", "decided") if kind in claim}
