"""What holds for every test: no network, no settings of the person who runs it, the same numbers each time."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from selenium import webdriver

    from tests.hub_server import Hub

# Before anything imports transformers or datasets, which read these once. The caches are of this run only.
_CACHE = tempfile.TemporaryDirectory(prefix="knnlm-tests-", ignore_cleanup_errors=True)
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HOME=_CACHE.name,
    NO_COLOR="1",
)
for _name in [name for name in os.environ if name.startswith("KNNLM_") and name != "KNNLM_NO_BROWSER"]:
    del os.environ[_name]
for _name in ("COLUMNS", "FORCE_COLOR", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_TOKEN"):
    os.environ.pop(_name, None)

# Before anything loads OpenMP, here and in the processes that tests start: work this small gains nothing by threads,
# which spin while they wait for one another. Tests of threads ask for a number of their own.
os.environ["OMP_NUM_THREADS"] = "1"

# A slow machine is no failure, and a failure is the same failure tomorrow.
hypothesis.settings.register_profile("knnlm", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("knnlm")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Fix torch's global seed where a test uses torch at all: models initialised in a test are the same each time.

    Only the CPU's: `torch.manual_seed` keeps a stack trace for each kind of accelerator, 2 ms and more with every test.
    """
    if torch := sys.modules.get("torch"):
        torch.default_generator.manual_seed(0)
    yield


# For the tests of the command line; what is heavy is imported when one of them runs.


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    status: int
    out: str
    errors: tuple[str, ...]
    """Lines of standard error."""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process."""
    from knnlm import cli

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["cli.py", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return Outcome(int(stopped.value.code or 0), out, tuple(err.splitlines()))

    return run


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 with its tokenizer, as `save_pretrained` leaves them; 128 positions."""
    from tests.tiny_models import save_tiny

    return save_tiny("gpt2", tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 documents of about 250 tokens."""
    from tests.evaluation.test_evaluate_oracle import texts, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", texts(0, 24))


@pytest.fixture(scope="session")
def store_folder(tmp_path_factory: pytest.TempPathFactory, gpt2_folder: Path, text_file: Path) -> Path:
    """A datastore of `text_file` with the keys of 1.ffn_input and 2.ffn_input; to be copied before it is damaged."""
    from knnlm.config import LayerConfig, Settings, TextConfig
    from knnlm.model.loading import load_model
    from knnlm.pipeline import build

    settings = Settings(text=TextConfig(context=32, stride=16), layers=LayerConfig(layers="1.ffn_input,2.ffn_input"))
    out = tmp_path_factory.mktemp("stores") / "store"
    return build(load_model(gpt2_folder), [text_file], out, settings=settings).folder


# For datastores on the hub: its client, led to a stand-in on this machine.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty hub, and a client of it with an empty cache and no token.

    huggingface_hub reads its environment when it is imported, so that the same is set here in its constants.
    """
    from huggingface_hub import constants

    from tests.hub_server import hub_server

    with hub_server() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A block in which the hub is not reached."""
    from huggingface_hub import constants

    @contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            yield

    return block


# For the pages, which are looked at in one real browser.

CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def executable(*names: str) -> str:
    """The path of the first that is installed. A missing browser is a failure: a skip would hide a broken page."""
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.fail(f"this test needs {names[0]} (Debian: chromium, chromium-driver); KNNLM_NO_BROWSER=1 leaves it out")


@pytest.fixture(scope="session")
def _chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = executable("chromium", "chromium-browser", "google-chrome")
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def browser(_chromium: webdriver.Chrome) -> webdriver.Chrome:
    """Chromium with one empty tab of a size of its own, and nothing that another module's pages left."""
    used = _chromium.current_window_handle
    _chromium.switch_to.new_window("tab")
    fresh = _chromium.current_window_handle
    _chromium.switch_to.window(used)
    _chromium.close()
    _chromium.switch_to.window(fresh)
    _chromium.execute_cdp_cmd("Storage.clearDataForOrigin", {"origin": "*", "storageTypes": "all"})
    _chromium.get_log("browser")
    return _chromium
