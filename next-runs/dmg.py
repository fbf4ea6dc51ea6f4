import sys, torch, weights, numpy as np
from lab import portraits, wordings
from lab.classifier import load_classifier
from lab.damage import load_detector
from lab.toy import PRINCIPLES
from livo import load_value_encoder
from sample import grid
sd=weights.load("tiny-sd"); R=wordings.Reader(); wordings.spread=lambda n,f:[f>0]*n
n=8
W=sys.argv[2] if len(sys.argv)>2 else "a portrait of {a}"
for folder in [None if sys.argv[1]=="base" else sys.argv[1]]:
    ve=folder and load_value_encoder(folder,"tiny-sd",sd)
    for p,a in PRINCIPLES.items():
        imgs,_=wordings.generate_all(sd,wordings.write_prompts(W,a if a in portraits.HARMS else ""),n,p,ve)
        seen=R.read(imgs); d=seen["damaged"]
        print(p,"damaged",round(100*d.mean(),1),{q:int(x) for q,x in zip(portraits.PROFESSIONS,d.sum(1)) if x},"prof",round(100*seen["profession"].mean(),1), flush=True)
        grid(imgs).save(f"/work/pt/sheet-{a}.png")
