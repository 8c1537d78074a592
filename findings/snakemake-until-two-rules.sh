#!/usr/bin/env bash
# snakemake 9.27.1: `--until` of two rules, of which one needs the other, ends after the earlier one, with exit code 1.
#
# What follows a rule that is named does not run, the other named rule neither, though it still counts as to be built:
# Snakemake calls that a bug of its own, "Out of jobs ready to be started". The later rule alone does both.
#
# Seen: --until later earlier: exit code 1, files: earlier; --until later: exit code 0, files: earlier later
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment snakemake==9.27.1
cat > Snakefile <<'SNAKEFILE'
rule last:
    input: "later"
    output: "last"
    shell: "touch {output}"

rule later:
    input: "earlier"
    output: "later"
    shell: "touch {output}"

rule earlier:
    output: "earlier"
    shell: "touch {output}"
SNAKEFILE
seen() {  # each in a working folder of its own
    local code=0
    mkdir "$1"
    snakemake --cores 1 --directory "$1" --until ${1//-/ } > "log-$1" 2>&1 || code=$?
    echo "--until ${1//-/ }: exit code $code, files: $(ls "$1" | paste -sd ' ')"
}
both=$(seen later-earlier)
alone=$(seen later)
echo "$both; $alone"
[[ $both == "--until later earlier: exit code 1, files: earlier" ]]
[[ $alone == "--until later: exit code 0, files: earlier later" ]]
grep -q "Out of jobs ready to be started" log-later-earlier
! grep -q "Out of jobs ready to be started" log-later
