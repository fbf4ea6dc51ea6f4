import json, glob, sys
from pathlib import Path
from lab import baselines
args = baselines.parse_args(["--out", "/work/pt/bl/runs/baselines"])
setup = baselines.Setup(args)
print(setup.model)
for f in glob.glob("/work/pt/bl/runs/baselines/**/*.json", recursive=True):
    d = json.load(open(f))
    if "about" in d: d["about"]["model"] = setup.model; json.dump(d, open(f, "w")); print(f[-60:])
