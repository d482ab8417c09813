"""Train a small causal language model from scratch on local text: how the repository's demo model was made.

    .venv/bin/python scripts/studies/train_model.py --text a.jsonl b.jsonl --out my-model

The result is an ordinary Hugging Face folder (config, safetensors in float16, tokenizer) for `knnlm --model`.
Steps are saved on the way under OUT/step-N when --save-every is given. On a CPU, most of the time goes to page
faults unless glibc keeps freed memory, so the script starts itself again with those settings.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # in earnest they are imported after the restart, where they are used
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Measured on 2 cores: 600 tokens/s without these, compile and bfloat16; 2,700 with them.
MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=17179869184:glibc.malloc.mmap_threshold=17179869184"
END = "<|endoftext|>"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="JSON Lines files with a text field")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--init-from", type=Path, help="continue from this model folder (fine-tuning), not from scratch"
    )
    parser.add_argument("--model-type", default="gpt2", choices=["gpt2", "llama", "qwen3", "gpt_neox"])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=16, help="windows of CONTEXT tokens in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--held-out", type=int, default=40, help="every N-th document is kept for validation")
    parser.add_argument("--save-every", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="slower steps, but no wait for torch.compile")
    return parser.parse_args()


def read_documents(paths: list[Path]) -> list[str]:
    lines = (line for path in paths for line in path.read_text(encoding="utf-8").split("\n"))
    return [json.loads(line)["text"] for line in lines if line.strip()]


def train_tokenizer(texts: list[str], size: int, context: int) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=context
    )


def make_model(args: argparse.Namespace, vocabulary: int) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if args.init_from:
        return AutoModelForCausalLM.from_pretrained(args.init_from, dtype="float32")
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(args.model_type, **common, **shape_of(args)))


def shape_of(args: argparse.Namespace) -> dict[str, float]:
    """The fields of a model type's configuration that say how large it is."""
    if args.model_type == "gpt2":
        shape = {"n_layer": args.blocks, "n_embd": args.width, "n_head": args.heads, "n_positions": args.context}
        return shape | {f"{part}_pdrop": args.dropout for part in ("resid", "embd", "attn")}
    shape = {"num_hidden_layers": args.blocks, "hidden_size": args.width, "num_attention_heads": args.heads}
    shape |= {"max_position_embeddings": args.context}
    if args.model_type == "gpt_neox":
        return shape | {"intermediate_size": 4 * args.width}
    shape |= {"intermediate_size": 8 * args.width // 3 // 32 * 32, "num_key_value_heads": args.heads}
    return shape | {"head_dim": args.width // args.heads}


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], end: int) -> Tensor:
    """One long row of token numbers: the documents, each closed by END."""
    import torch

    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return torch.tensor([token for row in rows for token in [*row, end]], dtype=torch.long)


def check_length(stream: Tensor, documents: int, args: argparse.Namespace) -> None:
    """A step takes --windows windows; one context more may be lost to the offset of an epoch."""
    needed = (args.windows + 1) * args.context + 1
    if len(stream) < needed:
        sys.exit(
            f"{documents} documents leave {len(stream):,} tokens to train on, but a step of {args.windows} windows of "
            f"{args.context} needs {needed:,}; give more text, or smaller --windows or --context"
        )


def batches(stream: Tensor, args: argparse.Namespace) -> Iterator[Tensor]:
    """Shuffled windows, [windows, context + 1], without end; each epoch has another offset, so that borders move."""
    import torch

    generator = torch.Generator().manual_seed(args.seed)
    while True:
        offset = int(torch.randint(args.context, (1,), generator=generator))
        starts = torch.arange(offset, len(stream) - args.context - 1, args.context)
        starts = starts[torch.randperm(len(starts), generator=generator)]
        for group in starts.split(args.windows):
            if len(group) == args.windows:
                yield torch.stack([stream[s : s + args.context + 1] for s in group])


def bfloat16_pays() -> bool:
    """Machines differ by three hundred times in bfloat16 products, so ask this one: the best of several, warmed up."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(512, 512).to(dtype)
        return min(timeit.repeat(lambda: a @ a, repeat=5, number=1))

    return seconds(torch.bfloat16) < seconds(torch.float32)


def learning_rate_share(step: int, steps: int) -> float:
    """Share of the full learning rate: a linear rise, then a half cosine down to 2 %."""
    warmup = max(steps // 50, 10)
    return min(step / warmup, 0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def make_optimizer(model: PreTrainedModel, learning_rate: float) -> torch.optim.Optimizer:
    import torch

    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def make_loss(model: PreTrainedModel, low_precision: bool) -> Callable[[Tensor], Tensor]:
    import torch
    from torch.nn.functional import cross_entropy

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            logits = model(batch[:, :-1], use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    return loss_of


def validation_perplexity(
    model: PreTrainedModel, loss_of: Callable[[Tensor], Tensor], valid: Tensor, args: argparse.Namespace
) -> float:
    import torch

    size = args.context + 1
    windows = valid[: len(valid) // size * size].view(-1, size)
    model.eval()
    with torch.no_grad():
        return torch.stack([loss_of(w) for w in windows.split(args.windows)][:8]).mean().exp().item()


def train(
    model: PreTrainedModel, stream: Tensor, valid: Tensor, args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> None:
    import torch

    optimizer, low = make_optimizer(model, args.learning_rate), bfloat16_pays()
    precision = f"bfloat16 {'on' if low else 'off'}"
    print(f"{model.num_parameters():,} parameters, {len(stream):,} tokens, {precision}", flush=True)
    loss_of = make_loss(model, low)
    step_loss = loss_of if args.no_compile else torch.compile(loss_of)
    begun, seen = time.perf_counter(), 0
    for step, batch in zip(range(1, args.steps + 1), batches(stream, args), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * learning_rate_share(step, args.steps)
        model.train()
        loss = step_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seen += batch[:, 1:].numel()
        if step % 20 == 0:
            rate = seen / (time.perf_counter() - begun)
            print(f"step {step} loss {loss.item():.3f} {rate:,.0f} tokens/s", flush=True)
        if args.save_every and step % args.save_every == 0 and step < args.steps:
            save(model, tokenizer, args.out / f"step-{step}")
        if len(valid) > args.context and (step % 250 == 0 or step == args.steps):
            perplexity = validation_perplexity(model, loss_of, valid, args)
            print(f"step {step} validation perplexity {perplexity:.2f}", flush=True)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write an ordinary model folder; float16 halves what a repository has to carry."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    args = parse_arguments()
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"GLIBC_TUNABLES": MALLOC})
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(args.seed)
    documents = read_documents(args.text)
    train_texts = [text for i, text in enumerate(documents) if i % args.held_out]
    if args.init_from:
        tokenizer = AutoTokenizer.from_pretrained(args.init_from)
    else:
        tokenizer = train_tokenizer(train_texts, args.vocabulary, args.context)
    end = tokenizer.eos_token_id
    stream, valid = encode(tokenizer, train_texts, end), encode(tokenizer, documents[:: args.held_out], end)
    check_length(stream, len(train_texts), args)
    if len(valid) <= args.context:
        print(f"no validation: {len(valid):,} tokens held out are less than one window", flush=True)
    model = make_model(args, len(tokenizer))
    train(model, stream, valid, args, tokenizer)
    save(model, tokenizer, args.out)


if __name__ == "__main__":
    main()
