"""Names of hosts, as they occur in URLs and in the `Host` and `Origin` headers of HTTP."""

import re
from dataclasses import dataclass
from ipaddress import ip_address

NETLOC = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::([0-9]{1,5}))?", re.IGNORECASE)


@dataclass(frozen=True)
class HostPort:
    """Where a request goes to, or where a page comes from.

    Attributes:
        name: Name or address, in lower case and without brackets.
        port: Its port; None if it is the default port of the scheme.
    """

    name: str
    port: int | None = None

    def is_at(self, other: "HostPort", default_port: int | None) -> bool:
        """Whether both have the same name and the same port, of which None is the default."""
        return self.name == other.name and (self.port or default_port) == (other.port or default_port)


def parse_host_port(text: str) -> HostPort | None:
    """Parse `name`, `name:port`, `[::1]` or `[::1]:port`; None for any other text."""
    match = NETLOC.fullmatch(text)
    if not match:
        return None
    return HostPort((match[1] or match[2]).lower(), int(match[3]) if match[3] else None)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback interface by its name or address alone, without a look-up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
