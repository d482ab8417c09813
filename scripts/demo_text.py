"""What a datastore's memory changes in a text: scripts/demo_text.py STORE PROMPT.

The likeliest continuation without and with the memory, and three of the passages that made the difference: the nearest
neighbour of each of the three tokens that the memory made likelier by most bits.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

import knnlm
from knnlm.inference.explain import ExplainedToken, Explainer

TOKENS, PASSAGES = 48, 3


def continuations(model: knnlm.KNNLM, prompt: str) -> tuple[str, str]:
    """The text without and with the memory."""
    mixed, texts = model.retrieval, []
    inputs = model.tokenizer(prompt, return_tensors="pt")
    for lam in (0.0, None):
        model.retrieval = mixed if lam is None else replace(mixed, setting=replace(mixed.setting, lam=lam))
        tokens = model.generate(
            **inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=model.tokenizer.eos_token_id
        )
        texts.append(model.tokenizer.decode(tokens[0], skip_special_tokens=True))
    return texts[0], texts[1]


def told(one: ExplainedToken) -> Text:
    """A token, its probability, and the passage of its nearest neighbour."""
    nearest = next(each.source for each in one.neighbors if each.source.token == one.text)
    passage = Text(" ".join(f"…{nearest.before}".split()) + " ")
    passage.append(nearest.token.strip(), style="bold reverse")
    passage.append(" " + " ".join(f"{nearest.after}…".split()))
    chances = f"{one.lm_probability:.3f} without, {one.mixed_probability:.3f} with the memory"
    head = f"“{one.text.strip()}”, probability {chances} ({nearest.document}, {nearest.number}):"
    return Text(f"{head}\n  ").append_text(passage)


def main() -> None:
    """Show both."""
    folder, prompt = sys.argv[1:]
    torch.manual_seed(0)
    store = knnlm.open_datastore(folder)
    lm = knnlm.load_model(store.model)
    model = knnlm.KNNLM.from_store(store, lm=lm)
    plain, mixed = continuations(model, prompt)
    console = Console(width=None if sys.stderr.isatty() else 120)
    table = Table("without memory", "with memory", show_lines=True)
    table.add_row(*(Text(text) for text in (plain, mixed)))
    console.print(table)
    tokens = Explainer(lm, model.retrieval).explain(mixed).tokens[len(lm.encode(prompt)) - 1 :]
    named = [one for one in tokens if one.change and any(each.source.token == one.text for each in one.neighbors)]
    console.print("Three of the passages behind it:")
    for one in sorted(named, key=lambda one: -(one.change or 0))[:PASSAGES]:
        console.print(Padding(told(one), (0, 0, 0, 2)))


if __name__ == "__main__":
    main()
