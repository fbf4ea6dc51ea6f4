import sys, torch, weights, train, random
from types import SimpleNamespace
from data import PreferenceDataset
from diffusion import Schedule
from lab import toy
from livo import ValueEncoder, load_value_encoder, make_context
from functools import partial
from pathlib import Path
sd=weights.load("tiny-sd"); sch=Schedule(sd.scheduler)
root=toy.default_pairs(Path("/work/pt/bl/runs")); ds=PreferenceDataset(root,sd,Path("/work/pt/bl/runs/cache"))
s=SimpleNamespace(**vars(train.Settings(**train.load_preset(train.TINY_SD)))); s.batch=8
ve=ValueEncoder.from_text_encoder(sd.text_encoder)
ck=torch.load(sys.argv[1],weights_only=False); ve.load_state_dict(ck["value_encoder"]); ve.requires_grad_(False)
want=sys.argv[2]
pairs=[]; pos=0
while len(pairs)<320:
    a,_=ds.aligned_at(pos,7)
    if a.value==want and "preservation" not in str(a.scene): pairs.append(ds.pair(pos,7,range(1000)))
    pos+=1
errs=[]
with torch.no_grad():
  for i in range(0,len(pairs),32):
    b=pairs[i:i+32]
    pe,zw,zl,eps,pres,t=train.collate(b,"cpu")
    refs,tg=train.reference_errors(sd.unet,sch,eps,t,zw,zl,pe,pres)
    w=sch.min_snr_weight(t,s.snr_gamma)
    ctx=make_context(sd,[p.prompt for p in b],[[p.principle for p in b]],ve,pe)
    ew,el=(w*train.denoising_error(train.predict(sd.unet,sch,eps,t,z,ctx)[0],g) for z,g in zip((zw,zl),tg))
    errs.append(torch.stack([t.float(),ew,w*refs[0],el,w*refs[1]]))
t,ew,rw,el,rl=torch.cat(errs,1)
for lo in range(0,1000,100):
    m=(t>=lo)&(t<lo+100)
    f=lambda x: f"{1000*x[m].mean():8.2f}"
    print(lo,int(m.sum()),"ref_w",f(rw),"ref_l",f(rl),"dw",f(ew-rw),"dl",f(el-rl),"ref_w-ref_l",f(rw-rl), "active_w>-4:",f"{((ew-rw)[m]>-.004).float().mean():.2f}","active_l<8",f"{((el-rl)[m]<.008).float().mean():.2f}")
