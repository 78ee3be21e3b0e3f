"""The search for SmoothQuant's alpha: against smoothing a model for real, and what it must find."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rac.errors import TransformError
from rac.methods import transforms as tf
from rac.methods.gptq import rtn
from rac.methods.smoothquant import choose, smoothquant
from rac.methods.transforms.smooth import PLACES
from rac.models.activations import per_token
from rac.stages.groups import values
from support import models

IDS = torch.arange(40).reshape(2, 20) * 7 % 251


def make(outliers=1.0):
    """Gains of the norms make some channels large."""
    torch.manual_seed(0)
    model = models.llama(tie_word_embeddings=False).eval()
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data[::16] *= outliers
    return model


def by_hand(model, alpha, bits, activations):
    """Mean relative error of the outputs of the layers behind norms, of a copy that is smoothed."""
    model, p = copy.deepcopy(model), None
    inputs = {}
    names = [
        f"model.layers.{i}.{n}" for i in range(2) for n in tf.RULES["llama"].attention_in + tf.RULES["llama"].mlp_in
    ]

    def see(name):
        return lambda _, args: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).double())

    hooks = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    p = tf.parts(model)
    tf.smooth(p, tf.maxima(p, [IDS]), alpha)
    tf.logits(model, IDS)
    for hook in hooks:
        hook.remove()
    errors = []
    for name in names:
        w = model.get_submodule(name).weight.detach().double()
        stored = torch.from_numpy(values(rtn(w.numpy(), bits, None, symmetric=True))).double()
        want = inputs[name] @ w.T
        errors.append(
            float((per_token(inputs[name], activations) @ stored.T - want).square().sum() / want.square().sum())
        )
    return np.mean(errors)


def how(bits=8, activations=8):
    return partial(rtn, bits=bits, group=None, symmetric=True), activations


def test_errors_are_those_of_a_smoothed_model():
    model = make(20)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    p = tf.parts(model)
    best, errors = choose(p, tf.maxima(p, [IDS]), [IDS], *how(6, 5), [0.0, 0.5, 1.0])
    for alpha, error in errors.items():
        assert error == pytest.approx(by_hand(model, alpha, 6, 5), rel=0.02)
    assert best == min(errors, key=errors.get)
    assert all(torch.equal(w, before[n]) for n, w in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules()) and p.about == {}


def test_outliers_go_into_the_weights():
    """With outliers, and activations quantised, smoothing pays; with weights alone it does not pay to go as far."""
    p = tf.parts(make(50))
    found = tf.maxima(p, [IDS])
    best, errors = choose(p, found, [IDS], *how())
    assert best >= 0.4 and errors[best] < 0.3 * errors[0.0]
    only, errors = choose(p, found, [IDS], *how(4, None), [0.0, 0.5, 0.9])
    assert only <= best and errors[0.9] > errors[only]


def test_all_places():
    p = tf.parts(make(20))
    _, errors = choose(p, tf.maxima(p, [IDS]), [IDS], *how(), [0.5], PLACES)
    assert 0 < errors[0.5] < 0.1


def test_the_whole_method():
    """What is found is what is done, and the model computes what it did."""
    want, _ = choose(tf.parts(make(50)), tf.maxima(tf.parts(make(50)), [IDS]), [IDS], *how())
    model = make(50)
    before, p = tf.logits(model, IDS), tf.parts(model)
    assert smoothquant(p, iter([IDS])) == want
    assert p.about["transforms"] == [f"smooth {want:g} attention mlp"] and tf.require_same(before, p, IDS) < 1e-5
    assert smoothquant(tf.parts(make()), [IDS], 0.25) == 0.25


def test_what_is_refused():
    p = tf.parts(make())
    found = tf.maxima(p, [IDS])
    for wrong in ({"alphas": []}, {"alphas": [1.5]}, {"places": ["nowhere"]}):
        with pytest.raises(ValueError, match="alphas"):
            choose(p, found, [IDS], *how(), **wrong)
    with pytest.raises(TransformError, match="sequences"):
        choose(p, found, [], *how())
    with pytest.raises(TransformError, match="not known"):
        choose(p, {}, [IDS], *how())
