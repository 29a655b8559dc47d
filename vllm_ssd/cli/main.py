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
    _run_vllm("serve", context.args)


@app.command(cls=_Verbatim)
def bench(context: typer.Context) -> None:
    """Run `vllm bench` of the installed vLLM, as `serve` does.

    All arguments are those of `vllm bench`; `vllm-ssd bench serve --help` lists some.
    """
    _run_vllm("bench", context.args)


def _run_vllm(command: str, arguments: list[str]) -> None:
    from vllm_ssd.cli.vllm_command import start

    with errors_in_one_line():
        start(command, arguments)


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[MODEL", help="Folder or hub name of the target.")
    ] = None,
    draft: Annotated[
        str | None, typer.Argument(metavar="DRAFT]", help="Folder or hub name of the draft.")
    ] = None,
    draft_address: Annotated[
        str | None, typer.Option(help="Of a draft server; in place of DRAFT.")
    ] = None,
    draft_key_file: Annotated[str | None, typer.Option(help="The key of that server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installation, the machine and, if given, a pair of models or a draft server.

    No model is loaded. The exit status is 1 if a check fails.
    """
    if (target is None) != (draft is None) and draft_address is None:
        raise typer.BadParameter("name both models, or none", param_hint="MODEL DRAFT")
    if draft is not None and draft_address is not None:
        raise typer.BadParameter("name a DRAFT or an address", param_hint="--draft-address")
    from vllm_ssd.cli.doctor import Asked, run

    if not run(Asked(target, draft, draft_address, draft_key_file), as_json):
        raise typer.Exit(1)


@app.command()
def draft_server(
    model: Annotated[str, typer.Option(help="The draft model: a folder or a hub name.")],
    listen: Annotated[str, typer.Option(help="unix:/PATH or tcp://HOST:PORT.")],
    key_file: Annotated[
        str | None, typer.Option(help="The key that targets must have; TCP needs one.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Serve Prometheus metrics there.")
    ] = None,
    metrics_host: Annotated[str, typer.Option(help="On this interface.")] = "127.0.0.1",
    max_targets: Annotated[int, typer.Option(min=1, help="More targets are refused.")] = 8,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests of all targets; sizes the batch and the KV cache.")
    ] = 64,
    num_speculative_tokens: Annotated[
        int, typer.Option("--num-speculative-tokens", "-k", min=1, max=32, help="K, at most.")
    ] = 8,
    branches: Annotated[
        int, typer.Option(min=1, max=1024, help="Branches of a request, at most.")
    ] = 32,
    draft_top_n: Annotated[
        int, typer.Option(min=2, max=256, help="Sampled tokens come from so many of the best.")
    ] = 64,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Longest text; default: what the model supports.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As of `vllm serve`.")] = None,
    quantization: Annotated[str | None, typer.Option(help="As of `vllm serve`.")] = None,
    load_format: Annotated[str, typer.Option(help="As of `vllm serve`.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Of a model from the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="As of `vllm serve`.")] = False,
    draft_vocab: Annotated[
        str | None, typer.Option(help="As the option of the same name: a number or a file.")
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Draft ids below this; default: the model's.")
    ] = None,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(min=1 << 20, help="Default: for max-requests of full length.")
    ] = None,
    cores: Annotated[
        str | None, typer.Option(help="Cores on CPU, as 2,3; default: all of this process's.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<index>.")] = "auto",
    enforce_eager: Annotated[bool, typer.Option(help="Do not compile the model.")] = False,
) -> None:
    """Serve a draft model to any number of targets (their option `draft_address`)."""
    from vllm_ssd.cli.draft_server import Options, core_numbers, run

    draft: dict[str, object] = {
        "model": model,
        "num_speculative_tokens": num_speculative_tokens,
        "branches": branches,
        "draft_top_n": draft_top_n,
        "draft_max_model_len": max_model_len,
        "draft_dtype": dtype,
        "draft_quantization": quantization,
        "draft_load_format": load_format,
        "draft_revision": revision,
        "draft_kv_cache_memory_bytes": kv_cache_memory_bytes,
        "draft_device": device,
        "draft_enforce_eager": enforce_eager,
    }
    with errors_in_one_line():
        if draft_vocab is not None:
            draft["draft_vocab"] = int(draft_vocab) if draft_vocab.isdigit() else draft_vocab
        if cores is not None:
            draft["draft_cpu_cores"] = core_numbers(cores)
        run(
            Options(
                listen=listen,
                key_file=key_file,
                metrics_port=metrics_port,
                metrics_host=metrics_host,
                max_targets=max_targets,
                max_requests=max_requests,
                vocab_size=vocab_size,
                trust_remote_code=trust_remote_code,
                draft=draft,
            )
        )


@app.command()
def draft_key(file: Annotated[str, typer.Argument(help="A new file.")]) -> None:
    """Write a new key for a draft server on TCP to a file that only its owner can read."""
    from vllm_ssd.wire.keys import write_key

    with errors_in_one_line():
        try:
            write_key(file)
        except OSError as error:
            raise CommandError(str(error)) from None


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
