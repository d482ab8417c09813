"""SIGKILL at random moments of the verbs that write, and of one that reads.

After each kill, the store at the target opens, is whole, and is the old or the new generation, byte for byte; the
user's own files and the verb's inputs are unchanged. The same command, repeated, then ends well, or is refused because
it was done already; in both cases the bytes are those of a run that nobody killed, and nothing is left over.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from forks import Ended, command, fork, run_knnlm
from tally import Tally
from workshop import Workshop, digest, digest_of_listed

LAYERS = ("--layers", "1.ffn_input,2.ffn_input", "--k", "8", "--seed", "3")
# Latest kill, relative to the verb's uninterrupted time, so that some come just after its end.
REACH = 1.05
Words = Sequence[object]


@dataclass(frozen=True)
class Verb:
    """The command to kill, and the state before it."""

    name: str
    words: Callable[[Workshop], Words]
    prepared: Callable[[Workshop], Sequence[Words]] = lambda shop: ()
    """Commands that make what is there before."""
    refusal: str = ""
    """What the command says when it was done before; empty: it ends well once more."""
    kills: int = 1
    """How often it is killed before it may end."""


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
    """The command that reads it, and stores its fit."""
    return ["eval", shop.store, "--eval-text", shop.text("evaluation"), "--eval-tokens", "400"]


def add_words(shop: Workshop) -> list[object]:
    """The command that adds a text to it."""
    return ["add", shop.store, "--text", shop.text("second")]


def remove_words(shop: Workshop, *more: object) -> list[object]:
    """The command that removes two documents of the first text."""
    return ["remove", shop.store, "--document", "first.jsonl:2", "--document", "first.jsonl:5", *more]


def make_store(shop: Workshop) -> None:
    """Make a store with all that one can have: parts, removed documents, an index over both, a fit, a report."""
    for words in _changed(shop):
        well(command(words))


def _run(shop: Workshop) -> list[Words]:
    return [run_words(shop, "first", "--overwrite")]


def _changed(shop: Workshop) -> list[Words]:
    return [*_run(shop), add_words(shop), remove_words(shop)]


def _two_stores(shop: Workshop) -> list[Words]:
    """Commands that make the two stores to merge."""
    one, other = shop.parents
    first = ["build", "--model", shop.model, "--text", shop.text("first"), "--index", "IVF4,Flat", *LAYERS]
    second = ["build", "--model", shop.model, "--text", shop.text("second"), "--frame", one, "--index", "exact"]
    return [[*first, "--out", one, "--overwrite"], [*second, "--out", other, "--overwrite"]]


EXISTS, GONE = "exists and is not empty", "has no document"
VERBS = (
    Verb("build", lambda shop: build_words(shop, "first"), refusal=EXISTS),
    Verb("build, killed 3 times", lambda shop: build_words(shop, "first"), refusal=EXISTS, kills=3),
    Verb("run", lambda shop: run_words(shop, "first"), refusal=EXISTS),
    Verb("build --overwrite", lambda shop: build_words(shop, "second", "--overwrite"), _run),
    Verb("run --overwrite", lambda shop: run_words(shop, "second", "--overwrite"), _run),
    Verb("eval", eval_words, _run),
    Verb("add", add_words, _run),
    Verb("remove", remove_words, _run, refusal=GONE),
    Verb("remove --purge", lambda shop: remove_words(shop, "--purge"), _run, refusal=GONE),
    Verb("compact", lambda shop: ["compact", shop.store], _changed),
    Verb("merge", lambda shop: ["merge", *shop.parents, "--out", shop.store], _two_stores, refusal=EXISTS),
)


@dataclass
class Scene:
    """A verb with what it finds and what it leaves when nobody kills it."""

    shop: Workshop
    verb: Verb
    before: Path | None = None
    """A copy of the store that is there before."""
    seconds: float = 0.0
    generations: dict[str, str] = field(default_factory=dict)
    """Digests of what may stand at the place after a kill, and what each is."""
    end: str = ""
    """Digest of all that stands there at the end."""
    names: set[str] = field(default_factory=set)
    """All that is beside the store when nothing is left over."""

    def reset(self) -> None:
        """As it was before the verb."""
        shutil.rmtree(self.shop.store, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, self.shop.store)

    def now(self) -> str:
        """What stands at the place: `old`, `new`, what is between; empty: anything else."""
        with suppress(FileNotFoundError):
            return self.generations.get(digest_of_listed(self.shop.store), "")
        return ""


def prepare(shop: Workshop, verb: Verb) -> Scene:
    """Run the verb once, uninterrupted."""
    scene = Scene(shop, verb)
    shutil.rmtree(shop.store, ignore_errors=True)
    for words in verb.prepared(shop):
        well(command(words))
    if shop.store.exists():
        scene.before = shop.folder / "before.knn"
        shutil.rmtree(scene.before, ignore_errors=True)
        shutil.copytree(shop.store, scene.before)
        scene.generations[digest_of_listed(shop.store)] = "old"
    log = shop.folder / "generations"
    log.write_text("")
    scene.seconds = well(fork(lambda: _note_generations(shop, verb.words(shop), log))).seconds
    scene.generations |= dict.fromkeys(log.read_text().split(), "new, but for its index")
    scene.generations[digest_of_listed(shop.store)] = "new"
    scene.end, scene.names = digest(shop.store), {path.name for path in shop.place.iterdir()}
    return scene


def _note_generations(shop: Workshop, words: Words, log: Path) -> None:
    """Run a command, and write down the digest of each generation that it puts in place."""
    replace = os.replace

    def noted(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        replace(source, target)
        if Path(target) == shop.store / "datastore.json":
            with log.open("a") as file:
                print(digest_of_listed(shop.store), file=file)

    os.replace = noted  # type: ignore[assignment]
    run_knnlm(words)


def well(ended: Ended) -> Ended:
    """Check that a fork succeeded; the campaign cannot continue otherwise."""
    if ended.status:
        raise SystemExit(f"the campaign cannot begin: {ended.output}")
    return ended


def kill(scene: Scene, rng: random.Random, tally: Tally) -> int:
    """Kill the verb, look at what is there, and repeat it; return how often it was killed."""
    scene.reset()
    own, kills = _own(scene.shop), 0
    while not kills or (kills < scene.verb.kills and scene.now() != "new"):
        kills += 1
        _kill_once(scene, rng, tally)
    _repeat(scene, tally)
    if _own(scene.shop) != own:
        tally.fault(scene.verb.name, "files lost that are not ours", "the user's own files, or the inputs, changed")
    return kills


def _kill_once(scene: Scene, rng: random.Random, tally: Tally) -> None:
    name = scene.verb.name
    ended = command(scene.verb.words(scene.shop), kill_after=rng.uniform(0, REACH * scene.seconds))
    tally.count(name, "killed" if ended.status == -9 else "came too late")
    if ended.traceback:
        tally.fault(name, "tracebacks", ended.output)
    _look(scene, tally)


def _repeat(scene: Scene, tally: Tally) -> None:
    """Give the same command again: it ends well, or was done; then all is as if nobody had killed it."""
    shop, verb, reached = scene.shop, scene.verb, scene.now()
    again = command(verb.words(shop))
    if verb.refusal and verb.refusal in again.output and again.status == 2 and reached.startswith("new"):
        tally.count(verb.name, "refused, as it was done")
    elif again.status or again.hung:
        kind = "hangs" if again.hung else "tracebacks" if again.traceback else "same command fails"
        tally.fault(verb.name, kind, f"{reached or 'unfinished'}: {again.output}")
    if digest(shop.store) != scene.end:
        tally.fault(verb.name, "other bytes than without a kill", f"after {reached or 'unfinished'}: {_names(scene)}")
    if left := {path.name for path in shop.place.iterdir()} - scene.names:
        tally.fault(verb.name, "left over", ", ".join(sorted(left)))


def _own(shop: Workshop) -> dict[str, str]:
    """Digests of everything beside the store that was there at the beginning, and of what the verbs read."""
    names = (shop.place / "notes.txt", shop.place / ".book.knn.partial-7")
    texts = (shop.text(name) for name in ("first", "second", "evaluation"))
    paths = (*names, shop.model, *texts, *shop.parents)
    return {str(path): digest(path) if path.exists() else "" for path in paths}


def _look(scene: Scene, tally: Tally) -> None:
    """What stands at the place must be one of the generations, or, of a first build, be whole without an index."""
    shop, name = scene.shop, scene.verb.name
    if not shop.store.exists():
        tally.count(name, "nothing there")
        if scene.before is not None:
            tally.fault(name, "old store lost", "nothing is at the place")
        return
    verified, found = command(["verify", shop.store]), scene.now()
    if verified.status or verified.traceback:
        tally.fault(name, "opens damaged", verified.output)
    elif found:
        tally.count(name, found)
    elif scene.before is not None or not (shop.store / "unfinished.json").is_file():
        tally.fault(name, "neither old nor new", _names(scene))
    else:
        tally.count(name, "whole, marked unfinished")


def _names(scene: Scene) -> str:
    names = {str(path.relative_to(scene.shop.store)) for path in scene.shop.store.rglob("*")}
    return f"holds {', '.join(sorted(names))}"


def index_twice(shop: Workshop, rng: random.Random, tally: Tally) -> None:
    """Kill a Python call that indexes a layer of a store, one that `build` has not indexed."""
    name, words = "index_layer", build_words(shop, "first", "--index", "exact", "--select", "2.ffn_input")
    shutil.rmtree(shop.store, ignore_errors=True)
    well(command(words))
    before = fork(lambda: _index(shop.store))
    seconds = well(before).seconds
    shutil.rmtree(shop.store)
    well(command(words))
    ended = fork(lambda: _index(shop.store), kill_after=rng.uniform(0, REACH * seconds))
    tally.count(name, "killed" if ended.status == -9 else "came too late")
    for reading in (["verify", shop.store], eval_words(shop)):
        after = command(reading)
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
    """Kill at least `count` times, spread over the verbs; if these are more than the kills, over a sample of them."""
    rng = random.Random(seed)
    each = -(-count // (len(VERBS) + 1)) if count > len(VERBS) else 0
    for verb in VERBS if each else rng.sample(VERBS, count):
        scene, killed = prepare(shop, verb), 0
        while killed < max(1, each):
            killed += kill(scene, rng, tally)
        print(f"{verb.name}: {killed} kills", file=sys.stderr)
    for _ in range(each):
        index_twice(shop, rng, tally)
