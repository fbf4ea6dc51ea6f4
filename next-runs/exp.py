import sys, torch, weights
from pathlib import Path
from livo import ValueEncoder
sd=weights.load("tiny-sd")
ve=ValueEncoder.from_text_encoder(sd.text_encoder)
ve.load_state_dict(torch.load(sys.argv[1],weights_only=False)["value_encoder"])
weights.save_text_encoder(ve, Path(sys.argv[2]), torch.float16)
