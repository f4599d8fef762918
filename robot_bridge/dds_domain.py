"""How Cyclone DDS meets other processes: on this host only, unless the caller allows more.

`discovery="localhost"` (the default) advertises 127.0.0.1 and nothing else, whatever the environment says: what in
ROS_AUTOMATIC_DISCOVERY_RANGE, ROS_STATIC_PEERS or CYCLONEDDS_URI reaches further is left out, and the log says so.
`discovery="subnet"` is the permission to leave the host; then these variables count as they do for a ROS 2 node, and
may narrow it again. (Cyclone binds its UDP ports on all interfaces in either case: mind the firewall.)
"""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from xml.etree import ElementTree

from embodied.contracts.errors import ConfigError, MissingExtraError, suggest
from embodied.robot_bridge import dds_wheel

log = logging.getLogger(__name__)

MAX_DOMAIN = 232  # above it the UDP port exceeds 65535
RANGES = ("SUBNET", "LOCALHOST", "OFF", "SYSTEM_DEFAULT")
_LOCAL_PEERS = ("127.0.0.1", "localhost", "::1")
# Sections of a Cyclone DDS configuration that cannot make a participant reach or be reached by another host.
_HARMLESS = ("compatibility", "sizing", "threads", "tracing")

_UNICAST = """<ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>32</MaxAutoParticipantIndex>"""
# A picture arrives in many packets at once; the kernel's rmem_max caps the wish.
_BUFFER = '<Internal><SocketReceiveBufferSize max="10MB"/></Internal>'
# Packets that must be kept for a while, announcements among them, fill a buffer from end to end before its memory is
# used again. At 1 MiB, the default, that takes six minutes a buffer, and a process grows by 2 to 4 MB in its first half
# hour; 256 kB hold four of the largest packets and are full after two minutes.
_BUFFER += "<Sizing><ReceiveBufferSize>256kB</ReceiveBufferSize></Sizing>"
# Large fragments: with the default size a third of the best-effort VGA images is lost on loopback.
# A ROS 2 node with its defaults calls by multicast, which we do not hear. It meets us when we announce ourselves, which
# Cyclone by itself repeats too rarely for one that starts after us.
_LOCALHOST = f"""<General>
<Interfaces><NetworkInterface address="127.0.0.1" multicast="false"/></Interfaces>
<AllowMulticast>false</AllowMulticast><MaxMessageSize>65500B</MaxMessageSize><FragmentSize>63000B</FragmentSize>
</General><Discovery><SPDPInterval>1s</SPDPInterval>{_UNICAST}
<Peers><Peer Address="127.0.0.1"/></Peers></Discovery>{_BUFFER}"""

_domains: dict[int, tuple[str, Any]] = {}  # a process may configure a domain once


def default_domain() -> int:
    """ROS_DOMAIN_ID, or 0."""
    text = os.environ.get("ROS_DOMAIN_ID", "") or "0"
    if not text.isdigit() or int(text) > MAX_DOMAIN:
        raise ConfigError(f"ROS_DOMAIN_ID is '{text}'; it must be a number from 0 to {MAX_DOMAIN}.")
    return int(text)


def open_domain(domain: int, discovery: str) -> None:
    """Configure a domain for this process; the second time with other settings is a ConfigError."""
    try:
        from cyclonedds.domain import Domain
    except ImportError as error:
        raise MissingExtraError("cyclonedds", "ros", "the ROS 2 bridge") from error
    if not 0 <= domain <= MAX_DOMAIN:
        raise ConfigError(f"ROS domain {domain} is out of range; it must be from 0 to {MAX_DOMAIN}.")
    if domain in _domains:
        if _domains[domain][0] != discovery:
            raise ConfigError(
                f"domain {domain} is already open in this process with discovery '{_domains[domain][0]}'."
            )
        return
    dds_wheel.mend()
    xml = configuration(discovery, os.environ)
    try:
        _domains[domain] = (discovery, Domain(domain, xml))
    except Exception as error:
        raise ConfigError(f"Cyclone DDS refuses its configuration; is CYCLONEDDS_URI right? {error}") from None


def configuration(discovery: str, environment: Mapping[str, str]) -> str:
    """The configuration of a participant, as Cyclone DDS reads it. Raises ConfigError for what ROS 2 would refuse."""
    wanted = (environment.get("ROS_AUTOMATIC_DISCOVERY_RANGE", "") or "SUBNET").upper()
    if wanted not in RANGES:
        raise ConfigError(f"ROS_AUTOMATIC_DISCOVERY_RANGE is '{wanted}'.{suggest(wanted, RANGES)}")
    peers = _static_peers(environment.get("ROS_STATIC_PEERS", ""))
    uri = environment.get("CYCLONEDDS_URI", "")
    if discovery == "localhost":
        foreign = [peer for peer in peers if peer not in _LOCAL_PEERS]
        if foreign:
            _ignored(f"ROS_STATIC_PEERS names {', '.join(foreign)}")
        fragment = _LOCALHOST + (_off() if wanted == "OFF" else "")
        return ",".join(filter(None, [_wrap(fragment), _harmless(uri)]))
    if discovery != "subnet":
        raise ConfigError(f"discovery '{discovery}' is unknown.{suggest(discovery, ('localhost', 'subnet'))}")
    if environment.get("ROS_LOCALHOST_ONLY", "") == "1":
        wanted, peers = "LOCALHOST", []
    if wanted == "LOCALHOST":
        log.warning("The environment keeps ROS 2 on this host; discovery 'subnet' follows it.")
        return ",".join(filter(None, [_wrap(_LOCALHOST + _peers(peers)), uri]))
    fragment = {"OFF": _off(), "SYSTEM_DEFAULT": "", "SUBNET": _BUFFER + _peers(peers)}[wanted]
    return ",".join(filter(None, [_wrap(fragment), uri]))


def _wrap(sections: str) -> str:
    return f'<CycloneDDS><Domain Id="any">{sections}</Domain></CycloneDDS>'


def _off() -> str:
    """A tag of this process's own: participants with another are not met."""
    return f"<Discovery><Tag>ros_discovery_off_{os.getpid()}</Tag></Discovery>"


def _peers(peers: list[str]) -> str:
    listed = "".join(f'<Peer Address="{peer}"/>' for peer in peers)
    return f"<Discovery>{_UNICAST}<Peers>{listed}</Peers></Discovery>" if peers else ""


def _static_peers(text: str) -> list[str]:
    peers = [peer.strip() for peer in text.split(";") if peer.strip()]
    for peer in peers:
        if not re.fullmatch(r"[A-Za-z0-9_.:-]+", peer):
            raise ConfigError(f"ROS_STATIC_PEERS holds '{peer}', which is no address or host name.")
    return peers


def _ignored(what: str) -> None:
    log.warning("%s: not used, since this process stays on this host; --discovery subnet would use it.", what)


def _harmless(uri: str) -> str:
    """The sections of a user's configuration that cannot open the host, as one fragment; the others are named."""
    kept, dropped = [], []
    for section in _sections(uri):
        (kept if section.tag.lower() in _HARMLESS else dropped).append(section)
    if dropped:
        _ignored(f"CYCLONEDDS_URI sets {', '.join(sorted({section.tag for section in dropped}))}")
    return _wrap("".join(ElementTree.tostring(section, "unicode") for section in kept)) if kept else ""


def _sections(uri: str) -> Iterator[ElementTree.Element]:
    """The sections (General, Discovery, ...) in a CYCLONEDDS_URI: XML or files, divided by commas."""
    for part in re.findall(r"<.*>|[^,<>]+", uri, re.DOTALL):
        text = part.strip()
        if not text:
            continue
        try:
            if not text.startswith("<"):
                with open(text.removeprefix("file://"), encoding="utf-8") as file:
                    text = re.sub(r"<\?xml.*?\?>", "", file.read())
            yield from _unwrap(ElementTree.fromstring(f"<all>{text.replace('>,', '>')}</all>"))
        except (OSError, ElementTree.ParseError) as error:
            raise ConfigError(f"CYCLONEDDS_URI cannot be read: {error}") from None


def _unwrap(element: ElementTree.Element) -> Iterator[ElementTree.Element]:
    for part in element.iter():
        part.tag = re.sub(r"\{.*\}", "", part.tag)  # the XML name space that an editor's schema wants
    for child in element:
        if child.tag.lower() in ("cyclonedds", "domain"):
            yield from _unwrap(child)
        else:
            yield child
