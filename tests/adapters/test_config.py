"""What a configuration may say, what is refused, and the rank and scale that it gives each module."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from adapters import folders
from loraspan.adapters import peft
from loraspan.adapters.config import read_config
from loraspan.adapters.scales import Patterns, Scales
from loraspan.errors import FormatError, UnsupportedError


def config(**fields):
    return folders.CONFIG | fields


REFUSED = {
    "other-method": (config(peft_type="LOHA"), "LOHA"),
    "no-method": ({"r": 2}, "peft_type"),
    "qalora": (config(use_qalora=True), "QALoRA"),
    "bdlora": (config(use_bdlora={"nblocks": 2}), "BD-LoRA"),
    "kasa": (config(kasa_config={"beta": 0.1}), "KaSA"),
    "alora": (config(alora_invocation_tokens=[1, 2]), "aLoRA"),
    "tied": (config(ensure_weight_tying=True), "tied"),
    "arrow": (config(arrow_config={"top_k": 3}), "Arrow"),
    "layer-replication": (config(layer_replication=[[0, 2]]), "repeated layers"),
    "megatron": (config(megatron_config={"a": 1}), "Megatron"),
    "module-to-import": (config(megatron_core="os.path"), "import"),
    "unknown-field": (config(quantum_rank=3), "quantum_rank"),
    "pissa": (config(init_lora_weights="pissa_niter_16"), "path_initial_model_for_weight_conversion"),
    "olora": (config(init_lora_weights="olora"), "changed base"),
    "corda": (config(init_lora_weights="corda"), "changed base"),
    "lora-ga": (config(init_lora_weights="lora_ga"), "changed base"),
    "loftq": (config(init_lora_weights="loftq"), "changed base"),
    "unknown-start": (config(init_lora_weights="hadamard"), "hadamard"),
    "nested-repeat": (config(rank_pattern={"(a+)+b": 2}), "very long"),
    "repeated-alternatives": (config(alpha_pattern={"(a|ab)*c": 2}), "very long"),
    "many-repeats": (config(rank_pattern={".*.*.*.*q": 2}), "very long"),
    "look-around": (config(rank_pattern={"(?=a)q": 2}), "very long"),
    "back-reference": (config(rank_pattern={r"(a)\1": 2}), "very long"),
    "long-pattern": (config(rank_pattern={"a" * 3000: 2}), "1000 characters"),
}
BAD = {
    "not-json": (b"{", "JSON"),
    "duplicate": (b'{"peft_type": "LORA", "r": 2, "r": 4}', "more than once"),
    "not-an-object": (b"[]", "object"),
    "infinity": (b'{"peft_type": "LORA", "lora_alpha": Infinity}', "Infinity"),
    "deep": (b'{"eva_config": ' + b'{"a": ' * 100 + b"1" + b"}" * 101, "deeper"),
    "very-deep": (b"[" * 200_000, "deeper"),
    "alpha-is-text": (config(lora_alpha="16"), "lora_alpha"),
    "rank-is-true": (config(r=True), "r needs int"),
    "pattern-is-a-list": (config(rank_pattern=["q"]), "rank_pattern"),
    "negative-rank": (config(rank_pattern={"q": -2}), "positive"),
    "no-regular-expression": (config(rank_pattern={"q(": 2}), "regular expression"),
    "modules-are-numbers": (config(target_modules=[1, 2]), "list of names"),
    "bias": (config(bias="some"), "bias"),
    "large": (b" " * 5_000_000 + b"{}", "bytes"),
    "two-ranks": (config(r=3), "rank 3"),
}


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3_000_000])
def test_a_long_configuration_is_read_to_its_end(tmp_path, size):
    short = folders.write(tmp_path / "short", config=config())
    raw = json.dumps(config()).encode()
    long = folders.write(tmp_path / "long", config=b" " * (size - len(raw)) + raw)
    found, told = (read_config(str(folder / "adapter_config.json")).fields for folder in (long, short))
    assert found == told


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_come_out_wrong_is_refused(case, tmp_path):
    fields, says = REFUSED[case]
    folder = folders.write(tmp_path / "a", config=fields)
    with pytest.raises(UnsupportedError, match=says) as caught:
        peft.read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_configuration_is_refused(case, tmp_path):
    text, says = BAD[case]
    folder = folders.write(tmp_path / "a", config=text)
    with pytest.raises(FormatError, match=says) as caught:
        peft.read(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("start", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_read(start, tmp_path):
    folder = folders.write(tmp_path / "a", config=config(init_lora_weights=start))
    assert peft.read(folder).slots["layers.0.q"].scale == 3.0


def test_fields_that_name_code_are_dropped(tmp_path):
    mapping = {"base_model_class": "X", "parent_library": "os"}
    folder = folders.write(tmp_path / "a", config=config(auto_mapping=mapping, megatron_core="megatron.core"))
    adapter = peft.read(folder)
    assert not adapter.config.keys() & {"auto_mapping", "megatron_core"}
    peft.write(adapter, tmp_path / "b")
    assert not json.loads((tmp_path / "b" / "adapter_config.json").read_text()).keys() & {"auto_mapping"}


def test_scale_conventions():
    plain = Scales({"r": 4, "lora_alpha": 10})
    rooted = Scales({"r": 4, "lora_alpha": 10, "use_rslora": True})
    assert plain.scale(plain.rule("q"), 4) == 2.5
    assert rooted.scale(rooted.rule("q"), 4) == 5.0


parts = st.sampled_from(["q", "k", "0", "1", "layers", "q_proj", "xq"])
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)
keys = st.one_of(paths, st.sampled_from([r"\d.q", ".*q", "^layers.0.q", "(q|k)", "layers..", r"layers\.[01]\..*"]))


@given(table=st.dictionaries(keys, st.integers(1, 9), max_size=5), path=paths)
def test_the_first_key_wins_as_in_peft(table, path):
    assert Patterns(table, "rank_pattern").first(path) == table.get(get_pattern_key(table.keys(), path))


def test_a_pattern_that_passes_ends_on_any_path():
    # two repeats and PEFT's own in front: the worst that is let through
    assert Patterns({"a*b?a*c": 2}, "rank_pattern").first("a" * 1000) is None
