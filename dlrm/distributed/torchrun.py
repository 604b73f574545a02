"""torchrun for the ranks of one host, which no other host can reach.

    python dlrm/distributed/torchrun.py --rdzv-backend=loopback --nproc-per-node=4 PROGRAM FLAG ...

On one host, torchrun's own rendezvous listens on all network interfaces, and torch unpickles what is stored there. So
any host that can connect to the port can run code. The rendezvous `loopback` listens on 127.0.0.1 only, and nothing in
its store is a pickle. All other flags are those of `torchrun`.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

LOOPBACK = "127.0.0.1"
# The store's server on libuv, which is torch's default, refuses a socket that listens already in torch 2.5 to 2.7.
LIBUV_TAKES_A_SOCKET = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)


def loopback_store(port: int = 0, ranks: int | None = None, timeout: timedelta = timedelta(minutes=5)) -> TCPStore:
    """Returns a store whose server runs in this process and listens on 127.0.0.1 only; `port=0` takes a free port.

    Raises OSError if the port is in use.
    """
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((LOOPBACK, port))
        server.listen(1024)
        port = server.getsockname()[1]
        more = {"master_listen_fd": server.detach(), "use_libuv": LIBUV_TAKES_A_SOCKET}
        return TCPStore(LOOPBACK, port, ranks, is_master=True, timeout=timeout, wait_for_workers=False, **more)


class LoopbackRendezvous(RendezvousHandler):
    """A rendezvous of one torchrun with itself. Its store is also the one in which the ranks meet."""

    def __init__(self, parameters: RendezvousParameters):
        self._run_id = parameters.run_id
        self._store = loopback_store()

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "loopback"

    def get_run_id(self) -> str:
        return self._run_id

    def next_rendezvous(self) -> RendezvousInfo:
        where = RendezvousStoreInfo(LOOPBACK, self._store.port)
        return RendezvousInfo(PrefixStore(self._run_id, self._store), 0, 1, where)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def shutdown(self) -> bool:
        return True


rendezvous_handler_registry.register("loopback", LoopbackRendezvous)

if __name__ == "__main__":
    from torch.distributed.run import main

    main()
