#!/bin/sh
# Train on several processes of this machine: tools/dist_train.sh CONFIG PROCESSES [arguments of visadapt train]
set -eu
config=$1
processes=$2
shift 2
exec "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node="$processes" \
  "$(dirname "$0")/train.py" "$config" "$@"
