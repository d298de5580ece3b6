from __future__ import annotations

from isotherm.cluster.doctor.proxies import judge_proxies


def judged(nodes=(), **environment) -> tuple[str, str]:
    (found,) = judge_proxies(environment, nodes)
    return found.state.value, found.advice


def test_a_proxy_that_is_asked_for_loopback_too():
    assert judged(PATH="/bin", HTTP_PROXY="")[0] == "ok"
    state, advice = judged(HTTP_PROXY="http://p:3128", no_proxy="example.org,localhost")
    assert state == "warn" and "no_proxy=example.org,localhost,127.0.0.1" in advice
    assert judged(http_proxy="http://p:3128", NO_PROXY="localhost, 127.0.0.1") == ("ok", "")
    assert judged(http_proxy="http://p:3128", no_proxy="*") == ("ok", "")


def test_nodes_are_asked_directly_too():
    state, advice = judged(["10.0.0.1"], grpc_proxy="http://p", no_proxy="localhost,127.0.0.1")
    assert state == "warn" and advice.endswith("no_proxy=localhost,127.0.0.1,10.0.0.1")
