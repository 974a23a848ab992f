import jax
import numpy as np
import pytest
from tiny import make_model, random_batch, run

from llm_jax.objectives import causal_lm


def test_loss_is_the_weighted_mean_cross_entropy():
    model, batch = make_model(), random_batch()
    output = causal_lm.make(causal_lm.Config()).loss(model, batch, key=None, train=False)
    log_p = jax.nn.log_softmax(run(model, batch).logits)
    at_target = np.take_along_axis(np.asarray(log_p), batch["targets"][..., None], -1)[..., 0]
    weights = batch["loss_weights"]
    assert 0 < weights.sum() < weights.size
    assert float(output.loss.weight) == weights.sum()
    expected = -(at_target * weights).sum() / weights.sum()
    assert float(output.loss.mean) == pytest.approx(expected, rel=1e-5)


def test_z_loss_is_added_and_reported():
    model, batch = make_model(), random_batch()
    plain, with_z = (
        causal_lm.make(causal_lm.Config(z_loss=z)).loss(model, batch, key=None, train=True)
        for z in (0.0, 0.01)
    )
    log_z = jax.nn.logsumexp(run(model, batch).logits, -1)
    weights = batch["loss_weights"]
    z_loss = 0.01 * (np.asarray(log_z) ** 2 * weights).sum() / weights.sum()
    assert float(with_z.loss.mean - plain.loss.mean) == pytest.approx(z_loss, rel=1e-3)
    assert float(with_z.metrics["z_loss"].mean) == pytest.approx(z_loss, rel=1e-5)


def test_batch_spec_is_what_the_transform_makes():
    objective = causal_lm.make(causal_lm.Config())
    spec, batch = objective.batch_spec(8, 32), random_batch()
    assert {n: (s.shape, s.dtype) for n, s in spec.items()} == {
        n: (a.shape, a.dtype) for n, a in batch.items()
    }
