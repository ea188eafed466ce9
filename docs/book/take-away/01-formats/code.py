"""Take it away: a GGUF file and back, a Modelfile, a server, and what a push would send."""

# %% graft
import tempfile
from pathlib import Path

import lapis
from lapis.tour.atlas.countries import questions
from lapis.tour.atlas.models import models, share_right

work, folder = Path(tempfile.mkdtemp()), models()
lapis.graft(base=folder["base"], chat=folder["chat"], onto=folder["adapted"], out=work / "grafted")
for path in sorted((work / "grafted").iterdir()):
    print(f"{path.stat().st_size:>9,}  {path.name}")


# %% gguf
for kind in ("f32", "q8_0", "q4_0"):
    result = lapis.export_gguf(work / "grafted", work / f"{kind}.gguf", type=kind, ollama=kind == "q8_0")
    proof = result.tokenizer.to_json()
    print(f"{kind:5} {result.bytes:>9,} bytes; the same ids on {proof['proved']} texts and {proof['words']} words")

# %% way-back
import torch

ids_BT = torch.tensor([lapis.Tokenizer.open(work / "grafted").encode("Ibu negara Malaysia ialah")])
for kind in ("f32", "q8_0", "q4_0"):
    lapis.import_gguf(work / f"{kind}.gguf", work / kind, dtype="f32")
    model, tokenizer = lapis.load(work / kind)
    original, _ = lapis.load(work / "grafted")
    with torch.no_grad():
        gap = (model(ids_BT) - original(ids_BT)).abs().max()
    right = share_right(model, tokenizer, questions("en"))
    print(f"{kind:5} a logit differs by {gap:.4f} at most; {right:.0%} right")

# %% modelfile
print((work / "Modelfile").read_text())

# %% serve
import json
import re
import subprocess
import sys
from urllib.request import Request, urlopen

server = subprocess.Popen(
    [sys.executable, "-m", "lapis", "serve", str(work / "grafted"), "--port", "0"], stderr=subprocess.PIPE, text=True
)
for line in server.stderr:
    if match := re.search(r"serving at (http://\S+)/v1", line):
        break
body = {"model": "grafted", "messages": questions("en")[0].messages, "max_tokens": 16, "temperature": 0}
request = Request(f"{match[1]}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
reply = json.load(urlopen(request))
server.terminate()
print(questions("en")[0].text, "->", reply["choices"][0]["message"]["content"])

# %% push
shipment = lapis.push(work / "grafted", "you/malay-chat", dry_run=True)
for name, size in shipment["files"].items():
    print(f"goes   {size:>9,}  {name}")
for name, reason in shipment["left_out"].items():
    print(f"stays             {name}: {reason}")
