"""Who is calling: TokenReview, its cache, and what happens when the API server is away."""

from __future__ import annotations

import asyncio

import pytest

from tests.fakes.api import FakeApi
from tests.fakes.clock import FakeClock
from tests.unit.coordinator_tools import NOW, jwt, review
from trainyard_api.contract import TOKEN_AUDIENCE
from trainyard_operator.coordinator.tokens import (
    MAX_REFUSED,
    Identity,
    TokenRefusedError,
    TokenReviewer,
    TokenUnavailableError,
    identity_of,
)
from trainyard_operator.kube.api import TOKEN_REVIEWS, ApiError

DOWN = ApiError(0, "Timeout", "no answer")


class Setup:
    def __init__(self) -> None:
        self.api = FakeApi()
        self.api.reactors[TOKEN_REVIEWS] = review
        self.clock = FakeClock()
        self.results: list[str] = []
        self.tokens = TokenReviewer(self.api, clock=self.clock, on_review=self.results.append)

    @property
    def reviews(self) -> int:
        return len(self.api.verbs(TOKEN_REVIEWS))


@pytest.fixture
def setup() -> Setup:
    return Setup()


async def test_the_pod_comes_from_the_review(setup: Setup) -> None:
    identity = await setup.tokens.identity(jwt("p1"))
    assert identity == Identity(
        namespace="team-a", service_account="default", pod_name="name-p1", pod_uid="p1"
    )
    sent = setup.api.calls[0].body
    assert sent is not None and sent["spec"] == {"token": jwt("p1"), "audiences": [TOKEN_AUDIENCE]}
    assert setup.results == ["accepted"]


async def test_an_accepted_token_is_not_asked_about_for_five_minutes(setup: Setup) -> None:
    for _ in range(3):
        await setup.tokens.identity(jwt("p1"))
        setup.clock.now += 99
    assert setup.reviews == 1
    setup.clock.now += 4
    await setup.tokens.identity(jwt("p1"))
    assert setup.reviews == 2


async def test_the_cache_ends_with_the_token(setup: Setup) -> None:
    token = jwt("p1", exp=NOW + 60)
    await setup.tokens.identity(token)
    setup.clock.now += 61
    with pytest.raises(TokenRefusedError, match="expired"):
        await setup.tokens.identity(token)


async def test_a_refusal_is_remembered_for_ten_seconds(setup: Setup) -> None:
    token = jwt("p1", bad=True)
    for _ in range(3):
        with pytest.raises(TokenRefusedError):
            await setup.tokens.identity(token)
    assert setup.reviews == 1 and setup.results == ["refused"]
    setup.clock.now += 11
    with pytest.raises(TokenRefusedError):
        await setup.tokens.identity(token)
    assert setup.reviews == 2


async def test_a_token_whose_pod_was_deleted_stops_working_at_the_next_review(setup: Setup) -> None:
    await setup.tokens.identity(jwt("p1"))
    setup.api.reactors[TOKEN_REVIEWS] = lambda body: {**body, "status": {"authenticated": False}}
    setup.clock.now += 301
    with pytest.raises(TokenRefusedError):
        await setup.tokens.identity(jwt("p1"))


@pytest.mark.parametrize(
    "token",
    [
        "not-a-jwt",
        "a.b.c",
        "a.!!!.c",
        "x." + "A" * 9000 + ".y",
        jwt("p1", aud=("https://kubernetes.default.svc",)),
        jwt("p1", aud=None),
        jwt("p1", exp=NOW - 1),
        jwt("p1", exp="soon"),  # type: ignore[arg-type]
        "x.W10.y",
        "ä.ö.ü",
    ],
)
async def test_what_cannot_be_ours_costs_the_api_server_nothing(setup: Setup, token: str) -> None:
    with pytest.raises(TokenRefusedError) as caught:
        await setup.tokens.identity(token)
    assert setup.reviews == 0
    assert token not in str(caught.value)


async def test_many_callers_with_one_token_share_one_review(setup: Setup) -> None:
    first = asyncio.ensure_future(setup.tokens.identity(jwt("p1")))
    await asyncio.sleep(0)
    others = [asyncio.ensure_future(setup.tokens.identity(jwt("p1"))) for _ in range(50)]
    await asyncio.sleep(0)
    first.cancel()  # the one who asked first hangs up; the others must not notice
    answers = await asyncio.gather(*others)
    assert {a.pod_uid for a in answers} == {"p1"} and setup.reviews == 1


async def test_a_known_token_works_on_while_the_api_is_away_until_it_expires(setup: Setup) -> None:
    token = jwt("p1", exp=NOW + 1000)
    await setup.tokens.identity(token)
    setup.api.fail_next("create", DOWN, times=1000)
    setup.clock.now += 301
    for _ in range(5):
        assert (await setup.tokens.identity(token)).pod_uid == "p1"
    assert setup.reviews == 2, "the API is not asked for every beat while it is away"
    setup.clock.now += 11
    assert (await setup.tokens.identity(token)).pod_uid == "p1"
    assert setup.reviews == 3
    setup.clock.now = NOW + 1001
    with pytest.raises(TokenRefusedError, match="expired"):
        await setup.tokens.identity(token)


@pytest.mark.parametrize("error", [DOWN, ApiError(403, "Forbidden", "no"), ApiError(500, "x", "y")])
async def test_an_unknown_token_cannot_be_told_while_the_api_is_away(setup: Setup, error: ApiError) -> None:
    setup.api.fail_next("create", error)
    with pytest.raises(TokenUnavailableError):
        await setup.tokens.identity(jwt("p1"))
    assert setup.results == ["error"]
    assert (await setup.tokens.identity(jwt("p1"))).pod_uid == "p1", "and is asked about again at once"


async def test_refusals_do_not_fill_the_memory(setup: Setup) -> None:
    for number in range(MAX_REFUSED + 10):
        with pytest.raises(TokenRefusedError):
            await setup.tokens.identity(jwt(f"p{number}", bad=True))
    assert len(setup.tokens._refused) == MAX_REFUSED
    assert not setup.tokens._running


GOOD = review({"spec": {"token": jwt("p1"), "audiences": [TOKEN_AUDIENCE]}})["status"]


@pytest.mark.parametrize(
    "change",
    [
        {"authenticated": False},
        {"authenticated": "true"},
        {"audiences": ["another"]},
        {"audiences": None},  # an API server that does not know of audiences
        {"user": {"username": "system:node:n1", "extra": GOOD["user"]["extra"]}},
        {"user": {"username": "alice", "extra": GOOD["user"]["extra"]}},
        {"user": {"username": "system:serviceaccount:team-a:default", "extra": {}}},
        {"user": None},
    ],
)
def test_a_review_that_does_not_name_a_pod_for_us_is_a_refusal(change: dict[str, object]) -> None:
    assert identity_of(GOOD, TOKEN_AUDIENCE).pod_uid == "p1"
    with pytest.raises(TokenRefusedError):
        identity_of({**GOOD, **change}, TOKEN_AUDIENCE)
