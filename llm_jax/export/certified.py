"""The whole way of an export: the run's model, its answers, the format's files, loading back, the certificate.

What is unusual: the trained model is let go before the export is loaded back, so that the whole needs the
memory of one of them at a time.
"""

import gc
from collections.abc import Callable
from pathlib import Path

import jax
from flax import nnx

from llm_jax.checkpoint.load import LoadedModel
from llm_jax.export import certificate
from llm_jax.export.card import write_card
from llm_jax.export.certificate import Exporter, Reference
from llm_jax.export.folder import new_folder
from llm_jax.export.probes import probes_for


def export_certified(
    exporter: Exporter,
    load: Callable[[], LoadedModel],
    directory: Path,
    *,
    workdir: Path | None,
    say: Callable[[str], None] = print,
) -> Path:
    """Exports what `load` gives, with a model card and a certificate; whole or not at all.

    Args:
      workdir: of the run, whose held-out texts are asked, and whose scores the card shows.

    Raises:
      ConfigError: as of the exporter, or the folder is not empty.
      RunError: the export does not compute what the model does.
    """
    with new_folder(directory) as folder:
        loaded = load()
        probes = probes_for(loaded.model, loaded.run, loaded.tokenizer, workdir)
        reference = Reference.of(loaded.model, probes)
        exporter.export(loaded.model, loaded.tokenizer, loaded.run, folder)
        about = {
            "model": loaded.run.model.name,
            "parameters": _count_parameters(loaded),
            "step": loaded.step,
        }
        title = Path(directory).resolve().name
        usage = exporter.usage(folder, title)
        write_card(folder, title, loaded, workdir, usage=usage, library=exporter.library)
        del loaded  # its memory is needed to load back, at once: modules refer to themselves
        gc.collect()
        content = certificate.certify(exporter, folder, reference, about)
    say(f"certified: {certificate.summary(content)}")
    return Path(directory).resolve()


def _count_parameters(loaded: LoadedModel) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(loaded.model, nnx.Param)))
