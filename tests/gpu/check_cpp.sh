#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds the C++ example with the compiler alone and compares it with the Python engine on one artifact, CPU or CUDA:
#   bash tests/gpu/check_cpp.sh ARTIFACT [WORK_FOLDER]
# Needs a C++ compiler and what the Python runtime needs (numpy, apache-tvm-ffi, tokenizers; PYTHONPATH is respected).
set -euo pipefail
artifact=$(realpath "$1")
work=${2:-$(mktemp -d)}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cores=$(nproc)
export CXX=${CXX:-$(command -v c++ || command -v g++)}
mkdir -p "$work/objects"

echo "== build"
ls "$root"/runtime/cpp/*.cpp "$root/examples/cpp/generate.cpp" | xargs -P "$cores" -I{} sh -c \
  '$CXX -std=c++17 -O2 -Wall -Wextra -I"$1/runtime/cpp" -c "$3" -o "$2/objects/$(basename "$3").o"' _ "$root" "$work" {}
"$CXX" "$work"/objects/*.o -ldl -pthread -o "$work/generate"

echo "== tokens of the Python engine"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" "$root/tests/gpu/cpp_tokens.py" "$artifact" "$work/tokens.txt"

echo "== C++"
cases=0 same=0
while IFS='|' read -r options prompt expected; do
  cases=$((cases + 1))
  if [ "$options" = text ]; then
    got=$("$work/generate" "$artifact" "$prompt" --raw --no-verify --max-new-tokens 64 | od -An -v -tx1 | tr -d ' \n')
  else
    # shellcheck disable=SC2086  # options are words
    got=$("$work/generate" "$artifact" --ids "$prompt" --no-verify --max-new-tokens 64 $options)
  fi
  if [ "$got" = "$expected" ]; then same=$((same + 1)); else printf 'DIFFERENT %s|%s\n  C++    %s\n  Python %s\n' \
    "$options" "${prompt:0:60}" "$got" "$expected"; fi
done < "$work/tokens.txt"

echo "== libraries and speed"
command=("$work/generate" "$artifact" "A compiler is" --raw --max-new-tokens 200 --ignore-eos --stats)
"${command[@]}" 2>&1 > "$work/out.txt" | tee "$work/speed.txt"
LD_DEBUG=files "${command[@]}" > "$work/out.txt" 2> "$work/log.txt"
grep -o 'calling init: .*\.so[^ ]*' "$work/log.txt" | sed 's/.*: //' | sort -u > "$work/libraries.txt"
sed 's/^/  /' "$work/libraries.txt"
pythons=$(grep -c python "$work/libraries.txt" || true)
strip -o "$work/stripped" "$work/generate"
bytes=$(cat "$work/stripped" "$artifact"/lib/* | wc -c)
echo "== $same of $cases cases equal; $pythons Python libraries; executable $(stat -c %s "$work/stripped") bytes, with lib/ $bytes"
# On a GPU the decode step must have been recorded.
if grep -q 'on cuda.*graph of 0 nodes' "$work/speed.txt"; then echo "The step was not captured as a CUDA graph."; exit 1; fi
[ "$same" = "$cases" ] && [ "$pythons" = 0 ] && [ "$bytes" -le 10000000 ]
