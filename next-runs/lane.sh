#!/bin/bash
core=$1; shift
. /work/venv/bin/activate; cd /work/next
export OMP_NUM_THREADS=1 TQDM_MININTERVAL=60
taskset -c $core python -m lab.baselines --out runs/b4 "$@" >> /work/pt/logs/lane$core.log 2>&1
