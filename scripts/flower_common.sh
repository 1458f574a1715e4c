# What the Flower scripts share; sourced, not run.
#
# Processes are known by the FLWR_HOME in their environment: Flower gives what it starts
# sessions of its own, so neither a parent nor a process group names them all.

# Nothing is fetched and nothing is reported while a run goes on. A SuperLink and a
# SuperNode read these when they start.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 RAY_USAGE_STATS_ENABLED=0
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1

# usage SCRIPT: print the comment at the head of a script.
usage() {
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p}' "$1"
}

# folder_of PATH: make a folder and print its absolute path.
folder_of() {
  mkdir -p "$1"
  (cd "$1" && pwd)
}

# free_port: print a port of this machine that nobody listens on.
free_port() {
  python -c '
import socket
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    print(s.getsockname()[1])'
}

# started_in HOME: ids of the processes whose FLWR_HOME is HOME or lies in it, without
# this script and those above it.
started_in() {
  python - "$1" <<'END'
import os, pathlib, sys

home, mine, pid = f"FLWR_HOME={sys.argv[1]}".encode(), set(), os.getpid()
while pid:
    mine.add(pid)
    stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    pid = int(stat.rpartition(")")[2].split()[1])
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        values = (process / "environ").read_bytes().split(b"\0")
    except OSError:
        continue
    found = any(v == home or v.startswith(home + b"/") for v in values)
    if found and int(process.name) not in mine:
        print(process.name)
END
}

# end_all HOME: end what was started in HOME, by force where asking does not help.
end_all() {
  local left second
  for second in $(seq 60); do
    left=$(started_in "$1")
    [ -n "$left" ] || return 0
    if [ "$second" = 1 ]; then kill $left 2>/dev/null || true; fi
    if [ "$second" -gt 10 ]; then kill -9 $left 2>/dev/null || true; fi
    sleep 1
  done
  echo "still running in $1: $left" >&2
  return 1
}

# wait_for_superlink URL PID LOG [CA]: wait until a SuperLink answers; fail if it ends.
wait_for_superlink() {
  local _
  for _ in $(seq 240); do
    if python - "$1" "${4:-}" <<'END'
import ssl, sys, urllib.request

url, authority = sys.argv[1:]
trusted = ssl.create_default_context(cafile=authority) if authority else None
try:
    urllib.request.urlopen(f"{url}/health", timeout=2, context=trusted)
except OSError:
    sys.exit(1)
END
    then return 0; fi
    if ! kill -0 "$2" 2>/dev/null; then break; fi
    sleep 0.5
  done
  echo "the SuperLink does not answer at $1; see $3" >&2
  return 1
}

# run_status [flwr ls's ARGUMENTS]: print the status of the newest run that is listed;
# `flwr run` itself exits 0 whatever becomes of the run.
run_status() {
  flwr ls "$@" --format json | python -c '
import json, sys
print(json.load(sys.stdin)["runs"][0]["status"])'
}
