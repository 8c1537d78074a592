#!/usr/bin/env bash
# mlcroissant 1.1.1 (pandas 3.1.1, pyarrow 25.0.1): records are not always what the file has, nor of the type that the
# Croissant file declares, and nothing says so.
#
# `sc:Text` fields of a CSV file are typed by pandas first: 007 comes back as 7, and NA as None. A whole column of
# Parquet's Int64 is read as floating-point numbers where one value is missing: 2**53 + 1 loses its last digit. Texts
# `false` and `true`, declared as `sc:Boolean`, are both True.
#
# Seen: text [(None, b'7'), (b'x', b'1')]; integers [9007199254740992, None]; booleans [True, True]
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment mlcroissant==1.1.1 pandas==3.1.1 pyarrow==25.0.1
python - <<'PYTHON'
import hashlib
import json
import logging
import pathlib

import mlcroissant as mlc
import pyarrow as pa
import pyarrow.parquet as pq

logging.disable(logging.WARNING)
CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/", "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo", "recordSet": "cr:recordSet", "field": "cr:field", "source": "cr:source",
    "extract": "cr:extract", "column": "cr:column", "fileObject": "cr:fileObject",
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
}


def records(name, encoding, columns):
    fields = [
        {
            "@type": "cr:Field", "@id": f"rows/{column}", "name": f"rows/{column}", "dataType": kind,
            "source": {"fileObject": {"@id": "file"}, "extract": {"column": column}},
        }
        for column, kind in columns.items()
    ]
    content = {
        "@context": CONTEXT, "@type": "sc:Dataset", "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "values", "description": "values", "license": "CC0-1.0", "url": "https://example.org",
        "distribution": [
            {"@type": "cr:FileObject", "@id": "file", "name": "file", "contentUrl": name, "encodingFormat": encoding,
             "sha256": hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest()}
        ],
        "recordSet": [{"@type": "cr:RecordSet", "@id": "rows", "name": "rows", "field": fields}],
    }
    pathlib.Path("croissant.json").write_text(json.dumps(content))
    return list(mlc.Dataset(jsonld="croissant.json").records("rows"))


pathlib.Path("text.csv").write_text("a,b\nNA,007\nx,1\n")
text = [(one["rows/a"], one["rows/b"]) for one in records("text.csv", "text/csv", {"a": "sc:Text", "b": "sc:Text"})]
pq.write_table(pa.table({"n": pa.array([2**53 + 1, None], pa.int64())}), "numbers.parquet")
parquet = "application/x-parquet"
integers = [one["rows/n"] for one in records("numbers.parquet", parquet, {"n": "sc:Integer"})]
pq.write_table(pa.table({"t": ["false", "true"]}), "texts.parquet")
booleans = [one["rows/t"] for one in records("texts.parquet", parquet, {"t": "sc:Boolean"})]
print(f"text {text}; integers {integers}; booleans {booleans}")
assert text == [(None, b"7"), (b"x", b"1")], "changed: texts are as in the file"
assert int(integers[0]) == 2**53, "changed: whole numbers keep their digits beside a missing one"
assert booleans == [True, True], "changed: `false` is False, or is refused"
PYTHON
