import sys, torch, weights, numpy as np
from collections import Counter
from lab import portraits, wordings
from lab.classifier import load_classifier
from lab.damage import load_detector
from livo import load_value_encoder
sd=weights.load("tiny-sd"); c=load_classifier(); d=load_detector()
wordings.spread=lambda n,f:[True]*n
n=8
for folder in sys.argv[1:]:
    ve=load_value_encoder(folder,"tiny-sd",sd)
    tot=Counter()
    prompts=wordings.write_prompts("a portrait of {a}")
    images,_=wordings.generate_all(sd,prompts,n,"racial equality",ve)
    k=c.classify(images)["skin"].reshape(12,n).numpy()
    per=[Counter(portraits.SKINS[i] for i in row) for row in k]
    for p,x in zip(portraits.PROFESSIONS,per): print(f"{p:15}",dict(x)); tot+=x
    print(folder,dict(tot),"damaged",100*np.mean(np.asarray(d.is_damaged(images))))
