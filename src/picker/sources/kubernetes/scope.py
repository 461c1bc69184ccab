"""What to look for in a namespace. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from picker.errors import ConfigError
from picker.sources.kubernetes.objects import OLD_POOL_GROUP, POOL_GROUP

PODS = "pods"  # the origin of pods that are selected without a pool


@dataclass(frozen=True, slots=True)
class Scope:
    """Pools by name, or pods by labels with the ports to use, or the slices of services.

    group: of the pools. selector: labels as the API server takes them. ports: with a selector they are needed; of
    services they choose among those that the slices name.
    """

    namespace: str
    pools: tuple[str, ...] = ()
    group: str = POOL_GROUP
    selector: str = ""
    ports: tuple[int, ...] = ()
    services: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError for what cannot be meant."""
        if sum(map(bool, (self.pools, self.selector, self.services))) != 1:
            raise ConfigError("kubernetes: give one of pools, selector and services")
        if self.group not in (POOL_GROUP, OLD_POOL_GROUP):
            known = f"{POOL_GROUP} and {OLD_POOL_GROUP}"
            raise ConfigError(f"kubernetes.group: {self.group!r} has no pools that picker knows; known are {known}")
        if self.selector and not self.ports:
            raise ConfigError("kubernetes.target_ports: pods without a pool need them (--endpoint-target-ports)")
        if not all(0 < port < 1 << 16 for port in self.ports):
            raise ConfigError("kubernetes.target_ports: ports are from 1 to 65535")
        if self.pools and self.ports:
            raise ConfigError("kubernetes.target_ports: a pool names its own ports")

    @property
    def origins(self) -> tuple[str, ...]:
        """What is looked for, each by a key: pool/a, service/b, pods."""
        pools = tuple(of_pool(name) for name in self.pools)
        return pools + tuple(of_service(name) for name in self.services) + ((PODS,) if self.selector else ())


def of_pool(name: str) -> str:
    return f"pool/{name}"


def of_service(name: str) -> str:
    return f"service/{name}"
