"""The one spelling of an address: what gateways say of an endpoint must match what it is named after."""

from __future__ import annotations

import ipaddress


def plain_address(text: str) -> str:
    """An address with or without a port as it is usually written: IPv6 in its shortest form, in brackets before a port.

    What is no IPv6 address is returned as it is: "10.0.0.1:8000", "[FD00:0::1]:8000" -> "[fd00::1]:8000".
    """
    if text.count(":") < 2:
        return text
    host, closed, port = text.removeprefix("[").partition("]")
    try:
        address = ipaddress.IPv6Address(host).compressed
    except ValueError:
        return text
    return f"[{address}]{port}" if closed and port else address
