"""A model as it was before training, out of the model in training.

What fine-tunes a model without forgetting where it began, such as LoRA, keeps the first weights in the
parts that it puts in the place of parameters. A part that does has a method `reference()`, which returns what
stands for the first weight: anything that is read as `part[...]`. So nothing is kept twice, and what is stored
in few bits stays so.
"""

from typing import Any

from flax import nnx

from llm_jax.core.types import Model


def frozen_reference(model: Model) -> Model:
    """The model before training; shares its arrays.

    Raises:
      ValueError: a parameter is trained without its first value being kept; names it.
    """
    model = nnx.clone(model)
    modules = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    for module in modules:
        for name, part in list(vars(module).items()):
            if _has_reference(part):
                setattr(module, name, part.reference())
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Param):
            raise ValueError(
                f"the objective compares with the model before training, and the first value of "
                f"{'.'.join(map(str, path))} is not kept: set transforms = ({{'name': 'lora'}},) without "
                "full, or ({'name': 'reference'},)"
            )
    return model


def _has_reference(part: Any) -> bool:
    return isinstance(part, nnx.Module) and hasattr(part, "reference")
