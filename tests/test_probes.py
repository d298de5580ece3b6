"""What probes of a served cluster are judged by."""

from __future__ import annotations

from probes import PERIOD, Probe, Probes


def test_waits_are_counted_from_the_asking_or_from_when_somebody_could_answer():
    probes = Probes("", requests=[Probe(0.0, 1.0, 200), Probe(2.0, 14.0, 200), Probe(3.0, 15.5, 503)])
    assert probes.waited() == 12.5
    assert probes.waited(hindered_until=12.0) == 3.5


def test_a_request_that_has_waited_and_waits_on_when_ready_says_200_is_seen():
    waiting = Probe(10.0, 30.0, 200)
    for ready, seconds in [
        (Probe(12.0, 12.5, 200), 2.5),  # it may not have been noticed yet
        (Probe(19.0, 20.0, 200), 10.0),
        (Probe(19.0, 20.0, 503), 0.0),
        (Probe(29.0, 29.5, 200), 0.5),  # it was answered soon after
    ]:
        assert Probes("", [waiting], [ready]).hung_though_ready() == seconds
    longer = Probes("", [Probe(28.0, 30.0, 200), waiting], [Probe(19.0, 20.0, 200), Probe(29.5, 29.75, 200)])
    assert longer.hung_longest(8.0) == "asked at 2.00 and answered at 22.00 s; /ready at 11.00 and 12.00 s"
    assert Probes("", [waiting], [Probe(19.0, 20.0, 503)]).hung_longest(8.0) == "none"
    never = Probe(10.0, float("inf"))
    assert Probes("", [never], [Probe(80.0, 90.0, 200)]).hung_though_ready() == 80.0


def test_served_again_when_the_last_refusal_is_past():
    refused = [Probe(1.0, 1.1, 503), Probe(4.0, 4.1), Probe(5.0, 5.1, 200)]
    probes = Probes("", requests=refused, readiness=[Probe(1.0, 1.1, 503), Probe(2.0, 2.1, 200)])
    assert probes.refused() == refused[:2] and probes.served_again(fault=1.5) == 2.5 + PERIOD
    assert probes.not_ready_seconds() == PERIOD
    assert Probes("", requests=refused[2:]).served_again(fault=1.5) == 0.0
