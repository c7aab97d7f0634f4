"""A conversation with a tool: differs from chat.py in the tools of `encode_chat`, and in `parse_reply`.

SmolLM2's own template writes turns, but no tools. The template here writes the same turns, and tools and calls between
tags. Larger models decide when to call a tool. This one has 135M parameters: it gets an answered question as an
example, and the begin of each call.
"""

import json
import sys

import mistral_eqx as mx


TEMPLATE = """\
{%- macro turn(role, text) %}{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>\\n' }}{% endmacro %}
{{- turn('system', 'You have access to the following tools:\\n<tools>' + (tools | tojson) + '</tools>\\n\\nTo call a '
    'tool, answer with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.') }}
{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- turn('assistant', '<tool_call>' + (call.function | tojson) + '</tool_call>') }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- turn('user', '<tool_response>' + message.content + '</tool_response>') }}
    {%- else %}
        {{- turn(message.role, message.content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
NUMBER = {"type": "number"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "multiply",
            "description": "The product of two numbers.",
            "parameters": {"type": "object", "properties": {"a": NUMBER, "b": NUMBER}, "required": ["a", "b"]},
        },
    }
]


def multiply(a, b):
    return a * b


def run(call):
    """The result of a call as JSON, or what is wrong with the call: a model may call anything with anything."""
    if call.name != "multiply" or call.arguments.keys() != {"a", "b"}:
        return json.dumps({"error": "There is only multiply(a, b)."})
    if not all(isinstance(value, int | float) for value in call.arguments.values()):
        return json.dumps({"error": "a and b must be numbers."})
    return json.dumps({"result": multiply(**call.arguments)})


def example():
    """A question with its call, result and answer."""
    call = mx.ToolCall("multiply", {"a": 12, "b": 11}, "call00000")
    return [
        {"role": "user", "content": "What is 12 times 11?"},
        mx.Reply(tool_calls=(call,)).message(),
        {"role": "tool", "tool_call_id": call.id, "content": run(call)},
        {"role": "assistant", "content": "12 times 11 is 132."},
    ]


def main(name="smollm2-135m"):
    model, tokenizer = mx.from_pretrained(name)
    tokenizer.chat_template = TEMPLATE
    conversation = mx.Conversation(model)
    messages = example()

    def answer(begin=""):
        """Adds the model's reply, which starts with `begin`."""
        prompt = mx.encode_chat(tokenizer, messages, tools=TOOLS)
        first = tokenizer.encode(begin, add_bos=False)
        new = conversation.reply(
            [*prompt, *first],
            max_new_tokens=48,
            eos_id=tokenizer.eos_ids,
            stop=["</tool_call>"],
            tokenizer=tokenizer,
        )
        reply = mx.parse_reply(tokenizer, [*first, *new], after=prompt)
        messages.append(reply.message())
        if reply.text:
            print(reply.text)
        return reply.tool_calls

    for question in ("What is 123 times 457?", "And 31 times 29?"):
        print(">", question)
        messages.append({"role": "user", "content": question})
        calls = answer('<tool_call>{"name": "multiply", "arguments": {"a":')
        for call in calls:
            result = run(call)
            print(f"{call.name}({json.dumps(call.arguments)}) gives {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        if calls:
            answer()


if __name__ == "__main__":
    main(*sys.argv[1:])
