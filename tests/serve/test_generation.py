"""Generation: a cache, prompts padded on the left, and beams that keep their row's task."""

import peft
import pytest
import torch
import transformers

import loraspan
from adapters import models
from loraspan.adapters import peft as files

PROMPTS = [[3, 1, 4, 1, 5, 9], [2, 7, 1], [8, 2, 8, 1, 8]]
NAMES = ["one", None, "two"]
LONG = 7


def build(name):
    model = models.build(name)
    # logits of a random head are close to each other
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    model.generation_config.eos_token_id = None
    return model


def generate(model, prompts, **options):
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = model.generate(
        input_ids=tokens, attention_mask=mask, max_new_tokens=LONG, do_sample=False, pad_token_id=0, **options
    )
    return out[:, longest:].reshape(len(prompts), -1, LONG).tolist()


CASES = {
    "cache": ("llama", {}),
    "beams": ("llama", {"num_beams": 3, "num_return_sequences": 2}),
    "gpt2": ("gpt2", {"num_beams": 2}),
    "no cache": ("llama", {"use_cache": False}),
}
LLAMA = {"target_modules": ["v_proj", "q_proj"], "lora_alpha": 16}
# its embeddings are its head, and what a task adds to them has to count
GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_alpha": 4000}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_a_mixed_batch_says_what_each_row_says_alone_with_peft(tmp_path, name, options):
    config = GPT2 if name == "gpt2" else LLAMA
    tasks = [task for task in NAMES if task]
    for seed, task in enumerate(tasks):
        models.save_adapter(name, tmp_path / task, seed=seed, r=4, **config)
    space = loraspan.compress([files.read(tmp_path / task, name=task) for task in tasks], rank=6)
    served = loraspan.attach(build(name), space)
    with served.tasks(NAMES):
        mixed = generate(served, PROMPTS, **options)
    alone = []
    for prompt, task in zip(PROMPTS, NAMES, strict=True):
        model = build(name)
        if task:
            files.write(space.reconstruct(task), tmp_path / "back" / task)
            with models.quiet():
                model = peft.PeftModel.from_pretrained(model, tmp_path / "back" / task)
        alone += generate(model, [prompt], **options)
    assert mixed == alone
    base = generate(build(name), PROMPTS, **options)
    assert [a == b for a, b in zip(mixed, base, strict=True)] == [False, True, False]


def bart():
    sizes = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in
             {"ffn_dim": 40, "layers": 2, "attention_heads": 4}.items()}  # fmt: skip
    config = transformers.BartConfig(vocab_size=48, d_model=32, max_position_embeddings=64, **sizes)
    return transformers.BartForConditionalGeneration(config)


def test_beams_of_an_encoder_and_a_decoder_keep_their_rows_task(tmp_path, monkeypatch):
    """The encoder runs before there are beams."""
    monkeypatch.setitem(models.BUILD, "bart", bart)
    for seed, task in enumerate(("one", "two")):
        models.save_adapter(
            "bart", tmp_path / task, seed=seed, r=4, lora_alpha=400, target_modules=["q_proj", "v_proj"]
        )
    space = loraspan.compress([files.read(tmp_path / task, name=task) for task in ("one", "two")], rank=6)
    options = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": LONG, "early_stopping": True}

    def said(model):
        model.generation_config.forced_eos_token_id = None
        tokens = torch.tensor([[0] * (6 - len(prompt)) + prompt for prompt in PROMPTS])
        out = model.generate(
            input_ids=tokens, attention_mask=(tokens > 0).long(), max_new_tokens=LONG, do_sample=False, **options
        )
        return out.reshape(len(PROMPTS), 2, -1).tolist()

    base, alone = said(build("bart")), []
    for row, task in enumerate(NAMES):
        model = build("bart")
        if task:
            files.write(space.reconstruct(task), tmp_path / "back" / task)
            with models.quiet():
                model = peft.PeftModel.from_pretrained(model, tmp_path / "back" / task)
        alone.append(said(model)[row])
    served = loraspan.attach(build("bart"), space)
    with served.tasks(NAMES):
        mixed = said(served)
    assert mixed == alone
    assert [a == b for a, b in zip(mixed, base, strict=True)] == [False, True, False]
