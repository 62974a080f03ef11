"""Generate with one model and three tasks in one batch: a row goes on as its own task says.

    python examples/generate_mixed_tasks.py

A tiny Llama, built from a configuration and never trained, learns three LoRA adapters that count up, count down, and
double, modulo ten. They become one space; attached, it serves any of them to any row. Needs transformers and peft, no
network, and a few seconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import loraspan

DIGITS, PAD = 10, 10
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "up": lambda digit: (digit + 1) % DIGITS,
    "down": lambda digit: (digit - 1) % DIGITS,
    "double": lambda digit: digit * 2 % DIGITS,
}
BATCH = [([3, 4], "up"), ([9, 8, 7], "down"), ([1], "double"), ([5], None)]


def base_model() -> LlamaForCausalLM:
    """Build it, the same every time."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=DIGITS + 1, pad_token_id=PAD, bos_token_id=None, eos_token_id=None, **shape)
    return LlamaForCausalLM(config).eval()


def train(rule: Callable[[Tensor], Tensor], folder: Path, steps: int = 60) -> None:
    """Train an adapter on sequences that follow the rule, and save it as PEFT does."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
    model = get_peft_model(base_model(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(steps):
        digits = [torch.randint(DIGITS, (32,))]
        for _ in range(5):
            digits.append(rule(digits[-1]))
        tokens = torch.stack(digits, dim=1)
        loss = cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Give prompts of any lengths as a batch, padded on the left."""
    longest = max(map(len, prompts))
    rows = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    return {"input_ids": rows, "attention_mask": (rows != PAD).long()}


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        for name, rule in TASKS.items():
            train(rule, Path(made, name))
        space = loraspan.compress([Path(made, name) for name in TASKS], max_error=0.02)
    print(space.summary, end="\n\n")

    served = loraspan.attach(base_model(), space)
    prompts, tasks = [list(column) for column in zip(*BATCH, strict=True)]
    batch = padded(prompts)

    # one call, a task to each row; None is the base model. Beams stay with their row's task
    with served.tasks(tasks):
        together = served.generate(**batch, max_new_tokens=5, do_sample=False)
        beams = served.generate(**batch, max_new_tokens=5, do_sample=False, num_beams=2)
    start = batch["input_ids"].shape[1]
    for prompt, task, row, beam in zip(prompts, tasks, together, beams, strict=True):
        with served.tasks(task):
            alone = served.generate(**padded([prompt]), max_new_tokens=5, do_sample=False)[0, len(prompt) :]
        print(f"{task or 'base model':<12}{prompt!s:<12}-> {row[start:].tolist()}", end="")
        print(f"   alone: {alone.tolist()}   two beams: {beam[start:].tolist()}")

    # the tensor form, for compiled graphs and servers: the tasks are an argument like the tokens
    logits = served(**batch, task_ids=space.ids(tasks)).logits[:, -1, :DIGITS]
    print("\nnext digits by task_ids:", logits.argmax(-1).tolist())
    # a mixture, row by row: the adapters' outputs are added in these shares
    with served.tasks([{"up": 1.0 - part, "down": part} for part in (0.0, 0.25, 0.75, 1.0)]):
        mixed = served(input_ids=torch.tensor([[5]] * 4)).logits[:, -1, :DIGITS].argmax(-1)
    print("after 5, from all up to all down:", mixed.tolist())


if __name__ == "__main__":
    main()
