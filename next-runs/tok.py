import sys, torch, weights
from livo import ValueEncoder, encode_prompts
from lab import toy
sd=weights.load("tiny-sd"); ve=ValueEncoder.from_text_encoder(sd.text_encoder)
ck=torch.load(sys.argv[1],weights_only=False); 
ve0=ValueEncoder.from_text_encoder(sd.text_encoder)
ve.load_state_dict(ck["value_encoder"])
with torch.no_grad():
  for p in toy.PRINCIPLES:
    ids=sd.tokenizer([f"{p}, a portrait of a {x}" for x in ("doctor","nurse","judge","chef")])
    a,b=ve(ids)[:,0],ve0(ids)[:,0]
    print(p, "norm", a.norm(dim=1).mean().item(), "before", b.norm(dim=1).mean().item(), "spread", (a-a.mean(0)).norm(dim=1).mean().item(), (b-b.mean(0)).norm(dim=1).mean().item())
  print("prompt rows norm", encode_prompts(sd,["a portrait of a doctor"])[0].norm(dim=1)[:12])
  # attention of the UNet to the token
  from livo import make_context
  import attention
