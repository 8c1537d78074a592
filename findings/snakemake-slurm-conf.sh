#!/usr/bin/env bash
# snakemake-executor-plugin-slurm-jobstep 0.6.1 (snakemake 9.27.1): srun does not see SLURM_CONF.
#
# Slurm's commands take their configuration from the file that SLURM_CONF names. The job step of the Slurm plugin clears
# SLURM_CONF before it calls srun, with the other SLURM_ variables, although sbatch brought it into the job. Where
# nothing else says which file it is, srun cannot find its cluster and each job fails: "Could not establish a
# configuration source". No Slurm is needed here: a script in srun's place prints what it is given.
#
# Seen: the job has SLURM_CONF=/some/where/slurm.conf, srun has SLURM_CONF=
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment snakemake==9.27.1 snakemake-executor-plugin-slurm-jobstep==0.6.1
mkdir commands
printf '#!/bin/sh\necho "$SLURM_CONF" > srun-has\necho "$SLURM_JOB_ID" > srun-is-in\n' > commands/srun
chmod +x commands/srun
printf 'rule one:\n    output: "made"\n    shell: "touch {output}"\n' > Snakefile
export SLURM_CONF=/some/where/slurm.conf SLURM_JOB_ID=1
PATH="$PWD/commands:$PATH" snakemake --executor slurm-jobstep --jobs 1 --mode remote --target-jobs one: > log 2>&1 || true
echo "the job has SLURM_CONF=$SLURM_CONF, srun has SLURM_CONF=$(cat srun-has)"
[[ $(cat srun-is-in) == 1 ]]
[[ -z $(cat srun-has) ]]
