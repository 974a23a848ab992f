"""Certificates: what they hold, that a wrong export gets none, and that what was changed later is found."""

import dataclasses
import functools
import json
import shutil
import weakref

import jax
import numpy as np
import pytest
from exports import MODELS, certified, loaded_of
from flax import nnx
from safetensors.numpy import load_file, save_file

from llm_jax.core.config import ConfigError
from llm_jax.core.flags import RunError
from llm_jax.export import certificate, hf, quantized, stablehlo
from llm_jax.export.certificate import EXACT, Reference, verify
from llm_jax.export.certified import export_certified
from llm_jax.export.outputs import Figures, compared
from llm_jax.export.probes import NOTHING, forward_of, probes_for

QUIET = {"say": lambda text: None}


@functools.cache
def loaded(name):
    return loaded_of(MODELS[name])


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return certified(hf.make(**QUIET), loaded("llama"), tmp_path_factory.mktemp("c") / "out")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "out")


def content_of(folder):
    return json.loads((folder / certificate.NAME).read_text())


def rewrite(folder, change, *, seal=False):
    """Changes the certificate; `seal`: and the hash that it has of itself."""
    content = content_of(folder)
    change(content)
    if seal:
        content.pop("sha256")
        content["sha256"] = certificate._sha256_of(content)
    (folder / certificate.NAME).write_text(json.dumps(content))


def one_line(error) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_is_certified_by_what_it_computes(tmp_path, name):
    folder = certified(hf.make(**QUIET), loaded(name), tmp_path / "out")
    content = verify(folder)
    figures = content["figures"]
    outputs = {"bert": {"logits", "class_logits"}, "bert_classes": {"class_logits"},
               "sentences": {"hidden"}}  # fmt: skip
    assert figures.keys() == outputs.get(name, {"logits"})
    assert all(f["largest_difference"] == 0 for f in figures.values())
    if "logits" in figures:
        found = figures["logits"]
        # An untrained model knows nothing: the perplexity of a uniform guess is the number of ids.
        assert found["trained_perplexity"] == found["exported_perplexity"] > 100
        assert found["equal_tokens"] == 1
        assert found["predicted"] > 50
    assert set(content["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "README.md" not in content["files"]
    assert content["step"] == 3
    assert content["parameters"] == sum(x.size for x in jax.tree.leaves(params(loaded(name).model)))


def params(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def test_an_export_that_computes_something_else_gets_no_name(tmp_path, monkeypatch):
    exporter = hf.make(**QUIET)
    load_back = exporter.load_back

    def another(directory):
        forward = load_back(directory)
        return lambda batch: {
            k: x + 0.1 * (np.arange(x.shape[-1]) == 7) for k, x in forward(batch).items()
        }

    monkeypatch.setattr(exporter, "load_back", another)
    with pytest.raises(RunError, match=r"largest difference 0\.1 exceeds") as error:
        certified(exporter, loaded("llama"), tmp_path / "out")
    one_line(error)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_is_no_number_holds_nothing(tmp_path, monkeypatch):
    exporter = quantized.make(**QUIET)
    monkeypatch.setattr(
        exporter,
        "load_back",
        lambda folder: lambda batch: {"logits": np.full((1, 128, 264), np.nan)},
    )
    with pytest.raises(RunError, match="KL divergence nan"):
        certified(exporter, loaded("llama"), tmp_path / "out")


@pytest.mark.parametrize("answer", [{}, {"logits": np.zeros((1, 128, 7), np.float32)}])
def test_an_answer_of_another_kind_is_none(tmp_path, monkeypatch, answer):
    exporter = hf.make(**QUIET)
    monkeypatch.setattr(exporter, "load_back", lambda folder: lambda batch: answer)
    with pytest.raises(RunError, match="does not compute logits"):
        certified(exporter, loaded("llama"), tmp_path / "out")


def test_rows_where_the_trained_model_is_not_finite_are_left_out(tmp_path):
    it = loaded_of(MODELS["llama"])
    tokens = probes_for(it.model, it.run, it.tokenizer, None).inputs["tokens"]
    broken = next(i for i in tokens[4] if i not in tokens[:4])
    it.trained.embed[...] = it.trained.embed[...].at[broken].set(np.nan)
    content = verify(certified(hf.make(**QUIET), it, tmp_path / "out"))
    rows = sum(broken not in row for row in tokens)
    assert content["figures"]["logits"]["positions"] == rows * tokens.shape[1] < tokens.size


def test_a_model_without_numbers_is_not_certified(tmp_path):
    it = loaded_of(MODELS["llama"])
    it.trained.embed[...] = it.trained.embed[...].at[ord("e")].set(np.nan)
    with pytest.raises(RunError, match="logits are not finite on every text: there is nothing"):
        certified(hf.make(**QUIET), it, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RunError, match="logits are not finite anywhere: there is nothing"):
        certificate._check("logits", Figures(0, 0.0, 0.0), EXACT)


def test_another_machine_may_round_as_the_format_does(tmp_path):
    rng = np.random.default_rng(0)
    logits = 0.1 * rng.standard_normal((1, 200, 30)).astype(np.float32)
    answers = [{"logits": logits}]
    _, digest = compared("logits", [(answers[0], answers[0])], np.zeros((1, 200), np.int32))
    rounded = [{"logits": logits + np.float32(0.004)}]  # bfloat16 from one program to another
    exact, loose = (
        stablehlo.make(stablehlo.Config(compute_dtype=dtype), **QUIET).tolerances.elsewhere
        for dtype in ("float32", "bfloat16")
    )
    certificate._check_answers(tmp_path, "logits", digest, rounded, loose)
    with pytest.raises(RunError, match="logits are not those that were certified"):
        certificate._check_answers(tmp_path, "logits", digest, rounded, exact)
    wrong = [{"logits": logits + np.float32(0.04)}]
    with pytest.raises(RunError, match="logits are not those that were certified"):
        certificate._check_answers(tmp_path, "logits", digest, wrong, loose)


def test_a_flipped_weight_is_found(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"].view(np.uint32)[5] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        RunError, match=r"model\.safetensors (is not what was|has .* bytes)"
    ) as error:
        verify(folder)
    one_line(error)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_changed_file_is_named(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[40] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(RunError, match=rf"{name} is not what was certified: another SHA-256"):
        verify(folder)
    (folder / name).write_bytes(content + b" ")
    with pytest.raises(RunError, match=rf"{name} has .* bytes, and what was certified"):
        verify(folder)


def test_the_card_is_its_readers_to_complete(folder):
    with (folder / "README.md").open("a") as card:
        card.write("\n## Licence\n\nMIT\n")
    verify(folder)
    (folder / "README.md").unlink()
    verify(folder)


def test_missing_and_added_files_are_named(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("hidden")
    verify(folder)
    (folder / "malware.py").write_text("")
    with pytest.raises(RunError, match=r"has beside what was certified malware\.py"):
        verify(folder)
    (folder / "malware.py").unlink()
    (folder / "generation_config.json").unlink()
    with pytest.raises(RunError, match=r"lacks generation_config\.json"):
        verify(folder)


def test_an_edited_certificate_is_found(folder):
    rewrite(folder, lambda c: c.update(step=4))
    with pytest.raises(RunError, match="was changed: it is not what its own SHA-256 says") as error:
        verify(folder)
    one_line(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("trained_perplexity", 2.0),
        ("exported_nats", 0.5),
        ("equal_tokens", 0.995),
        ("predicted", 3),
    ],
)
def test_figures_that_the_recorded_answers_do_not_give_are_found(folder, field, value):
    """Even by one who knows how the certificate is sealed."""
    rewrite(folder, lambda c: c["figures"]["logits"].update({field: value}), seal=True)
    with pytest.raises(RunError, match=rf"certificate was changed: logits: {field}"):
        verify(folder)


def test_other_weights_under_a_new_hash_are_found(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][65] *= 3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    rewrite(folder, lambda c: c.update(files=certificate._files(folder)), seal=True)
    with pytest.raises(RunError, match="logits are not those that were certified"):
        verify(folder)


def test_loosened_tolerances_are_found(folder):
    rewrite(folder, lambda c: c["tolerances"].update(kl_divergence=9.0), seal=True)
    with pytest.raises(RunError, match="other tolerances than the format"):
        verify(folder)


def test_what_is_no_certificate_says_so(folder):
    path = folder / certificate.NAME
    rewrite(folder, lambda c: c.update(certificate=99), seal=True)
    with pytest.raises(RunError, match="version 99"):
        verify(folder)
    rewrite(folder, lambda c: c.update(certificate=1, digests={"logits": {}}), seal=True)
    with pytest.raises(RunError, match="cannot be read as a certificate"):
        verify(folder)
    for text in ("[]", "{", '{"step": 3}'):
        path.write_text(text)
        with pytest.raises(RunError, match="cannot be read as a certificate"):
            verify(folder)
    path.unlink()
    with pytest.raises(RunError, match=r"has no certificate\.json"):
        verify(folder)


def test_a_folder_with_something_in_it_is_left_alone(folder):
    with pytest.raises(ConfigError, match="not empty"):
        certified(hf.make(**QUIET), loaded("llama"), folder)
    verify(folder)


def test_probes_are_the_same_each_time_and_of_several_scripts():
    it = loaded("llama")
    a, b = (probes_for(it.model, it.run, it.tokenizer, None) for _ in range(2))
    np.testing.assert_array_equal(a.inputs["tokens"], b.inputs["tokens"])
    assert a.source == "built in"
    text = it.tokenizer.decode([i for i in a.inputs["tokens"][:4].ravel() if i < 256])
    assert any("а" <= c <= "я" for c in text)
    assert any("一" <= c <= "龥" for c in text)
    assert a.inputs["tokens"].max() < 264
    # What is predicted is what comes next, in texts alone.
    np.testing.assert_array_equal(a.targets[:4, :-1], a.inputs["tokens"][:4, 1:])
    assert (a.targets[4:] == NOTHING).all()


def test_held_out_texts_are_asked_where_there_are_any(tmp_path):
    it = loaded("llama")
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        (texts / f"{number}.txt").write_text(f"zyx {number} " * 200)
    source = dataclasses.replace(it.run.data.sources[0], path=str(texts))
    run = dataclasses.replace(it.run, data=dataclasses.replace(it.run.data, sources=(source,)))
    probes = probes_for(it.model, run, it.tokenizer, tmp_path / "run")
    assert probes.source == "held out"
    assert "zyx" in it.tokenizer.decode([i for i in probes.inputs["tokens"][0] if i < 256])


def test_masks_are_where_an_encoder_predicts():
    it = loaded("bert")
    probes = probes_for(it.model, it.run, it.tokenizer, None)
    told = probes.targets != NOTHING
    assert set(probes.inputs["tokens"][told]) == {it.tokenizer.pad_id}  # there is no mask token
    assert 0.1 < told[:4].mean() < 0.2
    assert (probes.targets[told] < 256).mean() > 0.9


def test_figures_are_those_of_the_definitions():
    rng = np.random.default_rng(0)
    rows = [{"logits": rng.standard_normal((1, 21, 30)).astype(np.float32)} for _ in range(2)]
    others = [{"logits": x["logits"] + 0.1 * rng.standard_normal((1, 21, 30))} for x in rows]
    others = [{"logits": x["logits"].astype(np.float32)} for x in others]
    targets = rng.integers(0, 30, (2, 21)).astype(np.int32)
    targets[0, :5] = NOTHING
    figures, digest = compared("logits", list(zip(rows, others, strict=True)), targets)
    a, b = (
        np.concatenate([x["logits"][0] for x in side]).astype(np.float64) for side in (rows, others)
    )
    log_p, log_q = (np.asarray(jax.nn.log_softmax(x)) for x in (a, b))
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(1)
    told = targets.ravel() != NOTHING
    at = (np.arange(42)[told], targets.ravel()[told])
    wanted = Figures(
        42, np.abs(a).max(), np.abs(a - b).max(), divergence.mean(), divergence.max(),
        np.mean(a.argmax(1) == b.argmax(1)), 37, -log_p[at].mean(), -log_q[at].mean(),
        np.exp(-log_p[at].mean()), np.exp(-log_q[at].mean()),
    )  # fmt: skip
    for field, value in vars(wanted).items():
        assert getattr(figures, field) == pytest.approx(value, rel=1e-4), field
    # Coarsened, they are no farther apart.
    coarse = digest.figures()
    assert 0 < coarse.kl_divergence <= figures.kl_divergence
    assert coarse.trained_nats == figures.trained_nats


def test_the_trained_model_is_compared_and_not_its_copy():
    """A reference that was made before the model changed does not hold for the changed one."""
    it = loaded_of(MODELS["gpt2"])
    probes = probes_for(it.model, it.run, it.tokenizer, None)
    reference = Reference.of(it.model, probes)
    it.trained.embed[...] = it.trained.embed[...] * 1.01
    answers = [forward_of(it.trained)(batch) for batch in probes.batches()]
    figures, _ = compared(
        "logits", list(zip(reference.outputs, answers, strict=True)), probes.targets
    )
    with pytest.raises(RunError, match="largest difference"):
        certificate._check("logits", figures, EXACT)


def test_the_trained_model_is_let_go_before_the_export_is_loaded(tmp_path):
    """Else the whole would need the memory of two."""
    made = loaded_of(MODELS["llama"])
    made = [dataclasses.replace(made, trained=nnx.clone(made.trained))]
    alive = [weakref.ref(x) for x in jax.tree.leaves(params(made[0].trained))]
    exporter = hf.make(**QUIET)
    load_back, seen = exporter.load_back, []

    def watched(directory):
        seen.extend(ref() is None for ref in alive)
        return load_back(directory)

    exporter.load_back = watched
    export_certified(exporter, made.pop, tmp_path / "out", workdir=None, **QUIET)
    assert all(seen)
    assert len(seen) == 12
