#!/usr/bin/env bash
# All GPUs of this machine as one run; after a fault torchrun starts it again, and it goes on.
# $ bash launch/one_node.sh config/train_gpt2.py --out_dir=gpt2
# The same line goes on after anything else, too. GPUS=2 takes two of them; on a CPU it is the number of processes.
set -eu
python="${PYTHON:-python}"
train="$(cd -P "$(dirname "$0")/.." && pwd)/train.py"
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="${GPUS:-gpu}" --max-restarts=3 \
    --shutdown-timeout=120 "$train" --init_from=auto "$@"
