"""What models call: gradients, torch's own checks of operators, graphs without breaks that a change of task keeps."""

import dataclasses

import pytest
import torch

import oracles
from loraspan.errors import ArgumentError
from loraspan.ops import Cores, reconstruct, shared_lora, shared_lora_
from matrices import normal
from oracles import F32, F64
from task_cores import batch, columns, planted, random_tasks

COUNTS = [(2, 1, 0, 1), (3, 0, 1, 1), (0, 0, 0, 0), (1, 1, 1, 1)]
SCALE = 0.3
TABLES = ("weights", "left", "left_private", "right", "right_private")


@pytest.fixture(params=["cpu", "reference"])
def name(request):
    return request.param


def problem(dtype=F64, rows=9, mixture=2, seed=1):
    """Everything that may have a gradient, and a function of it."""
    cores = planted(seed, COUNTS, 6, 7, 3, 2, dtype=dtype, dense=[1])
    y, x, v, u = batch(seed + 1, rows, 6, 7, 3, 2, dtype)
    tasks, shares = random_tasks(seed + 2, rows, mixture, 4), normal(seed + 3, rows, mixture, dtype=F32)
    leaves = [t.clone().requires_grad_() for t in (y, x, *(getattr(cores, table) for table in TABLES))]

    def function(y, x, *tables, backend=None):
        trained = dataclasses.replace(cores, **dict(zip(TABLES, tables, strict=True)))
        return shared_lora(y, x, v, u, trained, tasks, shares=shares, scale=SCALE, backend=backend)

    return function, leaves, (v, u, cores, tasks, shares)


@pytest.mark.parametrize("mixture", [1, 3])
def test_gradients_are_those_of_finite_differences(name, mixture):
    function, leaves, _ = problem(mixture=mixture)
    assert torch.autograd.gradcheck(lambda *args: function(*args, backend=name), leaves)


def test_gradients_of_shares_are_what_each_task_gives_its_row():
    _, _, (v, u, cores, tasks, shares) = problem()
    y, x, grad = normal(10, 9, 6), normal(11, 9, 7), normal(12, 9, 6)
    shares = shares.requires_grad_()
    shared_lora(y, x, v, u, cores, tasks, shares=shares, scale=SCALE).backward(grad)
    for row in range(9):
        for place, task in enumerate(tasks[row].tolist()):
            wanted = 0.0
            if task >= 0:
                weights, left, right = columns(cores, v, u, task)
                wanted = SCALE * float((weights * (left @ grad[row].numpy()) * (right @ x[row].numpy())).sum())
            assert float(shares.grad[row, place]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_many_rows_of_a_task_have_the_gradients_of_few():
    """Where the kernels rebuild a task's own factors, forward and back."""
    cores = planted(13, [(4, 1, 1, 1)], 300, 400, 40, 48, dtype=F64)
    y, x, v, u = batch(14, 200, 300, 400, 40, 48, F64)
    grad, tasks = normal(15, 200, 300), torch.zeros(200, dtype=torch.int64)
    found = []
    for step in (200, 1):
        leaf = x.clone().requires_grad_()
        for at in torch.arange(200).split(step):
            shared_lora(y[at], leaf[at], v, u, cores, tasks[at], scale=SCALE).backward(grad[at])
        found.append(leaf.grad)
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


def test_only_what_is_asked_for_has_a_gradient():
    function, leaves, _ = problem()
    for chosen in range(len(leaves)):
        for i, leaf in enumerate(leaves):
            leaf.grad = None
            leaf.requires_grad_(i == chosen)
        function(*leaves).square().sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == chosen for i in range(len(leaves))]


def test_rows_have_the_same_gradient_whether_columns_train_or_not(name):
    function, leaves, _ = problem()
    grad, found = normal(16, 9, 6), []
    for trains in (True, False):
        for leaf in leaves:
            leaf.grad = None
            leaf.requires_grad_(trains or leaf is leaves[0] or leaf is leaves[1])
        function(*leaves, backend=name).backward(grad)
        found.append((leaves[0].grad, leaves[1].grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("trains", [True, False])
def test_transforms_of_functions_are_refused(trains):
    """Torch says what it needs for them; nothing of ours passes it by."""
    _, (y, x, weights, *_), (v, u, cores, tasks, _) = problem()
    cores = dataclasses.replace(cores, weights=weights if trains else weights.detach())
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.vjp(lambda row: shared_lora(y, row, v, u, cores, tasks), x.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_gradients_have_the_dtype_of_what_they_are_of(dtype):
    function, leaves, _ = problem(dtype)
    function(*leaves).float().sum().backward()
    for leaf in leaves:
        assert leaf.grad.dtype == leaf.dtype
        assert torch.isfinite(leaf.grad).all()


def test_training_finds_planted_loadings():
    """Gradient steps on the loadings alone, bases frozen, get back the task that made the data."""
    cores = planted(20, [(2, 0, 0, 0)], 30, 40, 5, 6, dtype=F64)
    y, x, v, u = batch(21, 60, 30, 40, 5, 6, F64)
    tasks = torch.zeros(60, dtype=torch.int64)
    wanted = shared_lora(y, x, v, u, cores, tasks)
    left = torch.zeros_like(cores.left).requires_grad_()
    right = normal(22, 2, 6).requires_grad_()
    optimiser = torch.optim.Adam([left, right], lr=0.05)
    losses = []
    for _ in range(400):
        trained = dataclasses.replace(cores, left=left, right=right)
        loss = (shared_lora(y, x, v, u, trained, tasks) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-4 * losses[0]


def test_the_form_in_place_refuses_gradients():
    _, leaves, (v, u, cores, tasks, _) = problem()
    y, x = (leaf.detach().clone() for leaf in leaves[:2])
    with pytest.raises(ArgumentError, match="has no gradient; use shared_lora"):
        shared_lora_(y, x.requires_grad_(), v, u, cores, tasks)
    with torch.no_grad():
        assert shared_lora_(y, x, v, u, cores, tasks) is y
    with pytest.raises(ArgumentError, match="the bases v and u are frozen"):
        shared_lora(y, x, v.requires_grad_(), u, cores, tasks)


def test_who_kept_y_for_a_gradient_is_told_that_it_changed():
    cores, (y, x, v, u) = planted(23, COUNTS, 6, 7, 3, 2), batch(24, 4, 6, 7, 3, 2)
    weight = torch.ones(4, 6, requires_grad=True)
    product = weight * y
    shared_lora_(y, x, v, u, cores, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def operands(function_of_grad):
    _, leaves, (v, u, cores, tasks, shares) = problem()
    y, x, *tables = leaves if function_of_grad else [leaf.detach() for leaf in leaves]
    return (y, x, v, u, cores.index, *tables, list(cores.most), tasks, shares, SCALE, None)


def test_torch_finds_the_operators_well_made():
    torch.library.opcheck(torch.ops.loraspan.shared_lora.default, operands(True))
    torch.library.opcheck(torch.ops.loraspan.shared_lora_.default, operands(False))
    y, x, *rest = operands(False)
    torch.library.opcheck(torch.ops.loraspan.shared_lora_transposed.default, (y, F64, *rest))
    torch.library.opcheck(torch.ops.loraspan.shared_lora_columns.default, (y, x, *rest[:-1]))
    basis, loadings = normal(30, 2, 5, 3).requires_grad_(), normal(31, 2, 3, 4).requires_grad_()
    torch.library.opcheck(torch.ops.loraspan.reconstruct.default, (basis, loadings, SCALE, None, None))


def test_reconstruct_has_gradients(name):
    leaves = normal(32, 2, 5, 3).requires_grad_(), normal(33, 2, 3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda b, l: reconstruct(b, l, scale=SCALE, backend=name), leaves)
    half = [leaf.detach().to(torch.bfloat16).requires_grad_() for leaf in leaves]
    reconstruct(*half, dtype=F32).sum().backward()
    assert [leaf.grad.dtype for leaf in half] == [torch.bfloat16] * 2


class Layer(torch.nn.Module):
    """A linear layer with the tasks of a collection beside it."""

    def __init__(self, v, u, cores):
        super().__init__()
        self.base = torch.nn.Linear(v.shape[0], u.shape[0])
        self.v, self.u, self.cores = v, u, cores

    def forward(self, x, tasks):
        return shared_lora(self.base(x), x, self.v, self.u, self.cores, tasks, scale=SCALE)


def compiled_layer(backend):
    torch._dynamo.reset()
    cores = planted(40, [(2, 0, 0, 0)] * 6, 12, 10, 4, 4)
    _, _, v, u = batch(41, 1, 12, 10, 4, 4)
    layer = Layer(v, u, cores)
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs)

    return layer, torch.compile(layer, fullgraph=True, backend=counted), graphs


def test_a_change_of_tasks_does_not_compile_again():
    """Other tasks, other companies of tasks, and tasks written into the room that the tables have left."""
    layer, fast, graphs = compiled_layer(lambda graph, _: graph.forward)
    x = normal(42, 8, 10, dtype=F32)
    for tasks in ([0] * 8, [0, 1, 2, 3, 4, 5, -1, 0], [-1] * 8, [5, 5, 5, 5, 0, 0, 0, 0]):
        ids = torch.tensor(tasks)
        torch.testing.assert_close(fast(x, ids), layer(x, ids))
    before = fast(x, torch.full((8,), 3))
    # task 3 becomes another: a graph that kept the old one would show it
    rows = slice(int(layer.cores.index[3, 1]), int(layer.cores.index[3, 1]) + 2)
    layer.cores.left[rows] *= -2
    after = fast(x, torch.full((8,), 3))
    base = layer.base(x)
    torch.testing.assert_close(after - base, -2 * (before - base))
    assert len(graphs) == 1


def test_inductor_compiles_the_layer_forward_and_back():
    from torch._inductor.compile_fx import compile_fx

    layer, fast, _ = compiled_layer(compile_fx)
    x, tasks = normal(43, 8, 10, dtype=F32), torch.tensor([0, 1, 2, 3, 4, 5, -1, 0])
    slow_x, fast_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(slow_x, tasks).square().sum().backward()
    fast(fast_x, tasks).square().sum().backward()
    torch.testing.assert_close(fast_x.grad, slow_x.grad)
    with torch.no_grad():
        torch.testing.assert_close(fast(x, tasks), layer(x, tasks))


def test_the_form_in_place_compiles():
    torch._dynamo.reset()
    cores, (y, x, v, u) = planted(44, COUNTS, 12, 10, 4, 4), batch(45, 5, 12, 10, 4, 4)
    tasks = torch.tensor([0, 1, -1, 3, 0])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(y, x, tasks):
        return shared_lora_(y * 2, x, v, u, cores, tasks)

    wanted = shared_lora(y * 2, x, v, u, cores, tasks)
    assert oracles.same_bits(step(y, x, tasks), wanted)


def test_reconstruct_compiles():
    torch._dynamo.reset()
    basis, loadings = normal(46, 9, 3, dtype=F32), normal(47, 3, 4, dtype=F32)
    fast = torch.compile(lambda b, l: reconstruct(b, l, scale=SCALE) + 1, fullgraph=True, backend="aot_eager")
    assert oracles.same_bits(fast(basis, loadings), reconstruct(basis, loadings, scale=SCALE) + 1)


def test_cores_are_built_from_what_they_hold():
    cores = planted(48, COUNTS, 6, 7, 3, 2)
    assert isinstance(cores, Cores)
    assert cores.most == (3, 1, 1, 1)
