#!/bin/sh
# Prints the GPUs for the process with number $1 of several: all of them, each time another one
# first, as CUDA_VISIBLE_DEVICES wants them. Nothing where there is none.
set -eu
all=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2> /dev/null |
  paste -sd, -)}
echo "$all" | awk -F, -v first="$1" '{
  for (i = 0; i < NF; ++i) printf "%s%s", i ? "," : "", $((first + i) % NF + 1)
}'
