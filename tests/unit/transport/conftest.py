"""A cluster's authority, whose keys take a while to make, and identities of its nodes."""

from datetime import timedelta

import pytest

from molink.core.ids import NodeId
from molink.transport.identity import ClusterAuthority, NodeIdentity, NodeKey


@pytest.fixture(scope="module")
def authority() -> ClusterAuthority:
    return ClusterAuthority.create("home")


def identity_of(authority: ClusterAuthority, node: NodeId) -> NodeIdentity:
    """What a node has after it was let in."""
    key = NodeKey()
    certificate = authority.sign_node(
        key.request_pem(), node=node, name="attic", valid_for=timedelta(days=1)
    )
    return key.accept(
        certificate, authority.certificate_pem, authority_key=authority.public_key_bytes
    )
