#!/bin/bash
# t.sh CORE NAME SEED options… : train LiVO on /work/pt/m's tiny-sd, then judge
core=$1; name=$2; seed=$3; shift 3
. /work/venv/bin/activate; cd /work/pt/m
export OMP_NUM_THREADS=1 TQDM_MININTERVAL=30
taskset -c $core python train.py --seed $seed --out /work/pt/trials/$name "$@" > /work/pt/trials/$name.log 2>&1
