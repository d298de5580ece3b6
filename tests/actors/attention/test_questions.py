"""Whether rows would get through: what has been heard since a question, and what is asked for it of whom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from exchange_parts import dispatch
from torch import Tensor

from isotherm.actors.attention.exchange import ExpertExchange
from isotherm.actors.attention.questions import Questions
from isotherm.actors.links.protocol import Dispatch, LinkError
from isotherm.cluster.placement.table import Placement, contiguous_placement
from isotherm.kernels.reference import ReferenceKernels

LAYERS, EXPERTS = (1, 2), 4
TWO = contiguous_placement(LAYERS, EXPERTS, ["a", "b"])


class Clock:
    now = 10.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def test_a_group_is_heard_from_the_question_on_only():
    questions, said = Questions(Clock()), list[bool]()
    questions.follow(["a", "b"])
    questions.heard("a")
    questions.ask(said.append)
    questions.heard("b")
    assert questions.waiting and questions.take() == ["a"]
    questions.answer(True)
    assert said == [True] and not questions.waiting


def test_what_was_heard_before_the_last_question_does_not_answer_it():
    questions, said = Questions(Clock()), list[bool]()
    questions.follow(["a"])
    questions.ask(said.append)
    questions.heard("a")
    questions.ask(said.append)
    assert questions.take() == ["a"]
    questions.answer(False)
    assert said == [False, False]


def test_only_groups_that_are_used_are_asked():
    questions = Questions(Clock())
    questions.follow(["a", "b"])
    questions.follow(["b", "c"])
    questions.ask(lambda through: None)
    assert questions.take() == ["b", "c"]


def test_nobody_is_asked_where_nobody_asks():
    questions = Questions(Clock())
    questions.follow(["a"])
    assert questions.take() == []


# --- over links -----------------------------------------------------------------------------------


class Link:
    """`error`: what the group's answers are instead."""

    kind = "fake"

    def __init__(self) -> None:
        self.messages: list[Dispatch] = []
        self.error: Exception | None = None

    def send(self, message: Dispatch) -> None:
        self.messages.append(message)

    def receive(self, progress: Callable[[], None] = lambda: None) -> Tensor:
        if self.error is not None:
            raise self.error
        message = self.messages[-1]
        return message.x_UD[torch.from_numpy(message.rows_P)] if len(message.rows_P) else message.x_UD

    def in_step(self, inside: bool) -> None:
        pass

    def close(self) -> None:
        pass


class Asked:
    def __init__(self, placement: Placement = TWO) -> None:
        self.links = {group: Link() for group in placement.groups()}
        self.failed: list[str] = []
        self.exchange = ExpertExchange(
            ReferenceKernels(torch.float32),
            placement,
            self.links,
            link_failed=lambda group, link, why: self.failed.append(group),
            hidden=8,
        )

    def ask(self) -> list[bool]:
        said: list[bool] = []
        self.exchange.questions.ask(said.append)
        return said

    def layer(self, *experts: int) -> None:
        ids = torch.tensor([experts], dtype=torch.int32)
        dispatch(self.exchange, 1, torch.ones(1, 8), ids, torch.ones(1, len(experts)))
        self.exchange.combine()


def test_an_idle_shard_asks_every_group_for_nothing():
    asked = Asked()
    said = asked.ask()
    asked.exchange.answer_questions()
    assert said == [True]
    for link in asked.links.values():
        (message,) = link.messages
        assert message.x_UD.shape == (0, 8) and len(message.rows_P) == 0 and message.layer in LAYERS
        np.testing.assert_array_equal(message.offsets_A1, [0])


def test_groups_that_have_answered_a_layer_since_are_not_asked():
    asked = Asked()
    said: list[bool] = []
    ask_of = asked.links["a"].send

    def send(message: Dispatch) -> None:
        ask_of(message)
        asked.exchange.questions.ask(said.append)  # while the layer is under way

    asked.links["a"].send = send  # type: ignore[method-assign]
    asked.layer(0, 3)
    asked.links["a"].send = ask_of  # type: ignore[method-assign]
    assert said == []
    asked.layer(0)  # at whose beginning the question is answered
    assert said == [True]
    assert [len(m.rows_P) for m in asked.links["b"].messages] == [1]


def test_a_question_in_a_step_asks_the_group_that_has_no_rows_of_it():
    asked = Asked()
    asked.layer(0)
    said = asked.ask()
    asked.layer(0)
    assert said == [True] and [len(m.rows_P) for m in asked.links["b"].messages] == [0]


@pytest.mark.parametrize("when", ["idle", "in a step"])
def test_a_group_that_does_not_answer_holds_requests_up_and_has_its_link_mended(when: str):
    asked = Asked()
    asked.links["b"].error = LinkError("the group gave no answer for 2 s")
    said = asked.ask()
    if when == "idle":
        asked.exchange.answer_questions()
    else:
        asked.layer(0)
    assert said == [False] and asked.failed == ["b"]
    said = asked.ask()
    asked.exchange.answer_questions()
    assert said == [False] and asked.failed == ["b"], "it is known already, and not asked again"
    asked.exchange.relink("b", Link())
    said = asked.ask()
    asked.exchange.adopt_offered()
    asked.exchange.answer_questions()
    assert said == [True]


def test_a_group_whose_experts_others_have_too_holds_nobody_up():
    both = (("a", "b"),) * EXPERTS
    asked = Asked(Placement(1, LAYERS, (both, both)))
    asked.links["b"].error = LinkError("the group is gone")
    said = asked.ask()
    asked.exchange.answer_questions()
    assert said == [True] and asked.failed == ["b"]
