"""`parofx generate`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from parofx.cli.common import (
    Device,
    Dtype,
    Offline,
    Revision,
    Source,
    TrustRemoteCode,
    console,
    errors_console,
    load,
    require_tokenizer,
)
from parofx.errors import DataError


def generate(
    model: Source,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="May be given several times.", show_default=False)
    ],
    chat: Annotated[
        bool | None, typer.Option(help="Render the prompt with the chat template; by default if there is one.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    compile: Annotated[bool, typer.Option(help="Compile decoding with torch.compile(backend='paro').")] = True,
    revision: Revision = None,
    offline: Offline = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text from prompts.

    \b
    parofx generate llama-paro -p "Why is the sky blue?"
    parofx generate llama-paro -p "Once upon a time" --no-chat --temperature 0.8
    parofx generate llama-paro -p "Hello" --no-compile   # starts at once, decodes slower
    """  # noqa: D301
    loaded = load(
        model, revision=revision, offline=offline, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    tokenizer = require_tokenizer(loaded, model, "generation")
    if not hasattr(loaded.model, "generate"):
        raise DataError(f"{model} cannot generate text: {type(loaded.model).__name__} has no generate()")

    import torch

    torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if compile:
        options |= compile_options()
    generate_tokens: Any = loaded.model.generate
    for text in prompt:
        inputs = encode_prompt(text, tokenizer, chat=chat).to(loaded.model.device)
        if not inputs["input_ids"].numel():
            raise DataError(f"the prompt {text!r} holds no token: give some text, or a model that starts with one")
        started = time.perf_counter()
        waiting = "generating; the first time decoding is compiled (--no-compile starts at once) …"
        with errors_console.status(waiting if compile else "generating …"):
            output = generate_tokens(**inputs, **options)
        seconds = time.perf_counter() - started
        new = output[0, inputs["input_ids"].shape[1] :]
        console.rule(text, align="left")
        console.print(tokenizer.decode(new, skip_special_tokens=True), markup=False, highlight=False)
        errors_console.print(f"{len(new)} tokens in {seconds:.1f} s", style="dim", highlight=False)


def encode_prompt(text: str, tokenizer: Any, *, chat: bool | None = None) -> Any:
    """Return the model inputs of a prompt, as one user message if `chat` (by default where there is a template).

    Raises:
        DataError: if a chat is asked for and the tokenizer has no template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if chat and template is None:
        raise DataError("--chat needs a chat template, and the tokenizer has none: pass --no-chat")
    if chat is False or template is None:
        return tokenizer(text, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )


def compile_options() -> dict[str, Any]:
    """Return the arguments of `generate` that compile decoding with parofx, on every device."""
    from transformers import CompileConfig

    compile_config = CompileConfig(backend="paro")
    # Without it transformers compiles on accelerators only.
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}
