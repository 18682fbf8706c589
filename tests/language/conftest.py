from __future__ import annotations

import pytest

from tests.language.worlds import World


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Folders of tiny models and of data sets in the layouts of the hub."""
    return World.made(tmp_path_factory.mktemp("language"))
