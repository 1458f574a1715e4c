#!/usr/bin/env bash
# Run the federation on Flower's deployment engine: TLS, and SuperNodes known by their keys.
#
#   scripts/flower_deployment.sh certificates KEYS CLIENTS [HOST ...]
#       A private CA, a certificate for the SuperLink under each HOST (names or addresses;
#       localhost and 127.0.0.1 are always in it), and one EC P-384 key pair a node.
#       What is there already stays. Give a machine only what it needs: the SuperLink
#       ca.crt, server.crt and server.key; node I ca.crt and node_I.
#   scripts/flower_deployment.sh nodes RUN_DIR CLIENTS NODES_DIR [RUN_CONFIG]
#       Prepare the run (text, model) and write NODES_DIR/node_I for every client: the
#       model and client I's own text, and nothing of another client.
#   scripts/flower_deployment.sh superlink KEYS HOME HOST:PORT
#       The server, until it is stopped. What it knows of nodes is in HOME/superlink.db,
#       and is known again after a restart in the same HOME.
#   scripts/flower_deployment.sh register KEYS HOME HOST:PORT [NODE ...]
#       Make node keys known to a running SuperLink (without NODE: all in KEYS). A node
#       with another key is turned away. Known keys are left as they are.
#   scripts/flower_deployment.sh supernode KEYS HOME HOST:PORT NODE NODE_DIR [NODE_CONFIG]
#       Node NODE, until it is stopped; started again where it dies. HOST is a name in the
#       SuperLink's certificate. NODE_DIR is this node's own folder. NODE_CONFIG is what
#       holds for this node alone: "device='cuda:1' memory-budget-bytes=600000000
#       flops-budget=0.5", all of them or some.
#   scripts/flower_deployment.sh run KEYS HOME HOST:PORT RUN_DIR CLIENTS [RUN_CONFIG]
#       Submit the app and follow it. RUN_DIR is on the SuperLink's machine. An earlier
#       run in RUN_DIR is continued after its last finished round. Exits 0 only where the
#       run was completed.
#   scripts/flower_deployment.sh stop HOME
#       End whatever was started in HOME.
#   scripts/flower_deployment.sh all-on-one-machine RUN_DIR CLIENTS [RUN_CONFIG]
#       All of the above on 127.0.0.1, ended when the run ends.
#
# HOME is a folder of its own for the SuperLink, for each node, and for whoever submits
# runs. RUN_CONFIG is settings as Flower writes them, e.g. "federation.rounds=5", the same
# for `nodes` and `run`. docs/deploy.md goes through it step by step.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/scripts/flower_common.sh"

# A SuperLink takes a node that died without a word for alive until two heartbeats of 30 s
# are missed, and refuses the node until then. Only after that is the round's message to
# it given up, which the server looks for every 3 s.
readonly REFUSED_SECONDS=75

fail() {
  echo "error: $1" >&2
  exit "${2:-1}"
}

need_arguments() { # needed, given
  [ "$2" -ge "$1" ] || { usage "$0" >&2; exit 2; }
}

need_file() { # path, remedy
  [ -f "$1" ] || fail "there is no $1; $2"
}

need_private() { # path of a private key
  need_file "$1" "make it with: $0 certificates"
  local mode
  mode=$(stat -c %a "$1")
  [ "${mode: -2}" = 00 ] || fail "$1 may be read by others (mode $mode); chmod 600 $1"
}

certificates() {
  need_arguments 2 $#
  [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "CLIENTS is '$2'; give a whole number from 1" 2
  umask 077
  local keys names="DNS:localhost,IP:127.0.0.1" host i
  keys=$(folder_of "$1")
  chmod 700 "$keys"
  for host in "${@:3}"; do
    if [[ $host =~ ^[0-9.]+$|: ]]; then names+=",IP:$host"; else names+=",DNS:$host"; fi
  done
  local -a curve=(-algorithm EC -pkeyopt ec_paramgen_curve:P-384)
  if [ ! -f "$keys/ca.crt" ]; then
    openssl genpkey "${curve[@]}" -out "$keys/ca.key"
    openssl req -x509 -new -key "$keys/ca.key" -sha384 -days 3650 -out "$keys/ca.crt" \
      -subj "/CN=federation CA" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
      -addext "keyUsage=critical,keyCertSign,cRLSign"
  fi
  if [ ! -f "$keys/server.crt" ]; then
    openssl genpkey "${curve[@]}" -out "$keys/server.key"
    openssl req -new -key "$keys/server.key" -subj "/CN=SuperLink" -out "$keys/server.csr"
    printf '%s\n' "subjectAltName=$names" "basicConstraints=critical,CA:FALSE" \
      "keyUsage=critical,digitalSignature" "extendedKeyUsage=serverAuth" \
      "authorityKeyIdentifier=keyid" >"$keys/server.ext"
    openssl x509 -req -in "$keys/server.csr" -CA "$keys/ca.crt" -CAkey "$keys/ca.key" \
      -CAcreateserial -days 825 -sha384 -extfile "$keys/server.ext" \
      -out "$keys/server.crt" 2>/dev/null
    rm "$keys/server.csr" "$keys/server.ext"
  fi
  for ((i = 0; i < $2; i++)); do
    [ -f "$keys/node_$i" ] ||
      ssh-keygen -q -t ecdsa -b 384 -N "" -C "node_$i" -f "$keys/node_$i"
  done
  echo "$keys: ca.crt, a certificate for $(openssl x509 -in "$keys/server.crt" -noout \
    -ext subjectAltName | tail -1 | sed 's/^ *//'), keys of $2 nodes"
}

nodes() {
  need_arguments 3 $#
  python "$here/scripts/hand_out_nodes.py" "$@"
}

superlink() {
  need_arguments 3 $#
  local keys=$1 host=${3%:*} port=${3##*:}
  need_file "$keys/ca.crt" "make it with: $0 certificates"
  need_file "$keys/server.crt" "make it with: $0 certificates"
  need_private "$keys/server.key"
  FLWR_HOME=$(folder_of "$2")
  export FLWR_HOME
  exec flower-superlink --ssl-ca-certfile "$keys/ca.crt" \
    --ssl-certfile "$keys/server.crt" --ssl-keyfile "$keys/server.key" \
    --enable-supernode-auth --host "$host" --port "$port" \
    --database "$FLWR_HOME/superlink.db"
}

# connect KEYS HOME HOST:PORT: the connection that `flwr` in HOME uses.
connect() {
  local keys
  need_file "$1/ca.crt" "copy it from the machine where the certificates were made"
  keys=$(cd "$1" && pwd)
  FLWR_HOME=$(folder_of "$2")
  export FLWR_HOME
  printf '%s\n' '[superlink]' 'default = "deployment"' '' '[superlink.deployment]' \
    "address = \"$3\"" "root-certificates = \"$keys/ca.crt\"" >"$FLWR_HOME/config.toml"
}

register() {
  need_arguments 3 $#
  connect "$1" "$2" "$3"
  local node answer
  local -a wanted=("${@:4}")
  if [ ${#wanted[@]} = 0 ]; then
    for node in "$1"/node_*.pub; do
      node=${node##*/node_}
      wanted+=("${node%.pub}")
    done
  fi
  for node in "${wanted[@]}"; do
    need_file "$1/node_$node.pub" "make it with: $0 certificates"
    if answer=$(flwr supernode register "$1/node_$node.pub" 2>&1); then
      echo "node $node is registered"
    elif [[ $answer == *"already in use"* ]]; then
      echo "node $node was registered before"
    else
      fail "node $node is not registered: $answer"
    fi
  done
}

supernode() {
  need_arguments 5 $#
  local keys=$1 address=$3 node=$4 home folder pid code began refused=0
  need_file "$keys/ca.crt" "copy it from the machine where the certificates were made"
  need_private "$keys/node_$node"
  [ -d "$5/shards" ] || fail "$5 is no node's folder (no shards/); make it with: $0 nodes"
  folder=$(cd "$5" && pwd)
  home=$(folder_of "$2")
  # Started anew, so that `stop` finds this loop too: it reads first environments.
  [ "${FLWR_HOME:-}" = "$home" ] || FLWR_HOME=$home exec "$0" supernode "$@"
  while true; do
    began=$SECONDS
    flower-supernode --root-certificates "$keys/ca.crt" --superlink "$address" \
      --auth-supernode-private-key "$keys/node_$node" --port "$(free_port)" \
      --node-config "partition-id=$node run-dir='$folder' ${6:-}" &
    pid=$!
    trap 'kill $pid 2>/dev/null; wait $pid; exit 143' TERM INT
    code=0
    wait $pid || code=$?
    trap - TERM INT
    [ $code != 0 ] || return 0
    if [ $((SECONDS - began)) -gt $REFUSED_SECONDS ]; then refused=0; fi
    refused=$((refused + 1))
    [ $refused -lt 3 ] || fail "node $node ended $refused times in a row (exit code $code)"
    echo "node $node ended (exit code $code); next try in $REFUSED_SECONDS s" >&2
    sleep $REFUSED_SECONDS &
    trap 'kill $! 2>/dev/null; exit 143' TERM INT
    wait $!
  done
}

run() {
  need_arguments 5 $#
  connect "$1" "$2" "$3"
  local answer id status
  answer=$(flwr run "$here/flower_app" --format json --run-config \
    "run-dir='$4' federation.clients=$5 ${6:-}") || true
  id=$(python -c '
import json, sys
print(json.loads(sys.argv[1]).get("run-id") or "")' "$answer") || fail "not submitted: $answer"
  [ -n "$id" ] || fail "not submitted: $answer"
  echo "Flower run $id"
  while true; do
    flwr log "$id" --stream || true
    if ! status=$(timeout 120 bash -c '. "$0/scripts/flower_common.sh"; run_status "$@"' \
      "$here" --run-id "$id" 2>/dev/null); then
      fail "the SuperLink at $3 does not answer; start it again and run this again: \
the run goes on after its last finished round" 3
    fi
    [[ $status == finished:* ]] && break
    sleep 5
  done
  echo "Flower run $id: $status"
  [ "$status" = finished:completed ]
}

stop() {
  need_arguments 1 $#
  end_all "$(cd "$1" && pwd)"
}

all-on-one-machine() {
  need_arguments 2 $#
  local run_dir home keys address clients=$2 pid i
  run_dir=$(folder_of "$1")
  home=$(folder_of "$run_dir/flower")
  keys=$home/keys
  address=127.0.0.1:$(free_port)
  trap "end_all $(printf %q "$home")" EXIT  # when it is run, home is no more
  certificates "$keys" "$clients"
  nodes "$run_dir" "$clients" "$home/nodes" "${3:-}"
  setsid "$0" superlink "$keys" "$home/superlink" "$address" >"$home/superlink.log" 2>&1 &
  wait_for_superlink "https://$address" $! "$home/superlink.log" "$keys/ca.crt"
  register "$keys" "$home/user" "$address"
  for ((i = 0; i < clients; i++)); do
    "$0" supernode "$keys" "$home/node_$i" "$address" "$i" "$home/nodes/node_$i" \
      >"$home/node_$i.log" 2>&1 &
  done
  run "$keys" "$home/user" "$address" "$run_dir" "$clients" "${3:-}"
}

case "${1:-}" in
certificates | nodes | superlink | register | supernode | run | stop | all-on-one-machine)
  "$@"
  ;;
*)
  usage "$0" >&2
  exit 2
  ;;
esac
