"""Classify texts of three tasks in one batch: each row goes through its own task's adapter and its own head.

    python examples/classify_mixed_tasks.py

A tiny BERT, built from a configuration, learns three adapters with PEFT, each with a classifier of its own
(``modules_to_save``): is a review good or bad, is it a question, is it urgent. They become one space, and one attached
model answers all of them at once. Needs transformers and peft, no network, and a few seconds.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import loraspan

SUBJECTS = ["the film", "this phone", "your support", "the food"]
GOOD, BAD = ["great", "lovely", "fast"], ["awful", "slow", "broken"]
WORDS = ["[pad]", "[cls]", *" ".join(SUBJECTS).split(), *GOOD, *BAD, "is", "now", "please", "?", "."]
NUMBER = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
# what a text says of each task, and the names of the two labels
TASKS: dict[str, tuple[Callable[[Sequence[str]], bool], tuple[str, str]]] = {
    "sentiment": (lambda words: any(word in GOOD for word in words), ("bad", "good")),
    "question": (lambda words: words[-1] == "?", ("statement", "question")),
    "urgency": (lambda words: "now" in words, ("can wait", "urgent")),
}


def text(rng: random.Random) -> list[str]:
    """Draw a sentence."""
    subject, opinion = rng.choice(SUBJECTS).split(), rng.choice(GOOD + BAD)
    asked = rng.random() < 0.5
    words = ["is", *subject, opinion] if asked else [*subject, "is", opinion]
    return [*words, *rng.choice([[], ["please"], ["now"], ["please", "now"]]), "?" if asked else "."]


def encode(texts: Sequence[Sequence[str]]) -> dict[str, Tensor]:
    """Give them as a batch, padded on the right."""
    longest = 1 + max(map(len, texts))
    rows = [["[cls]", *words, *["[pad]"] * (longest - 1 - len(words))] for words in texts]
    ids = torch.tensor([[NUMBER[word] for word in row] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != NUMBER["[pad]"]).long()}


def base_model() -> BertForSequenceClassification:
    """Build it, the same every time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(NUMBER), max_position_embeddings=16, num_labels=2, **shape)
    return BertForSequenceClassification(config).eval()


def train(label: Callable[[Sequence[str]], bool], folder: Path, steps: int = 60) -> None:
    """Train an adapter and its head, and save both as PEFT does."""
    torch.manual_seed(1)
    rng = random.Random(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    model = get_peft_model(base_model(), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(steps):
        texts = [text(rng) for _ in range(32)]
        loss = model(**encode(texts), labels=torch.tensor([int(label(words)) for words in texts])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        for name, (label, _) in TASKS.items():
            train(label, Path(made, name))
        space = loraspan.compress([Path(made, name) for name in TASKS], max_error=0.02)
    print(space.summary, end="\n\n")

    served = loraspan.attach(base_model(), space)
    rng = random.Random(2)
    texts = [text(rng) for _ in range(4)]

    # every text for every task: twelve rows, and each row's task chooses its adapter and its head
    rows = [(words, name) for words in texts for name in TASKS]
    with torch.no_grad(), served.tasks([name for _, name in rows]):
        logits = served(**encode([words for words, _ in rows])).logits
    for (words, name), answer in zip(rows, logits.argmax(-1).tolist(), strict=True):
        print(f"{' '.join(words):<36}{name:<12}{TASKS[name][1][answer]}")

    # how often each is right over many texts, the batch still mixed
    many = [(text(rng), name) for name in TASKS for _ in range(100)]
    with torch.no_grad():
        found = served(**encode([words for words, _ in many]), task_ids=space.ids([name for _, name in many]))
    right: dict[str, list[bool]] = {name: [] for name in TASKS}
    for (words, name), answer in zip(many, found.logits.argmax(-1).tolist(), strict=True):
        right[name].append(bool(answer) == TASKS[name][0](words))
    print("\n" + ", ".join(f"{name} {sum(told)} of {len(told)}" for name, told in right.items()) + " right")


if __name__ == "__main__":
    main()
