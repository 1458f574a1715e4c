#!/usr/bin/env bash
# Turn a dense Llama-style model into an expert graph.
#
#   scripts/bootstrap_experts.sh MODEL OUTPUT [KEY=VALUE ...]
#
# MODEL     hub id, local folder, GGUF file, or smollm2
# OUTPUT    folder to write; gets the model, frontier.json and cluster_stats.txt
# KEY=VALUE settings, e.g. experts.num_experts=16 experts.experts_per_token=8
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,8p' "$0"
  exit 2
fi
model=$1 output=$2
shift 2
settings=()
for item in "$@"; do
  settings+=(--set "$item")
done
exec samv2 bootstrap "$model" --output "$output" "${settings[@]}"
