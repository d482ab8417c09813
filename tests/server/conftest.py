"""What tests of a running server need besides its `server`, which each module has of its own kind."""

from __future__ import annotations

import pytest

from knnlm import KNNLM
from tests.server_process import LAMBDA, LAYER, TEMPERATURE, K


@pytest.fixture(scope="module")
def client(server):
    with server.client() as found:
        yield found


@pytest.fixture(scope="module")
def knn(server, store_folder):
    """The same kNN-LM, not the server's: nothing of it is shared but the weights."""
    return KNNLM.from_store(store_folder, LAYER, K, TEMPERATURE, LAMBDA, lm=server.service.lm)
