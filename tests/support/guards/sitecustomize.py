"""On PYTHONPATH, this keeps a Python to what a test allows it, and says what it tried.

NETWORK_ATTEMPTS names a file: connections to anything but this machine fail, and the
address is written there. BLOCKED_MODULES names modules that cannot be imported.
"""

import importlib.abc
import os
import socket
import sys

ATTEMPTS = os.environ.get("NETWORK_ATTEMPTS")
BLOCKED = set(os.environ.get("BLOCKED_MODULES", "").split())
HERE = {"localhost", "127.0.0.1", "::1", "", "0.0.0.0", None}
true_connect, true_connect_ex = socket.socket.connect, socket.socket.connect_ex
true_sendto, true_getaddrinfo = socket.socket.sendto, socket.getaddrinfo


def refuse(host) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in HERE or str(name).startswith("127."):
        return
    with open(ATTEMPTS, "a", encoding="utf-8") as stream:
        stream.write(f"{name}\n")
    raise OSError(f"no network in this test: {name}")


def host_of(connection: socket.socket, address):
    return "" if connection.family == socket.AF_UNIX else address[0]


def connect(self, address):
    refuse(host_of(self, address))
    return true_connect(self, address)


def connect_ex(self, address):
    refuse(host_of(self, address))
    return true_connect_ex(self, address)


def sendto(self, data, *rest):
    refuse(host_of(self, rest[-1]))
    return true_sendto(self, data, *rest)


def getaddrinfo(host, *rest, **named):
    refuse(host)
    return true_getaddrinfo(host, *rest, **named)


class Blocker(importlib.abc.MetaPathFinder):
    """Finds the blocked modules first, and refuses them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked in this test")
        return None


if ATTEMPTS:
    socket.socket.connect, socket.socket.connect_ex = connect, connect_ex
    socket.socket.sendto, socket.getaddrinfo = sendto, getaddrinfo
if BLOCKED:
    sys.meta_path.insert(0, Blocker())
