"""The durable record of tasks. Runs in the front; what touches the disk, in a thread of its own."""

from .database import Database
from .deliveries import Delivery, DeliveryUpdate, Lane
from .folder import StateFolder
from .journal import Journal

__all__ = ["Database", "Delivery", "DeliveryUpdate", "Journal", "Lane", "StateFolder"]
