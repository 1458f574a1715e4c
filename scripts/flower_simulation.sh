#!/usr/bin/env bash
# Run the thin Flower app in Flower's simulation engine on this machine, offline.
#
#   scripts/flower_simulation.sh RUN_DIR CLIENTS [RUN_CONFIG]
#
# RUN_DIR     run directory (made if needed; an earlier run in it is continued)
# CLIENTS     simulated clients, e.g. 2
# RUN_CONFIG  more settings as Flower writes them, e.g. "federation.rounds=5"
#
# Exits non-zero when the run failed (`flwr run` itself exits 0).
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,11p' "$0"
  exit 2
fi
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
run_dir=$(cd "$1" && pwd)
clients=$2

export FLWR_HOME="${FLWR_HOME:-$run_dir/flower}"
mkdir -p "$FLWR_HOME"
FLWR_HOME=$(cd "$FLWR_HOME" && pwd)
# Nothing is fetched and nothing is reported while the run goes on. The switches are read
# by the local SuperLink when it starts.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
port=${FLWR_LOCAL_SUPERLINK_HTTP_API_PORT:-$(python -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])')}
export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=$port

# Started here and not by `flwr run`, which would leave a daemon behind: this one is
# known by its id, and it and all that it starts end with this script.
setsid flower-superlink --insecure --simulation --isolation subprocess \
  --host 127.0.0.1 --port "$port" --database "$FLWR_HOME/superlink.db" \
  >"$FLWR_HOME/superlink.log" 2>&1 &
superlink=$!
# What the SuperLink starts has sessions of its own, and is known by its environment.
started() {
  python - "$FLWR_HOME" <<'END'
import os, pathlib, sys

mark, mine, pid = f"FLWR_HOME={sys.argv[1]}".encode(), set(), os.getpid()
while pid:  # this process and those above it stay
    mine.add(pid)
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    pid = int(stat.rpartition(")")[2].split()[1])
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        found = mark in (process / "environ").read_bytes().split(b"\0")
    except OSError:
        continue
    if found and int(process.name) not in mine:
        print(process.name)
END
}
stop() {
  kill -- "-$superlink" 2>/dev/null || true
  for second in $(seq 60); do
    left=$(started)
    [ -n "$left" ] || return 0
    if [ "$second" -gt 10 ]; then kill -9 $left 2>/dev/null || true; fi
    sleep 1
  done
}
trap stop EXIT
answers() {
  python - "$port" <<'END'
import sys, urllib.request
try:
    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=2)
except OSError:
    sys.exit(1)
END
}
for _ in $(seq 120); do
  if answers; then break; fi
  if ! kill -0 "$superlink" 2>/dev/null; then
    echo "the local SuperLink ended at once; see $FLWR_HOME/superlink.log" >&2
    exit 1
  fi
  sleep 0.5
done

config="run-dir='$run_dir' federation.clients=$clients ${3:-}"
flwr run "$here/flower_app" --stream \
  --federation-config "num-supernodes=$clients client-resources-num-cpus=1" \
  --run-config "$config"
flwr ls --format json | python -c '
import json, sys
runs = json.load(sys.stdin)["runs"]
status = runs[0]["status"]
print("Flower run:", status)
sys.exit(status != "finished:completed")'
