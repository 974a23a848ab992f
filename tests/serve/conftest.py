"""One run and one server for all tests of serving that do not need their own."""

import pytest
from servers import save_chat_run, serving


@pytest.fixture(scope="session")
def chat_run(tmp_path_factory):
    return save_chat_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def server(chat_run):
    with serving("--workdir", chat_run, "--num_slots", 4, "--max_queue", 28) as server:
        yield server
