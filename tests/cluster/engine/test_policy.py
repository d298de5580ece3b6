"""Who has its turn when: classes, fairness between keys, and who gives way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from isotherm.cluster.engine.policy import Waiting, gives_way_to, precedence
from isotherm.cluster.engine.sequence import ScheduledSequence
from isotherm.cluster.messages.requests import GenerationRequest, SamplingParams


def sequence(
    arrival: int, priority: int = 0, key: str = "", tokens: int = 10, weight: float = 1.0
) -> ScheduledSequence:
    params = SamplingParams(tokens)
    request = GenerationRequest(f"{key}{arrival}", (1, 2), params, priority=priority, key=key, weight=weight)
    return ScheduledSequence(request, arrival, [1, 2])


def order(waiting: Waiting) -> list[str]:
    """Of turns, each taken."""
    out = []
    while (first := waiting.first()) is not None:
        out.append(first.request.id)
        waiting.remove(first, has_turn=True)
    assert len(waiting) == 0
    return out


def queue(*sequences: ScheduledSequence) -> Waiting:
    waiting = Waiting()
    for one in sequences:
        waiting.add(one)
    return waiting


def test_one_key_is_served_as_it_comes():
    assert order(queue(*(sequence(i, tokens=100 - i) for i in range(5)))) == ["0", "1", "2", "3", "4"]


def test_a_lower_priority_value_comes_first():
    assert order(queue(sequence(0, 5), sequence(1), sequence(2, -3), sequence(3, 5))) == ["2", "1", "0", "3"]


def test_who_asks_for_much_does_not_keep_others_waiting():
    many = [sequence(i, key="a") for i in range(4)]
    assert order(queue(*many, sequence(4, key="b"), sequence(5, key="b"))) == ["a0", "b4", "a1", "b5", "a2", "a3"]


def test_long_requests_count_for_more():
    waiting = queue(*(sequence(i, key="a", tokens=98) for i in range(2)))
    for i in range(2, 8):
        waiting.add(sequence(i, key="b", tokens=18))
    assert order(waiting) == ["a0", "b2", "b3", "b4", "b5", "b6", "a1", "b7"]


def test_idleness_is_not_saved_up():
    """A key that comes late has its first turn soon, and then takes turns like everybody."""
    waiting = queue(*(sequence(i, key="a") for i in range(20)))
    for _ in range(10):
        waiting.remove(waiting.first(), has_turn=True)
    for i in range(20, 30):
        waiting.add(sequence(i, key="b"))
    assert order(waiting)[:6] == ["b20", "a10", "b21", "a11", "b22", "a12"]


def test_one_that_was_preempted_comes_before_those_that_had_no_turn():
    late, waiting = sequence(7), queue(sequence(0), sequence(1))
    late.admitted = True
    waiting.add(late)
    assert order(waiting) == ["7", "0", "1"]


def test_one_that_leaves_is_not_missed():
    gone, waiting = sequence(0), queue()
    for one in (gone, sequence(1), sequence(2)):
        waiting.add(one)
    waiting.remove(gone)
    assert [s.request.id for s in waiting] == ["1", "2"] == order(waiting)


def test_what_is_given_up_is_not_charged():
    many = [sequence(i, key="a") for i in range(6)]
    waiting = queue(*many[:5], *(sequence(i, key="b") for i in range(10, 13)))
    for one in many[1:5]:
        waiting.remove(one)
    waiting.add(many[5])
    assert order(waiting) == ["a0", "b10", "a5", "b11", "b12"]


def test_three_times_the_weight_is_three_times_the_turns():
    heavy = [sequence(i, key="a", weight=3.0) for i in range(6)]
    light = [sequence(i, key="b") for i in range(6, 9)]
    assert order(queue(*light, *heavy)) == ["a0", "b6", "a1", "a2", "a3", "b7", "a4", "a5", "b8"]


def test_what_was_asked_for_and_not_used_is_given_back():
    """One asks for long outputs and has short ones: it has turns by what it has used."""
    waiting = queue()
    for i in range(8):
        waiting.add(sequence(2 * i, key="a", tokens=98))
        waiting.add(sequence(2 * i + 1, key="b", tokens=8))
    turns = []
    while (first := waiting.first()) is not None:
        waiting.remove(first, has_turn=True)
        turns.append(first.request.key)
        first.tokens += [7] * 8
        waiting.ended(first)
    assert all(abs(turns[:n].count("a") - turns[:n].count("b")) <= 1 for n in range(len(turns)))


def test_what_somebody_has_of_one_class_counts_for_nothing_in_another():
    """A batch in the background does not keep its key's conversation waiting behind others."""
    batch = [sequence(i, 9, "a", 1000) for i in range(5)]
    waiting = queue(*batch)
    for _ in range(2):
        waiting.remove(waiting.first(), has_turn=True)
    for i, key in ((10, "b"), (11, "b"), (12, "a"), (13, "a")):
        waiting.add(sequence(i, key=key))
    assert order(waiting)[:4] == ["b10", "a12", "b11", "a13"]


def test_who_has_left_leaves_nothing_behind():
    waiting = queue()
    for i in range(3000):
        one = sequence(i, priority=i % 7, key=f"u{i}")
        waiting.add(one)
        waiting.remove(one, has_turn=i % 2 == 0)
        waiting.ended(one)
    assert not waiting._heap and not waiting._classes


def test_the_heap_has_few_entries_that_stand_for_nothing():
    waiting = queue(*(sequence(i, key="a") for i in range(50)))
    for i in range(50, 500):
        waiting.remove(next(iter(waiting)))  # each that is given up moves all after it
        waiting.add(sequence(i, key="a"))
    assert len(waiting._heap) == 50


def test_only_a_better_class_takes_blocks_away():
    assert gives_way_to(sequence(0, 1), sequence(1)) and not gives_way_to(sequence(0), sequence(1))
    assert not gives_way_to(sequence(0), sequence(1, 1))
    assert precedence(sequence(0, 1)) > precedence(sequence(9)) > precedence(sequence(8))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=2, max_size=30))
def test_no_key_gets_much_more_than_its_share(asked):
    """While two keys both wait, what either has been given differs by no more than one request of each."""
    sequences = [sequence(i, key=key, tokens=tokens) for i, (key, tokens) in enumerate(asked)]
    waiting, given_to, left = queue(*sequences), dict.fromkeys("abc", 0), [s.request.key for s in sequences]
    largest = 2 * (max(tokens for _, tokens in asked) + 2)
    while (first := waiting.first()) is not None:
        key = first.request.key
        waiting.remove(first, has_turn=True)
        left.remove(key)
        given_to[key] += 2 + first.request.params.max_tokens
        if len(with_more := [given_to[u] for u in set(left)]) > 1:
            assert max(with_more) - min(with_more) <= largest
