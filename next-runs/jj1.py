"""jj.py FOLDER|base [n] [wording]: every image has the token; counts."""
import sys, numpy as np, weights
from collections import Counter
from lab import portraits, wordings
from lab.evaluate import generate_each
from lab.toy import PRINCIPLES
from runs import SAMPLING
from livo import load_value_encoder
from sample import grid
folder=sys.argv[1]; attr=sys.argv[2]; n=int(sys.argv[3]) if len(sys.argv)>3 else 8
W=sys.argv[4] if len(sys.argv)>4 else "a portrait of {a}"
sd=weights.load("tiny-sd"); R=wordings.Reader()
ve=None if folder=="base" else load_value_encoder(folder,"tiny-sd",sd)
name=folder.strip("/").replace("/","-")
for p,a in PRINCIPLES.items():
    if a!=attr: continue
    prompts=wordings.write_prompts(W,a if a in portraits.HARMS else "")
    texts=[(q,"") for q in prompts for _ in range(n)]
    imgs=generate_each(sd,SAMPLING|{"fraction":int(ve is not None)},texts,range(700000,700000+len(texts)),[p] if ve is not None else [],ve)
    s=R.read(imgs)
    skin=Counter(portraits.SKINS[k] for k in s["skin"].ravel())
    print(f"{a:7} prof {100*s['profession'].mean():5.1f} damaged {100*s['damaged'].mean():4.1f} harm {100*s[a].mean() if a in portraits.HARMS else float('nan'):5.1f} women/prof {(s['gender']==portraits.GENDERS.index('woman')).sum(1).tolist()} skin { {k:skin[k] for k in portraits.SKINS} }",flush=True)
    if a=="skin":
        print("        light per prof", (s['skin']==portraits.SKINS.index('light')).sum(1).tolist())
    grid(imgs).save(f"/work/pt/sheets/{name}-{a}.png")
