"""A cluster's authority: its keys take a while to make."""

import pytest

from molink.transport.identity import ClusterAuthority


@pytest.fixture(scope="module")
def authority() -> ClusterAuthority:
    return ClusterAuthority.create("home")
