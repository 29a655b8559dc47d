"""``vllm-ssd``: one function a command; what a command needs is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated

import typer
from typer.core import TyperCommand

from vllm_ssd.cli import CommandError

app = typer.Typer(
    help="Speculative Speculative Decoding for vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turn a :class:`CommandError` into its sentence and exit status 1."""
    try:
        yield
    except CommandError as error:
        print(f"vllm-ssd: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


class _Verbatim(TyperCommand):
    """A command whose arguments are another program's: none is parsed, ``--help`` included."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        ctx.args = args
        return args


@app.command(cls=_Verbatim)
def serve(context: typer.Context) -> None:
    """Run `vllm serve` of the installed vLLM, on CPU with Intel's OpenMP preloaded.

    All arguments are those of `vllm serve`; `vllm-ssd serve --help` lists them.
    """
    from vllm_ssd.cli.serve import start

    with errors_in_one_line():
        start(context.args)


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[MODEL", help="Folder or hub name of the target.")
    ] = None,
    draft: Annotated[
        str | None, typer.Argument(metavar="DRAFT]", help="Folder or hub name of the draft.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installation, the machine and, if given, a pair of models; load neither.

    The exit status is 1 if a check fails.
    """
    if (target is None) != (draft is None):
        raise typer.BadParameter("name both models, or none", param_hint="MODEL DRAFT")
    from vllm_ssd.cli.doctor import run

    if not run(target, draft, as_json):
        raise typer.Exit(1)


@app.command()
def models() -> None:
    """Print the folders of the demonstration's target and draft, after fetching what is missing."""
    from vllm_ssd.cli.models import demo_models

    with errors_in_one_line():
        for folder in demo_models():
            print(folder)


@app.command()
def demo(
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 64,
    num_speculative_tokens: Annotated[
        int,
        typer.Option(
            "--num-speculative-tokens",
            "-k",
            min=1,
            max=32,
            help="K, the most tokens drafted at once.",
        ),
    ] = 4,
) -> None:
    """Answer three chat prompts with plain vLLM, its draft_model method and SSD, side by side.

    The default K is the best one measured (docs/performance.md). At the end SSD's text is compared
    with plain vLLM's in float32; if they differ, the exit status is 1.
    """
    from vllm_ssd.cli.env import preload_openmp

    preload_openmp()
    with errors_in_one_line():
        import_module("vllm_ssd.cli.demo").run(
            max_tokens=max_tokens, num_speculative_tokens=num_speculative_tokens
        )


if __name__ == "__main__":
    app()
