"""Small tokenizers that need no download: bytes as the vocabulary, with the templates of well-known families."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{% if message.role == 'assistant' %}A:{% generation %}{{ message.content }}"
    "<|im_end|>{% endgeneration %}{% else %}U:{{ message.content }}{% endif %}{% endfor %}"
)
PLAIN_TURNS = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}"
    "{{ 'Bot: ' + message.content + '<|im_end|>' }}{% else %}{{ 'Human: ' + message.content + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endfor %}"
)


def byte_tokenizer(
    template: str | None = CHATML, *, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A token a byte, after <|endoftext|> (bos), <|im_start|> and <|im_end|> (eos)."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(special + letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="$A $B", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
