"""A served embedding adds, for each token, what the token's task has at it: against float64, and against PEFT."""

import types

import numpy as np
import pytest
import torch
from torch import nn

import loraspan
import oracles
import task_cores
from adapters import models
from loraspan.errors import ArgumentError, UnsupportedError
from loraspan.ops.cores import Cores
from loraspan.ops.packed import unpack
from loraspan.serve.embedding import ServedEmbedding
from loraspan.serve.rows import Rows
from loraspan.serve.tables import Triple
from matrices import normal, packed
from oracles import BF16, F32, F64
from serve.samples import space_of

VOCABULARY, N, K_OUT, K_IN = 70, 11, 5, 6
# tasks of every form, of all forms at once, and of none
COUNTS = [(3, 0, 0, 0), (0, 2, 0, 0), (0, 0, 4, 0), (0, 0, 0, 2), (2, 1, 3, 2), (0, 0, 0, 0), (0, 2, 1, 1)]
U32 = oracles.UNIT_ROUNDOFF[F32]


def tables_of(dtype=F32, bits=0):
    """Tables, and what they are in full."""
    cores = task_cores.planted(3, COUNTS, N, VOCABULARY, K_OUT, K_IN, dtype=dtype, dense=[6])
    v, u = normal(1, VOCABULARY, K_IN, dtype=dtype), normal(2, N, K_OUT, dtype=dtype)
    if not bits:
        return Triple(v, u, cores), Triple(v, u, cores)
    ends = [packed(end, bits) for end in (cores.left, cores.left_private, cores.right, cores.right_private)]
    counts, dense = cores.index[:, 5:9], cores.index[:, 9] > 0
    v, u = packed(v.T, bits), packed(u.T, bits)
    small = Cores.of(counts, cores.weights, *ends, dense=dense)
    full = Cores.of(counts, cores.weights, *(unpack(end) for end in ends), dense=dense)
    return Triple(v, u, small), Triple(unpack(v).T, unpack(u).T, full)


def layer_of(now, dtype=F32, **options):
    base = nn.Embedding(VOCABULARY, N, dtype=dtype, **options).requires_grad_(False)
    base.weight.copy_(normal(7, VOCABULARY, N, dtype=dtype))
    layer = ServedEmbedding(base, "table", types.SimpleNamespace(now=now))
    return base, layer


def run(layer, tokens, rows):
    mark = layer.board.context.set(rows)
    try:
        return layer(tokens)
    finally:
        layer.board.context.reset(mark)


def expected(y, tokens, full, ids, shares):
    """What ought to come, and how far off it may be: the docstring's bound; rows without a task have none."""
    v, u, cores = full
    absolute = task_cores.absolute(cores)
    out, size, steps = oracles.to_numpy(y), np.abs(oracles.to_numpy(y)), np.full((*y.shape[:-1], 1), K_IN + K_OUT + 4)
    for at in np.ndindex(*tokens.shape):
        for task, share in zip(ids[at], shares[at], strict=True):
            if task >= 0:
                token = int(tokens[at])
                out[at] += share * task_cores.delta(cores, v, u, task)[:, token]
                size[at] += abs(share) * task_cores.delta(absolute, v.abs(), u.abs(), task)[:, token]
                steps[at] += sum(COUNTS[task]) + K_IN * (task == 6)
    wide = F64 if y.dtype == F64 else F32
    before = oracles.gamma(steps, oracles.UNIT_ROUNDOFF[wide]) + oracles.gamma(steps, oracles.UNIT_ROUNDOFF[F64])
    bound = oracles.rounding_bound(out, before * size + oracles.TINY, y.dtype)
    return out, np.where((ids >= 0).any(-1)[..., None], bound, 0.0)


@pytest.mark.parametrize(("dtype", "bits"), [(F32, 0), (BF16, 0), (F64, 0), (F32, 16), (F32, 8), (F32, 4)], ids=str)
@pytest.mark.parametrize("per", ["row", "token"])
@pytest.mark.parametrize("mixture", [0, 3])
def test_is_the_dense_product(dtype, bits, per, mixture, monkeypatch):
    # several chunks, the last a short one
    monkeypatch.setattr("loraspan.serve.embedding._GATHERED", 900)
    now, full = tables_of(dtype, bits)
    base, layer = layer_of(now, dtype)
    rows, length = 9, 7
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(5))
    shape = (rows,) if per == "row" else (rows, length)
    ids = task_cores.random_tasks(6, rows * length, max(1, mixture), len(COUNTS))[: np.prod(shape)].reshape(*shape, -1)
    shares = normal(8, *ids.shape, dtype=F32) if mixture else None
    told = Rows(ids, shares, per) if mixture else Rows(ids[..., 0], None, per)

    actual = run(layer, tokens, told)

    each = ids.numpy() if per == "token" else np.repeat(ids.numpy()[:, None], length, axis=1)
    weights = np.ones(each.shape) if shares is None else oracles.to_numpy(shares)
    weights = weights if shares is None or per == "token" else np.repeat(weights[:, None], length, axis=1)
    out, bound = expected(base(tokens), tokens, full, each, weights)
    assert actual.dtype == dtype
    oracles.assert_within(actual, out, bound)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_default_device_is_not_asked(bits):
    now, _ = tables_of(bits=bits)
    _, layer = layer_of(now)
    tokens, rows = torch.tensor([[3, 9], [9, 69]]), Rows(torch.tensor([4, 6]))
    expected = run(layer, tokens, rows)
    with torch.device("meta"):
        assert oracles.same_bits(run(layer, tokens, rows), expected)


def test_rows_of_no_task_and_no_rows_are_the_modules():
    now, _ = tables_of()
    base, layer = layer_of(now, padding_idx=0)
    tokens = torch.tensor([[0, 3], [5, 69]])
    assert oracles.same_bits(layer(tokens), base(tokens))
    assert oracles.same_bits(run(layer, tokens, Rows(torch.tensor([4, -1])))[1], base(tokens)[1])
    # a padding token is like others
    assert not torch.equal(run(layer, tokens, Rows(torch.tensor([4])))[0, 0], base(tokens)[0, 0])
    assert run(layer, tokens[:, :0], Rows(torch.tensor([4, -1]))).shape == (2, 0, N)


@pytest.mark.parametrize("wrong", [-2, 7, 10**12])
def test_a_number_of_no_task_is_refused(wrong):
    now, _ = tables_of()
    _, layer = layer_of(now)
    with pytest.raises(ArgumentError, match="table: a task of the batch has left the space"):
        run(layer, torch.tensor([[1, 2], [3, 4]]), Rows(torch.tensor([0, wrong])))


@pytest.mark.parametrize(("column", "value"), [(0, 1 << 59), (4, -1), (8, 3)])
def test_columns_outside_the_tables_are_refused(column, value):
    """Such is the row of a task that has left."""
    now, _ = tables_of()
    _, layer = layer_of(now)
    now.cores.index[4, column] = value
    tokens = torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ArgumentError, match="has left the space"):
        run(layer, tokens, Rows(torch.tensor([0, 4])))
    run(layer, tokens, Rows(torch.tensor([0, 1])))


def test_gradients_are_those_of_the_dense_product():
    now, _ = tables_of(F64)
    _, layer = layer_of(now, F64)
    leaves = [now.cores.weights, now.cores.left, now.cores.right, now.cores.left_private, now.cores.right_private]
    tokens, told = torch.tensor([[3, 9], [9, 69], [1, 1]]), Rows(torch.tensor([4, -1, 6]))
    for leaf in leaves:
        leaf.requires_grad_()
    weights = normal(9, 3, 2, N)

    found = torch.autograd.grad((run(layer, tokens, told) * weights).sum(), leaves)

    def loss():
        deltas = [task_cores.delta(now.cores, now.v, now.u, task)[:, tokens[row]].T for row, task in ((0, 4), (2, 6))]
        return sum((weights[row].numpy() * delta).sum() for row, delta in zip((0, 2), deltas, strict=True))

    for leaf, gradient in zip(leaves, found, strict=True):
        at = int(gradient.abs().argmax())
        assert gradient.flatten()[at] != 0
        values = leaf.detach().view(-1)
        before, step = loss(), 0.5
        values[at] += step
        # the output is linear in each of the five
        assert abs((loss() - before) / step - gradient.flatten()[at].item()) < 1e-10 * gradient.abs().max()
        values[at] -= step


def test_compiles_whole_and_once():
    now, _ = tables_of()
    _, layer = layer_of(now)
    seen = []

    def backend(graph, _):
        seen.append(graph)
        return graph.forward

    def call(tokens, ids):
        layer.board.traced = Rows(ids)
        try:
            return layer(tokens)
        finally:
            layer.board.traced = None

    compiled = torch.compile(call, fullgraph=True, backend=backend, dynamic=False)
    tokens = torch.tensor([[3, 9], [9, 69], [1, 1]])
    for ids in ([0, 1, 2], [4, -1, 6], [6, 5, 3]):
        ids = torch.tensor(ids)
        assert torch.allclose(compiled(tokens, ids), run(layer, tokens, Rows(ids)), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    # where an error cannot be raised, what is gone is no number at all
    out = compiled(tokens, torch.tensor([0, 7, -1]))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
    # nor is a task that has left, whose row points nowhere
    now.cores.index[4, :5] = 1 << 59
    out = compiled(tokens, torch.tensor([0, 4, -1]))
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()


CONFIG = {"r": 4, "lora_alpha": 7, "target_modules": ["embed_tokens", "v_proj"]}


def gemma():
    import transformers

    sizes = {**models.SIZES, **models.HEADS, "head_dim": 8}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_model_is_that_of_peft(name, tmp_path, monkeypatch):
    """Gemma's embedding scales what it looks up, and its head is tied to it."""
    monkeypatch.setitem(models.BUILD, "gemma", gemma)
    space = space_of(name, tmp_path, {"sql": CONFIG, "legal": {**CONFIG, "r": 2}})
    model = models.build(name)
    base = models.outputs(model)
    served = loraspan.attach(model, space)
    with served.tasks(["sql", "legal"]):
        mixed = models.outputs(served)
    with served.tasks([None, "sql"]):
        half = models.outputs(served)
    for row, task in enumerate(("sql", "legal")):
        space.export(task, tmp_path / "out" / task)
        theirs = models.load_outputs(name, tmp_path / "out" / task)
        assert (theirs - base).norm() > 0.1 * base.norm()
        # two float32 runs of a model of about a hundred sums, as in the tests of exported adapters
        assert (mixed[row] - theirs[row]).norm() <= 100 * U32 * theirs[row].norm()
    assert oracles.same_bits(half[0], base[0])
    assert served.detach() is model
    assert oracles.same_bits(models.outputs(model), base)


def test_a_number_may_scale(tmp_path):
    """As in Bart, whose factor is no tensor: against PEFT's own layer."""
    from transformers.models.bart.modeling_bart import BartScaledWordEmbedding

    class Scaled(nn.Sequential):
        def __init__(self):
            super().__init__()
            self.table = BartScaledWordEmbedding(VOCABULARY, N, None, embed_scale=2.5)

        def forward(self, tokens):
            return self.table(tokens)

    import peft

    model = Scaled()
    with models.quiet():
        theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["table"]))
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.data = normal(len(parameter), *parameter.shape, dtype=F32)
        theirs.save_pretrained(tmp_path / "sql")
    tokens = torch.randint(0, VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(1))
    expected = theirs.eval()(tokens).detach()
    space = loraspan.compress(tmp_path / "sql", max_error=1e-6, dtype=F32)
    served = loraspan.attach(theirs.unload(), space)
    with served.tasks("sql"):
        actual = served(tokens).detach()
    slot = space.reconstruct("sql").slots["table"]
    added = 2.5 * slot.up.double() @ slot.down.double()
    # the error that was asked for, and for both a few sums of 4 products of what is looked up
    bound = 2e-6 * added.norm() + 40 * U32 * (expected.abs().max() + added.abs().max())
    assert (actual - expected).abs().max() <= bound < 0.01 * added.abs().max()


class Positions(nn.Embedding):
    def forward(self, tokens):
        return super().forward(tokens + 2)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Embedding(VOCABULARY, N, max_norm=1.0), "max_norm 1.0"),
        (Positions(VOCABULARY, N), "is a Positions, an embedding with a forward of its own"),
        (nn.EmbeddingBag(VOCABULARY, N), "it is a EmbeddingBag"),
    ],
)
def test_other_embeddings_are_refused_by_name(base, message):
    with pytest.raises(UnsupportedError, match=message) as refused:
        ServedEmbedding(base, "model.table", types.SimpleNamespace())
    assert "model.table" in str(refused.value)
