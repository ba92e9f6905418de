"""A source that wires the service itself: constants, .env, its own log."""
import logging
import os
import pathlib

import ogpu.service
import ogpu.service.config
import ogpu.service.server as server
from ogpu.service import logger
from pydantic import BaseModel

HERE = pathlib.Path(__file__).parent

# Only this ever changed the port.
server.SERVICE_HOST = "127.0.0.1"
server.SERVICE_PORT = int(os.environ["PORT"])
server.CALLBACK_URL = ogpu.service.config.CALLBACK_URL + "/" + os.environ["QUEUE"]

logger.setLevel(logging.DEBUG)
_file = logging.FileHandler(os.environ["LOG_FILE"])
_file.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
logger.addHandler(_file)
logger.handlers[0].setFormatter(logging.Formatter("MINE %(levelname)s %(message)s"))
logging.getLogger("third.party").task_fail("any logger has the levels")


class In(BaseModel):
    text: str


class Out(BaseModel):
    token: str


@ogpu.service.expose()
def ask(data: In) -> Out:
    logger.debug("looking at %s", data.text)
    logger.task_timeout("a level of ours")
    return Out(token=os.environ["API_TOKEN"])


server.start()
