from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from kubernetes.stage import Told
from picker.sources.kubernetes.members import Engine, Member, Standing
from picker.sources.kubernetes.roster import Roster
from picker.types import CacheCleared, EndpointAdded, EndpointDraining, EndpointRemoved, Fact

READY = Member("a", "uid-a", "10.0.0.1", Standing.READY, engines=(Engine("vllm", "1"),))
NOT_READY = replace(READY, standing=Standing.NOT_READY)
GOING = replace(READY, standing=Standing.TERMINATING)


def roster(*ports: int) -> Roster:
    found = Roster()
    found.open("pool", ports or (8000,))
    return found


def kinds(facts: list[Fact]) -> list[type[Fact]]:
    return [type(fact) for fact in facts]


def test_a_member_is_told_of_once_it_is_ready() -> None:
    known = roster()
    assert known.put("pool", NOT_READY) == []
    assert kinds(known.put("pool", READY)) == [EndpointAdded]
    assert known.put("pool", READY) == []


def test_one_that_is_not_ready_for_a_while_keeps_what_is_known_of_it() -> None:
    known = roster()
    known.put("pool", READY)
    assert known.put("pool", NOT_READY) == [EndpointDraining("a-rank-0")]
    assert known.put("pool", NOT_READY) == []
    assert known.put("pool", READY) == [EndpointDraining("a-rank-0", draining=False)]


def test_one_that_terminates_takes_nothing_new_and_is_gone_in_the_end() -> None:
    known = roster(8000, 8001)
    known.put("pool", READY)
    assert known.put("pool", GOING) == [EndpointDraining("a-rank-0"), EndpointDraining("a-rank-1")]
    assert known.drop("pool", "a") == [EndpointRemoved("a-rank-0"), EndpointRemoved("a-rank-1")]
    assert known.endpoints == 0


def test_one_that_terminates_before_it_was_ready_is_never_told_of() -> None:
    known = roster()
    known.put("pool", NOT_READY)
    assert known.put("pool", GOING) == []
    assert known.drop("pool", "a") == []


def test_one_whose_containers_have_ended_is_gone() -> None:
    known = roster()
    known.put("pool", READY)
    assert known.put("pool", replace(READY, standing=Standing.OVER)) == [EndpointRemoved("a-rank-0")]


def test_another_pod_of_the_same_name_is_somebody_else() -> None:
    known = roster()
    known.put("pool", READY)
    again = replace(READY, uid="uid-b")
    assert kinds(known.put("pool", again)) == [EndpointRemoved, EndpointAdded]
    assert known.put("pool", replace(again, uid="uid-c", standing=Standing.NOT_READY)) == [EndpointRemoved("a-rank-0")]


def test_another_container_in_the_same_pod_has_an_empty_cache() -> None:
    known = roster()
    known.put("pool", READY)
    restarted = replace(READY, engines=(Engine("vllm", "2"),))
    assert known.put("pool", restarted) == [CacheCleared("a-rank-0")]
    assert known.put("pool", restarted) == []


def test_statuses_without_containers_say_nothing_about_them() -> None:
    known = roster()
    known.put("pool", READY)
    assert known.put("pool", replace(READY, engines=())) == []
    assert known.put("pool", READY) == []


def test_a_resize_without_a_restart_changes_nothing_and_with_one_everything() -> None:
    known = roster()
    known.put("pool", replace(READY, engines=(Engine("vllm", "1", {"limits": {"cpu": "4"}}),)))
    resized = replace(READY, engines=(Engine("vllm", "1", {"limits": {"cpu": "8"}}),))
    assert known.put("pool", resized) == []
    restarted = replace(READY, engines=(Engine("vllm", "2", {"limits": {"cpu": "8"}}),))
    assert kinds(known.put("pool", restarted)) == [EndpointRemoved, EndpointAdded]


def test_a_description_that_changes_is_told() -> None:
    known = roster()
    known.put("pool", READY)
    assert kinds(known.put("pool", replace(READY, models=frozenset({"m"})))) == [EndpointAdded]


def test_other_ports_of_the_pool_are_other_endpoints() -> None:
    known = roster(8000, 8001)
    known.put("pool", READY)
    facts = known.open("pool", (8000, 9000))
    assert [fact.endpoint.address for fact in facts if isinstance(fact, EndpointAdded)] == ["10.0.0.1:9000"]
    assert known.open("pool", (8000,)) == [EndpointRemoved("a-rank-1")]


def test_a_member_of_two_origins_counts_to_the_first_and_then_to_the_other() -> None:
    known = Roster()
    known.open("b", (9000,), order=(1,))
    known.open("a", (8000,), order=(0,))
    known.put("b", READY)
    (fact,) = known.put("a", READY)
    assert isinstance(fact, EndpointAdded)
    assert fact.endpoint.address == "10.0.0.1:8000"
    (fact,) = known.drop("a", "a")
    assert isinstance(fact, EndpointAdded)
    assert fact.endpoint.address == "10.0.0.1:9000"
    assert known.close("b") == [EndpointRemoved("a-rank-0")]


MEMBERS = st.builds(
    Member,
    name=st.sampled_from("abc"),
    uid=st.sampled_from("xy"),
    host=st.sampled_from(["10.0.0.1", "10.0.0.2", ""]),
    standing=st.sampled_from(Standing),
    only=st.sampled_from([None, frozenset({8000}), frozenset()]),
    engines=st.sampled_from([(), (Engine("e", "1"),), (Engine("e", "2"),), (Engine("e", "2", {"cpu": 1}),)]),
)
ORIGINS = st.sampled_from(["p", "q"])
STEPS = st.one_of(
    st.tuples(st.just("put"), ORIGINS, MEMBERS),
    st.tuples(st.just("drop"), ORIGINS, st.sampled_from("abc")),
    st.tuples(st.just("open"), ORIGINS, st.sampled_from([(8000,), (8000, 8001), (9000,)])),
    st.tuples(st.just("close"), ORIGINS, st.just(None)),
)


@given(st.lists(STEPS, max_size=30))
@settings(max_examples=150, deadline=None)
def test_what_was_told_is_what_is_there_whatever_happened(steps: list[tuple[str, str, object]]) -> None:
    known, told = Roster(), Told()
    there: dict[str, dict[str, Member]] = {}
    ports: dict[str, tuple[int, ...]] = {}
    for verb, origin, value in steps:
        facts: list[Fact] = []
        match verb, value:
            case "put", Member() as member if origin in there:
                there[origin].pop(member.name, None)
                there[origin][member.name] = member
                facts = known.put(origin, member)
            case "drop", str() as name:
                there.get(origin, {}).pop(name, None)
                facts = known.drop(origin, name)
            case "open", tuple() as opened:
                there.setdefault(origin, {})
                ports[origin] = opened
                facts = known.open(origin, opened)
            case "close", None:
                there.pop(origin, None)
                facts = known.close(origin)
        for fact in facts:
            told(fact)
    owned = {name: (origin, each) for origin in ("q", "p") for name, each in there.get(origin, {}).items()}
    expected = {
        endpoint.name: endpoint.address
        for origin, member in owned.values()
        if member.standing is Standing.READY
        for endpoint in member.endpoints(ports[origin])
    }
    assert told.routable == expected
    assert known.endpoints == len(told.endpoints)
    assert known.routable == len({name.rpartition("-rank-")[0] for name in told.routable})
