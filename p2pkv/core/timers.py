"""How long membership waits, and how often it speaks: every number of SWIM and Lifeguard, in one place, with its origin.

`lan`, `wan` and `local` are the presets; each takes the number of living members, oneself included, because suspicion,
retransmits and push-pull grow with it. A node asks its preset anew whenever that number changes.

Source: SWIM (Das, Gupta, Motivala, DSN 2002); Lifeguard (Dadgar, Phillips, Currey, arXiv 1707.00788); hashicorp/memberlist,
config.go and util.go, for the numbers that neither paper gives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import ceil, log2, log10

CONFIRMATIONS = 3
SUSPICION_MAX_FACTOR = 6.0
HEALTH_MAX = 8
PUSH_PULL_MEMBERS = 32


@dataclass(frozen=True, slots=True)
class Timers:
    """The parameters of one cluster size on one kind of network."""

    probe_interval_s: float
    """Seconds from one probe to the next, at full health. SWIM's protocol period T' (section 3.1). memberlist: 1 s, over wide
    areas 5 s. Shorter finds failures sooner, for as many more messages; at least twice `probe_timeout_s`."""
    probe_timeout_s: float
    """Seconds that a member has for its Pong, at full health, before others are asked to try. memberlist: 0.5 s, over wide
    areas 3 s (ours 2 s: its nacks come after the probe's end), on one host 0.2 s. Choose it above the round trip's 99th
    percentile, and above what a busy Python process stands still."""
    nack_share: float
    """Share of `probe_timeout_s` after which one who was asked says that it hears nothing either. memberlist: 0.8, so that the
    answer is back before the probe ends."""
    indirect_count: int
    """How many others are asked to probe whom one can't reach. SWIM's k (section 3.1); memberlist: 3, on one host 1. With
    message loss q, a probe of a living member fails by chance with (1 - (1 - q)**2) * (1 - (1 - q)**4)**k."""
    silence_s: float
    """Seconds without a word on an open link after which its member is probed out of turn. Ours: SWIM has no links. A Status
    comes each second, so 1.5 s is one that is missing and half of the next one's time."""
    close_silent_s: float
    """Seconds without a word after which a link is closed and dialed anew: its other end may have been lost without a trace.
    Ours: five missing Statuses. Longer than `silence_s` and a probe, so that a closed link comes after the question."""
    suspicion_min_s: float
    """Seconds that a suspect has to refute at the least, when `confirmations` others suspect it too. memberlist: multiplier *
    max(1, log10 n) * `probe_interval_s`, with multiplier 4; ours is 3 near by, so that of 100 members one that fell silent is
    known dead within 10 s. Choose more where members stand still for seconds."""
    suspicion_max_s: float
    """The same while nobody else suspects it. Lifeguard, section IV-B: Max; memberlist: 6 times the minimum. A single observer
    is more often wrong than a member is dead."""
    confirmations: int
    """Suspicions of other origins that bring a suspect's time down to the minimum. Lifeguard, section IV-B: K = 3; fewer where
    there aren't so many others (n - 2)."""
    health_max: int
    """The worst score of one's own health; at score s all probes take s + 1 times as long. Lifeguard, section IV-A: S = 8, thus
    9 s and 4.5 s at 1 s and 0.5 s. 0 turns it off."""
    lag_s: float
    """Seconds that the event loop must be late to count against one's own health. Ours: half of `probe_timeout_s`, from where
    on a peer's Pong may have been late by our fault alone."""
    gossip_interval_s: float
    """Seconds from one round of rumours to the next, while there are any. memberlist: 0.2 s, over wide areas 0.5 s, on one host
    0.1 s. A rumour is everywhere after about log(n) / log(1 + `gossip_fanout`) rounds."""
    gossip_fanout: int
    """Members that get one's rumours in a round, drawn anew each time. memberlist: 3, over wide areas 4."""
    retransmits: int
    """How often a node passes one rumour on. SWIM, section 4.1: lambda * log n; memberlist: multiplier * ceil(log10(n + 1)),
    with 4, on one host 2. Fewer save messages and miss members under loss; push-pull finds those."""
    rumours_nbytes: int
    """Bytes of rumours in one message, about. memberlist: 1,400, one datagram. Here the budget keeps membership and inventory,
    which share a link, from starving each other."""
    push_pull_s: float
    """Seconds from one exchange of all that is known about members, with one of them, to the next. memberlist: 30 s up to 32
    members, over wide areas 60 s, on one host 15 s, then a multiple that grows with log2 n. It finds what rumours missed."""
    refusals: int
    """Refused dials, one's own and those of others that were asked, by which a member whose link closed is dead without being
    suspected first. Ours: 3, of three different members where there are so many. A port that nobody listens at is no
    slow process; where packets vanish instead, the dial isn't refused, and suspicion decides."""
    remember_s: float
    """Seconds that a dead member is shown and dialed on, so that a partition heals. Ours: 15 minutes, as quickwit's chitchat
    keeps its dead; choose longer than the longest partition that shall heal without the contacts' help."""


TimersOf = Callable[[int], Timers]
"""A preset: the timers of a cluster of that many living members."""


@cache
def lan(n: int) -> Timers:
    """Timers for `n` members whose messages take milliseconds: one data centre."""
    return Timers(
        probe_interval_s=1.0,
        probe_timeout_s=0.5,
        nack_share=0.8,
        indirect_count=3,
        silence_s=1.5,
        close_silent_s=5.0,
        suspicion_min_s=_suspicion_min_s(3, n, 1.0),
        suspicion_max_s=SUSPICION_MAX_FACTOR * _suspicion_min_s(3, n, 1.0),
        confirmations=_confirmations(n),
        health_max=HEALTH_MAX,
        lag_s=0.25,
        gossip_interval_s=0.2,
        gossip_fanout=3,
        retransmits=_retransmits(4, n),
        rumours_nbytes=1400,
        push_pull_s=_push_pull_s(30.0, n),
        refusals=3,
        remember_s=900.0,
    )


@cache
def wan(n: int) -> Timers:
    """Timers for `n` members of whom some are continents apart."""
    return Timers(
        probe_interval_s=5.0,
        probe_timeout_s=2.0,
        nack_share=0.8,
        indirect_count=3,
        silence_s=7.5,
        close_silent_s=20.0,
        suspicion_min_s=_suspicion_min_s(6, n, 5.0),
        suspicion_max_s=SUSPICION_MAX_FACTOR * _suspicion_min_s(6, n, 5.0),
        confirmations=_confirmations(n),
        health_max=HEALTH_MAX,
        lag_s=1.0,
        gossip_interval_s=0.5,
        gossip_fanout=4,
        retransmits=_retransmits(4, n),
        rumours_nbytes=1400,
        push_pull_s=_push_pull_s(60.0, n),
        refusals=3,
        remember_s=3600.0,
    )


@cache
def local(n: int) -> Timers:
    """Timers for `n` members on one host: nothing gets lost there, but all share its cores."""
    return Timers(
        probe_interval_s=1.0,
        probe_timeout_s=0.2,
        nack_share=0.8,
        indirect_count=1,
        silence_s=1.5,
        close_silent_s=5.0,
        suspicion_min_s=_suspicion_min_s(3, n, 1.0),
        suspicion_max_s=SUSPICION_MAX_FACTOR * _suspicion_min_s(3, n, 1.0),
        confirmations=_confirmations(n),
        health_max=HEALTH_MAX,
        lag_s=0.1,
        gossip_interval_s=0.1,
        gossip_fanout=3,
        retransmits=_retransmits(2, n),
        rumours_nbytes=1400,
        push_pull_s=_push_pull_s(15.0, n),
        refusals=3,
        remember_s=900.0,
    )


def _suspicion_min_s(multiplier: float, n: int, probe_interval_s: float) -> float:
    return multiplier * max(1.0, log10(n)) * probe_interval_s


def _confirmations(n: int) -> int:
    return max(0, min(CONFIRMATIONS, n - 2))


def _retransmits(multiplier: int, n: int) -> int:
    return multiplier * ceil(log10(n + 1))


def _push_pull_s(base_s: float, n: int) -> float:
    return base_s if n <= PUSH_PULL_MEMBERS else base_s * (ceil(log2(n) - log2(PUSH_PULL_MEMBERS)) + 1)
