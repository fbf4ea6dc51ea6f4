#!/bin/bash
# lane.sh CORE methods… : baselines in /work/pt/m
core=$1; shift
. /work/venv/bin/activate; cd /work/pt/m
export OMP_NUM_THREADS=1
taskset -c $core python -m lab.baselines --out /work/pt/bl/runs/baselines --only "$@" > /work/pt/lane$core-$(date +%H%M).log 2>&1
