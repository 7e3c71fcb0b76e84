"""On PYTHONPATH: this Python connects to nothing but this machine, and says what it tried.

Every attempt goes to the file named by NETWORK_ATTEMPTS, and fails.
"""

import os
import socket

ATTEMPTS = os.environ.get("NETWORK_ATTEMPTS", os.devnull)
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


socket.socket.connect, socket.socket.connect_ex = connect, connect_ex
socket.socket.sendto, socket.getaddrinfo = sendto, getaddrinfo
