#!/usr/bin/env bash
# Several machines as one run: the same line on each of them, with the name of any one.
# $ NODES=2 HEAD=node1 bash launch/nodes.sh config/train_gpt2.py --out_dir=/shared/gpt2
# out_dir is on a disk that all of them see (after a fault any of them may be rank 0); the code, the packages and the
# dataset are the same on each. PORT (29400) is open between them. RUN: another name for each run that HEAD serves.
set -eu
python="${PYTHON:-python}"
train="$(cd -P "$(dirname "$0")/.." && pwd)/train.py"
: "${NODES:?how many machines, as NODES=2}" "${HEAD:?the name of one of them, as HEAD=node1}"
exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="${GPUS:-gpu}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$HEAD:${PORT:-29400}" --rdzv-id="${RUN:-flatgpt}" \
    --shutdown-timeout=120 "$train" --init_from=auto "$@"
