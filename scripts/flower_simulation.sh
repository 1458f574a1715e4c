#!/usr/bin/env bash
# Run the thin Flower app in Flower's simulation engine on this machine, offline.
#
#   scripts/flower_simulation.sh RUN_DIR CLIENTS [RUN_CONFIG]
#
# RUN_DIR     run directory (made if needed; an earlier run in it is continued)
# CLIENTS     simulated clients, e.g. 50; as many work at a time as there are cores
# RUN_CONFIG  more settings as Flower writes them, e.g. "federation.rounds=5"
#
# A worker that dies (killed for want of memory, say) is restarted and its client asked
# again. Exits non-zero when the run failed (`flwr run` itself exits 0).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/scripts/flower_common.sh"
if [ $# -lt 2 ]; then
  usage "$0"
  exit 2
fi
run_dir=$(folder_of "$1")
clients=$2

export FLWR_HOME=$(folder_of "${FLWR_HOME:-$run_dir/flower}")
port=${FLWR_LOCAL_SUPERLINK_HTTP_API_PORT:-$(free_port)}
export FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=$port

# Started here and not by `flwr run`, which would leave a daemon behind: this one and all
# that it starts end with this script.
trap 'end_all "$FLWR_HOME"' EXIT
setsid flower-superlink --insecure --simulation --isolation subprocess \
  --host 127.0.0.1 --port "$port" --database "$FLWR_HOME/superlink.db" \
  >"$FLWR_HOME/superlink.log" 2>&1 &
wait_for_superlink "http://127.0.0.1:$port" $! "$FLWR_HOME/superlink.log"

config="run-dir='$run_dir' federation.clients=$clients ${3:-}"
flwr run "$here/flower_app" --stream \
  --federation-config "num-supernodes=$clients client-resources-num-cpus=1" \
  --run-config "$config"
status=$(run_status)
echo "Flower run: $status"
[ "$status" = finished:completed ]
