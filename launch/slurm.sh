#!/usr/bin/env bash
# Trains on a Slurm cluster. Either of
#
#   launch/slurm.sh [--dry_run] [sbatch options] -- --config FILE --workdir DIR [more flags]
#   sbatch [sbatch options] launch/slurm.sh --config FILE --workdir DIR [more flags]
#
# The flags go to `python -m llm_jax.train`, once per task, in the folder of submission. The sbatch
# options win over the #SBATCH lines below. Variables:
#
#   TASKS=host|gpu   a process per host (default), or one per GPU of each host
#   MAX_RESTARTS=N   put the job back into the queue up to N times (default 0) when training fails
#                    or reaches the time limit; it goes on from its newest checkpoint
#   PYTHON=python    the Python of the environment that holds llm_jax, the same on all hosts
#
#SBATCH --job-name=llm_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 1
}

[[ ${TASKS:=host} =~ ^(host|gpu)$ ]] || fail "TASKS=$TASKS: expected host or gpu"
[[ ${MAX_RESTARTS:=0} =~ ^[0-9]+$ ]] || fail "MAX_RESTARTS=$MAX_RESTARTS: expected a number, 0 or more"
export TASKS MAX_RESTARTS PYTHON=${PYTHON:-python}

# Sets `step` to the command that trains: NODES, TASKS PER NODE, CPUS PER TASK, TASKS IN ALL, FLAGS.
set_step() {
  # The peers of a lost task would wait for it (kill-on-bad-exit); a task that asks for no CPUs gets
  # one core. All GPUs of a host stay visible to each of its tasks, so that NCCL can use NVLink.
  step=(srun --kill-on-bad-exit=1 "--nodes=$1" "--ntasks-per-node=$2" "--cpus-per-task=$3"
    "--ntasks=$4" "$PYTHON" -m llm_jax.train "${@:5}")
}

submit() {
  local options=() dry_run=
  while [[ $1 != -- ]]; do
    if [[ $1 == --dry_run ]]; then dry_run=yes; else options+=("$1"); fi
    shift
  done
  shift
  (($#)) || fail "nothing to train: give the flags of llm_jax.train after --"
  local command=(sbatch "${options[@]}" "$0" "$@")
  if [[ $dry_run ]]; then
    local tasks=1
    if [[ $TASKS == gpu ]]; then tasks='$SLURM_GPUS_ON_NODE'; fi
    set_step '$SLURM_JOB_NUM_NODES' "$tasks" "\$((SLURM_CPUS_ON_NODE / ${tasks#\$}))" \
      "\$((SLURM_JOB_NUM_NODES * ${tasks#\$}))"
    echo "TASKS=$TASKS MAX_RESTARTS=$MAX_RESTARTS PYTHON=$PYTHON$(printf ' %q' "${command[@]}")"
    grep '^#SBATCH' "$0"
    echo "${step[*]}$(printf ' %q' "$@")"
    exit
  fi
  command -v sbatch > /dev/null ||
    fail "sbatch not found: run this on a login node, or install the Slurm client (slurm-client)"
  exec "${command[@]}"
}

train() {
  local tasks=1 at_limit='' status=0 restarts=${SLURM_RESTART_COUNT:-0} step_id
  if [[ $TASKS == gpu ]]; then
    tasks=${SLURM_GPUS_ON_NODE:-0}
    ((tasks)) || fail "TASKS=gpu, but the job has no GPUs: add --gpus-per-node=N"
  fi
  set_step "$SLURM_JOB_NUM_NODES" "$tasks" $((SLURM_CPUS_ON_NODE / tasks)) \
    $((SLURM_JOB_NUM_NODES * tasks)) "$@"
  # Near the time limit this shell gets USR1, as TERM would also mean that the job was cancelled. The
  # tasks get TERM, at which they save and leave. Not by way of srun: it would kill them at once.
  trap 'at_limit=yes; trap "" USR1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
  "${step[@]}" &
  step_id=$!
  wait "$step_id" || status=$?
  if [[ $at_limit ]]; then # which cut the wait short
    status=0
    wait "$step_id" || status=$?
  fi
  ((status)) || exit 0
  if ((restarts < MAX_RESTARTS)); then
    echo "training ended with status $status: restart $((restarts + 1)) of $MAX_RESTARTS"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$status"
}

for argument in "$@"; do
  if [[ $argument == -- ]]; then submit "$@"; fi
done
[[ ${SLURM_JOB_ID:-} ]] || fail "nothing to train: give the flags of llm_jax.train after --"
train "$@"
