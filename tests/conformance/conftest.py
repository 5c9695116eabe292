"""Every conformance test that takes ``backend`` runs once on each host."""

import pytest

from tests.conformance.backends import HOSTS, Backend, backend_for
from tests.conftest import require_host


@pytest.fixture(params=HOSTS)
def backend(request: pytest.FixtureRequest) -> Backend:
    require_host(request.param)
    return backend_for(request.param)
