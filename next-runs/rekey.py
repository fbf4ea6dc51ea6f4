import json, glob, sys, os
from lab import baselines
src,dst=sys.argv[1:]
setup = baselines.Setup(baselines.parse_args(["--out", dst]))
for f in glob.glob(src+"/**/*.json", recursive=True):
    if "/images/" in f or f.endswith("curve.json"): continue
    d = json.load(open(f)); to=dst+f[len(src):]
    if "about" in d and not os.path.exists(to):
        d["about"]["model"] = setup.model; os.makedirs(os.path.dirname(to),exist_ok=True); json.dump(d, open(to, "w")); print(to)
