"""Whether a host can be reached at all, asked before a library spends a minute on retries."""

from __future__ import annotations

import os
import socket


def reachable(host: str) -> bool:
    """Whether `host` resolves; taken for granted behind a proxy, which resolves names itself."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
