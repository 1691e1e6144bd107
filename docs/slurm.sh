#!/usr/bin/env bash
# One sweep on a SLURM cluster: every task of the array is an agent; they share the trials through PostgreSQL.
#
#   export CIFAR_STORAGE=postgresql://USER:PASSWORD@HOST/DB CIFAR_RUNS=/shared/runs
#   id=$(python -m cifar sweep sweeps/architectures.yaml --no-agent | sed -n 's/.*cifar agent //p')
#   sbatch docs/slurm.sh "$id"
#
# SLURM sends SIGUSR1 two minutes before the end: the agent writes checkpoints, gives its trials back and ends with 138.
# The job is then queued again, and whoever comes next goes on from the checkpoints.
#SBATCH --job-name=cifar
#SBATCH --array=0-3
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
cd "${SLURM_SUBMIT_DIR:-.}"

srun python -m cifar agent "$1" ${CIFAR_AGENT_OPTIONS:-} & # no --time-limit: that would end with 0, and not be queued again
agent=$!
trap 'kill -USR1 "$agent"' USR1 # srun hands it on
trap 'kill -TERM "$agent"' TERM
wait "$agent"
code=$?
while kill -0 "$agent" 2>/dev/null; do # a trap ends `wait` before the agent has ended
  wait "$agent"
  code=$?
done

if [ "$code" -eq 138 ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$code"
