# ruff: noqa: E501 (a template stands as it is published)
"""Chat templates in the styles of well-known models, and tiny tokenizers for them."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from torchsft.data.formats import Conversation, Example
from torchsft.data.rows import RowError
from torchsft.data.template import ChatTokenizer, Encoded, Sample

SPECIAL = [
    *("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>"),
    *(
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|User|>",
        "<|Assistant|>",
        "<think>",
        "</think>",
    ),
    *(
        "<|calls|>",
        "<|call|>",
        "<|sep|>",
        "<|end_call|>",
        "<|end_calls|>",
        "<|output|>",
        "<|end_output|>",
    ),
    *("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_GENERATION = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m['content'] + '<|im_end|>' }}{% "
    "endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif "
    "%}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Blocks as people write them: without the end-of-turn token, with the newline behind it, with the
# header.
CHATML_GENERATION_WITHOUT_END = CHATML_GENERATION.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
CHATML_GENERATION_WITH_NEWLINE = CHATML_GENERATION.replace(
    "{% endgeneration %}{{ '\n' }}", "{{ '\n' }}{% endgeneration %}"
)
CHATML_GENERATION_WITH_HEADER = CHATML_GENERATION.replace(
    "{{ '<|im_start|>assistant\n' }}{% generation %}",
    "{% generation %}{{ '<|im_start|>assistant\n' }}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + "
    "'<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}"
)
LLAMA3_GENERATION = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% "
    "endgeneration %}"
    "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}"
)
# The system turn has no header and is gathered from wherever it stands.
DEEPSEEK_V3 = (
    "{% set ns = namespace(system='') %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{% set ns.system = ns.system + "
    "m['content'] %}{% endif %}"
    "{% endfor %}{{ bos_token }}{{ ns.system }}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|>' + m['content'] + eos_token }}{% endif "
    "%}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
DEEPSEEK_V3_GENERATION = DEEPSEEK_V3.replace(
    "{{ '<|Assistant|>' + m['content'] + eos_token }}",
    "{{ '<|Assistant|>' }}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}",
)
# Reasoning is cut out of every answer, yet the generation prompt opens one.
DEEPSEEK_R1 = DEEPSEEK_V3.replace(
    "m['content'] + eos_token", "m['content'].split('</think>')[-1] + eos_token"
).replace("{{ '<|Assistant|>' }}{% endif %}", "{{ '<|Assistant|><think>\n' }}{% endif %}")
# Reasoning is cut out of the history only.
KEEPS_LAST_REASONING = DEEPSEEK_R1.replace(
    "m['content'].split('</think>')[-1]",
    "(m['content'] if loop.last else m['content'].split('</think>')[-1])",
)
# A default system turn, and an empty reasoning block in front of the last answer where it brings
# none of its own.
QWEN3 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif "
    "%}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '</think>' not in m['content'] %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ (m['content'] if m['role'] != 'assistant' or loop.last else "
    "m['content'].split('</think>')[-1].lstrip('\n'))"
    " + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' "
    "}}{% endif %}"
)
QWEN3_GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}"
    "{% if loop.last and '</think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif "
    "%}"
    "{{ (m['content'] if loop.last else m['content'].split('</think>')[-1].lstrip('\n')) + "
    "'<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# In the style of Qwen3, with tools: reasoning from its field or the content, kept since the last
# question only, with an empty block for the last answer; tool calls as JSON, results gathered in
# user turns.
QWEN3_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}
    {{- '# Tools\n' }}
    {%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(asked=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content, reasoning = m.content or '', m.reasoning_content or '' %}
        {%- if not reasoning and '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.asked and (loop.last or reasoning) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in m.tool_calls or [] %}
            {%- if not loop.first or content %}{{- '\n' }}{%- endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""
# In the style of DeepSeek-V3.1: the prompt opens or closes a reasoning block, which is closed and
# empty in every answer; calls go behind it, arguments as a JSON string; answers to tool results
# have no header at all.
DEEPSEEK_V31 = """
{{- bos_token }}
{%- set ns = namespace(asked=false) %}
{%- for m in messages %}{%- if m['role'] == 'system' %}{{- m['content'] }}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m['role'] == 'user' %}
        {%- set ns.asked = true %}
        {{- '<|User|>' + m['content'] }}
    {%- elif m['role'] == 'assistant' %}
        {%- if ns.asked %}{{- '<|Assistant|></think>' }}{%- endif %}
        {%- set ns.asked = false %}
        {%- set content = m['content'] or '' %}
        {{- content.split('</think>', 1)[1] if '</think>' in content else content }}
        {%- if m['tool_calls'] is defined and m['tool_calls'] is not none %}
            {{- '<|calls|>' }}
            {%- for call in m['tool_calls'] %}
                {{- '<|call|>' + call['function']['name'] + '<|sep|>' + call['function']['arguments'] + '<|end_call|>' }}
            {%- endfor %}
            {{- '<|end_calls|>' }}
        {%- endif %}
        {{- eos_token }}
    {%- elif m['role'] == 'tool' %}
        {%- set ns.asked = false %}
        {{- '<|output|>' + m['content'] + '<|end_output|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}
    {{- '<|Assistant|>' + ('<think>' if thinking is defined and thinking else '</think>') }}
{%- endif %}"""
# In the style of Llama 3.1: one call a turn, arguments as an object, results under a role of their
# own and as JSON.
LLAMA31 = """
{{- bos_token }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content | tojson + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time, please') }}{%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
        {%- if loop.first and tools %}{{- tools | tojson + '\n' }}{%- endif %}
        {{- m.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""
# Arguments in tags, one by one.
TAGS = """
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}
    {%- for call in m.tool_calls or [] %}
        {{- '<function=' + call.function.name + '>' }}
        {%- for name, value in call.function.arguments.items() %}{{- '<' + name + '>' + value | string }}{%- endfor %}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# In the style of gpt-oss: reasoning in a channel without tags, kept for the last answer only, which
# ends with another token.
CHANNELS = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- if loop.last and m.reasoning_content %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
# No header at all before an answer, a space on both sides of it; the system turn is part of the
# first question.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '[INST] ' + "
    "m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}"
    "{{ ('' if loop.index0 == 1 and messages[0]['role'] == 'system' else '[INST] ') + m['content'] "
    "+ ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% "
    "endfor %}"
)
# One more token at the very end of the conversation.
PHI3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% "
    "endif %}"
)


def word_tokenizer(template: str, words: str) -> PreTrainedTokenizerFast:
    """One token for each word, white-space character and punctuation mark of `words`, and for each
    special token.
    """
    split = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    found = sorted({piece for piece, _ in split.pre_tokenize_str(words)})
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *found])}))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return wrap(tokenizer, template)


def byte_tokenizer(
    template: str, trim_offsets: bool = True, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges include runs of newlines and spaces, as those of large models
    do.
    """
    text = [
        "the answer is\n\nhello\n\n\nyou  and   me",
        "user\n",
        "assistant\n",
        "system\n",
        " : \n\n \n",
        "to say hello",
    ] * 10
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+|\s+|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    if add_bos:
        bos = ("<bos>", tokenizer.token_to_id("<bos>"))
        tokenizer.post_processor = processors.TemplateProcessing(
            "<bos> $A", "<bos> $A $B", special_tokens=[bos]
        )
    return wrap(tokenizer, template)


def wrap(tokenizer: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """With a pad token that is the end-of-sequence token, as many models have it."""
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def conversation(
    *contents: str, system: str | None = None, name: str = "chat.jsonl:7"
) -> Conversation:
    """User and assistant turns in alternation, after a system turn if there is one."""
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Conversation(name, messages)


def call(name: str, arguments: dict | str) -> dict:
    """A tool call in OpenAI's shape."""
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def tokenize(
    example: Example, tokenizer: PreTrainedTokenizerFast, mask: str = "assistant", **options
) -> Sample:
    """The only sample of one example; a fault is raised."""
    [(tokens, weights)] = encode(example, tokenizer, mask, **options).samples
    return Sample(example.id, tokens, weights)


def encode(
    example: Example, tokenizer: PreTrainedTokenizerFast, mask: str = "assistant", **options
) -> Encoded:
    """What becomes of one example; a fault is raised."""
    [found] = ChatTokenizer(tokenizer, mask=mask, **options).encode([example])
    if isinstance(found, RowError):
        raise found
    return found
