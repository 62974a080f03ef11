"""Small collections of every kind, what they must be equal to, and ways to spoil a store."""

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from loraspan import store
from loraspan.adapters.base import Source
from loraspan.collection.collection import Collection, Segment, SlotSpace, Task
from loraspan.collection.columns import Columns
from loraspan.collection.segments import merge

NAMES = ("sql", "../../etc/passwd", "名前 🦥", "", "a\nb\0c", "\udc80 not utf-8", "CURRENT", "x" * 10_000)
FORMS_CASES = ([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [2, 3, 4, 5])
ODD_EXTRAS = {
    "score.weight": torch.arange(6.0).reshape(2, 3),
    "ids": torch.tensor([2**62 + 1, -3]),
    "mask": torch.tensor([True, False, True]),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "nothing": torch.zeros(0, 3, dtype=torch.int16),
    "fp8": torch.tensor([1.5, -0.25, 448.0]).to(torch.float8_e4m3fn),
    "fp8.e5m2": torch.tensor([1.5, -0.25]).to(torch.float8_e5m2),
    "half.transposed": torch.arange(6, dtype=torch.float16).reshape(2, 3).T,
    "nan": torch.tensor([float("nan"), float("inf")], dtype=torch.bfloat16),
}


def orthonormal(rng, m, k, dtype):
    return torch.linalg.qr(torch.randn(m, k, generator=rng, dtype=torch.float64))[0].to(dtype)


def columns(rng, members, slot, counts, dense, dtype):
    """Random columns of a slot ``(n, d, k_out, k_in)``."""
    n, d, k_out, k_in = slot
    ss, sp, ps, pp = (counts[:, j].sum() for j in range(4))
    right = np.where(dense, 0, counts[:, 0]).sum() + ps
    sizes = ((ss + sp, k_out), (ps + pp, n), (right, k_in), (sp + pp, d))
    weights = torch.rand(int(counts.sum()), generator=rng)
    rest = [torch.randn(int(rows), width, generator=rng).to(dtype) for rows, width in sizes]
    return Columns(np.asarray(members, dtype=np.int64), counts, dense, weights, *rest)


def collection(seed=0, *, slots=3, tasks=4, dtype=torch.float32, names=None, extras=None):
    """A random collection: tasks lack slots, bases may have no width, cores may be dense, configurations repeat."""
    rng = torch.Generator().manual_seed(seed)
    draw = np.random.default_rng(seed)
    spaces, of_slots = {}, {}
    for j in range(slots):
        n, d = (int(size) for size in draw.integers(1, 9, 2))
        k_out, k_in = int(draw.integers(0, n + 1)), int(draw.integers(0, d + 1))
        members = [i for i in range(tasks) if draw.random() < 0.7]
        dense = draw.random(len(members)) < 0.3
        counts = draw.integers(0, 4, (len(members), 4))
        counts[dense, 0] = k_in
        # no end is shared on a basis without vectors
        counts[:, [0, 1]] *= k_out > 0
        counts[:, [0, 2]] *= k_in > 0
        dense &= (counts[:, 0] == k_in) | (k_out > 0)
        u, v = orthonormal(rng, n, k_out, dtype), orthonormal(rng, d, k_in, dtype)
        kind, kernel = ("conv2d", (d, 1, 1)) if j == 1 else ("linear", None)
        held = columns(rng, members, (n, d, k_out, k_in), counts, dense, dtype)
        spaces[f"layers.{j}.weights"] = SlotSpace(u, v, kind, kernel)
        of_slots[f"layers.{j}.weights"] = held
    known = tuple(
        task(i, draw, {s: i in held.tasks for s, held in of_slots.items()}, names, extras or {}) for i in range(tasks)
    )
    one = Segment(known, {s: held for s, held in of_slots.items() if len(held.tasks)})
    return Collection(spaces, (one,), dtype, "base/model" if seed % 2 else None, "Half of it — is shared.")


def task(i, draw, has, names, extras):
    held = [slot for slot, there in has.items() if there]
    return Task(
        name=names[i] if names else f"task {i}",
        error=float(draw.random()),
        error_kind=("measured", "bound")[i % 2],
        norm=float(draw.random() * 1e3),
        forgotten=float(draw.random()) * (i % 2),
        scales={slot: float(draw.choice([2.0, 0.3])) for slot in held},
        lora_ranks={slot: int(draw.choice([8, 300])) for slot in held},
        config={"r": 8, "target_modules": ["q", "v"], "nested": {"x": None, "y": [True, 1.5]}} if i % 3 else {},
        source=Source(f"/adapters/{i}\udcff", "ab" * 32, "cd" * 32 if i % 2 else None, "base/model", None),
        factor_bytes=int(draw.integers(2**40)),
        factor_dtype="bfloat16",
        extras=dict(extras) if i % 2 == 0 else {},
    )


def same_bytes(a, b):
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


def assert_same(got, want):
    """Every field of both, bit for bit."""
    assert (got.dtype, got.base_model, got.summary) == (want.dtype, want.base_model, want.summary)
    assert list(got.slots) == list(want.slots)
    for name, slot in want.slots.items():
        other = got.slots[name]
        assert (other.kind, other.kernel) == (slot.kind, slot.kernel)
        same_bytes(other.u, slot.u)
        same_bytes(other.v, slot.v)
    assert_same_columns(merge(got.segments), merge(want.segments))
    assert len(got.tasks) == len(want.tasks)
    for ours, theirs in zip(got.tasks, want.tasks, strict=True):
        for field in Task.__dataclass_fields__:
            if field != "extras":
                assert getattr(ours, field) == getattr(theirs, field), field
        assert ours.extras.keys() == theirs.extras.keys()
        for key, extra in theirs.extras.items():
            same_bytes(ours.extras[key], extra)


def assert_same_columns(got, want):
    assert got.columns.keys() == want.columns.keys()
    for name, held in want.columns.items():
        other = got.columns[name]
        for field in ("tasks", "counts", "dense"):
            ours, theirs = getattr(other, field), getattr(held, field)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        for field, tensor in held.tensors().items():
            same_bytes(getattr(other, field), tensor)


def listing(folder):
    return sorted(entry.name for entry in Path(folder).iterdir() if entry.name != ".lock")


def part_of(held, first, last):
    """Give a segment with the tasks ``first`` to ``last - 1`` of a collection."""
    whole = merge(held.segments)
    alive = [task if first <= i < last else None for i, task in enumerate(whole.tasks)]
    return merge([Segment(tuple(alive), whole.columns)])


def save_in_segments(held, folder, cuts):
    """Save with one segment between each two cuts, as adding tasks one after another leaves it."""
    parts = tuple(part_of(held, a, b) for a, b in itertools.pairwise(cuts))
    return store.save(replace(held, segments=parts), folder)


def without(held, *names):
    """Give a collection without some tasks, as removing them leaves it."""
    return _each_task(held, lambda task: None if task.name in names else task)


def renamed(held, **new):
    """Give a collection with other names for some tasks."""
    return _each_task(held, lambda task: replace(task, name=new[task.name]) if task.name in new else task)


def _each_task(held, change):
    def changed(of):
        tasks = tuple(None if task is None else change(task) for task in of.tasks)
        return of if all(a is b for a, b in zip(tasks, of.tasks, strict=True)) else Segment(tasks, of.columns)

    return replace(held, segments=tuple(changed(of) for of in held.segments))


def adding(held, *segments):
    """Give a collection with more segments."""
    return replace(held, segments=(*held.segments, *segments))


def files_named(*tables):
    """The files of tensors that manifests name, by their checksums."""
    kinds = [("basis", table["basis"]) for table in tables]
    kinds += [("tasks", entry) for table in tables for entry in table["segments"]]
    return {f"{kind}-{entry['sha256'][:32]}.safetensors" for kind, entry in kinds}


def edit_manifest(folder, change, *, seal=True):
    """Change the current manifest, and give it the checksum of what it has become."""
    path = Path(folder) / f"manifest-{int((Path(folder) / 'CURRENT').read_text()):06d}.json"
    table = json.loads(path.read_text())
    table.pop("checksum")
    changed = change(table)
    text = changed if isinstance(changed, str) else json.dumps(changed or table)
    body = text.rstrip().removesuffix("}").encode()
    digest = hashlib.sha256(body).hexdigest() if seal else "0" * 64
    path.write_bytes(body + f',\n  "checksum": "{digest}"\n}}\n'.encode())
    return path.name


def edit_tensors(folder, kind, change):
    """Change the tensors of the current bases or of the first segment as a writer with a fault would."""
    folder = Path(folder)
    path = next(folder.glob(f"{kind}-*"))
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}
    change(tensors)
    content = safetensors.torch.save(tensors)
    digest = hashlib.sha256(content).hexdigest()
    path.unlink()
    name = f"{kind}-{digest[:32]}.safetensors"
    (folder / name).write_bytes(content)

    def point(table):
        entry = next(e for e in (table["basis"], *table["segments"]) if e["sha256"][:32] in path.name)
        entry.update(sha256=digest, bytes=len(content))

    edit_manifest(folder, point)
    return name


def saved(folder, **options):
    """Save a sample, and give its path."""
    path = Path(folder) / "team.span"
    store.save(collection(**options), path)
    return path


def current_bytes(folder):
    """The bytes of the files of the current generation."""
    opened = store.open_at(folder)
    names = {data.file for data in (opened.basis, *opened.segments)}
    names |= {"CURRENT", f"manifest-{opened.generation:06d}.json"}
    return sum((folder / name).stat().st_size for name in names)
