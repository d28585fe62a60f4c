"""`lanerank models`: which models and services lanerank knows how to ask, and how."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Annotated

import typer
from rich.markup import escape
from rich.text import Text

from lanerank.cli.console import JsonFlag, out, print_json
from lanerank.contracts import Lane
from lanerank.service import ServiceContract
from lanerank.service import services as known_services
from lanerank.template import contract_for, contracts, known_models

models_app = typer.Typer(help="List the models that lanerank knows how to ask.")

_INSTRUCTION = {
    (True, True): "instruction isolated",
    (True, False): "instruction open",
    (False, False): "instruction none",
}
_EMBEDDED = "lanerank-mini"
_LANE_STYLES = {Lane.INSTRUCTION: "green", Lane.QUERY: "cyan", Lane.DOCUMENT: "yellow"}


@models_app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    *,
    services: Annotated[
        bool, typer.Option("--services", help="List the servers and hosted services instead.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the models whose exact prompt lanerank knows.

    Any of them loads by its id, as `--model ID` or `Reranker.from_pretrained("ID")`; the weights
    are fetched when you ask for them. Others need a contract: `models show` has examples.
    """
    if context.invoked_subcommand is not None:
        return
    if services:
        _list_services(as_json=as_json)
        return
    if as_json:
        print_json(
            [
                {
                    "model": model,
                    "kind": contract.kind,
                    "instructions": contract.supports_instructions,
                    "isolates_instruction": contract.isolates_instruction,
                    "parameters": contract.models[model].parameters,
                    **contract.model_dump(include={"family", "licence", "languages", "verified"}),
                }
                for model, contract in known_models()
            ]
        )
        return
    out.print(
        f"[bold]{_EMBEDDED}[/bold], in the package: instruction isolated; Apache-2.0; English"
    )
    for contract in contracts():
        how = _INSTRUCTION[contract.supports_instructions, contract.isolates_instruction]
        how = "refused" if contract.kind == "refused" else how
        facts = f"{how}; {contract.licence}; {contract.languages}"
        out.print(f"\n[bold]{contract.family}[/bold]: {escape(facts)}", highlight=False)
        for model, each in contract.models.items():
            out.print(f"  {escape(model)}  [dim]{each.parameters or ''}[/dim]", highlight=False)
        out.print(f"  [dim]{escape(contract.verified)}[/dim]", highlight=False)
    out.print(
        "\nIsolated: no document can change how the instruction is read. Open: the document comes "
        "first and can. None: the model takes no instruction, see `--on-unsupported`. "
        "`lanerank models show ID` has the prompt and its sources."
    )


def _list_services(*, as_json: bool) -> None:
    if as_json:
        print_json([contract.model_dump() for contract in known_services()])
        return
    for contract in known_services():
        where = contract.url or "http://YOUR-SERVER"
        out.print(f"[bold]{contract.service}[/bold]: {where}{contract.path}", highlight=False)
        out.print(f"  {escape(_describe_channel(contract))}", highlight=False)
        out.print(f"  [dim]{escape(contract.verified)}[/dim]", highlight=False)
    out.print(
        "\n`Reranker.from_url(URL, service=NAME, model=...)` ranks with them, and needs the extra "
        "lanerank\\[remote]. For another, pass a JSON file with what differs. `--json` has "
        "notes and sources."
    )


def _describe_channel(contract: ServiceContract) -> str:
    channel = contract.instruction
    if channel is None:
        return "instruction: none"
    if channel.template:
        return "instruction: in a prompt that lanerank renders, for a model whose prompt it knows"
    if channel.query is not None:
        return f"instruction: in the query, as {channel.query!r}"
    return f"instruction: in the field {channel.field!r}"


@models_app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="ID", help="A model id, or a family.")],
    *,
    query: Annotated[str, typer.Option("--query", "-q")] = "candidates with IMO experience",
    instruction: Annotated[
        str, typer.Option("--instruction", "-i", help="Empty shows the prompt without one.")
    ] = "We are a marine logistics company.",
    document: Annotated[
        str, typer.Option("--document", "-d", help="Try one that imitates the markers.")
    ] = "Ten years of port-state inspections of tankers.",
) -> None:
    """Show how a model is asked, the lanes in colours, and where that is known from."""
    if name == _EMBEDDED:
        _show_embedded()
        return
    contract = contract_for(name)
    facts = contract.model_dump(
        include={"family", "kind", "licence", "languages", "max_tokens", "verified", "notes"}
    )
    if contract.kind == "refused":
        facts = {"family": contract.family, "refused": contract.reason}
    elif contract.kind == "causal_lm":
        facts["isolates_instruction"] = contract.isolates_instruction
    for key, value in facts.items():
        if value not in ("", None):
            out.print(f"[bold]{key}[/bold]: {escape(str(value))}", highlight=False)
    for source in contract.sources:
        out.print(f"[bold]source[/bold]: {escape(source)}", highlight=False)
    if contract.kind != "causal_lm":
        return
    prompt = Text()
    for piece in contract.render(query=query, instruction=instruction, document=document):
        style = "dim" if piece.lane is None else _LANE_STYLES[piece.lane]
        prompt.append(
            "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in piece.text), style
        )
    legend = Text("  ").join(Text(lane.name.lower(), style) for lane, style in _LANE_STYLES.items())
    chat = ", as the user's turn of the model's own chat template" if contract.chat else ""
    out.print(f"\n[bold]prompt[/bold]{chat}:", legend)
    out.print(prompt)
    if contract.answers is not None:
        tokens = [contract.answers.positive, contract.answers.negative]
        read = " minus ".join(repr(answer.token) for answer in tokens if answer)
        out.print(
            f"[bold]score[/bold]: sigmoid of the logit of {escape(read)}, "
            f"less {contract.mapping.shift:g}, over {contract.mapping.scale:g}",
            highlight=False,
        )


def _show_embedded() -> None:
    """The model in the package, which has no prompt."""
    folder = files("lanerank") / "models" / _EMBEDDED
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    positions, attributes = config["max_position_embeddings"], config["attributes_budget"]
    facts = {
        "model": f"{_EMBEDDED}, in the package: what runs where no model is named",
        "kind": "lane_encoder",
        "licence": "Apache-2.0",
        "languages": "English",
        "max_tokens": f"{positions} of instruction, of query and of document, "
        f"{attributes} of attributes",
        "isolates_instruction": True,
        "prompt": "none; each lane is read by itself, with no text around it",
        "source": folder / "README.md",
    }
    for key, value in facts.items():
        out.print(f"[bold]{key}[/bold]: {escape(str(value))}", highlight=False, soft_wrap=True)
