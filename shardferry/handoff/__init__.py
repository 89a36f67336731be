"""What crosses from a loader to its trainer, and by which transport."""

from shardferry.handoff.handle import Shard, ShardHandle, make_handle
from shardferry.handoff.receiver import OptimizerReceiver, Reception
from shardferry.handoff.transport import Recipient, Transport
from shardferry.handoff.transports import TRANSPORTS, choose_transport, transport_named

__all__ = [
    "TRANSPORTS",
    "OptimizerReceiver",
    "Reception",
    "Recipient",
    "Shard",
    "ShardHandle",
    "Transport",
    "choose_transport",
    "make_handle",
    "transport_named",
]
