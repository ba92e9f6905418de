"""The peers, in the order in which tables tell them."""

from .bentoml import BentoML
from .cog import Cog
from .fastapi import FastAPIInline
from .frozen import Frozen
from .litserve import LitServe
from .mosec import Mosec
from .ours import Ours, OursInMemory
from .peer import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Ours(),
        OursInMemory(),
        Frozen(),
        FastAPIInline(),
        Mosec(),
        LitServe(),
        BentoML(),
        Cog(),
    )
}
