"""Quantised sources: codes and scales are the numbers that they stand for, and a pack to a budget takes these."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
st = pytest.importorskip("safetensors.torch")

import quantised_models  # noqa: E402
import rac  # noqa: E402
from rac.cli import main  # noqa: E402
from rac.dequantise.found import TABLES  # noqa: E402
from rac.encode.sources import open_source  # noqa: E402
from rac.errors import BudgetError, SourceError  # noqa: E402
from rac.frameworks import to_framework  # noqa: E402
from rac.study.compare import compare  # noqa: E402
from support import models  # noqa: E402

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A tiny model with matrices whose sides no block divides."""
    folder = tmp_path_factory.mktemp("plain")
    models.write("llama", folder)
    return folder


@pytest.fixture(scope="module")
def made(plain, tmp_path_factory):
    """Makes the quantised versions of the model, once each."""
    there = {}

    def make(scheme):
        if scheme not in there:
            there[scheme] = quantised_models.make(scheme, plain, tmp_path_factory.mktemp("made") / scheme)
        return there[scheme]

    return make


def scaled(t, codes, scale):
    """Element by element, in float64."""
    w, s = t[codes].double(), t[scale].double()
    s = s.reshape(s.shape if s.dim() == 2 else (1, 1))
    out = torch.empty_like(w)
    high, wide = (n if s.shape[i] == 1 else (1 if s.shape[i] == n else 128) for i, n in enumerate(w.shape))
    for i in range(w.shape[0]):
        for j in range(0, w.shape[1], wide):
            out[i, j : j + wide] = w[i, j : j + wide] * s[i // high, j // wide]
    return out


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E2M1 += [-x for x in E2M1]


def bits_of(word, i, bits):
    """Integer `i` of words that are read as one number."""
    whole = sum((int(w) & 0xFFFFFFFF) << 32 * k for k, w in enumerate(word))
    return whole >> bits * i & (1 << bits) - 1


def table(shape, value):
    """A matrix from a function of row and column."""
    return torch.tensor([[float(value(i, j)) for j in range(shape[1])] for i in range(shape[0])], dtype=torch.float64)


def floats4(t, codes, scale, group):
    """E2M1 in halves of bytes."""
    c, s = t[codes].tolist(), scale.double().tolist()
    return table((len(c), 2 * len(c[0])), lambda i, j: E2M1[c[i][j // 2] >> 4 * (j % 2) & 15] * s[i][j // group])


def modelopt(t, n):
    return floats4(t, f"{n}.weight", t[f"{n}.weight_scale"].double() * t[f"{n}.weight_scale_2"].double(), 16)


def divided(t, n):
    scale = t[f"{n}.weight_scale"].double() / t[f"{n}.weight_global_scale"].double()
    return floats4(t, f"{n}.weight_packed", scale, 16)


def gptq(t, n, bits, more):
    columns, zeros = t[f"{n}.qweight"].T.tolist(), t[f"{n}.qzeros"].tolist()
    scales, groups = t[f"{n}.scales"].double().tolist(), t[f"{n}.g_idx"].tolist()
    high = [bits_of(row, j, bits) for row in zeros for j in range(len(columns))]

    def value(i, j):
        g = groups[j]
        return scales[g][i] * (bits_of(columns[i], j, bits) - high[g * len(columns) + i] - more)

    return table((len(columns), len(groups)), value)


def awq(t, n):
    codes, zeros, scales = (t[f"{n}.{p}"].tolist() for p in ("qweight", "qzeros", "scales"))
    place = {c: p for p, c in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}  # column in nibble p

    def at(rows, i, j):
        return rows[i][j // 8] >> 4 * place[j % 8] & 15

    return table(
        (len(scales[0]), len(codes)), lambda j, i: scales[i // 32][j] * (at(codes, i, j) - at(zeros, i // 32, j))
    )


def int4(t, n):
    codes, scales = t[f"{n}.weight_packed"].tolist(), t[f"{n}.weight_scale"].double().tolist()
    zero = t.get(f"{n}.weight_zero_point")

    def value(i, j):
        z = 8 if zero is None else int(zero[i // 8, j // 32]) >> 4 * (i % 8) & 15
        return scales[i][j // 32] * ((codes[i][j // 8] >> 4 * (j % 8) & 15) - z)

    return table(t[f"{n}.weight_shape"].tolist(), value)


def nf4(t, n):
    w = f"{n}.weight"
    state = json.loads(bytes(t[f"{w}.quant_state.bitsandbytes__nf4"].tolist()))
    codes, most, (rows, cols) = t[w].flatten().tolist(), t[f"{w}.absmax"].tolist(), state["shape"]
    outer, inner, top = (t[f"{w}.{p}"].double().tolist() for p in ("quant_map", "nested_quant_map", "nested_absmax"))

    def value(i, j):
        k = i * cols + j
        scale = inner[most[k // 64]] * top[k // 64 // 256] + state["nested_offset"]
        return outer[codes[k // 2] >> 4 * (1 - k % 2) & 15] * scale

    return table((rows, cols), value)


REFERENCES = {
    "fp8": lambda t, n: scaled(t, f"{n}.weight", f"{n}.weight_scale_inv"),
    "fp8-row": lambda t, n: scaled(t, f"{n}.weight", f"{n}.weight_scale"),
    "fp8-tensor": lambda t, n: scaled(t, f"{n}.weight", f"{n}.weight_scale"),
    "fp8-e5m2": lambda t, n: scaled(t, f"{n}.weight", f"{n}.weight_scale"),
    "int8": lambda t, n: scaled(t, f"{n}.weight", f"{n}.weight_scale"),
    "mxfp4": lambda t, n: floats4(t, f"{n}.weight_packed", 2.0 ** (t[f"{n}.weight_scale"].double() - 127), 32),
    "nvfp4": modelopt,
    "nvfp4-packed": divided,
    "gptq": lambda t, n: gptq(t, n, 4, 1),
    "gptq-3": lambda t, n: gptq(t, n, 3, 0),
    "awq": awq,
    "int4": int4,
    "int4-zero": int4,
    "nf4": nf4,
}


def dense(folder):
    """Logical tensors of a folder, by name."""
    source = open_source(folder, dequantise=True)
    return {t.name: to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "pt") for t in source.tensors}, source


def test_every_scheme_has_a_reference():
    assert REFERENCES.keys() == quantised_models.SCHEMES.keys()


@pytest.mark.parametrize("scheme", REFERENCES)
def test_numbers_are_those_of_the_reference(scheme, made, plain):
    stored = st.load_file(made(scheme) / "model.safetensors")
    found, source = dense(made(scheme))
    original = st.load_file(plain / "model.safetensors")
    assert found.keys() == original.keys()
    for name, w in original.items():
        if name in stored and stored[name].dtype == w.dtype:  # not quantised
            assert torch.equal(found[name], stored[name])
            continue
        want = REFERENCES[scheme](stored, name.removesuffix(".weight"))
        # one rounding to BF16, or two where the product was rounded to float32 before
        assert torch.allclose(found[name].double(), want, rtol=2**-8 + 2**-20, atol=0), name
        assert (found[name].double() - want).norm() / want.norm() < 2**-8
        assert (found[name].float() - w.float()).norm() / w.float().norm() < 0.25  # and close to the original
    q = next(t for t in source.tensors if t.name == f"{Q}.weight")
    for a, b in ((0, 1), (3, 1000), (254, 260), (q.nbytes - 7, q.nbytes)):  # bytes from anywhere
        assert q.read(a, b).tobytes() == q.read(0, q.nbytes)[a:b].tobytes()


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "mxfp4", "nvfp4", "gptq", "awq", "nf4"])
def test_lossless_and_lossy(scheme, made, tmp_path, capsys):
    folder = made(scheme)
    assert main(["pack", str(folder), "-o", str(tmp_path / "whole.rac")]) == 0
    rac.verify(tmp_path / "whole.rac", folder)
    assert "dequantised" not in capsys.readouterr().out
    assert (
        main(
            [
                "pack",
                str(folder),
                "-o",
                str(tmp_path / "m.rac"),
                "--bits",
                "3",
                "--effort",
                "fast",
                "--calibrate",
                "none",
            ]
        )
        == 0
    )
    assert "tensors read as BF16; stored were" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "m.rac"), "--against", str(folder)]) == 0
    assert f"dB from what the codes of {folder} stand for" in capsys.readouterr().out
    found = rac.verify(tmp_path / "m.rac", folder)
    assert found.lossy == 11  # ten layers, and the embedding
    assert found.snr > 10
    model, numbers = rac.load_model(tmp_path / "m.rac"), dense(folder)[0]
    assert model.state_dict().keys() >= numbers.keys()
    error = sum(float((model.get_parameter(n).detach().float() - w.float()).square().sum()) for n, w in numbers.items())
    assert error < 0.1 * sum(float(w.float().square().sum()) for w in numbers.values())
    rac.unpack(tmp_path / "m.rac", tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_calibrated_is_what_the_dequantised_folder_gives(made, tmp_path):
    folder, numbers = made("fp8"), dense(made("fp8"))[0]
    (tmp_path / "text.txt").write_text(models.TEXT)
    shutil.copytree(folder, tmp_path / "dense")
    st.save_file(numbers, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config, indent=2))
    asked = {"calibrate": tmp_path / "text.txt", "tokens": 300, "bits": 4, "effort": "fast"}
    for name, src in (("a", folder), ("b", tmp_path / "dense")):
        rac.pack(src, tmp_path / f"{name}.rac", **asked)
    a, b = (rac.load_file(tmp_path / f"{name}.rac") for name in "ab")
    assert a.keys() == b.keys()
    for name, w in a.items():
        assert np.array_equal(w.view(np.uint16), b[name].view(np.uint16)), name


def test_a_divergence_is_from_the_dequantised_model(made, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(models.TEXT)
    text = str(tmp_path / "text.txt")
    asked = ["--kl", "0.2", "--calibrate", text, "--tokens", "128", "--effort", "fast", "--cache", "none"]
    assert main(["pack", str(made("fp8")), "-o", str(tmp_path / "m.rac"), *asked, "--measure", text]) == 0
    assert "KL 0." in capsys.readouterr().out


def broken(source, out, change):
    shutil.copytree(source, out)
    tensors = st.load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    change(tensors, config)
    st.save_file(tensors, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(config))
    return out


def no_scale(tensors, config):
    del tensors[f"{Q}.weight_scale_inv"]


def odd_scale(tensors, config):
    tensors[f"{Q}.weight_scale_inv"] = torch.ones(3, 5)


def unknown(tensors, config):
    config["quantization_config"] = {"quant_method": "hqq"}


def unexplained(tensors, config):
    tensors["model.codes"] = torch.zeros(256, 256, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (no_scale, f"'{Q}.weight' (F8_E4M3 [128, 128]) has no scale: '{Q}.weight_scale_inv' or"),
        (odd_scale, "does not fit the shape [3, 5] of its scales"),
        (unknown, "names the quantisation 'hqq', known are"),
        (unexplained, "'model.codes' (U8 [256, 256]) is not understood as weights of 'fp8'"),
    ],
)
def test_refused_in_one_line(change, what, made, tmp_path, capsys):
    folder = broken(made("fp8"), tmp_path / "m", change)
    with pytest.raises(SourceError) as e:
        rac.pack(folder, tmp_path / "m.rac", bits=4, calibrate="none")
    assert what in str(e.value)
    assert "\n" not in str(e.value)
    assert not (tmp_path / "m.rac").exists()
    rac.pack(folder, tmp_path / "m.rac")  # lossless asks nothing
    rac.verify(tmp_path / "m.rac", folder)


def test_eight_bit_floats_without_scales_are_numbers(tmp_path):
    w = torch.randn(160, 128).to(torch.float8_e4m3fn)
    st.save_file({"w": w}, tmp_path / "w.safetensors")
    assert torch.equal(dense(tmp_path / "w.safetensors")[0]["w"], w.bfloat16())


def test_f64_is_quantised_like_f32(tmp_path):
    w = torch.randn(160, 128, dtype=torch.float64)
    st.save_file({"w": w, "small": w[0].clone()}, tmp_path / "a.safetensors")
    st.save_file({"w": w.float(), "small": w[0].clone()}, tmp_path / "b.safetensors")
    for name in "ab":
        rac.pack(tmp_path / f"{name}.safetensors", tmp_path / f"{name}.rac", bits=4)
        rac.verify(tmp_path / f"{name}.rac", tmp_path / f"{name}.safetensors")
    a, b = (rac.load_file(tmp_path / f"{name}.rac") for name in "ab")
    assert a["small"].dtype == np.float64
    assert np.array_equal(a["w"], b["w"])


def test_what_is_there_is_said_where_nothing_can_be_quantised(tmp_path):
    tensors = {"i": torch.zeros(200, 200, dtype=torch.int32), "embed": torch.randn(200, 200), "v": torch.randn(9)}
    st.save_file({**tensors, "w": torch.randn(200, 200)}, tmp_path / "w.safetensors")
    with pytest.raises(BudgetError) as e:
        rac.pack(tmp_path / "w.safetensors", tmp_path / "w.rac", bits=4, keep=["w"], embeddings=False)
    for what in ("of 4 tensors", "1 are of I32", "1 are kept by --keep", "1 are embeddings", "1 are vectors or small"):
        assert what in str(e.value)


def test_experts_of_gpt_oss(tmp_path):
    transformers_mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    w = torch.randn(3, 96, 64)
    stored = {n: t.contiguous() for n, t in quantised_models.experts("layers.0.mlp.experts.gate_up_proj", w).items()}
    st.save_file(stored, tmp_path / "m.safetensors")
    found, source = dense(tmp_path / "m.safetensors")
    (name,) = found
    assert name == "layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(found[name], transformers_mxfp4.convert_moe_packed_tensors(*stored.values()))
    (t,) = source.tensors
    for a, b in ((1, 2), (1000, 20000), (5, 36001)):
        assert t.read(a, b).tobytes() == t.read(0, t.nbytes)[a:b].tobytes()
    rac.pack(tmp_path / "m.safetensors", tmp_path / "m.rac", bits=4, effort="fast")
    assert rac.verify(tmp_path / "m.rac", tmp_path / "m.safetensors").lossy == 1
    assert list(rac.load_file(tmp_path / "m.rac")) == [name]


@pytest.mark.parametrize("missing", ["scales", "absmax", "quant_map", "weight_scale", "blocks"])
def test_a_part_that_is_missing_is_named(missing, tmp_path):
    w = torch.randn(64, 128)
    parts = quantised_models.gptq("a", w) | quantised_models.nf4("b", w) | quantised_models.mxfp4("c", w)
    parts |= quantised_models.experts("d", torch.randn(2, 32, 16))
    name = next(n for n in (f"a.{missing}", f"b.weight.{missing}", f"c.{missing}", f"d_{missing}") if n in parts)
    del parts[name]
    st.save_file({n: t.contiguous() for n, t in parts.items()}, tmp_path / "m.safetensors")
    if missing == "blocks":  # scales alone are no matrix
        assert {"a.weight", "b.weight", "c.weight", "d_scales"} == dense(tmp_path / "m.safetensors")[0].keys()
        return
    with pytest.raises(SourceError, match=f"'{name}'.* is missing"):
        open_source(tmp_path / "m.safetensors", dequantise=True)


def test_blocks_of_gguf(tmp_path):
    gguf = pytest.importorskip("gguf")
    rng, q = np.random.default_rng(0), gguf.GGMLQuantizationType
    w = {f"blk.{i}.ffn_up.weight": rng.standard_normal((160, 256)).astype(np.float32) for i in range(3)}
    kinds = dict(zip(w, (q.Q8_0, q.Q4_1, q.Q6_K), strict=True))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_file_type(15)
    numbers = {}
    for name, kind in kinds.items():
        if kind is q.Q6_K:  # gguf cannot make these: six-bit codes and eight-bit scales are what they are
            blocks = rng.integers(0, 255, (160, 210)).astype(np.uint8)
            blocks[:, -2:] = np.full(160, 1e-3, "<f2").view(np.uint8).reshape(160, 2)
        else:
            blocks = gguf.quants.quantize(w[name], kind)
        numbers[name] = gguf.quants.dequantize(blocks, kind)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", np.ones(7, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, source = dense(tmp_path / "m.gguf")
    assert source.dequantised == ("GGUF Q4_1", "GGUF Q6_K", "GGUF Q8_0")
    for name, want in numbers.items():
        assert torch.equal(found[name], torch.from_numpy(want).bfloat16())
    rac.pack(tmp_path / "m.gguf", tmp_path / "m.rac", bits=4, effort="fast")
    assert rac.verify(tmp_path / "m.rac", tmp_path / "m.gguf").lossy == 3
    (out,) = rac.unpack(tmp_path / "m.rac", tmp_path / "out.gguf")
    reader = gguf.GGUFReader(out)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_BF16
    packed = rac.load_file(tmp_path / "m.rac", framework="pt")
    for t in reader.tensors:
        assert t.tensor_type == (q.F32 if t.name == "output_norm.weight" else q.BF16)
        assert t.data.tobytes() == packed[t.name].contiguous().view(torch.uint8).numpy().tobytes()


def test_named_methods_and_comparisons_take_the_numbers(made, tmp_path, capsys):
    folder, text = made("nvfp4"), tmp_path / "text.txt"
    text.write_text(models.TEXT)
    rac.pack(folder, tmp_path / "whole.rac")
    with pytest.warns(UserWarning, match="NVFP4 .* loaded as the numbers"):
        want = models.logits(rac.load_model(tmp_path / "whole.rac")).float()
    for recipe in ("rtn", "quarot"):
        out = tmp_path / f"{recipe}.rac"
        asked = ["--recipe", recipe, "--bits", "8", "--group", "32", "--calibrate", str(text), "--tokens", "256"]
        assert main(["pack", str(folder), "-o", str(out), *asked]) == 0
        assert (models.logits(rac.load_model(out)).float() - want).norm() < 0.05 * want.norm()
    *_, exact, row = compare(folder, [tmp_path / "whole.rac", tmp_path / "rtn.rac"])
    assert exact.snr is None  # no error at all
    assert row.snr > 35


@pytest.mark.parametrize(
    "kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"]
)
def test_values_of_eight_bit_floats(kind):
    dtype = getattr(torch, kind)
    name = {"float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}.get(kind, f"F8_{kind[7:].upper()}")
    want = torch.arange(256).to(torch.uint8).view(dtype).float().numpy()
    assert np.array_equal(TABLES[name], want, equal_nan=True)


def powers(*shape):
    return torch.randint(120, 130, shape, dtype=torch.uint8)


E8M0 = torch.float8_e8m0fnu
OTHERS = {
    "a scale for each expert": (torch.randn(3, 160, 96).to(torch.float8_e4m3fn), torch.rand(3)),
    "blocks of each expert": (torch.randn(2, 160, 96).to(torch.float8_e4m3fn), torch.rand(2, 2, 1)),
    "columns of each expert": (torch.randn(2, 96, 160).to(torch.float8_e5m2), torch.rand(2, 1, 160)),
    "exponents": (torch.randn(256, 160).to(torch.float8_e4m3fn), powers(2, 2).view(E8M0)),
    "exponents in bytes": (torch.randn(160, 96).to(torch.float8_e4m3fn), powers(160, 3)),
    "FNUZ": (torch.randn(160, 96).to(torch.float8_e4m3fnuz), torch.rand(160, 1)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_scales(what, tmp_path):
    codes, scale = OTHERS[what]
    st.save_file({"w.weight": codes, "w.weight_scale": scale}, tmp_path / "m.safetensors")
    found = dense(tmp_path / "m.safetensors")[0]["w.weight"].float()
    s = scale.float() if scale.dtype != torch.uint8 else 2.0 ** (scale.float() - 127)
    s = s.reshape(*s.shape, *[1] * (codes.dim() - s.dim()))
    for axis in (-2, -1):
        n = codes.shape[axis]
        side = {1: n, n: 1}.get(s.shape[axis], 128 if what != "exponents in bytes" else 32)
        s = s.repeat_interleave(side, axis).narrow(axis, 0, n)
    assert torch.equal(found, (codes.float() * s).bfloat16().float())


@pytest.mark.parametrize("kind", ["F4", "I8"])
def test_pairs_of_other_types(kind, tmp_path):
    """F4 of torch, and DeepSeek-V4's experts: I8 with `.scale`."""
    want = quantised_models.mxfp4("w", torch.randn(96, 128))
    st.save_file(want, tmp_path / "a.safetensors")
    codes, scale = want["w.weight_packed"], want["w.weight_scale"].view(E8M0)
    parts = {"w.weight": codes.view(torch.int8), "w.scale": scale}
    if kind == "F4":
        parts = {"w.weight": codes.view(torch.float4_e2m1fn_x2), "w.weight_scale": scale}
    st.save_file(parts, tmp_path / "b.safetensors")
    a, b = (dense(tmp_path / f"{n}.safetensors")[0] for n in "ab")
    assert list(b) == ["w.weight"]
    assert torch.equal(a["w.weight"], b["w.weight"])


def test_experts_of_gpt_oss_are_calibrated(tmp_path):
    small = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 64, "vocab_size": 256}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.GptOssConfig(**small, initializer_range=0.2, rope_parameters=rope, eos_token_id=0)
    transformers.GptOssForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    models.tokenizer().save_pretrained(tmp_path / "m")

    def change(tensors, stated):
        for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
            made = quantised_models.experts(name, tensors.pop(name).float())
            tensors |= {n: t.contiguous() for n, t in made.items()}
        stated["quantization_config"] = {"quant_method": "mxfp4"}

    folder = broken(tmp_path / "m", tmp_path / "q", change)
    (tmp_path / "text.txt").write_text(models.TEXT)
    done = rac.pack(folder, tmp_path / "q.rac", bits=3, calibrate=tmp_path / "text.txt", tokens=200, effort="fast")
    aligned = {f.name: f.alignment for f in done.fidelity}
    assert {aligned[f"model.layers.0.mlp.experts.{n}"] for n in ("gate_up_proj", "down_proj")} == {"triangular"}
    assert rac.verify(tmp_path / "q.rac", folder).lossy == len(aligned)


@pytest.mark.parametrize(("spread", "most"), [(0.0, 0.818), (0.5, 0.83)])
def test_lossless_size_of_fp8(spread, most, tmp_path):
    """A Gaussian of any deviation takes 6.47 of 8 bits (80.9 %): rows and columns of their own cost a bit more."""
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(1024, 1024, generator=rng)
    for shape in ((1024, 1), (1, 1024)):
        w = w * (spread * torch.randn(shape, generator=rng)).exp()
    rac.save_file({"w": quantised_models.fp8("w", w)["w.weight"]}, tmp_path / "w.rac")
    assert (tmp_path / "w.rac").stat().st_size <= most * w.numel()


DAMAGE = {
    "missing": None,
    "short": lambda t: t.flatten()[: t.numel() // 2].clone(),
    "turned": lambda t: t.reshape(t.shape[::-1]),
    "flat": lambda t: t.flatten(),
    "bytes": lambda t: torch.zeros(t.shape, dtype=torch.uint8),
    "empty": lambda t: t.flatten()[:0].clone(),
    "deep": lambda t: t[None, None],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_parts_are_numbers_or_one_line(damage, tmp_path):
    w = torch.randn(64, 128)
    refused = []
    for scheme, (quantise, stated) in quantised_models.SCHEMES.items():
        whole = quantise("a", w)
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": stated} if stated else {}))
        for name in whole:
            parts = {n: t for n, t in whole.items() if n != name}
            if DAMAGE[damage]:
                parts[name] = DAMAGE[damage](whole[name])
            st.save_file({n: t.contiguous() for n, t in parts.items()}, tmp_path / "model.safetensors")
            try:
                for t in open_source(tmp_path, dequantise=True).tensors:
                    assert len(t.read(0, t.nbytes)) == t.nbytes, (scheme, name)
            except SourceError as e:
                refused.append(str(e))
    assert len(refused) >= 5
    assert not [line for line in refused if "\n" in line]
