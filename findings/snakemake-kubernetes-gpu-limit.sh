#!/usr/bin/env bash
# snakemake-executor-plugin-kubernetes 0.5.1 (snakemake 9.27.1): a job with gpu=1 requests a GPU without a limit.
#
# Kubernetes takes a GPU in a container's limits, and in its requests only beside an equal limit: its API server refuses
# other jobs. The plugin writes limits only for a job with the resource scale=0, of which the error says nothing. Without
# it, gpu=1 and gpu_manufacturer="nvidia" become a request alone. No cluster is needed here: a server in the API
# server's place prints what it is asked for, and then says that the job failed.
#
# Seen: requests and limits of nvidia.com/gpu: 1 None; with scale=0: 1 1
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment snakemake==9.27.1 snakemake-executor-plugin-kubernetes==0.5.1 snakemake-storage-plugin-s3==0.3.6 \
    'moto[server]==5.2.5'  # jobs on Kubernetes want a bucket
cat > server.py <<'PYTHON'
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from moto.server import ThreadedMotoServer


class Api(BaseHTTPRequestHandler):
    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("/jobs"):
            [container] = content["spec"]["template"]["spec"]["containers"]
            Path("asked.json").write_text(json.dumps(container["resources"]))
        self.answer(content, 201)

    def do_GET(self):
        self.answer({"status": {"failed": 1}} if self.path.endswith("/status") else {"items": []})

    def do_DELETE(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.answer({})


bucket = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
bucket.start()
Path("bucket").write_text(f"http://127.0.0.1:{bucket.get_host_and_port()[1]}")
server = HTTPServer(("127.0.0.1", 0), Api)
Path("config.new").write_text(json.dumps({
    "current-context": "here",
    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
    "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
    "users": [{"name": "me", "user": {}}],
}))
Path("config.new").rename("config")
server.serve_forever()
PYTHON
python server.py > server.log 2>&1 &
trap "kill $!; rm -rf '$PWD'" EXIT
until [[ -f config ]]; do kill -0 $!; sleep 0.2; done
export KUBECONFIG=$PWD/config AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b
git init --quiet
asked() {
    printf 'rule one:\n    output: "made"\n    resources: gpu=1, gpu_manufacturer="nvidia"%s\n    shell: "touch {output}"\n' "$1" > Snakefile
    rm -f asked.json
    snakemake --executor kubernetes --jobs 1 --seconds-between-status-checks 1 --default-storage-provider s3 \
        --default-storage-prefix s3://bucket --storage-s3-endpoint-url "$(cat bucket)" -- made > log 2>&1 || true
    [[ -f asked.json ]] || cat log >&2
    python -c '
import json

asked = json.load(open("asked.json"))
of_gpu = [kind and kind.get("nvidia.com/gpu") for kind in (asked["requests"], asked.get("limits"))]
print(*of_gpu)'
}
default=$(asked "") scaled=$(asked ", scale=0")
echo "requests and limits of nvidia.com/gpu: $default; with scale=0: $scaled"
[[ $default == "1 None" ]]
[[ $scaled == "1 1" ]]
