"""SIGKILL at random moments of the verbs that write, and of one that reads.

After each kill, the store at the target opens, is whole, and is the old or the new one; the user's own files are
unchanged; and the same command, repeated, succeeds and leaves no leftovers of the killed one.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forks import Ended, command, fork
from tally import Tally
from workshop import Workshop, digest

LAYERS = ("--layers", "1.ffn_input,2.ffn_input", "--k", "8", "--seed", "3")
# Latest kill, relative to the verb's uninterrupted time, so that some come just after its end.
REACH = 1.05


@dataclass(frozen=True)
class Verb:
    """The command to kill, and the state before it."""

    name: str
    words: Callable[[Workshop], Sequence[object]]
    prepared: Callable[[Workshop], Sequence[object]] | None = None
    """Command that makes the store that is there before."""


def build_words(shop: Workshop, text: str, *more: object) -> list[object]:
    """The command that builds a store of a text."""
    return [
        "build",
        "--model",
        shop.model,
        "--text",
        shop.text(text),
        "--out",
        shop.store,
        *LAYERS[:2],
        *LAYERS[4:],
        *more,
    ]


def run_words(shop: Workshop, text: str, *more: object) -> list[object]:
    """The command that makes a store with an index, a fit and a report."""
    given = ["run", "--model", shop.model, "--text", shop.text(text), "--out", shop.store, *LAYERS]
    return [*given, "--eval-tokens", "400", "--index", "IVF4,Flat", *more]


def eval_words(shop: Workshop) -> list[object]:
    """The command that reads it."""
    return ["eval", shop.store, "--eval-text", shop.text("evaluation"), "--eval-tokens", "400", "--k", "8"]


VERBS = (
    Verb("build", lambda shop: build_words(shop, "first")),
    Verb("run", lambda shop: run_words(shop, "first")),
    Verb(
        "build --overwrite",
        lambda shop: build_words(shop, "second", "--overwrite"),
        lambda shop: run_words(shop, "first"),
    ),
    Verb(
        "run --overwrite", lambda shop: run_words(shop, "second", "--overwrite"), lambda shop: run_words(shop, "first")
    ),
    Verb("eval", eval_words, lambda shop: run_words(shop, "first")),
)


@dataclass
class Scene:
    """A verb with what it finds and what it leaves when nobody kills it."""

    shop: Workshop
    verb: Verb
    before: Path | None = None
    """A copy of the store that is there before."""
    seconds: float = 0.0
    outcomes: set[str] = field(default_factory=set)
    """Digests of what may stand at the place after a kill: the old store, the new one."""
    names: set[str] = field(default_factory=set)
    """All that is beside the store when nothing is left over."""

    def reset(self) -> None:
        """As it was before the verb."""
        shutil.rmtree(self.shop.store, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.shop.store)


def prepare(shop: Workshop, verb: Verb) -> Scene:
    """Run the verb once, uninterrupted."""
    scene = Scene(shop, verb)
    shutil.rmtree(shop.store, ignore_errors=True)
    if verb.prepared is not None:
        well(command(verb.prepared(shop)))
        scene.before = shop.folder / "before.knn"
        shutil.rmtree(scene.before, ignore_errors=True)
        shutil.copytree(shop.store, scene.before)
        scene.outcomes.add(digest(shop.store))
    scene.seconds = well(command(verb.words(shop))).seconds
    scene.outcomes.add(digest(shop.store))
    scene.names = {path.name for path in shop.place.iterdir()}
    return scene


def well(ended: Ended) -> Ended:
    """Check that a fork succeeded; the campaign cannot continue otherwise."""
    if ended.status:
        raise SystemExit(f"the campaign cannot begin: {ended.output}")
    return ended


def kill(scene: Scene, rng: random.Random, tally: Tally) -> None:
    """Kill the verb once and look at what it left."""
    scene.reset()
    shop, verb = scene.shop, scene.verb
    own = _own(shop)
    ended = command(verb.words(shop), kill_after=rng.uniform(0, REACH * scene.seconds))
    tally.count(verb.name, "killed" if ended.status == -9 else "came too late")
    if ended.traceback:
        tally.fault(verb.name, "tracebacks", ended.output)
    _look(scene, tally)
    # A first build that was finished before the kill came is rightly refused when it is given again.
    finished = scene.before is None and shop.store.exists() and digest(shop.store) in scene.outcomes
    again = command([*verb.words(shop), *(["--overwrite"] if finished else [])])
    if again.status or again.hung:
        kind = "hangs" if again.hung else "tracebacks" if again.traceback else "same command fails"
        tally.fault(verb.name, kind, again.output)
    if left := {path.name for path in shop.place.iterdir()} - scene.names:
        tally.fault(verb.name, "left over", ", ".join(sorted(left)))
    if _own(shop) != own:
        tally.fault(verb.name, "files lost that are not ours", "the user's own files changed")


def _own(shop: Workshop) -> dict[str, str]:
    """Digests of everything beside the store that was there at the beginning, and of what the verbs read."""
    names = ("notes.txt", ".book.knn.partial-7")
    read = (shop.model, *(shop.text(name) for name in ("first", "second", "evaluation")))
    return {
        str(path): digest(path) if path.exists() else "" for path in (*(shop.place / name for name in names), *read)
    }


def _look(scene: Scene, tally: Tally) -> None:
    """What stands at the place must be one of the whole stores, or, of a first build, be whole without an index."""
    shop, name = scene.shop, scene.verb.name
    if not shop.store.exists():
        tally.count(name, "nothing there")
        if scene.before is not None:
            tally.fault(name, "old store lost", "nothing is at the place")
        return
    if digest(shop.store) in scene.outcomes:
        tally.count(name, "old or new store, whole")
        return
    verified = command(["verify", shop.store])
    if verified.status or verified.traceback:
        tally.fault(name, "opens damaged", verified.output)
    elif scene.before is not None or not (shop.store / "unfinished.json").is_file():
        tally.fault(name, "neither old nor new", _difference(scene))
    else:
        tally.count(name, "whole, marked unfinished")


def _difference(scene: Scene) -> str:
    names = {str(path.relative_to(scene.shop.store)) for path in scene.shop.store.rglob("*")}
    return f"holds {', '.join(sorted(names))}"


def index_twice(shop: Workshop, rng: random.Random, tally: Tally) -> None:
    """Kill a Python call that indexes a layer of a store."""
    name = "index_layer"
    shutil.rmtree(shop.store, ignore_errors=True)
    well(command(build_words(shop, "first", "--index", "exact")))
    before = fork(lambda: _index(shop.store))
    seconds = well(before).seconds
    shutil.rmtree(shop.store)
    well(command(build_words(shop, "first", "--index", "exact")))
    ended = fork(lambda: _index(shop.store), kill_after=rng.uniform(0, REACH * seconds))
    tally.count(name, "killed" if ended.status == -9 else "came too late")
    for words in (["verify", shop.store], eval_words(shop)):
        after = command(words)
        if after.status:
            tally.fault(name, "opens damaged", after.output)
    if "1.ffn_input" in json.loads((shop.store / "datastore.json").read_text(encoding="utf-8"))["indexes"]:
        return  # it was finished before the kill came, and a second index of a layer is rightly refused
    again = fork(lambda: _index(shop.store))
    if again.status:
        tally.fault(name, "same command fails", again.output)


def _index(store: Path) -> None:
    from knnlm import index_layer
    from knnlm.config import KNNConfig, Settings

    index_layer(store, "1.ffn_input", settings=Settings(knn=KNNConfig(index="IVF4,Flat", k=8)))


def campaign(shop: Workshop, count: int, seed: int, tally: Tally) -> None:
    """Kill `count` times, spread over the verbs; if there are fewer kills than verbs, over a sample of them."""
    rng = random.Random(seed)
    each, rest = divmod(count, len(VERBS) + 1)
    for verb in VERBS if each else rng.sample(VERBS, rest):
        scene = prepare(shop, verb)
        for _ in range(each or 1):
            kill(scene, rng, tally)
    for _ in range(each):
        index_twice(shop, rng, tally)
