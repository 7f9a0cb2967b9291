"""What clouds say of their machines, told by servers that answer as theirs do."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from holdfast.notices import AwsNotice, AzureNotice, GcpNotice, Notice, NoticeWatch, Notified

Answer = tuple[int, str]


class Cloud:
    """A metadata service: answers by method and path, with whatever it was told to."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.refuse: Callable[[str, dict[str, str]], Answer | None] = lambda request, headers: None
        self.asked: list[str] = []
        self.hangs = threading.Event()
        self.hangs.set()
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                request = f"{self.command} {self.path}"
                cloud.asked.append(request)
                cloud.hangs.wait(60)
                headers = {name.lower(): value for name, value in self.headers.items()}
                status, body = cloud.refuse(request, headers) or cloud.answers.get(request, (404, "not found"))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = answer  # noqa: N815 - as http.server wants them

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self.hangs.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """A cloud; the proxies of the environment lead nowhere, and must not be asked."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    made = Cloud()
    yield made
    made.close()


# ---------------------------------------------------------------------------------------------------------------- AWS

TOKEN = "PUT /latest/api/token"
ACTION = "GET /latest/meta-data/spot/instance-action"
REBALANCE = "GET /latest/meta-data/events/recommendations/rebalance"


@pytest.fixture
def aws(cloud: Cloud) -> Cloud:
    """A service that wants a token, the newest that it gave out."""
    tokens: list[str] = []

    def refuse(request: str, headers: dict[str, str]) -> Answer | None:
        if request == TOKEN:
            assert 0 < int(headers["x-aws-ec2-metadata-token-ttl-seconds"]) <= 21600
            tokens.append(f"token {len(tokens)}")
            return 200, tokens[-1]
        valid = bool(tokens) and headers.get("x-aws-ec2-metadata-token") == tokens[-1]
        return None if valid else (401, "unauthorized")

    cloud.refuse = refuse
    return cloud


def test_aws_has_nothing_to_say(aws: Cloud) -> None:
    """No such item: all is well. One token serves for long."""
    notice = AwsNotice(aws.url)
    assert [notice.check(), notice.check()] == [None, None]
    assert aws.asked == [TOKEN, ACTION, ACTION]


def test_aws_takes_the_instance(aws: Cloud) -> None:
    """With the time."""
    aws.answers[ACTION] = (200, '{"action": "terminate", "time": "2026-09-18T08:22:00Z"}')
    assert AwsNotice(aws.url).check() == Notified(
        "AWS spot: terminate at 2026-09-18T08:22:00Z", datetime(2026, 9, 18, 8, 22, tzinfo=UTC)
    )


def test_aws_token_expires(aws: Cloud) -> None:
    """A new one is fetched, and the question is asked again."""
    notice = AwsNotice(aws.url)
    notice.check()
    AwsNotice(aws.url).check()  # now only the token of this one is valid
    aws.asked.clear()
    aws.answers[ACTION] = (200, '{"action": "stop", "time": "2026-09-18T08:22:00Z"}')
    found = notice.check()
    assert found is not None
    assert found.reason == "AWS spot: stop at 2026-09-18T08:22:00Z"
    assert aws.asked == [ACTION, TOKEN, ACTION]


def test_aws_refuses_every_token(cloud: Cloud) -> None:
    """It is not asked for ever."""

    def refuse(request: str, headers: dict[str, str]) -> Answer:
        if len(cloud.asked) > 10:
            return 404, "not found"
        return (200, "token") if request == TOKEN else (401, "unauthorized")

    cloud.refuse = refuse
    with pytest.raises(PermissionError, match="a new token was refused"):
        AwsNotice(cloud.url).check()
    assert cloud.asked == [TOKEN, ACTION, TOKEN, ACTION]


@pytest.mark.parametrize(("rebalance", "found"), [(True, Notified("AWS: rebalance recommendation")), (False, None)])
def test_aws_recommends_to_leave(aws: Cloud, rebalance: bool, found: Notified | None) -> None:
    """Only for those who want to hear it."""
    aws.answers[REBALANCE] = (200, '{"noticeTime": "2026-09-18T08:22:00Z"}')
    assert AwsNotice(aws.url, rebalance=rebalance).check() == found


# ------------------------------------------------------------------------------------------------------- Google Cloud

PREEMPTED = "GET /computeMetadata/v1/instance/preempted"
MAINTENANCE = "GET /computeMetadata/v1/instance/maintenance-event"


@pytest.fixture
def gcp(cloud: Cloud) -> Cloud:
    """A service that wants its header, on a machine that nothing threatens."""
    cloud.refuse = lambda request, headers: None if headers.get("metadata-flavor") == "Google" else (403, "forbidden")
    cloud.answers = {PREEMPTED: (200, "FALSE"), MAINTENANCE: (200, "NONE")}
    return cloud


def test_gcp_has_nothing_to_say(gcp: Cloud) -> None:
    """Neither of preemption nor of maintenance."""
    assert GcpNotice(gcp.url, maintenance=True).check() is None
    assert gcp.asked == [PREEMPTED, MAINTENANCE]


def test_gcp_preempts(gcp: Cloud) -> None:
    """Thirty seconds, of which some may be over since the last look."""
    gcp.answers[PREEMPTED] = (200, "TRUE\n")
    before = datetime.now(UTC)
    found = GcpNotice(gcp.url, interval_s=4.0).check()
    assert found is not None
    assert found.reason == "GCP: preempted"
    assert found.at is not None
    assert before + timedelta(seconds=26) <= found.at <= datetime.now(UTC) + timedelta(seconds=26)


@pytest.mark.parametrize(
    ("maintenance", "event", "found"),
    [
        (True, "TERMINATE_ON_HOST_MAINTENANCE", Notified("GCP: the host will be maintained")),
        (True, "MIGRATE_ON_HOST_MAINTENANCE", None),  # the machine moves, and goes on
        (False, "TERMINATE_ON_HOST_MAINTENANCE", None),
    ],
)
def test_gcp_maintains(gcp: Cloud, maintenance: bool, event: str, found: Notified | None) -> None:
    """Only for those who want to hear it."""
    gcp.answers[MAINTENANCE] = (200, event)
    assert GcpNotice(gcp.url, maintenance=maintenance).check() == found


# --------------------------------------------------------------------------------------------------------------- Azure

EVENTS = "GET /metadata/scheduledevents?api-version=2020-07-01"
NAME = "GET /metadata/instance/compute/name?api-version=2021-02-01&format=text"
NOT_BEFORE = "Mon, 19 Sep 2026 18:29:47 GMT"


@pytest.fixture
def azure(cloud: Cloud) -> Cloud:
    """A service that wants its header, on the machine ``trainer_1``."""
    cloud.refuse = lambda request, headers: None if headers.get("metadata") == "true" else (400, "bad request")
    cloud.answers = {EVENTS: (200, '{"DocumentIncarnation": 1, "Events": []}'), NAME: (200, "trainer_1")}
    return cloud


def scheduled(**event: Any) -> Answer:
    """An answer with one event."""
    whole = {"EventId": "602d9444", "EventStatus": "Scheduled", "Resources": ["trainer_1"], **event}
    return 200, json.dumps({"DocumentIncarnation": 2, "Events": [whole]})


def test_azure_has_nothing_to_say(azure: Cloud) -> None:
    """No events, and no other question."""
    assert AzureNotice(azure.url).check() is None
    assert azure.asked == [EVENTS]


@pytest.mark.parametrize(
    ("event", "found"),
    [
        (
            {"EventType": "Preempt", "NotBefore": NOT_BEFORE},
            Notified(f"Azure: Preempt at {NOT_BEFORE}", datetime(2026, 9, 19, 18, 29, 47, tzinfo=UTC)),
        ),
        ({"EventType": "Terminate", "NotBefore": ""}, Notified("Azure: Terminate now")),  # it has begun
        ({"EventType": "Freeze", "NotBefore": NOT_BEFORE}, None),  # the machine stays
        ({"EventType": "Preempt", "NotBefore": NOT_BEFORE, "Resources": ["trainer_0", "trainer_11"]}, None),
    ],
)
def test_azure_events(azure: Cloud, event: dict[str, Any], found: Notified | None) -> None:
    """Those that end a machine, if it is this one."""
    azure.answers[EVENTS] = scheduled(**event)
    assert AzureNotice(azure.url).check() == found


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize(
    ("notice", "request_line"),
    [(AwsNotice, ACTION), (AzureNotice, EVENTS)],
    ids=["aws", "azure"],
)
@pytest.mark.parametrize("body", ["{", "[]", '"terminate"'])
def test_malformed_answers(cloud: Cloud, notice: Callable[[str], Notice], request_line: str, body: str) -> None:
    """They are errors, not news."""
    cloud.answers = {TOKEN: (200, "token"), request_line: (200, body)}
    with pytest.raises(ValueError, match=r"expected a JSON object|Expecting"):
        notice(cloud.url).check()


@pytest.mark.parametrize("notice", [AwsNotice, GcpNotice, AzureNotice])
def test_a_service_that_hangs(cloud: Cloud, notice: Callable[..., Notice]) -> None:
    """It is not waited for."""
    cloud.hangs.clear()
    with pytest.raises(OSError, match="timed out"):
        notice(cloud.url, timeout_s=0.05).check()


@pytest.mark.parametrize("notice", [AwsNotice, GcpNotice, AzureNotice])
def test_a_service_that_is_not_there(notice: Callable[..., Notice]) -> None:
    """Not on that cloud."""
    with pytest.raises(OSError, match="refused"):
        notice("http://127.0.0.1:1").check()


# ---------------------------------------------------------------------------------------------------------- the watch


class Script:
    """A notice that says one thing after the other, and waits at the end until it is told to stop."""

    def __init__(self, *says: Notified | Exception | None) -> None:
        self.interval_s = 0.001
        self._says = list(says)
        self.over = threading.Event()
        self.thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return "Script()"

    def check(self) -> Notified | None:
        """The next line."""
        self.thread = threading.current_thread()
        if not self._says:
            self.over.set()
            return None
        said = self._says.pop(0)
        if isinstance(said, Exception):
            raise said
        return said


def watch(*notices: Script) -> list[tuple[str, float | None]]:
    """What is told of, until all notices have said what they have to say."""
    told: list[tuple[str, float | None]] = []
    watching = NoticeWatch(notices, lambda reason, in_seconds: told.append((reason, in_seconds)))
    watching.start()
    for notice in notices:
        assert notice.over.wait(60)
    watching.stop()
    for notice in notices:
        assert notice.thread is not None
        notice.thread.join(60)
        assert not notice.thread.is_alive()
        assert notice.thread.daemon
    return told


def test_what_is_told() -> None:
    """Each piece of news once."""
    assert watch(Script(None, Notified("a"), Notified("a"), Notified("b"))) == [("a", None), ("b", None)]


@pytest.mark.parametrize("zone", [UTC, None])
def test_a_time_is_told_as_seconds_to_come(zone: Any) -> None:
    """Clocks on the wall can be set; what is left cannot."""
    at = datetime.now(UTC).replace(tzinfo=zone) + timedelta(seconds=120)
    [(reason, in_seconds)] = watch(Script(Notified("a", at)))
    assert reason == "a"
    assert in_seconds is not None
    assert 0 < in_seconds <= 120


def test_errors_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """Quietly when there is nobody to ask; and what comes after them counts, of this notice and of others."""
    caplog.set_level(logging.INFO, "holdfast")
    broken = Script(OSError("no route"), OSError("no route"), ValueError("no JSON"), Notified("a"))
    assert sorted(watch(broken, Script(ValueError("no JSON"), Notified("b")))) == [("a", None), ("b", None)]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "Script(): no route. Said once; it is asked again all the same."),
        ("WARNING", "Script(): no JSON. Said once; it is asked again all the same."),
    ]


def test_nobody_is_told_after_the_end() -> None:
    """An answer that comes late is dropped."""
    told: list[str] = []
    asked, answers = threading.Event(), threading.Event()

    class Late:
        thread: threading.Thread | None = None

        def check(self) -> Notified:
            self.thread = threading.current_thread()
            asked.set()
            assert answers.wait(60)
            return Notified("late")

    late = Late()
    watching = NoticeWatch([late], lambda reason, in_seconds: told.append(reason))
    watching.start()
    assert asked.wait(60)
    watching.stop()
    answers.set()
    assert late.thread is not None
    late.thread.join(60)
    assert told == []


def test_without_notices_there_is_no_thread() -> None:
    """Nobody pays for what they do not use."""
    before = threading.active_count()
    watching = NoticeWatch([], lambda reason, in_seconds: None)
    watching.start()
    assert threading.active_count() == before
    watching.stop()
