#!/usr/bin/env bash
# Turn a dense Llama-style model into an expert graph.
#
#   scripts/bootstrap_experts.sh MODEL OUTPUT [KEY=VALUE ...] [OPTION ...]
#
# MODEL     hub id, local folder, GGUF file, or smollm2
# OUTPUT    folder to write; gets the model, frontier.json, frontier.png, layers.json and
#           cluster_stats.txt
# KEY=VALUE settings, e.g. experts.num_experts=16 experts.experts_per_token=8
# OPTION    of `samv2 bootstrap`, from the first --option on, e.g. --flops 0.5, or
#           --config frontier --also-score factbook,politics,math
#
# A bootstrap that was stopped goes on when the same command is given again.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0"
  exit 2
fi
model=$1 output=$2
shift 2
settings=()
while [ $# -gt 0 ] && [[ $1 != --* ]]; do
  settings+=(--set "$1")
  shift
done
exec samv2 bootstrap "$model" --output "$output" "${settings[@]}" "$@"
