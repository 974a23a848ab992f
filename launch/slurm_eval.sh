#!/usr/bin/env bash
# Scores a run's checkpoints on a Slurm cluster, beside its training. Either of
#
#   launch/slurm_eval.sh [--dry_run] [sbatch options] -- --workdir DIR [flags of llm_jax.evaluate]
#   sbatch [sbatch options] launch/slurm_eval.sh --workdir DIR [more flags]
#
# The job watches until training has ended and all is scored; --array=1-4 makes four that share the
# checkpoints. At the time limit it puts itself back into the queue and goes on: scores that are there
# are not made again. Variables:
#
#   PYTHON=python    the Python of the environment that holds llm_jax
#
#SBATCH --job-name=llm_jax-eval
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --output=slurm-eval-%A_%a.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 1
}

export PYTHON=${PYTHON:-python}
job=("$PYTHON" -m llm_jax.evaluate --watch)

submit() {
  local options=() dry_run=
  while [[ $1 != -- ]]; do
    if [[ $1 == --dry_run ]]; then dry_run=yes; else options+=("$1"); fi
    shift
  done
  shift
  (($#)) || fail "nothing to score: give the flags of llm_jax.evaluate after --"
  local command=(sbatch "${options[@]}" "$0" "$@")
  if [[ $dry_run ]]; then
    echo "PYTHON=$PYTHON$(printf ' %q' "${command[@]}")"
    grep '^#SBATCH' "$0"
    echo "srun ${job[*]}$(printf ' %q' "$@")"
    exit
  fi
  command -v sbatch > /dev/null ||
    fail "sbatch not found: run this on a login node, or install the Slurm client (slurm-client)"
  exec "${command[@]}"
}

score() {
  local at_limit='' status=0 step_id
  # Near the time limit: the evaluation gives its checkpoint free, and the job goes on later. Not by
  # way of srun, which would kill it at once.
  trap 'at_limit=yes; trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  srun "${job[@]}" "$@" &
  step_id=$!
  wait "$step_id" || status=$?
  [[ $at_limit ]] || exit "$status"
  # While it compiles it does not hear; requeueing ends what is left, and others take the checkpoint over.
  for _ in {1..40}; do kill -0 "$step_id" 2> /dev/null || break; sleep 1; done
  echo "at the time limit: back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
}

for argument in "$@"; do
  if [[ $argument == -- ]]; then submit "$@"; fi
done
[[ ${SLURM_JOB_ID:-} ]] || fail "nothing to score: give the flags of llm_jax.evaluate after --"
score "$@"
