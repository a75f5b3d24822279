"""`gossamer export`: a trained policy as an ordinary model folder."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from node.cli.options import Debug, Settings, Target
from node.operations.model_export import write_model

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make; it must not exist.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="Precision of the weights.  [default: as trained]", show_default=False),
]


def export(model: Target, out: Out, dtype: Dtype = None, settings: Settings = None, debug: Debug = False) -> None:
    """Write a policy as an ordinary model folder.

    transformers and vLLM can load it. Adapters are merged, and a model card tells its origin.

    \b
    Example:
      gossamer export runs/a/nodes/n0 my-model
      gossamer export runs/a/nodes/n0/checkpoints/best my-model   # the best by evaluation (eval.every)
      gossamer export runs/a/nodes/n0/checkpoints/checkpoint-200 my-model --dtype bfloat16
    """
    write_model(model, out, dtype, settings, debug=debug)
    print(f"model: {out}")
