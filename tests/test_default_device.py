"""A default device that somebody else has set changes nothing: the same bits, on the CPU where the inputs are.

``meta`` stands for a GPU: what is made there has no memory, and nothing can be read from it.
"""

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import planted
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

import loraspan
import serving
from loraspan import linalg, ops, store
from loraspan.adapters import peft, read_all
from loraspan.cli import main
from loraspan.linalg import IncrementalSVD
from loraspan.ops.gram import gram_blocks
from loraspan.ops.joint_gram import joint_gram
from loraspan.ops.product import product
from loraspan.ops.whiten import whiten_
from matrices import normal
from oracles import F32, F64

# torch looks up which functions make tensors when it first has to, and here that has to be before tests put others in
# their place
with torch.device("meta"):
    assert torch.empty(0).is_meta


def bits(found):
    """All that can be seen of a result, tensors as bytes."""
    if isinstance(found, Tensor):
        assert found.is_cpu, found.device
        return found.dtype, found.shape, found.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(found, np.ndarray):
        return found.dtype, found.shape, found.tobytes()
    if isinstance(found, ops.Packed):
        return bits(found.codes), bits(found.scales), found.length, found.bits
    if dataclasses.is_dataclass(found):
        return type(found), [bits(getattr(found, field.name)) for field in dataclasses.fields(found) if field.repr]
    if isinstance(found, Mapping):
        return [(key, bits(value)) for key, value in found.items()]
    if isinstance(found, (list, tuple)):
        return [bits(each) for each in found]
    assert found is None or isinstance(found, (int, float, str, torch.dtype)), type(found)
    return found


def contents(space):
    """All tensors of a space, and what it says of its tasks."""
    slots, segments = space.collection.slots.values(), space.collection.segments
    columns = [table.tensors() for segment in segments for table in segment.columns.values()]
    return [(slot.u, slot.v) for slot in slots], columns, space.tasks, space.errors


def held(space):
    """The same, and its bytes: of adapters that were no files, whose paths it would keep."""
    return contents(space), space.nbytes, space.summary


def files(folder):
    """Tensors of all files in a folder."""
    return {path.name: load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


def saved(path, **options):
    space = loraspan.compress(serving.adapters()[:5], out=path, max_error=0.2, **options)
    assert space.path == path
    return space


CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


# each is called with a folder, and gives what is done under the default device and what is given then


def made(seed, *shape, dtype=F64):
    """Inputs, which lie on the CPU."""
    with torch.device("cpu"):
        return normal(seed, *shape, dtype=dtype)


X = made(1, 12, 300, dtype=F32)
TALL = [made(2, 40, 30), made(3, 9, 30)]
W = made(4, 12, 3)
BASIS = torch.linalg.qr(made(5, 300, 4, dtype=F32))[0]
BOTH = [None, "reference"]


@case
def operators(_):
    return [
        [
            ops.gram(X, backend=b),
            ops.gram([*TALL], backend=b, precision="f64"),
            ops.gram(X.view(3, 4, 300), backend=b),
            ops.gram(X.view(3, 4, 300)[:0], backend=b),
            ops.gram(ops.RowBlocks([], 5), backend=b),
            ops.gram_many([X, TALL], backend=b),
            ops.squares(TALL, backend=b),
            ops.squares(ops.RowBlocks([], 5), backend=b),
            ops.combine(X, W, backend=b),
            ops.combine(X, W, dtype=torch.bfloat16, products=False, backend=b),
            ops.combine_many([(X, W), (X, W[:, :0])], precision="f64", backend=b),
            ops.combine(ops.RowBlocks([], 5), W[:0], backend=b),
            ops.sketch(X, 5, backend=b),
            ops.sketch_many([(X, 5), (TALL, 3)], precision="f64", backend=b),
            ops.sparse_sketch(X, 8, backend=b),
            ops.sparse_sketch(ops.RowBlocks([], 5), 8, backend=b),
            product(TALL[0], TALL[1].T, backend=b),
            joint_gram(TALL[0].view(4, 10, 30), TALL[0].view(4, 10, 30), TALL[1].T, backend=b),
            whiten_(W.clone(), 2 * W, 1e-8, backend=b),
            ops.power(X, W, backend=b),
            ops.power_many([(X, W), (TALL, made(6, 49, 2))], precision="f64", backend=b),
        ]
        for b in BOTH
    ]


@case
def blocks_of_a_gram(_):
    return gram_blocks([ops.RowBlocks([X, X]), ops.RowBlocks(TALL), ops.RowBlocks([], 3)])


@case
def packing(_):
    packed = {(n, b): ops.pack(X, n, backend=b) for n in (8, 4) for b in BOTH}
    return packed, [
        (ops.unpack(each, backend=b), ops.unpack(each, dtype=torch.float16, backend=b), ops.packed_products([X], each))
        for (_, b), each in packed.items()
    ]


@case
def rebuilding(_):
    found = []
    for b in BOTH:
        left, right = X.T.contiguous().requires_grad_(), W.float().requires_grad_()
        out = ops.reconstruct(left, right, scale=0.3, dtype=torch.float16, backend=b)
        out.float().sum().backward()
        pieces = [X.new_zeros(300, 3), X.new_zeros(300, 4)]
        packed = ops.Piece(ops.pack(X[:4], 4), None, pieces[1])
        ops.reconstruct_many([ops.Piece(X.T, W.float(), pieces[0]), packed], backend=b)
        found += [out, left.grad, right.grad, pieces, ops.reconstruct(X.T, W, backend=b)]
        found.append(ops.reconstruct(X.view(3, 4, 300).mT, X.view(3, 4, 300), backend=b))
    return found


V, U = torch.linalg.qr(made(8, 56, 4, dtype=F32))[0], torch.linalg.qr(made(9, 40, 4, dtype=F32))[0]
COUNTS = [[2, 1, 1, 1], [0, 0, 0, 0], [1, 0, 2, 0]]
ENDS = [made(10, rows, width, dtype=F32) for rows, width in ((4, 4), (4, 40), (6, 4), (2, 56))]
TASKS = torch.tensor([0, 2, -1, 1, 0, 2])
ROWS, INTO = made(11, 6, 56, dtype=F32), made(12, 6, 40, dtype=F32)


@case
def columns_of_tasks(_):
    found = []
    for ends in (ENDS, [ops.pack(end, 8) for end in ENDS]):
        cores = ops.Cores.of(COUNTS, made(13, 8, dtype=F32), *ends)
        for b in BOTH:
            y = INTO.clone()
            found += [ops.shared_lora(INTO, ROWS, V, U, cores, TASKS, backend=b)]
            found += [ops.shared_lora_(y, ROWS, V, U, cores, TASKS, scale=0.3, backend=b)]
            mixed = torch.stack([TASKS, TASKS.flip(0)], 1), made(14, 6, 2, dtype=F32)
            found += [ops.shared_lora(INTO, ROWS, V, U, cores, mixed[0], shares=mixed[1], backend=b)]
    return found


@case
def gradients_of_columns(_):
    found = []
    for b in BOTH:
        cores = ops.Cores.of(COUNTS, made(13, 8, dtype=F32).requires_grad_(), *[e.clone() for e in ENDS])
        x = ROWS.clone().requires_grad_()
        ops.shared_lora(INTO, x, V, U, cores, TASKS, backend=b).square().sum().backward()
        found += [x.grad, cores.weights.grad]
    return found


@case
def small_decompositions(_):
    square = X.double() @ X.double().T
    found = [linalg.top_eigenpairs(square, 3), linalg.top_eigenpairs(made(15, 200, 200).square().cov(), 2)]
    found += [linalg.orthonormalize(made(16, 300, 5, dtype=F32)), linalg.orthonormalize(made(16, 300, 0))]
    for b in BOTH:
        found += [linalg.gram_root(square, backend=b), linalg.gram_root(0 * square, backend=b)]
    return found


@case
def singular_vectors(_):
    return [
        linalg.randomized_svd(x, rank, center=center)
        for x in (X, X.T, TALL[0], X.view(3, 4, 300), X.view(3, 4, 300)[:0], 0 * X, made(17, 150, 170))
        for rank in (3, 2)
        for center in (False, True)
    ] + [linalg.randomized_svd(x, **goal) for x in (X, TALL[0]) for goal in ({"energy": 0.5}, {"tolerance": 0.3})]


@case
def singular_vectors_sent(_):
    """An explicit device counts, whatever the default is."""
    return linalg.randomized_svd(X, 3, device="cpu"), linalg.factored_svd(W, X[:3], device="cpu")


@case
def singular_vectors_of_products(_):
    b, a = made(18, 5, 40, 3), made(19, 5, 3, 50)
    unequal = [b[0], b[1][:, :2]], [a[0], a[1][:2]]
    found = [linalg.factored_svd(b, a), linalg.factored_svd(*unequal), linalg.factored_svd(b, a, rank=2)]
    found += [linalg.factored_svd(b[:0], a[:0]), linalg.factored_svd([], []), linalg.factored_svd(b * 0, a)]
    found += [linalg.factored_svd(b[..., :0], a[:, :0]), linalg.factored_svd(b * 1e9, a)]
    return [*found, linalg.merged_svd(list(b), list(a)), linalg.merged_svd(*unequal, weights=[1.0, -2.0], rank=2)]


@case
def following_a_stream(_):
    found = []
    for center in (False, True):
        one, two = (IncrementalSVD(4, center=center, forget=0.99) for _ in range(2))
        for piece in made(20, 90, 60, dtype=F32).split(17):
            one.update(piece)
        old = one.basis
        two.update(made(21, 50, 60, dtype=F32))
        one.merge(two)
        again = IncrementalSVD(4, center=center, forget=0.99)
        again.merge(one)
        state = again.state_dict()
        again.load_state_dict(state)
        found += [one.basis, one.s, one.discarded, one.weight, one.rotation(old), one.transform(X[:, :60]), state]
        found += [again.basis, again.transform(X[:, :60]), IncrementalSVD(2).state_dict()]
        found += [one.mean] if center else []
    return found


@case
def scikit_learn(_):
    estimator = pytest.importorskip("loraspan.compat.sklearn").IncrementalPCA(n_components=3)
    loadings = estimator.fit(TALL[0].numpy()).transform(TALL[0].numpy())
    return loadings, estimator.inverse_transform(loadings), estimator.mean_, estimator.explained_variance_ratio_


GOALS = [{"rank": 4}, {"energy": 0.9}, {"max_error": 0.2}, {"max_bytes": 20_000}]
WIDTHS = [None, torch.bfloat16, "int8", "int4", "coded"]


@case
def compress(_):
    return [held(loraspan.compress(serving.adapters(), **goal)) for goal in GOALS]


@case
def compress_to_dtypes(_):
    given = serving.adapters()
    return [held(loraspan.compress(given, **goal, dtype=dtype)) for dtype in WIDTHS[1:] for goal in GOALS[1:3]]


@case
def compress_what_shares_nothing(_):
    """Private columns alone, and adapters of no columns at all."""
    none = planted.adapters(shared_out=0, shared_in=0, noise=1.0, shape=(300, 200), count=3, slots=1)
    return held(loraspan.compress(none, max_error=0.01)), held(loraspan.compress(none, max_error=0.3, dtype="coded"))


@case
def compress_many_small_ones(_):
    many = planted.adapters(count=240, shape=(72, 96), ranks=(4,), slots=1, noise=0.3)
    return held(loraspan.compress(many, rank=6)), held(loraspan.compress(many, max_error=0.2))


@case
def report(_):
    space = loraspan.compress(serving.adapters(), max_error=0.05)
    return str(space.report()), repr(space), space.source_nbytes, space.ids(["task 1", None]), space.ids("task 2")


class Elsewhere(ThreadPoolExecutor):
    """Threads of somebody who gives each the default device."""

    def submit(self, function, /, *args):
        def there():
            with torch.device("meta"):
                return function(*args)

        return super().submit(there)


@case
def groups(folder):
    for adapter in serving.adapters():
        peft.write(adapter, folder / "in" / adapter.name)
    found = [loraspan.compress(folder / "in", max_error=0.05, memory="100MB", out=folder / "one.span")]
    for pool, name in ((ThreadPoolExecutor(1), "two.span"), (Elsewhere(1), "three.span")):
        with pool:
            found.append(loraspan.compress(folder / "in", rank=4, executor=pool, out=folder / name))
    return [contents(space) for space in found]


@case
def files_of_peft(folder):
    for i, adapter in enumerate(serving.adapters()[:2]):
        peft.write(adapter, folder / str(i), dtype=torch.bfloat16)
    return read_all([folder / "0", folder / "1"])[1].slots, peft.read(folder / "0").slots, files(folder)


@case
def a_store(folder):
    found = []
    for dtype in WIDTHS:
        path = folder / f"{dtype}.span"
        space = saved(path, dtype=dtype)
        again = loraspan.open(path)
        again.save(folder / f"{dtype} again.span")
        found += [held(space), held(again), again.reconstruct("task 1").slots]
        found += [len(store.verify(path)), [entry.generation for entry in store.log(path)]]
    return [*found, files(folder)]


@case
def giving_back(folder):
    found = []
    for dtype in (None, "int4", "coded"):
        space = saved(folder / f"{dtype}.span", dtype=dtype)
        space.export("task 0", folder / "one" / str(dtype), dtype=torch.float16)
        space.export(None, folder / "all" / str(dtype), rank_multiple=8)
        found += [space.reconstruct(name, dtype=torch.bfloat16).slots for name in space.tasks]
    return [*found, files(folder / "one"), files(folder / "all")]


@case
def a_projection(folder):
    space, other = saved(folder / "a.span"), serving.adapters(seed=3)[7]
    found = space.project(other, max_error=0.02)
    return str(found), [getattr(found, field.name) for field in dataclasses.fields(found) if field.name != "loadings"]


def life(space):
    """Every change of a space, and what it holds after each."""
    more, found = serving.adapters()[5:], []

    def note(change):
        found.append((str(change), held(space)))

    for dry_run in (True, False):
        note(space.add(more[:1], max_error=0.2, dry_run=dry_run))
    note(space.replace([dataclasses.replace(more[1], name="task 5")], max_error=0.2))
    note(space.refit(max_forgetting=0.2))
    note(space.refit(rank=5))
    note(space.rename("task 1", "one"))
    note(space.remove("task 2", "one"))
    note(space.start("new", lora_rank=2))
    note(space.start("other", like="task 0"))
    note(space.absorb(more[1:], max_error=0.2, max_forgetting=0.3))
    note(space.refit(max_bytes=2 * space.nbytes))
    return found


@case
def life_in_memory(_):
    return [life(loraspan.compress(serving.adapters()[:5], max_error=0.2, dtype=dtype)) for dtype in (None, "int8")]


@case
def life_in_a_store(folder):
    found = [life(saved(folder / f"{dtype}.span", dtype=dtype)) for dtype in (None, "coded")]
    path = folder / "None.span"
    store.rollback(path, 2)
    store.gc(path, keep=0, grace=0)
    return [*found, held(loraspan.open(path)), files(folder)]


@case
def attached(_):
    found = []
    for dtype in WIDTHS:
        space = loraspan.compress(serving.adapters()[:5], max_error=0.2, dtype=dtype)
        # a model is made where its maker wants it
        with torch.device("cpu"):
            model = serving.Tower()
        served = loraspan.attach(model, space)
        with torch.device("cpu"):
            x = serving.batch(4)
        found.append(answers(served, space, x))
        space.add(serving.adapters()[5:7], max_error=0.2)
        space.remove("task 3")
        found.append(answers(served, space, x))
        baked = loraspan.bake(served.detach(), space, "task 0")
        found += [list(baked.state_dict().values())]
    return found


def answers(served, space, x):
    with served.tasks(["task 0", None, {"task 0": 0.3, "task 1": 0.7}, "task 1"]):
        found = [served(x)]
    with served.tasks([["task 0", None, "task 1"]] * 4, per="token"):
        found.append(served(x))
    with served.tasks(space.ids("task 1")):
        found.append(served(x))
    return [*found, served(x), served(x, task_ids=space.ids(["task 0", None, "task 1", "task 0"]))]


@case
def trained(folder):
    space = loraspan.compress(serving.adapters()[:5], rank=6, out=folder / "a.span")
    space.start("new", lora_rank=2)
    with torch.device("cpu"):
        model, x = serving.Tower(), serving.batch(2)
    served = loraspan.attach(model, space, train=True)
    optimizer = torch.optim.SGD(served.loadings().values(), lr=0.1)
    for _ in range(2):
        with served.tasks(["new", "task 0"]):
            served(x).square().sum().backward()
        optimizer.step()
    change = space.keep(served, None)
    return served.trained("new"), change.added, held(space)


@case
def models_of_peft(_):
    pytest.importorskip("peft")
    space = loraspan.compress(serving.adapters()[:3], max_error=0.01)
    with torch.device("cpu"):
        model, x = serving.Tower(), serving.batch(2)
    loaded = space.as_peft(model, "task 0", rank=8)
    found = [loaded(x)]
    space.swap_peft(loaded, "task 2")
    return [*found, loaded(x), list(loaded.state_dict().values())]


@case
def resolved_for_vllm(folder):
    from loraspan.serve import vllm

    saved(folder / "a.span")
    folders = vllm.TaskFolders(vllm.Settings(folder / "a.span", folder / "cache", 1_000_000))
    return folders.resolve("base", "task 1").number, files(folder / "cache")


@case
def the_command_line(folder):
    for adapter in serving.adapters()[:4]:
        peft.write(adapter, folder / "in" / adapter.name)
    peft.write(serving.adapters()[5], folder / "task 5")
    path = str(folder / "a.span")
    for line in (
        ["compress", str(folder / "in"), "-o", path, "--max-error", "0.05"],
        ["info", path],
        ["add", path, str(folder / "task 5")],
        ["refit", path, "--max-forgetting", "0.1"],
        ["export", path, "task 0", "-o", str(folder / "out")],
        ["verify", path],
        ["doctor"],
    ):
        done = CliRunner().invoke(main, line)
        assert done.exit_code == 0, (line, done.output, done.exception)
    return contents(loraspan.open(path)), files(folder / "out")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What each case gives where nobody has set a device."""
    known = {}

    def ask(name):
        if name not in known:
            known[name] = bits(CASES[name](tmp_path_factory.mktemp("expected")))
        return known[name]

    return ask


@pytest.mark.parametrize("name", CASES)
def test_what_the_default_device_is_changes_no_bit(name, expected, tmp_path):
    wanted = expected(name)
    with torch.device("meta"):
        found = CASES[name](tmp_path)
    assert bits(found) == wanted


FIRST = """
import sys, torch
torch.set_default_device("meta")
import loraspan
from loraspan.adapters import Adapter, Slot
from loraspan.cli import main
ones = torch.ones(2, 5, device="cpu")
space = loraspan.compress([Adapter("one", {"q": Slot(ones, ones.T.clone(), 0.3)})], max_error=0.01, out=sys.argv[1])
space.refit(rank=1)
print({slot.up.device for slot in loraspan.open(sys.argv[1]).reconstruct("one").slots.values()}, torch.zeros(0).device)
main(["doctor"])
"""


def test_it_may_be_set_before_all_imports(tmp_path):
    command = [sys.executable, "-c", FIRST, str(tmp_path / "a.span")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{device(type='cpu')} meta\n")


def test_a_graph_is_whole_with_an_operator_in_it():
    """What a graph is compiled through names its devices itself."""
    step = torch.compile(lambda a, b: ops.reconstruct(a, b, scale=0.3), fullgraph=True, backend="eager")
    with torch.device("meta"):
        found = step(X.T, W)
    assert bits(found) == bits(ops.reconstruct(X.T, W, scale=0.3))


def test_what_was_packed_in_a_file_may_first_be_looked_at_elsewhere(tmp_path):
    space = saved(tmp_path / "a.span", dtype="coded")
    wanted = bits(contents(space))
    opened = loraspan.open(tmp_path / "a.span")
    with torch.device("meta"):
        found = contents(opened)
        seen = [rows.codes.device.type for columns in found[1] for rows in columns.values() if hasattr(rows, "codes")]
    assert seen
    assert set(seen) == {"cpu"}
    assert bits(found) == wanted


def test_a_failure_leaves_the_default_device_as_it_was():
    with torch.device("meta"):
        with pytest.raises(loraspan.errors.ArgumentError):
            ops.gram(X, precision="f16")
        assert torch.zeros(0).is_meta


def test_it_may_be_one_that_is_not_here():
    """As in a process that was forked from one that uses a GPU: there nothing can be made on it."""
    wanted = bits(ops.gram(X))
    with torch.device("xpu" if torch.cuda.is_available() else "cuda"):
        assert bits(ops.gram(X)) == wanted
