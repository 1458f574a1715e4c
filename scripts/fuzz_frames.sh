#!/usr/bin/env bash
# Throw hostile frames at the packing codec, under AddressSanitizer and UBSan.
#
#   scripts/fuzz_frames.sh [--seconds S] [--executions N] [--corpus DIR]
#                          [--engine libfuzzer|driver] [--seed X] [--coverage]
#                          [--replay INPUT]
#
# --seconds S      stop after S seconds of fuzzing (default 60, without a limit if
#                  --executions is given)
# --executions N   stop after N executions
# --corpus DIR     inputs to start from; new ones are added (default build/fuzz/corpus).
#                  Seeds from the encoder, tests/golden and earlier findings
#                  (csrc/fuzz/findings) are put there first
# --engine E       libfuzzer: coverage-guided, needs clang++ (Debian: apt install clang);
#                  driver: csrc/fuzz/main.cpp, needs only g++. Default: what is there
# --seed X         of all random choices (default 1)
# --coverage       afterwards replay the corpus with gcov and print lines per source file
# --replay INPUT   run one saved input, or all of a directory, and do not fuzz
#
# Takes a frame apart, changes some parts, makes lengths and hashes right again, and checks
# what csrc/fuzz/properties.h lists. Afterwards the corpus is replayed with SAMV2_ISA set to
# each instruction set of this machine: verdicts and bits must be the same.
#
# Prints executions/s and how many frames were accepted or refused, by reason.
# Exits 0 if all properties held; 1 on a finding, whose input stays in build/fuzz/crashes;
# 2 on wrong usage; 3 if there is no compiler.
set -euo pipefail
usage() {
  sed -n '2,26p' "$0" | sed 's/^# \{0,1\}//'
}
cd "$(dirname "$0")/.."
build=build/fuzz
corpus=$build/corpus
seconds='' executions='' engine='' coverage='' replay='' seed=1
while [ $# -gt 0 ]; do
  case $1 in
    --help | -h) usage; exit 0 ;;
    --coverage) coverage=1; shift; continue ;;
    --seconds | --executions | --corpus | --engine | --seed | --replay)
      [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; }
      declare "${1#--}=$2"; shift 2 ;;
    *) echo "unknown option $1; see --help" >&2; exit 2 ;;
  esac
done
for number in $seconds $executions $seed; do
  [[ $number =~ ^[0-9]+$ ]] || { echo "$number is not a whole number; see --help" >&2; exit 2; }
done
if [ -z "$seconds$executions" ]; then seconds=60; fi

links_libfuzzer() {
  echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' |
    clang++ -fsanitize=fuzzer,address -x c++ - -o "$build/probe" 2>/dev/null
}
mkdir -p "$build/crashes"
if [ -z "$engine" ]; then
  if links_libfuzzer; then engine=libfuzzer; else engine=driver; fi
fi
case $engine in
  libfuzzer) compiler=clang++ edges=-fsanitize-coverage=inline-8bit-counters,pc-table ;;
  driver) compiler=${CXX:-g++} edges=-fsanitize-coverage=trace-pc ;;
  *) echo "engine is $engine, known are libfuzzer and driver" >&2; exit 2 ;;
esac
command -v "$compiler" >/dev/null || { echo "no $compiler here; install it" >&2; exit 3; }

# compile COMPILER DIR FLAGS: the codec, but not its Python binding, into DIR/*.o.
# Hashes get no edges: they would only slow the search down.
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=all"
common="-std=c++17 -g -ffp-contract=off -Wall -Wextra -Werror -Icsrc"
compile() {
  mkdir -p "$2"
  rm -f "$2"/*.o
  for source in csrc/*.cpp; do
    case $source in
      csrc/bindings.cpp) ;;
      csrc/hash.cpp) echo "$1 $common ${3/$edges/} -c $source -o $2/hash.o" ;;
      *) echo "$1 $common $3 -c $source -o $2/$(basename "$source" .cpp).o" ;;
    esac
  done
}
# The harness itself is fast and not instrumented; heap checks see through it.
compile_harness() {
  for source in csrc/fuzz/*.cpp; do
    echo "$1 $common -O2 -c $source -o $2/fuzz_$(basename "$source" .cpp).o"
  done
}
in_parallel() {
  tr '\n' '\0' | xargs -0 -P "$(nproc)" -I{} sh -c '{}'
}
{
  compile "$compiler" "$build/$engine" "-O1 $sanitizers $edges"
  compile_harness "$compiler" "$build/$engine"
} | in_parallel
driver=$build/$engine/driver
$compiler $sanitizers "$build/$engine"/*.o -o "$driver"
if [ $engine = libfuzzer ]; then
  rm "$build/$engine"/fuzz_{main,edges}.o
  $compiler $sanitizers -fsanitize=fuzzer "$build/$engine"/*.o -o "$build/$engine/fuzzer"
fi

export ASAN_OPTIONS=quarantine_size_mb=8:malloc_context_size=8${ASAN_OPTIONS:+:$ASAN_OPTIONS}
if [ -n "$replay" ]; then
  exec "$driver" --executions 0 --crashes "$build/crashes" "$replay"
fi

"$driver" --write-seeds "$corpus"
cp csrc/fuzz/findings/* "$corpus"
for golden in tests/golden/*.bin; do
  name=$(basename "$golden")
  round=$(python3 -c '
import json, sys
cases = json.load(open("tests/golden/packing.json"))
print(next(case["round"] for case in cases if case["file"] == sys.argv[1]))' "$name")
  { printf "\\0\\0\\x$(printf %02x "$round")"; cat "$golden"; } >"$corpus/$name"
done

log=$build/$engine.log
echo "fuzzing with $engine; the log is $log"
if [ $engine = libfuzzer ]; then
  run=("$build/$engine/fuzzer" -max_len=40000 -timeout=20 -entropic_scale_per_exec_time=1
    "-seed=$seed" "-artifact_prefix=$build/crashes/")
  if [ -n "$seconds" ]; then run+=("-max_total_time=$seconds"); fi
  if [ -n "$executions" ]; then run+=("-runs=$executions"); fi
else
  run=("$driver" --executions "${executions:-1000000000000}" --seed "$seed" --crashes "$build/crashes")
  if [ -n "$seconds" ]; then run+=(--seconds "$seconds"); fi
fi
if ! "${run[@]}" "$corpus" >"$log" 2>&1; then
  tail -n 60 "$log"
  echo "a property failed; after a fix: scripts/fuzz_frames.sh --replay $build/crashes" >&2
  exit 1
fi
grep '	DONE ' "$log" || true
sed -n '/^executions/,$p' "$log"

isas=scalar
if grep -qw avx2 /proc/cpuinfo; then isas+=" avx2"; fi
if grep -qw avx512_vbmi2 /proc/cpuinfo; then isas+=" avx512"; fi
digests=$(for isa in $isas; do
  SAMV2_ISA=$isa "$driver" --executions 0 --crashes "$build/crashes" "$corpus" 2>&1 | grep ^digest
done | sort -u)
if [ "$(wc -l <<<"$digests")" != 1 ]; then
  echo "instruction sets ($isas) differ in verdicts or bits" >&2
  exit 1
fi
echo "same verdicts and bits with SAMV2_ISA of each of: $isas"

if [ -n "$coverage" ]; then
  gcov_build=$build/coverage
  rm -rf "$gcov_build"
  edges=none
  { compile g++ "$gcov_build" "-O0 --coverage"; compile_harness g++ "$gcov_build"; } | in_parallel
  g++ --coverage "$gcov_build"/*.o -o "$gcov_build/driver"
  "$gcov_build/driver" --executions 0 "$corpus" 2>/dev/null
  for source in csrc/*.cpp; do
    [ $source = csrc/bindings.cpp ] ||
      gcov -n -b -r -s "$PWD" -o "$gcov_build/$(basename "$source" .cpp).o" "$source"
  done 2>/dev/null | awk -F"'" '
    /^File/ { file = $2 }
    /^Lines/ && !(file in lines) && file ~ /csrc\/(bits|lanes|index_block|masked_block|numbers|parse|rle|value_block|writer)/ {
      lines[file] = $0; print file ": " $0 }'
fi
