"""Ask a model a question that needs a tool, and print the whole conversation.

python -m demo.talk "What is the weather in Oslo?"
"""

import argparse
import json
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flashmoe_mlx
from demo import MODEL
from flashmoe_mlx.evaluation.tasks import tool_calls

# One of the tools that the demo model was trained on.
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city"],
        },
    },
}


def get_weather(city: str, unit: str = "celsius") -> dict[str, Any]:
    """Return a made-up forecast: the same rain in every city."""
    return {"temperature": 7 if unit == "celsius" else 45, "sky": "rainy"}


def talk(model: nn.Module, tokenizer: TokenizerWrapper, question: str) -> list[dict[str, Any]]:
    """Generate replies to a question, and run the calls in them, until a reply has none.

    Args:
        model (nn.Module): The model.
        tokenizer (TokenizerWrapper): Its tokenizer.
        question (str): The message of the user.

    Returns:
        list[dict[str, Any]]: The messages: the question, calls and their results, and the answer.
    """
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    while messages[-1]["role"] != "assistant":
        prompt = tokenizer.apply_chat_template(messages, tools=[TOOL], add_generation_prompt=True)
        text = mlx_lm.generate(model, tokenizer, prompt, max_tokens=100)
        calls = tool_calls(text, [TOOL], tokenizer)
        functions = [{"type": "function", "function": call} for call in calls]
        messages.append(
            {"role": "assistant", "tool_calls": functions} if calls else {"role": "assistant", "content": text}
        )
        messages += [{"role": "tool", "content": json.dumps(get_weather(**call["arguments"]))} for call in calls]
    return messages


def main() -> None:
    """Ask the question and print the messages."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", nargs="?", default="What is the weather in Oslo?")
    parser.add_argument("--model", default=str(MODEL), help="the model (default: demo/model)")
    options = parser.parse_args()
    model, tokenizer = flashmoe_mlx.load(options.model)[:2]
    for message in talk(model, tokenizer, options.question):
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
        print(f"{message['role']:>9}: {message.get('content') or ', '.join(calls)}")


if __name__ == "__main__":
    main()
