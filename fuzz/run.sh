#!/bin/sh
# Fuzzes the C entries: builds build/fuzz/merge_fuzz, of the pair, and build/fuzz/parts_fuzz, of many
# parts; runs the regression inputs of both, then libFuzzer, half of FUZZ_SECONDS each, from the
# committed corpora (fuzz/corpus and fuzz/parts_corpus). New inputs go to build/fuzz/corpus and
# build/fuzz/parts_corpus, a finding to build/fuzz; fixed, it belongs in fuzz/regressions or
# fuzz/parts_regressions. What is new is kept by
#   build/fuzz/merge_fuzz -merge=1 -use_counters=0 fuzz/corpus build/fuzz/corpus
# and the same of parts_fuzz.
# Exit status 3: the tools are missing.
#   CLANGXX  a clang++ with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer
set -eu
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-600}
clangxx=${CLANGXX:-$(command -v clang++ || command -v clang++-14 || true)}
if [ -z "$clangxx" ]; then
  echo "merge_attn_states: fuzzing needs clang++: install the package clang." >&2
  exit 3
fi
build=build/fuzz
mkdir -p $build/corpus $build/parts_corpus
sanitize=-fsanitize=fuzzer,address,undefined
echo 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }' \
  > $build/probe.cpp
if ! "$clangxx" $sanitize $build/probe.cpp -o $build/probe 2> $build/probe.log; then
  echo "merge_attn_states: $clangxx links no libFuzzer: install the package libclang-rt-14-dev" \
    "(or that of its version); its message is in $build/probe.log." >&2
  exit 3
fi

echo '#define MERGE_ATTN_STATES_BUILD_COMMIT "fuzz"' > $build/merge_attn_states_commit.h
flags="-std=c++20 -g -fno-omit-frame-pointer -ffp-contract=off -Wall -Wextra -Werror -Wno-psabi"
flags="$flags -fsanitize=address,undefined -fno-sanitize-recover=all -Iinclude -I$build"
for name in VERSION TORCH ARCHITECTURES; do
  flags="$flags -DMERGE_ATTN_STATES_BUILD_$name=\"fuzz\""
done
# Clang takes the instruction set of the wider CPU kernel from its command line.
wider=
if [ "$(uname -m)" = x86_64 ]; then
  flags="$flags -DMERGE_ATTN_STATES_HAS_V3=1"
  wider="-mavx2 -mbmi -mbmi2 -mf16c -mfma"
fi
objects=
for source in fuzz/*.cpp csrc/entry.cpp csrc/core/*.cpp csrc/cpu/*.cpp; do
  # Coverage guides by the library, not by the harness.
  case $source in
    fuzz/*) set -- -O2 ;;
    */kernels_v3.cpp) set -- -O1 -fsanitize=fuzzer-no-link $wider ;;
    *) set -- -O1 -fsanitize=fuzzer-no-link ;;
  esac
  object=$build/$(echo "$source" | tr / _).o
  "$clangxx" $flags "$@" -c "$source" -o "$object"
  case $source in
    fuzz/*_fuzz.cpp) ;;
    *) objects="$objects $object" ;;
  esac
done
for target in merge parts; do
  "$clangxx" $sanitize $objects $build/fuzz_${target}_fuzz.cpp.o -o $build/${target}_fuzz
done

export UBSAN_OPTIONS=print_stacktrace=1 STATISTICS=1
set -- -timeout=10 -rss_limit_mb=2048 -verbosity=0
find fuzz/regressions -type f -exec $build/merge_fuzz "$@" {} +
find fuzz/parts_regressions -type f -exec $build/parts_fuzz "$@" {} +
[ "$seconds" -gt 0 ] || exit 0
fuzz() {
  target=$1 corpus=$2 length=$3
  shift 3
  echo "merge_attn_states: $target for $((seconds / 2)) s"
  $build/$target "$@" -max_total_time=$(((seconds + 1) / 2)) -max_len="$length" -len_control=0 \
    -print_final_stats=1 -artifact_prefix=$build/ $build/$corpus fuzz/$corpus
}
fuzz merge_fuzz corpus 80 "$@"
fuzz parts_fuzz parts_corpus 200 "$@"
