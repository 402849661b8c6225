"""A tokenizer by its name on the Hub when the Hub cannot be reached: no row of attempts, one sentence."""

from __future__ import annotations

import socket
import threading

import pytest
from huggingface_hub import constants

from data.tokenizer import hub_away, load_tokenizer


def test_a_hub_that_does_not_answer_is_not_asked_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    calls: list[int] = []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")

        def refuse() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                calls.append(1)
                connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        with pytest.raises(ValueError) as caught:
            load_tokenizer("someone/something")
        server.shutdown(socket.SHUT_RDWR)
    assert "127.0.0.1" in str(caught.value) and "cannot be reached" in str(caught.value) and "not in the cache" in str(caught.value)
    assert len(calls) <= 2  # its own client would try each of many files six times


def test_offline_is_said() -> None:
    assert constants.HF_HUB_OFFLINE is False or hub_away() == "HF_HUB_OFFLINE is set"
