"""`generate`: text from a teacher, an fdb or a packed model."""

from typing import Annotated, Literal

import typer

from dbllm_cli.commands.options import (
    DeviceOption,
    ModelRevisionOption,
    StoreOption,
    TrustOption,
)
from dbllm_cli.console import Console, ConsoleProgress
from dbllm_cli.store import Store, resolve_input
from dbllm_cli.store.store import DEFAULT_ROOT

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="a model (folder, hub id, .gguf, builtin:NAME) or an fdb or packed artifact",
    ),
]


def register(app: typer.Typer) -> None:
    """Add `generate`."""
    app.command("generate")(generate)


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="what the text starts with")],
    chat: Annotated[
        bool, typer.Option("--chat", help="put the prompt in the model's chat template")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest text, in tokens")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="sampling temperature; 0: always the likeliest token")
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option(min=0, help="sample among the k likeliest tokens; 0: among all")
    ] = 50,
    seed: Annotated[int, typer.Option(min=0, help="seed of the sampling")] = 0,
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
