"""Which addresses are this machine's own. Pure."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str | None) -> bool:
    """Whether a peer at this address, or a server at this name, is on this machine and nowhere else."""
    if (host or "").lower() == "localhost":
        return True
    address = _address(host)
    return address is not None and address.is_loopback


def reaches_this_machine(host: str | None) -> bool:
    """Whether a connection to this host ends here. One to the unspecified address (0.0.0.0, which binds every
    interface) does."""
    address = _address(host)
    return is_loopback(host) or (address is not None and address.is_unspecified)


def _address(host: str | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address((host or "").strip("[]"))
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
