"""What clouds say of a machine that they are about to take away, and a thread that asks them.

Each notice asks the metadata service of one cloud, which only machines of that cloud can reach; elsewhere it is quiet.
One of your own needs a single method: see :class:`Notice`.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any, Protocol

__all__ = ["AwsNotice", "AzureNotice", "GcpNotice", "Notice", "Notified"]

_logger = logging.getLogger("holdfast")
_INTERVAL_S = 5.0  # AWS asks for no more, and thirty seconds of warning allow no less
_TIMEOUT_S = 2.0  # the services are on the machine's own host
_LONGEST_ANSWER_BYTES = 1 << 20
_GCP_WARNING_S = 30.0


@dataclass(frozen=True, slots=True)
class Notified:
    """The machine is going to be taken away.

    Attributes:
        reason: who says so and what will happen, in words.
        at: when, in UTC if it has no time zone; None when that was not said.
    """

    reason: str
    at: datetime | None = None


class Notice(Protocol):
    """Asks whether the machine is about to be taken away.

    An attribute ``interval_s`` may say how often to ask; every five seconds otherwise.
    """

    def check(self) -> Notified | None:
        """Ask once. Called in a thread of its own; blocks for a few seconds at most.

        Raises:
            OSError: there is nobody to ask. It is asked again.
        """


@dataclass(slots=True)
class AwsNotice:
    """Spot instances of Amazon EC2: two minutes of warning.

    In a container the instance's metadata hop limit has to be 2 or more, or the token never arrives.

    Sources: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/rebalance-recommendations.html,
    https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/instancedata-data-retrieval.html.

    Args:
        url: the metadata service.
        rebalance: leave at a rebalance recommendation too, which says that an interruption has become likely.
        timeout_s: how long one answer is waited for.
        interval_s: how often to ask.
    """

    url: str = "http://169.254.169.254"
    rebalance: bool = False
    timeout_s: float = _TIMEOUT_S
    interval_s: float = _INTERVAL_S
    _token: str = field(default="", init=False, repr=False, compare=False)

    def check(self) -> Notified | None:
        """See :class:`Notice`."""
        action = self._get("/latest/meta-data/spot/instance-action")
        if action is not None:
            told = _mapping(json.loads(action))
            at = datetime.fromisoformat(str(told["time"]))
            return Notified(f"AWS spot: {told['action']} at {told['time']}", at)
        if self.rebalance and self._get("/latest/meta-data/events/recommendations/rebalance") is not None:
            return Notified("AWS: rebalance recommendation")
        return None

    def _get(self, path: str) -> str | None:
        """What is at ``path``; None when there is nothing, which is how this service says that all is well."""
        for _ in range(2):
            if not self._token:
                self._token = self._new_token()
            try:
                return _ask(self.url + path, {"X-aws-ec2-metadata-token": self._token}, self.timeout_s)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == HTTPStatus.NOT_FOUND:
                    return None
                if error.code != HTTPStatus.UNAUTHORIZED:
                    raise
                self._token = ""  # it has expired
        raise PermissionError(f"{self.url}: a new token was refused")

    def _new_token(self) -> str:
        ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}  # six hours, the longest there is
        return _ask(f"{self.url}/latest/api/token", ttl, self.timeout_s, method="PUT")


@dataclass(frozen=True, slots=True)
class GcpNotice:
    """Spot and preemptible machines of Google Cloud: thirty seconds of warning.

    Sources: https://cloud.google.com/compute/docs/instances/create-use-spot,
    https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice.

    Args:
        url: the metadata service.
        maintenance: leave too when the host will be maintained and this machine stopped for it. Machines with GPUs
            are told an hour before.
        timeout_s: how long one answer is waited for.
        interval_s: how often to ask.
    """

    url: str = "http://metadata.google.internal"
    maintenance: bool = False
    timeout_s: float = _TIMEOUT_S
    interval_s: float = _INTERVAL_S

    def check(self) -> Notified | None:
        """See :class:`Notice`."""
        if self._get("preempted") == "TRUE":
            # The service does not say when; since the last look a part of the warning may have gone by.
            left = timedelta(seconds=max(_GCP_WARNING_S - self.interval_s, 0.0))
            return Notified("GCP: preempted", datetime.now(UTC) + left)
        if self.maintenance and self._get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notified("GCP: the host will be maintained")
        return None

    def _get(self, name: str) -> str:
        url = f"{self.url}/computeMetadata/v1/instance/{name}"
        return _ask(url, {"Metadata-Flavor": "Google"}, self.timeout_s).strip()


@dataclass(frozen=True, slots=True)
class AzureNotice:
    """Spot machines and scale sets of Azure: thirty seconds of warning at least.

    The first question switches the service on, which can take it two minutes. Events are told to all machines of a
    scale set or availability set; those that name others are passed over.

    Source: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events.

    Args:
        url: the metadata service.
        timeout_s: how long one answer is waited for.
        interval_s: how often to ask.
    """

    url: str = "http://169.254.169.254"
    timeout_s: float = _TIMEOUT_S
    interval_s: float = _INTERVAL_S

    def check(self) -> Notified | None:
        """See :class:`Notice`."""
        told = _mapping(json.loads(self._get("/metadata/scheduledevents?api-version=2020-07-01")))
        events = [event for event in told.get("Events", ()) if event.get("EventType") in ("Preempt", "Terminate")]
        own_name = (
            self._get("/metadata/instance/compute/name?api-version=2021-02-01&format=text").strip() if events else ""
        )
        for event in events:
            if own_name in event.get("Resources", [own_name]):
                not_before = event.get("NotBefore") or ""  # empty when it has begun
                at = parsedate_to_datetime(not_before) if not_before else None
                return Notified(f"Azure: {event['EventType']} {f'at {not_before}' if at else 'now'}", at)
        return None

    def _get(self, path: str) -> str:
        return _ask(self.url + path, {"Metadata": "true"}, self.timeout_s)


def _ask(url: str, headers: Mapping[str, str], timeout_s: float, method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # metadata is never behind http_proxy
    with opener.open(request, timeout=timeout_s) as answer:
        body: bytes = answer.read(_LONGEST_ANSWER_BYTES)
    return body.decode()


def _mapping(answer: object) -> Mapping[str, Any]:
    if not isinstance(answer, dict):
        raise ValueError(f"expected a JSON object, found {answer!r}")
    return answer


class NoticeWatch:
    """A thread that asks notices until it is told to stop. A forked child does not have it.

    Args:
        notices: whom to ask; where there is none, there is no thread.
        tell: called in the thread with each new answer, and the seconds until the machine goes, if that was said.
    """

    def __init__(self, notices: Sequence[Notice], tell: Callable[[str, float | None], None]) -> None:
        self._notices = notices
        self._tell = tell
        self._stopped = threading.Event()
        self._complained: set[int] = set()
        self._told: set[str] = set()

    def start(self) -> None:
        """Begin to ask."""
        if self._notices:
            self._stopped = threading.Event()  # another thread's, if there was one, stays set
            self._told.clear()
            threading.Thread(target=self._watch, args=(self._stopped,), name="holdfast-notices", daemon=True).start()

    def stop(self) -> None:
        """Ask no more. Does not wait for an answer that is still under way; nobody will be told of it."""
        self._stopped.set()

    def _watch(self, stopped: threading.Event) -> None:
        interval_s = min(float(getattr(notice, "interval_s", _INTERVAL_S)) for notice in self._notices)
        while not stopped.is_set():
            for number, notice in enumerate(self._notices):
                self._look(number, notice, stopped)
            stopped.wait(interval_s)

    def _look(self, number: int, notice: Notice, stopped: threading.Event) -> None:
        try:
            found = notice.check()
            in_s = None if found is None else _seconds_to(found.at)
        except Exception as error:  # noqa: BLE001 - one that fails must not silence the others, nor itself for ever
            if number not in self._complained:
                self._complained.add(number)
                level = logging.INFO if isinstance(error, OSError) else logging.WARNING
                _logger.log(level, "%r: %s. Said once; it is asked again all the same.", notice, error)
            return
        if found is None or found.reason in self._told or stopped.is_set():
            return
        self._told.add(found.reason)
        self._tell(found.reason, in_s)


def _seconds_to(at: datetime | None) -> float | None:
    if at is None:
        return None
    aware = at if at.tzinfo else at.replace(tzinfo=UTC)
    return (aware - datetime.now(UTC)).total_seconds()
