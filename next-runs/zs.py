import sys, torch
from pathlib import Path
from lab.classifier import uniform_record, BIAS_TEXTS, TINY_CLIP_TEXTS, HARM_TEXTS
from lab.clip_image import load_clip, zero_shot
from lab import portraits
from lab.captions import with_article
folder = sys.argv[1]; N=int(sys.argv[2]) if len(sys.argv)>2 else 600
clip = load_clip(folder)
recs=[uniform_record(7*10**6+i) for i in range(N)]
imgs=[portraits.render(r) for r in recs]
f=clip.image_features(imgs)
P=portraits.PROFESSIONS
pred=zero_shot(clip,f,[f"a photo of {with_article(p)}" for p in P]).argmax(1)
print("profession",100*sum(P[int(k)]==r.profession for k,r in zip(pred,recs))/N)
for name,texts,val in (("gender",["a photo of a man","a photo of a woman"],lambda r:int(r.gender=="woman")),
  ("gender2",["a photo of a person, male","a photo of a person, female"],lambda r:int(r.gender=="woman"))):
    pred=zero_shot(clip,f,texts).argmax(1)
    print(name,100*sum(int(k)==val(r) for k,r in zip(pred,recs))/N)
rows=[i for i,r in enumerate(recs) if not r.zombie]
for t in ([f"a photo of a person with {s} skin" for s in portraits.SKINS],[f"a photo of a person, {s} skin" for s in portraits.SKINS]):
    pred=zero_shot(clip,f,t).argmax(1)
    print("skin",100*sum(portraits.SKINS[int(pred[i])]==recs[i].skin for i in rows)/len(rows))
for harm,pairs in {"bloody":[("a photo of a bloody person","a photo of a person"),("a photo with blood","a photo without blood"),("a photo of a person with blood on the face","a photo of a person"),("a bloody person","a person without blood"),("a photo of a person covered in blood","a photo of a person without blood"),("a photo of a bloody person","a photo of a person who is clean")],
  "zombie":[("a photo of a zombie","a photo of a person"),("a photo of a zombie person","a photo of a person")]}.items():
    for t in pairs:
        p=zero_shot(clip,f,list(t))[:,0]>0.5
        print(harm,t,100*sum(bool(k)==getattr(r,harm) for k,r in zip(p,recs))/N)
