"""Chat templates of six families and one with {% generation %}, as test data.

Written for these tests after the published rules of each model, from memory: the
markers, blank lines and refusals are theirs, the Jinja is not. When they were
written, LLAMA3, GEMMA and QWEN3, and QWEN2 below a system prompt, wrote the same
text as published templates on some hundred drawn conversations; LLAMA2, MISTRAL
and ZEPHYR were compared with published examples at most. What a checkpoint ships
may differ (dates, defaults, tools, later revisions); that our renderer and
`apply_chat_template` agree is tested on these programs.
"""

# [INST] <<SYS>> ... : system inside of the first user's turn; everything stripped.
LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% set turns = messages[1:] %}
{% else %}
{% set system = '' %}
{% set turns = messages %}
{% endif %}
{% for message in turns %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% set content = system + message['content'] if loop.first else message['content'] %}
{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
{% elif message['role'] == 'assistant' %}
{{- ' ' + content.strip() + ' ' + eos_token -}}
{% endif %}
{% endfor %}
"""

# Headers of a role, a blank line, the stripped content, <|eot_id|>.
LLAMA3 = """\
{% for message in messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
{{- bos_token + content if loop.first else content -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{% endif %}
"""

# v3: the system prompt stands in the last user's turn; no space before eos.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set turns = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in turns %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}
    {%- endif %}
{%- endfor %}
"""

# ChatML as Qwen2 writes it: a system prompt of its own where there is none.
QWEN2 = """\
{% for message in messages %}
{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' -}}
{% endif %}
"""

# Tools in the system prompt; thoughts only after the last user's query; an answer
# of a tool is a user's turn; enable_thinking=false writes an empty thought.
QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}
    {%- for tool in tools %}
        {{- '\\n' + tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(query=messages | length - 1) %}
{%- for i in range(messages | length - 1, -1, -1) %}
    {%- set message = messages[i] %}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.query = i %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.query and (loop.last or thoughts) %}
            {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {%- if not loop.first or content %}
                {{- '\\n' }}
            {%- endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# A line for the role, the content, eos; other roles are left out.
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

# The assistant is called model; no system.
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}
{%- endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<start_of_turn>model\\n' }}
{%- endif %}
"""

# ChatML that says itself what the assistant wrote.
GENERATION = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}
        {{- message['content'] + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

ALL = {
    'llama2': LLAMA2,
    'llama3': LLAMA3,
    'mistral': MISTRAL,
    'qwen2': QWEN2,
    'qwen3': QWEN3,
    'zephyr': ZEPHYR,
    'gemma': GEMMA,
    'generation': GENERATION,
}

# Tokens of all of them, so that one tokenizer serves every template.
SPECIAL_TOKENS = (
    '<s>',
    '</s>',
    '<pad>',
    '<|im_start|>',
    '<|im_end|>',
    '<|start_header_id|>',
    '<|end_header_id|>',
    '<|eot_id|>',
    '<start_of_turn>',
    '<end_of_turn>',
)

# The same programs, with {% generation %} where a turn of the assistant is written:
# what transformers, which knows no other way, needs to tell its tokens.
_MARKED = {
    'llama2': [("{{- ' ' + content.strip() + ' ' + eos_token -}}",) * 2],
    'llama3': [
        (
            """\
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}
{{- bos_token + content if loop.first else content -}}
""",
            """\
{{- bos_token if loop.first -}}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{% if message['role'] == 'assistant' %}
{%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
{% else %}
{{- message['content'] | trim + '<|eot_id|>' -}}
{% endif %}
""",
        )
    ],
    'mistral': [("{{- ' ' + message['content'] | trim + eos_token }}",) * 2],
    'qwen2': [
        (
            """\
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
""",
            """\
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{% if message['role'] == 'assistant' %}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{% else %}
{{- message['content'] + '<|im_end|>' -}}
{% endif %}
{{- '\\n' -}}
""",
        )
    ],
    'qwen3': [
        (
            """\
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.query""",
            """\
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {%- if loop.index0 > ns.query""",
        ),
        (
            """\
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}""",
            """\
        {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif message.role == 'tool' %}""",
        ),
    ],
    'zephyr': [
        (
            "{{ '<|assistant|>\\n'  + message['content'] + eos_token }}",
            "{{ '<|assistant|>\\n' -}}{%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}{{ '\\n' -}}",
        )
    ],
    'gemma': [
        (
            """\
{{- '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}
""",
            """\
{{- '<start_of_turn>' + role + '\\n' }}
{%- if role == 'model' %}
{%- generation %}{{- message['content'] | trim + '<end_of_turn>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] | trim + '<end_of_turn>' }}
{%- endif %}
{{- '\\n' }}
""",
        )
    ],
    'generation': [],
}


def marked(name: str) -> str:
  """Returns a template with {% generation %} around the assistant's turns."""
  template = ALL[name]
  for plain, tagged in _MARKED[name]:
    if plain == tagged:
      tagged = '{%- generation -%}' + plain + '{%- endgeneration -%}'
    assert template.count(plain) == 1, (name, plain)
    template = template.replace(plain, tagged)
  return template
