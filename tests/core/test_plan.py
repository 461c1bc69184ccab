from dataclasses import dataclass, field

import numpy as np

from fakes import endpoint, pool, request, scheduler, view
from headed import headed, labelled
from picker.core.label_filters import DecodeRole, HeaderSelection, PrefillRole
from picker.core.plan import Plan, Route
from picker.core.view import PoolView
from picker.scorers.header_label import HeaderLabel
from picker.scorers.no_hit_lru import NoHitLru
from picker.scorers.queue_depth import QueueDepth
from picker.types import Request, Role, ScoreArray


@dataclass(frozen=True, slots=True)
class Diary:
    """Rates all alike and writes down what it is told."""

    entries: list[tuple[int, str]] = field(default_factory=list)
    name: str = "diary"

    def __call__(self, view: PoolView, request: Request) -> ScoreArray:
        return np.zeros(view.n, dtype=np.float32)

    def picked(self, view: PoolView, request: Request, name: str) -> None:
        self.entries.append((view.n, name))


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def decide(plan: Plan, seen: PoolView, asked: Request, count: int = 3) -> list[int]:
    total, _ = plan.rank(seen, asked)
    return [int(index) for index in plan.pick(total, count, rng())]


def test_the_default_route_filters_scores_and_picks() -> None:
    made = pool(labelled("p", role_="prefill"), labelled("d", role_="decode"), labelled("u"))
    made.waiting[:3] = (0, 5, 2)
    plan = Plan({"only": Route([(QueueDepth(), 1.0)], [DecodeRole()])}, "only")
    assert decide(plan, view(made), request()) == [2, 1]


def test_a_route_names_no_more_endpoints_than_it_may() -> None:
    plan = Plan({"only": Route([], most=1)}, "only")
    assert len(decide(plan, view(pool(a=0, b=0, c=0)), request())) == 1


def test_nobody_is_picked_when_the_filters_leave_nobody() -> None:
    plan = Plan({"only": Route([], [PrefillRole()])}, "only")
    assert decide(plan, view(pool(a=0, b=0)), request()) == []


def test_a_header_chooses_the_route_and_an_unknown_one_chooses_nobody() -> None:
    made = pool(labelled("p", role_="prefill"), labelled("d", role_="decode"))
    routes = {"decode": Route([], [DecodeRole()]), "prefill": Route([], [PrefillRole()])}
    plan = Plan(routes, "decode", header="EPP-Profile")
    assert decide(plan, view(made), headed({})) == [1]
    assert decide(plan, view(made), headed({"epp-profile": "prefill"})) == [0]
    assert decide(plan, view(made), headed({"epp-profile": "render"})) == []
    assert decide(plan, view(made), request()) == [1]


def test_a_request_to_be_prefilled_goes_by_the_prefill_route() -> None:
    made = pool(labelled("p", role_="prefill"), labelled("d", role_="decode"))
    plan = Plan({"decode": Route([], [DecodeRole()]), "pre": Route([], [PrefillRole()])}, "decode", prefill="pre")
    assert decide(plan, view(made), request(role=Role.PREFILL)) == [0]
    assert decide(plan, view(made), request(role=Role.DECODE)) == [1]


def test_plugins_are_told_where_the_request_went_and_among_how_many() -> None:
    diary = Diary()
    made = pool(labelled("p", role_="prefill"), labelled("d", role_="decode"))
    decide(Plan({"only": Route([(diary, 1.0)], [DecodeRole()])}, "only"), view(made), request())
    assert diary.entries == [(1, "d")]


def test_nothing_is_told_of_a_request_that_was_refused() -> None:
    diary = Diary()
    plan = Plan({"only": Route([(diary, 1.0)], [PrefillRole()])}, "only")
    decide(Plan({"only": Route([(diary, 1.0)])}, "only"), view(pool(a=0)), request())
    assert decide(plan, view(pool(a=0)), request()) == []
    assert len(diary.entries) == 1


def test_a_plan_says_which_headers_it_depends_on() -> None:
    route = Route([(HeaderLabel(header_name="X-Zone", label_key="zone"), 1.0)], [HeaderSelection()])
    plan = Plan({"a": route, "b": Route([(QueueDepth(), 1.0)])}, "a", header="EPP-Profile")
    assert plan.headers == {"x-zone", "test-epp-endpoint-selection", "epp-profile"}
    assert Plan({"a": Route([])}, "a").headers == frozenset()


def test_a_scheduler_decides_by_a_plan() -> None:
    """Cold prompts go round because each decision is told to the scorer before the next one."""
    plan = Plan({"only": Route([(NoHitLru(), 1.0)])}, "only")
    made = scheduler(*(endpoint(name) for name in "abc"), profile=plan, picker=plan.pick)
    went = [made.submit(request(number), 1000.0).endpoint.name for number in range(6)]  # type: ignore[union-attr]
    assert went == ["a", "b", "c", "a", "b", "c"]
