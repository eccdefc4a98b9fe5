"""Let a model answer a question with a tool, and print the whole conversation.

python -m demo.talk "What is the weather in Oslo?"
"""

import argparse
import json
import random
from typing import Any

import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper

import flashmoe_mlx
from demo import MODEL
from demo.training.dataset import Message
from demo.training.handwritten_tools import HANDWRITTEN_TOOLS
from flashmoe_mlx.tasks import tool_calls

TOOL = HANDWRITTEN_TOOLS[0].schema(random.Random(0))


def get_weather(city: str, unit: str = "celsius") -> dict[str, Any]:
    """The tool itself: it rains everywhere."""
    return {"temperature": 7 if unit == "celsius" else 45, "sky": "rainy"}


def talk(model: nn.Module, tokenizer: TokenizerWrapper, question: str) -> list[Message]:
    """The conversation: the question, the calls with their results, and the answer."""
    messages: list[Message] = [{"role": "user", "content": question}]
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
    """Talk and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("question", nargs="?", default="What is the weather in Oslo?")
    parser.add_argument("--model", default=str(MODEL))
    options = parser.parse_args()
    model, tokenizer = flashmoe_mlx.load(options.model)
    for message in talk(model, tokenizer, options.question):
        calls = [json.dumps(call["function"]) for call in message.get("tool_calls", [])]
        print(f"{message['role']:>9}: {message.get('content') or ', '.join(calls)}")


if __name__ == "__main__":
    main()
