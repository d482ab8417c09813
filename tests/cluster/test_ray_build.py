"""A build on a Ray cluster gives the bytes of one process, whatever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from knnlm.config import LayerConfig
from knnlm.errors import DatastoreError
from knnlm.model.lm import LanguageModel
from knnlm.pipeline import build
from tests.cluster.conftest import SETTINGS
from tests.pipeline.test_resume import contents
from tests.source_files import ROOT
from tests.tiny_models import tiny_model, tiny_tokenizer

pytest.importorskip("ray")


def writing(place: Path) -> Iterator[int]:
    """Other processes that have a file of an unfinished part open."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            files = [os.readlink(one) for one in (process / "fd").iterdir()]
            if int(process.name) != os.getpid() and any(one.startswith(f"{place}/parts/.") for one in files):
                yield int(process.name)


class Killer(threading.Thread):
    """Does one deed after the other to workers that it finds in the middle of a part; a deed may decline."""

    def __init__(self, place: Path, *deeds: Callable[[int], bool]) -> None:
        super().__init__(daemon=True)
        self.place, self.deeds, self.done, self.over = place, deeds, 0, False

    def run(self) -> None:
        while not self.over and self.done < len(self.deeds):
            for pid in writing(self.place):
                with suppress(OSError):  # it is gone by now
                    self.meet(pid)
            time.sleep(0.002)

    def meet(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)  # so that it does not come to its end first
        try:
            if not self.over and self.done < len(self.deeds) and pid in writing(self.place):
                self.done += self.deeds[self.done](pid)
        finally:
            os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> bool:
    os.kill(pid, signal.SIGKILL)
    return True


def test_killed_workers_and_a_lost_machine_leave_the_bytes_of_one_process(
    raylets, cluster, lm, corpus, one_process, tmp_path
):
    killer = Killer(tmp_path / ".store.partial", kill, raylets.lose, kill)
    killer.start()
    store = build(lm, [corpus], tmp_path / "store", settings=SETTINGS, cluster=cluster)
    killer.over = True
    killer.join()
    raylets.add()
    assert killer.done == 3 and len(store.manifest.parts) >= 6
    assert contents(store.folder) == contents(one_process)


DRIVER = """
import sys
from knnlm.cluster.core import open_cluster
from knnlm.model.loading import load_model
from knnlm.pipeline import build
from knnlm.store import writer
from tests.cluster.conftest import PART_ROWS, SETTINGS

writer.PART_ROWS = PART_ROWS
model, text, out, address = sys.argv[1:]
with open_cluster(address) as cluster:
    build(load_model(model), [text], out, settings=SETTINGS, cluster=cluster)
"""


def test_the_same_call_goes_on_where_the_driver_was_killed(
    raylets, cluster, lm, gpt2_folder, corpus, one_process, tmp_path
):
    place, out = tmp_path / ".store.partial" / "parts", tmp_path / "store"
    words = [sys.executable, "-c", DRIVER, gpt2_folder, corpus, out, raylets.address]
    driver = subprocess.Popen([str(one) for one in words], cwd=ROOT)
    while driver.poll() is None and len(list(place.glob("0*"))) < 3:
        time.sleep(0.002)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    finished = {one.name: one.stat().st_ino for one in place.glob("0*")}
    store = build(lm, [corpus], out, settings=SETTINGS, cluster=cluster)
    assert contents(store.folder) == contents(one_process)
    kept = {one.name: one.stat().st_ino for one in (out / "parts").iterdir()}
    assert len(finished) >= 3 and finished.items() <= kept.items()


def test_named_layers_have_the_keys_of_one_process(cluster, lm, corpus, tmp_path):
    named = replace(SETTINGS, layers=LayerConfig(layers="1.ffn_input,final_norm", select="final_norm"))
    here = build(lm, [corpus], tmp_path / "here", settings=named)
    there = build(lm, [corpus], tmp_path / "there", settings=named, cluster=cluster)
    assert contents(there.folder / "parts") == contents(here.folder / "parts")
    assert there.manifest.scores["tokens"] < here.manifest.scores["tokens"] == here.count


def test_an_error_of_a_worker_is_that_of_one_process(cluster, lm, corpus, tmp_path):
    with pytest.raises(DatastoreError, match="is another model on a machine of the cluster"):
        other = LanguageModel.from_model(tiny_model("llama"), tiny_tokenizer(), name=lm.name)
        build(other, [corpus], tmp_path / "store", settings=SETTINGS, cluster=cluster)
    assert not list(tmp_path.iterdir())
