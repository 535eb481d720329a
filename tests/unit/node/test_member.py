"""What a node tells the head of its direct links."""

from types import SimpleNamespace
from typing import Any

import pytest

from molink.core.ids import NodeId
from molink.node.member import MemberAgent
from molink.wire.to_head import LinkLost

PEER = NodeId(2)


@pytest.mark.parametrize(
    ("was_dialled_again", "has_delivered", "told"),
    [
        (False, True, [LinkLost(PEER, "cut", nothing=True)]),
        (False, False, [LinkLost(PEER, "cut", nothing=False)]),
        (True, True, []),
        (True, False, [LinkLost(PEER, "cut", nothing=False)]),
    ],
)
def test_steps_lost_with_a_link_are_told_even_if_another_has_taken_its_place(
    was_dialled_again: bool, has_delivered: bool, told: list[LinkLost]
) -> None:
    said: list[Any] = []
    member: Any = MemberAgent.__new__(MemberAgent)
    links = {PEER: object()} if was_dialled_again else {}
    member.switch = SimpleNamespace(links=links, is_used=lambda _: False)
    member.tell_head = said.append
    member.link_lost(SimpleNamespace(peer=PEER, has_delivered=has_delivered), "cut")
    assert said == told
