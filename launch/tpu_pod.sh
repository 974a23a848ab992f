#!/usr/bin/env bash
# What each worker of a TPU VM pod does; launch/tpu_pod.py calls it over ssh on all of them.
#
#   tpu_pod.sh install [BUCKET]   Python and this package into ~/llm_jax-venv; the bucket at /gcs
#   tpu_pod.sh start FLAGS...     the training, in the background; ends one that still runs
#   tpu_pod.sh stop               SIGTERM, so that the run saves; waits until it has ended
#   tpu_pod.sh status             "running", "none" or the exit status of the last training
#   tpu_pod.sh logs               the end of its output
set -euo pipefail

SOURCE=$(cd "$(dirname "$0")/.." && pwd)
VENV=${LLM_JAX_VENV:-$HOME/llm_jax-venv}
STATE=${LLM_JAX_STATE:-$HOME/llm_jax-run}
BUCKET_PATH=/gcs
GRACE_SECONDS=300

install_package() {
  # The images' own Python is older than this package takes.
  if ! command -v "$HOME/.local/bin/uv" > /dev/null; then
    curl -LsSf https://astral.sh/uv/install.sh | sh
  fi
  "$HOME/.local/bin/uv" venv --quiet --allow-existing --python 3.12 "$VENV"
  # The versions that the tests ran with, the same on all workers.
  "$HOME/.local/bin/uv" pip install --quiet --python "$VENV/bin/python" \
    -c "$SOURCE/constraints.txt" "$SOURCE[tpu,gcs]"
}

mount_bucket() {
  mountpoint --quiet "$BUCKET_PATH" && return
  if ! command -v gcsfuse > /dev/null; then
    local list=/etc/apt/sources.list.d/gcsfuse.list key=/usr/share/keyrings/cloud.google.asc
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
      sudo tee "$list" > /dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  sudo mkdir -p "$BUCKET_PATH"
  sudo chown "$USER" "$BUCKET_PATH"
  gcsfuse --implicit-dirs "$1" "$BUCKET_PATH"
}

is_running() {
  [[ -f $STATE/pid ]] && kill -0 "$(< "$STATE/pid")" 2> /dev/null
}

start() {
  stop
  mkdir -p "$STATE"
  rm -f "$STATE/status" "$STATE/pid"
  cd "$SOURCE"
  # A session of its own, since ssh ends its own. The shell in it outlives the training, to say how
  # that ended.
  setsid bash -c '
    "$1/bin/python" -u -m llm_jax.train "${@:3}" > "$2/log" 2>&1 &
    echo $! > "$2/pid"
    wait $! && status=0 || status=$?
    echo $status > "$2/status"
  ' bash "$VENV" "$STATE" "$@" < /dev/null > /dev/null 2>&1 &
  until [[ -s $STATE/pid ]]; do sleep 0.1; done
}

stop() {
  is_running || return 0
  local pid waited=0
  pid=$(< "$STATE/pid")
  kill -TERM "$pid"
  while kill -0 "$pid" 2> /dev/null; do
    if ((waited++ >= GRACE_SECONDS)); then
      kill -KILL "$pid" 2> /dev/null || true
    fi
    sleep 1
  done
}

status() {
  if [[ -f $STATE/status ]]; then
    cat "$STATE/status"
  elif is_running; then
    echo running
  else
    echo none
  fi
}

case ${1:-} in
  install)
    install_package
    if [[ -n ${2:-} ]]; then mount_bucket "$2"; fi
    ;;
  start) start "${@:2}" ;;
  stop) stop ;;
  status) status ;;
  logs) tail -n 50 "$STATE/log" ;;
  *)
    echo "usage: tpu_pod.sh install [BUCKET] | start FLAGS... | stop | status | logs" >&2
    exit 2
    ;;
esac
