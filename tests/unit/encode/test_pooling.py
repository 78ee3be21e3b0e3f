"""How sentence encoders pool, what gradients of their embeddings come to, and the lengths that they read."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers.modeling_outputs import BaseModelOutputWithPooling  # noqa: E402

from rac.calibrate.endings import Embedding, Outputs, Predictions, ending  # noqa: E402
from rac.calibrate.pooling import LENGTHS, pooled, pooling, readings  # noqa: E402
from rac.calibrate.text import sequences  # noqa: E402
from rac.models.predictions import around  # noqa: E402
from support import models  # noqa: E402

MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
POOLING = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


def folder_of(path, config, modules=(POOLING,), architecture="BertModel"):
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return path


@pytest.mark.parametrize(
    ("config", "how"),
    [
        (MEAN, ["mean_tokens"]),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, ["cls_token", "max_tokens"]),
        ({"pooling_mode": "lasttoken"}, ["lasttoken"]),
        ({"pooling_mode": "mean"}, ["mean_tokens"]),
        ({"pooling_mode": ["cls", "mean_sqrt_len"]}, ["cls_token", "mean_sqrt_len_tokens"]),
        ({"pooling_mode_new_tokens": True}, []),
        ([1], []),
        ("{", []),
    ],
)
def test_what_a_folder_says(tmp_path, config, how):
    assert pooling(folder_of(tmp_path, config)) == how


@pytest.mark.parametrize(
    "modules", [[], [{"path": "1_Pooling"}], {"a": 1}, [{"path": "gone", "type": "a.Pooling"}], None]
)
def test_modules_that_say_nothing(tmp_path, modules):
    assert pooling(folder_of(tmp_path, MEAN, modules)) == []


def test_a_language_model_predicts(tmp_path):
    assert pooling(tmp_path) == [] == pooling(folder_of(tmp_path, MEAN, architecture="Qwen3ForCausalLM"))


def test_pooled():
    hidden = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    x, places = hidden.numpy(), np.arange(1, 6)[:, None] / 15
    expected = {
        "cls_token": x[0],
        "lasttoken": x[-1],
        "mean_tokens": x.mean(0),
        "mean_sqrt_len_tokens": x.mean(0),
        "max_tokens": x.max(0),
        "weightedmean_tokens": (x * places).sum(0),
    }
    for how, each in expected.items():
        np.testing.assert_allclose(pooled(hidden, [how]).numpy(), each / np.linalg.norm(each), rtol=1e-5)
    both = np.concatenate([x[0], x.max(0)])
    np.testing.assert_allclose(
        pooled(hidden, ["cls_token", "max_tokens"]).numpy(), both / np.linalg.norm(both), rtol=1e-5
    )


def output(hidden):
    return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=7 * hidden[:, 0])


def squares(end, hidden, out, draws=3000):
    total = torch.zeros_like(hidden)
    for sequence in range(draws):
        leaf = hidden.clone().requires_grad_(True)
        end.backward(out(leaf), sequence, 0, None)
        total += leaf.grad.square()
    return total.numpy() / draws


def test_gradients_of_embeddings():
    """Their mean square is that of all rows of the Jacobian: each sequence has a projection of its own."""
    hidden = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(2))
    how = ["mean_tokens"]
    jacobian = torch.autograd.functional.jacobian(lambda h: pooled(h[0], how), hidden)
    exact = jacobian.square().sum(0).numpy()
    np.testing.assert_allclose(squares(Embedding(how), hidden, output), exact, rtol=0.15)


def test_gradients_of_outputs():
    """Relative errors of each tensor that comes out."""
    hidden = torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(3))
    exact = np.full(hidden.shape, 2 / float(hidden.square().sum()))
    found = squares(Outputs(), hidden, lambda h: {"a": h, "b": (7 * h, torch.zeros(3))})
    np.testing.assert_allclose(found, exact, rtol=0.15)
    with_pooled = squares(Outputs(), hidden, output)
    np.testing.assert_allclose(with_pooled, exact / 2, rtol=0.15)
    with pytest.raises(RuntimeError, match="no output"):
        Outputs().backward({"a": torch.zeros(3)}, 0, 0, None)


def test_endings():
    encoder, decoder, both = (make() for make in (models.bert, models.llama, models.t5))
    assert isinstance(ending(encoder, False, 8, ["cls_token"]), Embedding)
    assert type(ending(encoder, False, 8, [])) is Outputs
    assert isinstance(ending(decoder, True, 8, []), Predictions)
    assert isinstance(ending(both, False, 8, []), Predictions)


def test_readings(tmp_path):
    """Every length has a part of the text, which they share whole."""
    text = "".join(chr(97 + i % 26) for i in range(40_000))
    assert readings(tmp_path, text, 4000, 512) == [(text, 4000, 512)]
    folder = folder_of(tmp_path, MEAN)
    found = readings(folder, text, 3000, 1024)
    assert "".join(part for part, _, _ in found) == text
    assert [(n, length) for _, n, length in found] == [(1000, length) for length in LENGTHS]
    assert [length for *_, length in readings(folder, text, 3000, LENGTHS[1])] == list(LENGTHS[:2])
    assert [length for *_, length in readings(folder, text[:20_000], 3000, 1024)] == list(LENGTHS[-2:])
    assert readings(folder, text[:9000], 4000, 1024) == [(text[:9000], 4000, LENGTHS[-1])]
    assert readings(folder, None, 4000, 1024) == [(None, 4000, 1024)]


def test_what_a_tokenizer_puts_around_a_text():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = models.tokenizer(begin=True)
    assert around(tokenizer) == (tokenizer("a").input_ids[:1], [])
    both = tokenizers.processors.TemplateProcessing(single="! $0 ! !", special_tokens=[("!", 0)])
    tokenizer.backend_tokenizer.post_processor = both
    assert around(tokenizer) == ([0], [0, 0])
    found = sequences(np.arange(10, 200), 64, 16, *around(tokenizer))
    assert found.shape == (4, 16) and not found[:, [0, -1, -2]].any()
    np.testing.assert_array_equal(found[:, 1:-2].ravel(), np.arange(10, 62))
