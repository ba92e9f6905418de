import sys

import ogpu.service
from ogpu.service.logger import logger

from . import backend
from .models import ChatResult, InputData, Usage

generator = None


@ogpu.service.init()
def setup():
    global generator
    generator, device = backend.load()
    logger.info(f"{backend.MODEL} loaded on {device}.")
    if device.type == "cpu":
        logger.warning("No GPU found, this will be slow")


def _count(text):
    return len(text.split())


@ogpu.service.expose(timeout=120)
def text2text(input_data: InputData) -> ChatResult:
    messages = [{"role": m.role, "content": m.content} for m in input_data.messages]
    answer = generator(messages, max_new_tokens=input_data.max_tokens)
    text = answer[0]["generated_text"][-1]["content"]
    usage = Usage(
        prompt_tokens=sum(_count(m.content) for m in input_data.messages),
        completion_tokens=_count(text),
    )
    return ChatResult(role="assistant", content=text, usage=usage)


def main(argv=None):
    ogpu.service.start()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
