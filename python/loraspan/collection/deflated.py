"""Text and small numbers of a store in fewer bytes: zlib, told beforehand what records of tasks mostly say."""

from __future__ import annotations

import zlib

from loraspan.collection.headers import INFLATED
from loraspan.errors import FormatError

_LEVEL = 9
# Between text, which is JSON and has no such byte, and what lies behind it.
_END = b"\0"
# What zlib may refer to as if it came before: records of a task whose configuration is as PEFT writes it. It is part of
# the format (docs/store.md), and no byte of it may change.
DICTIONARY = (
    b'"slots":["model.layers.0.mlp.down_proj","model.layers.0.mlp.gate_proj","model.layers.0.mlp.up_proj",'
    b'"model.layers.0.self_attn.k_proj","model.layers.0.self_attn.o_proj","model.layers.0.self_attn.q_proj",'
    b'"model.layers.0.self_attn.v_proj"]}{"names":["bound","trained","bfloat16","float32","'
    b'],"errors":[0.0],"error_kinds":["measured","measured"],"norms":[1.0],"forgotten":[0.0,0.0],"factor_bytes":[],'
    b'"factor_dtypes":["float16","float16"],"sources":[["/",null,null,null],["",null]],"configs":[0,1,2,3,4,5,6,7,8,9,'
    b'10],"config_table":[{"alora_invocation_tokens":null,"alpha_pattern":{},"arrow_config":null,"auto_mapping":null,'
    b'"base_model_name_or_path":"","bias":"none","corda_config":null,"ensure_weight_tying":false,"eva_config":null,'
    b'"exclude_modules":null,"fan_in_fan_out":false,"inference_mode":true,"init_lora_weights":true,'
    b'"kasa_config":null,"layer_replication":null,"layers_pattern":null,"layers_to_transform":null,"loftq_config":{},'
    b'"lora_alpha":16,"lora_bias":false,"lora_dropout":0.0,"lora_ga_config":null,"megatron_config":null,'
    b'"megatron_core":"megatron.core","modules_to_save":null,"monteclora_config":null,"peft_type":"LORA",'
    b'"peft_version":"0.","qalora_group_size":16,"r":8,"rank_pattern":{},"revision":null,'
    b'"target_modules":["down_proj","gate_proj","k_proj","o_proj","q_proj","up_proj","v_proj"],'
    b'"target_parameters":null,"task_type":"CAUSAL_LM","trainable_token_indices":null,"use_bdlora":null,'
    b'"use_dora":false,"use_qalora":false,"use_rslora":false,"velora_config":null}],"origin_table":[[1.0,8],[2.0,16]]'
)


def deflate(text: bytes, behind: bytes = b"") -> bytes:
    """Give text and bytes behind it as a store keeps them: compressed where that is shorter, as they are otherwise.

    Example:
        >>> inflate(deflate(b'{"names":["sql"]}', bytes(99)))[1] == bytes(99)
        True
    """
    stream = zlib.compressobj(_LEVEL, zdict=DICTIONARY)
    packed = stream.compress(text)
    if behind:
        # other bytes, other codes
        packed += stream.flush(zlib.Z_FULL_FLUSH) + stream.compress(_END + behind)
    packed += stream.flush()
    whole = text + _END * bool(behind) + behind
    return packed if len(packed) < len(whole) <= INFLATED * len(packed) else whole


def inflate(data: bytes) -> tuple[bytes, bytes]:
    """Undo :func:`deflate`; what would be longer than anything that is written is not unpacked.

    Raises:
        FormatError: if the data do not begin with ``{`` and are no such stream.
    """
    if data[:1] != b"{":
        stream = zlib.decompressobj(zdict=DICTIONARY)
        try:
            whole = stream.decompress(data, INFLATED * len(data) + 1)
        except zlib.error as error:
            raise FormatError(f"needs one JSON object, or one compressed by zlib: {error}") from None
        if not stream.eof or stream.unused_data:
            raise FormatError(f"needs to be one zlib stream of at most {INFLATED} times its own length")
        data = whole
    text, _, behind = data.partition(_END)
    return text, behind
