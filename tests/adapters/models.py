"""Small real models and adapters of PEFT's own, for the tests of this folder."""

import contextlib
import warnings

import peft
import torch
import transformers
from torch import nn

SIZES = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


class Pixels(nn.Module):
    """An embedding, two convolutions and a linear layer, outside transformers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(48, 6)
        self.first = nn.Conv2d(6, 10, (3, 2), padding=1)
        self.second = nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(5, 7)

    def forward(self, input_ids):
        grid = self.table(input_ids).permute(0, 2, 1).unflatten(2, (2, 4))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(grid)))).mean((2, 3)))


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **HEADS))


def _bert():
    config = transformers.BertConfig(**SIZES, num_attention_heads=4, max_position_embeddings=32, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def _gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4))


def _mixtral():
    config = transformers.MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2)
    return transformers.MixtralForCausalLM(config)


BUILD = {"llama": _llama, "bert": _bert, "gpt2": _gpt2, "mixtral": _mixtral, "pixels": Pixels}


def build(name):
    """Build a model with the same weights every time."""
    torch.manual_seed(20261122)
    return BUILD[name]().eval()


def outputs(model):
    """Run a model on the same tokens every time; ``[rows, values]`` in float64."""
    with torch.no_grad():
        out = model(input_ids=TOKENS)
    return (out if isinstance(out, torch.Tensor) else out.logits).double().flatten(1)


@contextlib.contextmanager
def quiet():
    """Silence PEFT's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_adapter(name, folder, dtype=torch.float32, seed=5, **config):
    """Make an adapter with PEFT, set everything that it trains at random, save it; give the outputs with it."""
    with quiet():
        model = peft.get_peft_model(build(name), peft.LoraConfig(**config))
        rng = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                # PEFT starts lora_B at zero; a magnitude stays near the norm that it starts as
                noise = torch.randn(parameter.shape, generator=rng)
                value = parameter * (1 + 0.1 * noise) if "magnitude" in key else 0.15 * noise
                parameter.data = value.to(dtype).to(parameter.dtype)
        model.eval()
        before = outputs(model)
        if dtype != torch.float32:
            for key, parameter in model.named_parameters():
                if ".lora_" in key:
                    parameter.data = parameter.data.to(dtype)
        model.save_pretrained(folder)
    return before


def load_outputs(name, folder):
    """Load a folder with PEFT on a fresh model; give the outputs with it."""
    with quiet():
        return outputs(peft.PeftModel.from_pretrained(build(name), folder).eval())
