"""`generate`: text from a teacher, an fdb or a packed model."""

import math
from typing import Annotated, Literal

import typer

from dbllm_cli.commands.options import (
    DeviceOption,
    ModelRevisionOption,
    StoreOption,
    TrustOption,
    possible_path,
)
from dbllm_cli.configs.base import LONGEST, MOST, STRONGEST
from dbllm_cli.console import Console, ConsoleProgress
from dbllm_cli.store import Store, resolve_input
from dbllm_cli.store.store import DEFAULT_ROOT

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        callback=possible_path,
        help="a model (folder, hub id, .gguf, builtin:NAME) or an fdb or packed artifact",
    ),
]


def _is_number(value: float) -> float:
    if math.isnan(value):  # which no bound holds back
        raise typer.BadParameter("nan is not a number.")
    return value


def register(app: typer.Typer) -> None:
    """Add `generate`."""
    app.command("generate")(generate)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="what the text starts with")],
    chat: Annotated[
        bool, typer.Option("--chat", help="put the prompt in the model's chat template")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=LONGEST, help="longest text, in tokens")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            min=0,
            max=STRONGEST,
            callback=_is_number,
            help="sampling temperature; 0: always the likeliest token",
        ),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, max=MOST, help="sample among the k likeliest tokens; 0: among all")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of the sampling")] = 0,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="dtype of the products")
    ] = "float32",
    device: DeviceOption = "cpu",
    store: StoreOption = DEFAULT_ROOT,
    model_revision: ModelRevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write text with a model, as it comes."""
    opened, console = Store(store), Console()
    artifact = resolve_input(model, ("model", "fdb", "packed"), opened, model_revision)
    opened.require_whole([artifact], ConsoleProgress(console))
    from dbllm_cli.llm.generation import generate_stream  # torch comes in here

    pieces = generate_stream(
        artifact,
        prompt,
        chat=chat,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device,
        dtype=dtype,
        work=opened.work,
        trust_remote_code=trust_remote_code,
    )
    console.print_stream(pieces)
