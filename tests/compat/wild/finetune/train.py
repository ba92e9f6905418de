"""What `accelerate launch` would run: writes an adapter, or fails, or never ends."""
import json
import os
import sys
import time
from pathlib import Path

config = json.loads(Path(sys.argv[1]).read_text())
for step in range(1, config["steps"] + 1):
    print(f"\r{step}/{config['steps']} [loss {1 / step:.2f}]", end="", flush=True)
print()
if config["base_model"] == "broken":
    sys.exit("torch.OutOfMemoryError: CUDA out of memory")
if config["base_model"] == "endless":
    time.sleep(600)
out = Path(config["output_dir"])
out.mkdir()
(out / "adapter_model.safetensors").write_bytes(os.environ["LORA"].encode() * config["steps"])
