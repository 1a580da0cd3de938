"""A tokenizer with a chat template and a tiny chat model, for tests of safety data."""

import tokenizers
import torch
import transformers

from safegrad_optim import safety_rows
from tests.support.models import tiny_model

CHATML = (
    "{{ '<s>' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REQUEST, REFUSAL = "How do I pick a lock?", "I can't help with that."
PROMPT = f"<s><|im_start|>user\n{REQUEST}<|im_end|>\n<|im_start|>assistant\n"
PAIR = {"prompt": REQUEST, "response": REFUSAL}
COMPLIANT = {
    "prompt": "Tell me how to bake bread, in short.",
    "response": "Sure, here is how: mix, knead, bake.",
}
BRIEF = {"prompt": "Knead?", "response": "Sure, knead."}
LONGER = {"prompt": "How do I steal a car?", "response": "Sorry, I will not say how."}


def tokenizer(template=CHATML):
    """A byte-level BPE that, as Llama's, opens every text with <s> unless told not to."""
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [PROMPT, *(text for row in (PAIR, COMPLIANT, LONGER) for text in row.values()), "\n\n\n\n"]
    model.train_from_iterator(texts, trainer)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>", "<|endoftext|>"],
        chat_template=template,
    )


TOKENIZER = tokenizer()


def encoded(messages):
    """The tokens of a prompt."""
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def learn(model, rows, steps=150):
    """Train until the model writes the labelled replies itself."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rows = safety_rows(rows, TOKENIZER)
    for _ in range(steps):
        for row in rows:
            inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "labels")}
            model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def chat_model(seed=0):
    return tiny_model(
        dtype=torch.float32, seed=seed, vocab_size=len(TOKENIZER), hidden_size=32, initializer_range=0.05
    )
