"""A network in one machine: namespaces as hosts, links with a rate, a delay, jitter and loss.

    with Lab() as lab:
        lab.add_host("head")
        lab.add_host("a")
        lab.link("head", "a", PROFILES["wan-100m-15ms"])
        lab.popen("a", ["ping", lab.address("head")])

Needs root, iproute2 and /dev/net/tun; for a host behind a NAT, nftables too.
"""

from .lab import Lab, LabError, why_not
from .profiles import PROFILES, Line, add_profiles

__all__ = ["PROFILES", "Lab", "LabError", "Line", "add_profiles", "why_not"]
