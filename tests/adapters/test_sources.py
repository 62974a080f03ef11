"""From what a user names to adapters, each with its own name; and whether they belong together."""

import builtins
import dataclasses
from pathlib import Path

import pytest
import torch

from adapters import folders
from loraspan.adapters import check_together, find_not_finite, hub, read_all, resolve
from loraspan.adapters.base import Slot
from loraspan.errors import ArgumentError, FormatError, MismatchError


@pytest.fixture
def root(tmp_path, monkeypatch):
    for name in ("b", "a", "c"):
        folders.write(tmp_path / "many" / name)
    (tmp_path / "many" / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(sources):
    return [adapter.name for adapter in read_all(sources)]


def test_every_kind_of_source(root):
    many = root / "many"
    assert names(many / "a") == ["a"]
    assert names(str(many)) == names("many/*") == names(str(many / "*")) == ["a", "b", "c"]
    assert names("many/[ab]") == ["a", "b"]
    assert names("many/*/adapter_model.safetensors") == ["a", "b", "c"]
    assert names("many/**") == names("many/**/*") == names("**/adapter_model.safetensors") == ["a", "b", "c"]
    assert names(many / "b" / "adapter_model.safetensors") == ["b"]
    assert names([many / "c", "many/[ab]", folders.adapter("sql")]) == ["c", "a", "b", "sql"]
    assert names({"x": many / "a", "y": many / "a", "z": folders.adapter("sql")}) == ["x", "y", "z"]
    assert names(folders.adapter("sql")) == ["sql"]
    assert names([]) == []
    assert resolve(["many/c", "many/a"]) == [Path("many/c"), Path("many/a")]


def test_a_tilde_is_the_home_folder(root, monkeypatch):
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.chdir(root / "many")
    assert names("~/many/[ab]") == ["a", "b"]
    assert names("~/many/c") == ["c"]
    folders.write(root / "many" / "~" / "many" / "own")
    assert names("~/many/own") == ["own"]


@pytest.mark.parametrize("source", ["many/none", "many/x*", "many/notes", "nowhere/at/all", "../many"])
def test_a_source_without_adapters_is_named(root, source):
    with pytest.raises(FormatError, match=source.replace("*", r"\*").replace(".", r"\.")):
        resolve([root / "many" / "a", source])


def test_two_adapters_never_fall_on_one_name(root):
    folders.write(root / "other" / "a")
    with pytest.raises(MismatchError, match=r"'a': .*many.*other.*Name them"):
        read_all(["many/a", "other/a"])
    with pytest.raises(MismatchError, match="'a'"):
        read_all(["many/a", "many/*"])
    assert names({"a": "many/a", "b": "other/a"}) == ["a", "b"]


@pytest.mark.parametrize("sources", [3, b"many", None, {"": "many/a"}, {"x": "many"}, {1: "many/a"}])
@pytest.mark.usefixtures("root")
def test_what_is_no_source_is_refused(sources):
    with pytest.raises(ArgumentError, match="sources"):
        read_all(sources)


def test_resolve_has_no_path_for_an_adapter():
    with pytest.raises(ArgumentError, match="Adapter"):
        resolve(folders.adapter())


def test_a_hub_id_comes_from_the_hub_only_if_there_is_no_such_path(root, monkeypatch):
    asked = []

    def download(hub_id):
        asked.append(hub_id)
        return root / "many" / "b"

    monkeypatch.setattr(hub, "download", download)
    assert names("many/a") == ["a"]
    assert asked == []
    (adapter,) = read_all("owner/sql-lora")
    assert asked == ["owner/sql-lora"]
    assert (adapter.name, adapter.source.path) == ("sql-lora", "owner/sql-lora")


def test_the_hub_is_looked_for_offline_in_the_cache_alone(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FormatError, match="owner/never-was"):
        resolve("owner/never-was")


def test_without_the_library_the_extra_is_named(monkeypatch):
    honest = builtins.__import__

    def no_hub(name, *args, **options):
        if name == "huggingface_hub":
            raise ImportError(name)
        return honest(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", no_hub)
    with pytest.raises(ArgumentError, match=r"loraspan\[hub\]"):
        resolve("owner/sql")


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"d": 6}, r"linear \[3, 5\].*linear \[3, 6\]"),
        ({"kind": "embedding"}, "linear .* embedding"),
        ({"base": "llama"}, "'base'.*'llama'"),
    ],
)
def test_what_does_not_belong_together_is_named(other, says):
    one, two = folders.adapter("sql", base="base"), folders.adapter("legal", **({"base": "base"} | other))
    with pytest.raises(MismatchError, match=f"'sql' and 'legal'.*{says}"):
        check_together([one, folders.adapter("plain"), two])


def test_kernels_belong_to_the_shape():
    one, two = (folders.adapter(name, d=6, kind="conv2d", kernel=k) for name, k in (("a", (2, 3, 1)), ("b", (2, 1, 3))))
    with pytest.raises(MismatchError, match=r"kernel \[2, 3, 1\].*kernel \[2, 1, 3\]"):
        check_together([one, two])


def test_other_slots_and_unnamed_bases_belong_together():
    check_together(
        [
            folders.adapter("a", base="owner/base/"),
            folders.adapter("b", base="owner/base"),
            folders.adapter("c", base=None),
            folders.adapter("d", d=9, path="layers.1.q"),
        ]
    )


@pytest.mark.parametrize("role", ["down", "up"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_found(role, bad):
    adapter = folders.adapter(d=3_000_000 if role == "down" else 5)
    assert find_not_finite(adapter) is None
    slot = adapter.slots["layers.0.q"]
    getattr(slot, role)[-1, -1] = bad
    key = f"base_model.model.layers.0.q.lora_{'A' if role == 'down' else 'B'}.weight"
    assert find_not_finite(adapter) == ("layers.0.q", role, key)


def test_what_is_not_finite_in_an_expert_is_found_in_its_file():
    slots = {"x.experts.p[1]": Slot(torch.ones(2, 3), torch.full((3, 2), float("nan")), 1.0, "expert")}
    adapter = dataclasses.replace(folders.adapter(), slots=slots, config={"target_parameters": ["experts.p"]})
    assert find_not_finite(adapter) == ("x.experts.p[1]", "up", "base_model.model.x.experts.lora_B.weight")
