"""The peers, in the order in which tables tell them."""

from .bentoml import BentoML
from .celery import Celery
from .cog import Cog
from .fastapi import FastAPIInline
from .frozen import Frozen
from .gunicorn import Gunicorn
from .litserve import LitServe
from .mosec import Mosec, MosecForked
from .ours import Ours, OursInMemory
from .pebble import Pebble, PebbleTuned
from .peer import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Ours(),
        OursInMemory(),
        Frozen(),
        FastAPIInline(),
        Mosec(),
        MosecForked(),
        LitServe(),
        BentoML(),
        Cog(),
        Pebble(),
        PebbleTuned(),
        Gunicorn(),
        Celery(),
    )
}
