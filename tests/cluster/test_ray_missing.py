"""What is said where Ray is not installed, or where there is no cluster: one line, before any work."""

from __future__ import annotations

import socket
import sys

import pytest

from knnlm.cluster.core import open_cluster
from knnlm.errors import InputError


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own: a session that is connected already would be used."""
    monkeypatch.setattr(pytest.importorskip("ray"), "is_initialized", lambda: False)


def refusal(call, *given: object) -> str:
    outcome = call("build", *given)
    assert (outcome.status, outcome.out, len(outcome.errors)) == (2, "", 1)
    return outcome.errors[0]


def test_one_line_says_how_to_install_ray(call, gpt2_folder, text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    given = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--ray", "local")
    assert refusal(call, *given) == "knnlm: Ray needs ray, which is not installed; pip install '.[ray]'"
    assert not list(tmp_path.iterdir())


def test_an_address_without_a_cluster_is_one_line(unconnected, call, gpt2_folder, text_file, tmp_path):
    given = ("--model", gpt2_folder, "--text", text_file, "--out", tmp_path / "out", "--ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        told = refusal(call, *given, address)
    assert told.startswith(f"knnlm: --ray is '{address}', where nothing answers (Connection refused); take local, auto")
    assert refusal(call, *given, "ray://head:1").startswith("knnlm: --ray is 'ray://head:1', which is no address; take")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("address", ["", "head", "head:", "head:port", "head:99999", "a b:1", "http://head:1"])
def test_what_is_no_address_is_refused(unconnected, address):
    with pytest.raises(InputError, match="which is no address; take local, auto"), open_cluster(address):
        pass


def test_given_vectors_are_not_shared_out(call, gpt2_folder, tmp_path):
    given = ("--model", gpt2_folder, "--hidden-states", tmp_path, "--out", tmp_path / "out", "--ray", "local")
    assert "--hidden-states needs no passes of a model" in " ".join(call("build", *given).errors)
