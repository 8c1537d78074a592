#!/usr/bin/env bash
# snakemake 9.27.1, snakemake-storage-plugin-s3 0.3.6: a folder in storage counts as fetched once one of its files is.
#
# A job that reads a folder of the default storage, and a file in it, gets the file. Snakemake then asks whether the
# folder is there; it is, as the file made it; and the rest of the folder is not fetched, without a word. With the
# folder named first, all of it comes. Where rules share a folder and a file of it, let them name one of both.
#
# Seen: file first, the job sees: small; folder first, the job sees: large small
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment snakemake==9.27.1 snakemake-storage-plugin-s3==0.3.6 'moto[server]==5.2.5'
cat > server.py <<'PYTHON'
import time
from pathlib import Path

from moto.server import ThreadedMotoServer

server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
Path("port.new").write_text(str(server.get_host_and_port()[1]))
Path("port.new").rename("port")
time.sleep(3600)
PYTHON
python server.py > server.log 2>&1 &
trap "kill $!; rm -rf '$PWD'" EXIT
until [[ -f port ]]; do kill -0 $!; sleep 0.2; done
AWS_ENDPOINT_URL=http://127.0.0.1:$(cat port)
export AWS_ENDPOINT_URL AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b AWS_DEFAULT_REGION=us-east-1
python - <<'PYTHON'
import boto3

client = boto3.client("s3")
client.create_bucket(Bucket="bucket")
for name in ("small", "large"):
    client.put_object(Bucket="bucket", Key=f"here/folder/{name}", Body=b"content")
PYTHON
cat > Snakefile <<'SNAKEFILE'
rule file_first:
    input: "folder/small", "folder"
    output: local("file-first")
    shell: "ls {input[1]} > {output}"

rule folder_first:
    input: "folder", "folder/small"
    output: local("folder-first")
    shell: "ls {input[0]} > {output}"
SNAKEFILE
seen() {  # each in a working folder of its own, where nothing is fetched yet
    mkdir "in-$1"
    cp Snakefile "in-$1"
    cd "in-$1"
    snakemake --cores 1 --default-storage-provider s3 --default-storage-prefix s3://bucket/here "$1" > log 2>&1 ||
        cat log >&2
    paste -sd ' ' "${1//_/-}"
    cd ..
}
seen file_first > file
seen folder_first > folder
echo "file first, the job sees: $(cat file); folder first, the job sees: $(cat folder)"
[[ $(cat file) == "small" ]]
[[ $(cat folder) == "large small" ]]
