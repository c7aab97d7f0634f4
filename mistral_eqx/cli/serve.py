"""`mistral-eqx serve`: a server with OpenAI's API."""

import contextlib
import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Annotated

import typer
from annotated_types import Ge, Le

from .. import checks, interrupts
from ..checks import Count, CountOrZero, Positive
from ..documents import to_path
from ..errors import InputError
from . import options, processes
from .options import within


_SERVER, _ENGINE = "Server", "Engine"
_KEY = "MISTRAL_EQX_API_KEY"
_Port = Annotated[int, Ge(0), Le(65535)]


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, and whom it answers."""

    host: Annotated[
        str,
        typer.Option(
            help="The address to listen on; 0.0.0.0 lets other machines in, for which --api-key is made.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1"
    port: Annotated[
        int,
        typer.Option("--port", "-p", callback=within(_Port), help="0 takes a free port.", rich_help_panel=_SERVER),
    ] = 8000
    name: Annotated[
        str | None,
        typer.Option(help="The model's name for clients; by default its file's or its id.", rich_help_panel=_SERVER),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar=_KEY,
            show_envvar=False,
            help=f"The key that clients must send. The variable {_KEY} hides it from other users of this machine.",
            rich_help_panel=_SERVER,
        ),
    ] = None
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let pages of this origin use the server, such as https://example.org; may be given several times.",
            rich_help_panel=_SERVER,
        ),
    ] = None
    timeout: Annotated[
        float,
        typer.Option(
            callback=within(Positive), help="The most seconds of a request, waiting included.", rich_help_panel=_SERVER
        ),
    ] = 600.0
    max_body: Annotated[
        int,
        typer.Option(callback=within(Count), help="The most bytes of a request.", rich_help_panel=_SERVER),
    ] = 4 * 2**20
    drain: Annotated[
        float,
        typer.Option(
            callback=within(checks.NotNegative),
            help="For how many seconds answers may go on after SIGTERM or ctrl-C.",
            rich_help_panel=_SERVER,
        ),
    ] = 30.0
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts to the log.", rich_help_panel=_SERVER)
    ] = False


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How much the engine does at once."""

    rows: Annotated[
        int,
        typer.Option(callback=within(Count), help="How many answers are decoded together.", rich_help_panel=_ENGINE),
    ] = 8
    context: Annotated[
        int | None,
        typer.Option(
            callback=within(Count),
            help="The most tokens of a prompt and its answer; by default 4096, or the model's context if that is "
            "shorter.",
            rich_help_panel=_ENGINE,
        ),
    ] = None
    queue: Annotated[
        int,
        typer.Option(
            callback=within(Count), help="How many answers may wait; more are refused.", rich_help_panel=_ENGINE
        ),
    ] = 256
    chunk: Annotated[
        int,
        typer.Option(
            callback=within(Count),
            help="Prefill at most this many tokens of a prompt at a time; fewer while the steps of other answers wait.",
            rich_help_panel=_ENGINE,
        ),
    ] = 256
    prefix_cache: Annotated[
        int,
        typer.Option(
            metavar="MB",
            callback=within(CountOrZero),
            help="Memory for the keys and values of beginnings that prompts have in common.",
            rich_help_panel=_ENGINE,
        ),
    ] = 256
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Adapters that clients choose by this name as their model; may be given several times.",
            rich_help_panel=_ENGINE,
        ),
    ] = None

    def folders(self) -> dict[str, Path]:
        """The folder of each of the adapters, by name.

        **Raises:** `ValueError` that names what is wrong.
        """
        from ..checkpoint.peft import adapter_folder

        found: dict[str, Path] = {}
        for given in self.lora or ():
            name, _, folder = given.partition("=")
            if not name or not folder:
                raise InputError(f"--lora is {given!r}; give a name and a folder, as in --lora poet=runs/poet.")
            if name in found:
                raise InputError(f"--lora has the name {name!r} twice; give each adapter its own.")
            found[name] = adapter_folder(to_path(folder, "The folder of --lora"))
        return found


@options.flat
def serve(
    *,
    model: options.ModelOptions,
    server: ServerOptions,
    engine: EngineOptions,
    speculation: options.SpeculationOptions,
    cache_dtype: options.CacheDType = None,
    split: options.ProcessOptions,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Write no line for each request.")] = False,
    debug: options.Debug = False,
):
    """Serve a model with OpenAI's API, and a page to talk with it.

    Clients use it as OpenAI's, with the address that is printed and /v1 as base URL. Requests are answered together,
    each with the tokens that it would get alone. SIGTERM or ctrl-C lets the answers that run come to their end; the
    second one does not.

    With --mesh the model is split over several devices, and with --coordinator over several processes, each started
    with the same command but for --process-id. Process 0 listens.
    """
    _expect_extra()
    import jax

    import mistral_eqx as mx

    from ..checkpoint import open_checkpoint
    from ..engine import Engine
    from ..parallel import watch
    from ..parallel.agreement import check_same
    from ..server import LOOPBACK, create_app, is_loopback, listen, run, url
    from .devices import Devices
    from .loading import Speculating, load, locate
    from .progress import waiting

    if server.api_key is not None and not server.api_key.strip():
        raise InputError("--api-key is empty; give a key, or leave it out.")
    # JAX would keep SIGTERM of several processes to itself, for training.
    jax.config.update("jax_enable_preemption_service", False)
    devices = Devices(split)
    model.check_adapter()
    folders, name = engine.folders(), server.name or _name(model.model)
    if name in folders:
        raise InputError(f"The model and an adapter have the name {name!r}; give another --name.")
    first = processes.number() == 0
    # All that can be refused without the weights is refused before they are read.
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(listen(server.host, server.port)) if first else None
        path = locate(model.model)
        config = open_checkpoint(path).config
        speculating = Speculating(speculation, config.vocab)
        mesh, strategy, where = devices.place(config)
        speculating.check(mesh, strategy)
        if speculation.draft is not None and strategy.axes("kv_seq"):
            raise InputError(
                f"The strategy {strategy.name!r} splits 'kv_seq', which a server with a draft cannot; give another "
                "--strategy, or --prompt-lookup in place of --draft.",
                key="strategy",
            )
        tokenizer = mx.load_tokenizer(path)
        alike = speculation.agreed, model.agreed, tokenizer.eos_ids
        check_same("command", repr((dataclasses.replace(engine, lora=None), [*folders], cache_dtype, *alike)))
        weights = load(path, model, mesh, strategy)
        if where and not quiet:
            processes.say(f"The model is split over devices: {where}.")
        _start_log(quiet)
        running = stack.enter_context(
            Engine(
                weights,
                tokenizer,
                rows=engine.rows,
                context=engine.context,
                chunk=engine.chunk,
                queue=engine.queue,
                prefix_cache=engine.prefix_cache * 2**20,
                cache_dtype=cache_dtype,
                adapters={one: mx.load_lora(weights, folder) for one, folder in folders.items()},
                speculate=speculating(model, mesh, strategy),
            )
        )
        # The first clients do not wait for the compiler.
        with waiting("Compiling for requests; later starts find the programs"):
            running.warm()
        if taken is None:
            # Process 0 has the last word.
            with interrupts.answered():
                running.follow()
            return
        local = is_loopback(taken)
        app = create_app(
            running,
            name=name,
            api_key=server.api_key,
            hosts=LOOPBACK if local and server.api_key is None else None,
            allow_origins=server.allow_origin or (),
            timeout=server.timeout,
            max_body=server.max_body,
            log_prompts=server.log_prompts,
            trouble=lambda: getattr(watch.running(), "trouble", None),
        )
        if not local and server.api_key is None:
            processes.say("Whoever reaches this machine can use the model; --api-key lets in only those with the key.")
        address = url(taken)
        run(app, taken, drain=server.drain, ready=lambda: processes.tell(f"Serving {model.model} on {address}"))


def _name(model: str) -> str:
    """The name of a model for clients: that of a file or folder without its place."""
    path = Path(model).expanduser()
    return path.resolve().name.removesuffix(".gguf") if path.exists() else model


def _expect_extra():
    """Refuses to begin without the libraries of the server."""
    for library in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(library) is None:
            raise InputError(
                f"The server needs {library}, which is not installed; run pip install 'mistral-eqx[serve]'."
            )


def _start_log(quiet: bool):
    log = logging.getLogger("mistral_eqx.server")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.ERROR if quiet else logging.INFO)
