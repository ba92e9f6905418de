from pydantic import BaseModel

import torch
from diffusers import DiffusionPipeline
import base64
from io import BytesIO
import threading

import ogpu.service

MODEL_ID = "stabilityai/stable-diffusion-xl-base-1.0"
if torch.cuda.is_available():
    DEVICE = "cuda"
    TORCH_DTYPE = torch.float16
    VARIANT = "fp16"
else:
    DEVICE = "cpu"
    TORCH_DTYPE = torch.float32
    VARIANT = None

PIPE = None
PIPE_LOCK = threading.Lock()  # one request at a time
COUNT = 0


@ogpu.service.init()
def setup():
    global PIPE
    ogpu.service.logger.info(f"Pulling {MODEL_ID} model...")
    PIPE = DiffusionPipeline.from_pretrained(
        MODEL_ID, torch_dtype=TORCH_DTYPE, use_safetensors=True, variant=VARIANT
    )
    PIPE = PIPE.to(DEVICE)
    ogpu.service.logger.info(f"{MODEL_ID} pulled.")


class InputData(BaseModel):
    prompt: str = "a photo of an astronaut riding a horse on mars"
    seed: int | None = None


class OutputData(BaseModel):
    image_base64: str
    device: str
    number: int


@ogpu.service.expose()
def text2image(input_data: InputData) -> OutputData:
    """Paint what the prompt says."""
    global COUNT

    output_data = {}
    try:
        with PIPE_LOCK, torch.no_grad():
            COUNT += 1
            ogpu.service.logger.info(f"Processing request: {input_data.prompt[:50]}...")
            generator = None
            if input_data.seed is not None:
                generator = torch.Generator(device=DEVICE).manual_seed(input_data.seed)
            image = PIPE(input_data.prompt, generator=generator).images[0]
            img_bytes = BytesIO()
            image.save(img_bytes, format="PNG")
            img_bytes.seek(0)
            img_base64 = base64.b64encode(img_bytes.read()).decode("utf-8")
            output_data = OutputData(image_base64=img_base64, device=DEVICE, number=COUNT)
            ogpu.service.logger.info("Task completed.")
    except Exception as e:
        ogpu.service.logger.error(f"An error occurred: {e}")
        raise e
    finally:
        torch.cuda.empty_cache()

    return output_data


ogpu.service.start()
