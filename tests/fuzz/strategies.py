"""Cases for every target: a store or an adapter in order, with one part of it spoilt."""

import functools
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st

from adapters.folders import CONFIG, adapter, factors, write
from fuzz.cases import Case, Special
from fuzz.hostile import spoiled_bytes, spoiled_json, text_of
from fuzz.tensors import spoiled_header, spoiled_tensors
from loraspan import compress, store
from loraspan.adapters import Adapter
from loraspan.adapters.base import Slot
from loraspan.adapters.keys import CONFIG_NAME, WEIGHTS_NAME
from store.samples import ODD_EXTRAS, collection, save_in_segments, saved

LINKS = [Special("link", to) for to in ("/dev/zero", "/etc/passwd", "loop")]
SPECIALS = (Special("fifo"), Special("folder"), *LINKS)
GENERATIONS = (b"2\n", b"999999999999999999\n", b"1" * 70)
STORE_PARTS = {"manifest": 6, "tensors": 10, "header": 3, "bytes": 3, "CURRENT": 1, "special": 1}
# what still opens, mostly
NUMBERS = {"manifest": 2, "tensors": 12, "bytes": 2}
ADAPTER_PARTS = {"config": 7, "tensors": 7, "header": 4, "bytes": 2, "special": 1}
_SEAL = ',\n  "checksum": "'


@functools.cache
def stores():
    """Stores in order, each as the bytes of its files."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, str(i)) for i in range(9)]
        for path in paths:
            path.mkdir()
        saved(paths[0], seed=2, extras=ODD_EXTRAS)
        saved(paths[1], seed=1, slots=2, tasks=3, dtype=torch.bfloat16)
        saved(paths[2], seed=4, slots=1, tasks=1)
        saved(paths[3], seed=5, slots=2, tasks=6, dtype=torch.float16)
        save_in_segments(collection(2), paths[4] / "team.span", [0, 2, 4])
        _coded(paths[5] / "team.span", 0.1, 1e-3)
        _coded(paths[6] / "team.span", 1e-3, 0.1)
        _live(paths[7] / "team.span")
        _on_coded_bases(paths[8] / "team.span")
        return [{p.name: p.read_bytes() for p in (path / "team.span").iterdir() if p.name != ".lock"} for path in paths]


def _coded(path, first, then):
    """A store in coded ends, two segments of them, whose numbers have 8 bits for one of the errors and 16 for one."""
    space = compress([adapter(name, base="base") for name in ("sql", "legal")], max_error=first, dtype="coded")
    space.save(path)
    space.add([adapter("new", base="base", path="layers.1.q")], max_error=then)


def _on_coded_bases(path):
    """A store of one input factor, and so of coded loadings."""
    draw = torch.Generator().manual_seed(7)
    down = torch.randn(2, 48, generator=draw)
    slots = [{"layers.2.q": Slot(down, torch.randn(12, 2, generator=draw), 1.0)} for _ in range(12)]
    space = compress([Adapter(f"task {i}", of_task) for i, of_task in enumerate(slots)], max_error=0.2, dtype="coded")
    assert space.collection.slots["layers.2.q"].ranks == (0, 2)
    space.save(path)


def _live(path):
    """A store in packed rows that has been through some changes, of which the last generation is left."""
    space = compress([adapter(name, base="base") for name in ("sql", "legal", "chat")], max_error=0.3)
    space.save(path)
    space.add([adapter("new", base="base", path="layers.1.q")], max_error=0.3)
    space.remove("legal")
    space.rename("sql", "../sql")
    store.gc(path, keep=0, grace=0)
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)


@functools.cache
def adapters():
    """Adapters in order: plain, with patterns and extras, a convolution, an embedding, experts."""
    plain = factors() | factors("layers.0.v", seed=5)
    prefix = "base_model.model."
    extras = {f"{prefix}score.weight": torch.ones(2, 3), f"{prefix}layers.0.q.lora_B.bias": torch.ones(3),
              f"{prefix}layers.0.v.lora_magnitude_vector": torch.ones(3)}  # fmt: skip
    conv = {
        f"{prefix}conv.lora_A.weight": torch.ones(2, 3, 1, 1),
        f"{prefix}conv.lora_B.weight": torch.ones(4, 2, 1, 1),
    }
    embedding = {f"{prefix}e.lora_embedding_A": torch.ones(2, 9), f"{prefix}e.lora_embedding_B": torch.ones(4, 2)}
    experts = factors("mlp.experts", r=6)
    pairs = [
        (plain, CONFIG),
        (plain | extras, CONFIG | {"rank_pattern": {"v": 2}, "alpha_pattern": {"layers.0.q": 4}, "lora_bias": True}),
        (conv | embedding, CONFIG | {"use_rslora": True, "license": "mit"}),
        (experts, CONFIG | {"target_parameters": ["experts.up"], "target_modules": []}),
        ({k: t.half() for k, t in plain.items()}, CONFIG | {"modules_to_save": ["score"], "layers_to_transform": [0]}),
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [write(Path(folder, str(i)), *pair) for i, pair in enumerate(pairs)]
        return [{p.name: p.read_bytes() for p in path.iterdir()} for path in paths]


def _weighted(parts):
    return st.sampled_from([part for part, weight in parts.items() for _ in range(weight)])


@st.composite
def store_cases(draw, target, parts=None, first=0):
    """A store with a spoilt manifest, tensor file or CURRENT; mostly with names, sizes and checksums made to agree.

    ``first``: only the stores from that one on; -1 draws the one that the good adapters of the targets fit.
    """
    files = dict(draw(st.sampled_from(stores()[first:])))
    manifest = next(name for name in files if name.startswith("manifest"))
    data = sorted(name for name in files if name.endswith(".safetensors"))
    part = draw(_weighted(parts or STORE_PARTS))
    if part == "manifest":
        files[manifest] = draw(_spoiled_manifest(files[manifest]))
    elif part in ("tensors", "header"):
        name = draw(st.sampled_from(data))
        spoil = spoiled_header(files[name]) if part == "header" else spoiled_tensors(files[name], likely="records")
        _agree(files, manifest, name, draw(spoil))
    elif part == "bytes":
        name = draw(st.sampled_from([*data, manifest]))
        spoiled = draw(spoiled_bytes(files[name]))
        if name in data and draw(st.booleans()):
            _agree(files, manifest, name, spoiled)
        else:
            files[name] = spoiled
    elif part == "CURRENT":
        files["CURRENT"] = draw(st.one_of(spoiled_bytes(files["CURRENT"]), st.sampled_from(GENERATIONS)))
    else:
        files[draw(st.sampled_from([*data, manifest, "CURRENT"]))] = draw(st.sampled_from(SPECIALS))
    return Case(target, {f"team.span/{name}": content for name, content in files.items()})


@st.composite
def adapter_cases(draw, target):
    """A PEFT folder with a spoilt configuration or tensor file, or with something odd beside them."""
    files = dict(draw(st.sampled_from(adapters())))
    part = draw(_weighted(ADAPTER_PARTS))
    if part == "config":
        files[CONFIG_NAME] = text_of(draw(spoiled_json(json.loads(files[CONFIG_NAME]))))
    elif part == "tensors":
        files[WEIGHTS_NAME] = draw(spoiled_tensors(files[WEIGHTS_NAME]))
    elif part == "header":
        files[WEIGHTS_NAME] = draw(spoiled_header(files[WEIGHTS_NAME]))
    elif part == "bytes":
        name = draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME]))
        files[name] = draw(spoiled_bytes(files[name]))
    else:
        files[draw(st.sampled_from([CONFIG_NAME, WEIGHTS_NAME, "README.md"]))] = draw(st.sampled_from(SPECIALS))
    return Case(target, {f"bad/{name}": content for name, content in files.items()})


@st.composite
def _spoiled_manifest(draw, content):
    table = json.loads(content)
    table.pop("checksum")
    spoiled = draw(spoiled_json(table))
    return sealed(text_of(spoiled)) if draw(st.integers(0, 7)) else content.replace(b"0", b"1", 1)


def sealed(text):
    """Give a manifest of that text its checksum, if it ends as an object does."""
    body = text.decode("utf-8", "surrogatepass").rstrip().removesuffix("}").encode("utf-8", "surrogatepass")
    return body + f'{_SEAL}{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def _agree(files, manifest, name, content):
    """Put ``content`` in place of a file of tensors, with a manifest that says so."""
    digest = hashlib.sha256(content).hexdigest()
    del files[name]
    new = f"{name.partition('-')[0]}-{digest[:32]}.safetensors"
    files[new] = content
    table = json.loads(files[manifest])
    table.pop("checksum")
    for entry in (table["basis"], *table["segments"]):
        if entry["sha256"][:32] in name:
            entry.update(sha256=digest, bytes=len(content))
    files[manifest] = sealed(re.sub(r"\n\Z", "", json.dumps(table)).encode())
