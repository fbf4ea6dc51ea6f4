#!/bin/bash
# tt.sh CORE DIR NAME SEED options…
core=$1; dir=$2; name=$3; seed=$4; shift 4
. /work/venv/bin/activate; cd $dir
export OMP_NUM_THREADS=1 TQDM_MININTERVAL=20
taskset -c $core python train.py --seed $seed --out $dir/runs/$name "$@" > /work/pt/trials/$name.log 2>&1
PYTHONPATH=. taskset -c $core python /work/pt/jj.py $dir/runs/$name/value_encoder 8 > /work/pt/trials/$name.jj 2>&1
