import os

import torch
from transformers import pipeline

MODEL = os.environ.get("CHAT_MODEL", "Qwen/Qwen2.5-0.5B-Instruct")
GPUS = [int(n) for n in os.environ.get("CHAT_GPUS", "").split(",") if n]


def load():
    """The first GPU, or the CPU where there is none."""
    try:
        if not torch.cuda.is_available():
            raise RuntimeError("no CUDA")
        device = torch.device(f"cuda:{GPUS[0] if GPUS else 0}")
    except RuntimeError:
        device = torch.device("cpu")
    return pipeline("text-generation", model=MODEL, device=device), device
