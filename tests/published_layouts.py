"""Key layouts of published checkpoints, written out from what is known of them, with random values.

Nothing here looks at our own modules: a converter that drifts from the published names must fail. The two forward
passes are plain functions of the published names, to compare numbers with.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import DistilBertConfig, DistilBertModel

State = dict[str, Tensor]


def randomise(state: Mapping[str, Tensor], seed: int = 0) -> State:
    """Values that let every tensor matter: spread around one for gains, positive variances, whole counters."""
    generator = torch.Generator().manual_seed(seed)
    filled = {}
    for name, value in state.items():
        if not value.is_floating_point():
            filled[name] = torch.randint(1, 9, value.shape, generator=generator)
            continue
        noise = torch.randn(value.shape, generator=generator)
        fan = value[0].numel() if value.dim() > 1 else 1
        scaled = noise * (0.7 / fan**0.5 if value.dim() > 1 else 0.1)
        gain = name.endswith(("running_var", "gamma", "scale")) or ("norm" in name and name.endswith("weight"))
        filled[name] = (scaled.abs() + 0.5) if gain else scaled
    return filled


# --- DCFormer and DEC_CLIP --------------------------------------------------------------------------------------------


def _axial(name: str, inputs: int, outputs: int, kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for axis in range(3):
        size = [1, 1, 1]
        size[axis] = kernel
        yield f"{name}.c{axis + 1}.0.weight", (outputs, inputs, *size)
        yield f"{name}.c{axis + 1}.0.bias", (outputs,)
        yield from ((f"{name}.c{axis + 1}.1.{part}", shape) for part, shape in _batch_norm(outputs))


def _batch_norm(width: int) -> list[tuple[str, tuple[int, ...]]]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return [*((part, (width,)) for part in vectors), ("num_batches_tracked", ())]


def dcformer_shapes(
    blocks: Sequence[int], channels: Sequence[int], kernels: Sequence[int] = (13, 11, 9, 7), older: bool = False
) -> dict[str, tuple[int, ...]]:
    """Names (``s0.0...``) and shapes of the encoder; ``older``: ``gamma`` and batch norms listed twice."""
    shapes = {}
    axials: list[tuple[str, int]] = []
    for layer in range(4):
        name, inputs = f"s0.0.{layer}", channels[0] if layer else 1
        shapes |= dict(_axial(name, inputs, channels[0], 3 if layer else 7))
        axials.append((name, channels[0]))
    for stage in range(1, 5):
        width = channels[stage]
        for block in range(blocks[stage]):
            name = f"s{stage}.{block}"
            shapes[f"{name}.gamma" if older else f"{name}.scale"] = (width,)
            if block == 0:
                shapes[f"{name}.proj.weight"] = (width, channels[stage - 1], 1, 1, 1)
            shapes |= dict(_axial(f"{name}.dwconv", 1, width, kernels[stage - 1]))
            axials.append((f"{name}.dwconv", width))
            shapes |= {f"{name}.mlp.mlp.0.weight": (4 * width, width), f"{name}.mlp.mlp.0.bias": (4 * width,)}
            shapes |= {f"{name}.mlp.mlp.3.weight": (width, 4 * width), f"{name}.mlp.mlp.3.bias": (width,)}
    if older:
        for name, width in axials:
            shapes |= {f"{name}.norm.{n}.{part}": shape for n in range(3) for part, shape in _batch_norm(width)}
    return shapes


def empty(shapes: Mapping[str, tuple[int, ...]], prefix: str = "") -> State:
    """Tensors without storage for names and shapes."""
    return {
        prefix + name: torch.empty(
            shape, device="meta", dtype=torch.int64 if name.endswith("num_batches_tracked") else torch.float32
        )
        for name, shape in shapes.items()
    }


def dec_clip(blocks: Sequence[int], channels: Sequence[int], text_dim: int, width: int, words: int) -> State:
    """``DEC_CLIP``: encoder, DistilBERT, two projections, two numbers."""
    with torch.device("meta"):
        text = DistilBertModel(DistilBertConfig(vocab_size=words, dim=text_dim, hidden_dim=4 * text_dim, n_heads=12))
    shapes = {f"language_encoder.{name}": tuple(value.shape) for name, value in text.state_dict().items()}
    shapes |= {"mm_vision_proj.weight": (width, channels[-1]), "mm_vision_proj.bias": (width,)}
    shapes |= {"mm_language_proj.weight": (width, text_dim), "mm_language_proj.bias": (width,)}
    shapes |= {"t_prime": (), "bias": ()}
    return empty(dcformer_shapes(blocks, channels), "vision_encoder.encoder.") | empty(shapes)


def dcformer_forward(state: Mapping[str, Tensor], volume: Tensor) -> list[Tensor]:
    """Published encoder on (B, 1, D, H, W): five token maps (B, d*h*w, C), depth-major."""

    def axial(maps: Tensor, name: str, stride: int = 1, groups: int = 1) -> Tensor:
        total = torch.zeros(())
        for branch in ("c1", "c2", "c3"):
            weight = state[f"{name}.{branch}.0.weight"]
            padding = [size // 2 for size in weight.shape[2:]]
            out = functional.conv3d(maps, weight, state[f"{name}.{branch}.0.bias"], stride, padding, 1, groups)
            norm = [state[f"{name}.{branch}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            total = total + functional.batch_norm(out, *norm)
        return total

    maps = volume.permute(0, 1, 3, 4, 2)
    for layer in range(4):  # no activation: the published code hands its GELU to another argument
        maps = axial(maps, f"s0.0.{layer}", stride=1 if layer else 4)
    levels = [maps]
    for stage in range(1, 5):
        block = 0
        while f"s{stage}.{block}.scale" in state:
            name = f"s{stage}.{block}"
            if block == 0:
                maps = functional.conv3d(functional.max_pool3d(maps, 3, 2, 1), state[f"{name}.proj.weight"])
            inner = axial(maps, f"{name}.dwconv", groups=maps.shape[1]).permute(0, 2, 3, 4, 1)
            for layer in (0, 3):
                weight, bias = (state[f"{name}.mlp.mlp.{layer}.{part}"] for part in ("weight", "bias"))
                inner = functional.linear(inner, weight, bias)
                inner = functional.gelu(inner) if layer == 0 else inner
            maps = maps + (state[f"{name}.scale"] * inner).permute(0, 4, 1, 2, 3)
            block += 1
        levels.append(maps)
    return [level.permute(0, 4, 2, 3, 1).flatten(1, 3) for level in levels]


# --- Med3DVLM ---------------------------------------------------------------------------------------------------------


def mixer_shapes(
    stream: str, tokens: Sequence[int], channels: Sequence[int], prefix: str = "model.mm_projector."
) -> dict[str, tuple[int, ...]]:
    """One stream of the projector; ``tokens`` and ``channels`` before the first and after every layer."""
    shapes = {}
    for layer in range(len(tokens) - 1):
        name = f"{prefix}{stream}_mixer.{layer}"
        for norm in ("ln1", "ln2"):
            shapes |= {f"{name}.{norm}.weight": (channels[layer],), f"{name}.{norm}.bias": (channels[layer],)}
        for mlp, sizes in (("mlp1", tokens), ("mlp2", channels)):
            before, after = sizes[layer], sizes[layer + 1]
            shapes[f"{name}.{mlp}.mm_projector.0.weight"] = (after, before)
            shapes[f"{name}.{mlp}.mm_projector.0.bias"] = (after,)
            shapes[f"{name}.{mlp}.mm_projector.1.1.weight"] = (after, after)
            shapes[f"{name}.{mlp}.mm_projector.1.1.bias"] = (after,)
    return shapes


def mixer_forward(state: Mapping[str, Tensor], stream: str, tokens: Tensor, layers: int = 2) -> Tensor:
    """Published projector stream on (B, n, C)."""

    def mlp(values: Tensor, name: str) -> Tensor:
        for linear in ("0", "1.1"):
            weight, bias = (state[f"{name}.mm_projector.{linear}.{part}"] for part in ("weight", "bias"))
            values = functional.linear(functional.gelu(values) if linear == "1.1" else values, weight, bias)
        return values

    for layer in range(layers):
        name = f"model.mm_projector.{stream}_mixer.{layer}"
        for norm, part in (("ln1", "mlp1"), ("ln2", "mlp2")):
            gain, shift = (state[f"{name}.{norm}.{end}"] for end in ("weight", "bias"))
            tokens = functional.layer_norm(tokens, tokens.shape[-1:], gain, shift)
            if part == "mlp1":
                tokens = mlp(tokens.transpose(1, 2), f"{name}.{part}").transpose(1, 2)
            else:
                tokens = mlp(tokens, f"{name}.{part}")
    return tokens


# --- Qwen2.5 ----------------------------------------------------------------------------------------------------------


def qwen_shapes(
    vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of ``Qwen2ForCausalLM`` as stored; the head only where it is not tied."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    inner = hidden // heads * kv_heads
    for layer in range(layers):
        name = f"model.layers.{layer}"
        for part, rows in (("q", hidden), ("k", inner), ("v", inner)):
            shapes[f"{name}.self_attn.{part}_proj.weight"] = (rows, hidden)
            shapes[f"{name}.self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{name}.self_attn.o_proj.weight"] = (hidden, hidden)
        shapes |= {f"{name}.mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, ffn)
        shapes |= {f"{name}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    return shapes if tied else {**shapes, "lm_head.weight": (vocabulary, hidden)}


def qwen_config(vocabulary: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, tied: bool) -> Any:
    """``config.json`` of a Qwen2.5 folder."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 32768,
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        "vocab_size": vocabulary,
    }


def qwen_tokenizer(folder: Path, extra: Sequence[str] = ()) -> int:
    """Write a ``tokenizer.json`` of the Qwen2.5 kind: byte-level, special tokens behind the vocabulary."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator(["liver and spleen", "the liver, the spleen"], trainer)
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>")])
    fast.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<|im_end|>", *extra)])
    fast.add_tokens([AddedToken("<tool_call>", normalized=False)])
    fast.save(str(folder / "tokenizer.json"))
    return int(fast.get_vocab_size())


def split_tokenizer(folder: Path) -> None:
    """Replace ``tokenizer.json`` by what transformers' slow tokenizers wrote: vocabulary, merges, special tokens."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(folder / "vocab.json", content["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    added = {str(token.pop("id")): token for token in content["added_tokens"]}
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": added, **ends})
    (folder / "tokenizer.json").unlink()


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")
