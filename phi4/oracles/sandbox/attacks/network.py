"""Sockets to the host and beyond; the first two targets are open while this runs."""

import json
import socket
import sys

targets = json.load(sys.stdin)
AF_VSOCK, AF_PACKET, AF_NETLINK, AF_ALG = 40, 17, 16, 38
got = []


def connect(name, family, address):
    try:
        with socket.socket(family) as opened:
            opened.settimeout(0.2)
            opened.connect(address)
        got.append(name)
    except OSError:
        pass


connect("host port", socket.AF_INET, ("127.0.0.1", targets["port"]))
connect("abstract socket", socket.AF_UNIX, "\0" + targets["abstract"])
connect("internet", socket.AF_INET, ("192.0.2.1", 53))
connect("internet 6", socket.AF_INET6, ("2001:db8::1", 53))
for family, kind in (
    (AF_VSOCK, socket.SOCK_STREAM),
    (AF_PACKET, socket.SOCK_RAW),
    (AF_NETLINK, socket.SOCK_RAW),
    (AF_ALG, socket.SOCK_SEQPACKET),
    (socket.AF_INET, socket.SOCK_RAW),
):
    try:
        socket.socket(family, kind).close()
        got.append(f"socket of family {int(family)}, kind {int(kind)}")
    except OSError:
        pass
print(", ".join(got) or "refused")
