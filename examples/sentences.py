"""A sentence encoder without labels: a small BERT, trained here to fill in words, with ids of any length.

python examples/sentences.py made/sentences
leanort deploy hf:made/sentences --data examples/sentences.py:data --name sentences --set task.name=embedding
"""

import os
import random
import sys

import torch

SAMPLES, PAD, MASK = int(os.environ.get("SAMPLES", "4000")), 0, 1
CHOICES = (
    THE := "the a my your one every",
    "small large old new red quiet clever tired",
    "dog cat horse child farmer teacher sailor doctor",
    "sees follows likes paints carries forgets finds sells",
    THE,
    "book house garden river boat letter window lamp",
    "in near behind under above",
    THE,
    "town forest street harbour school station field market",
)
WORDS = sorted({word for some in CHOICES for word in some.split()} | {"and"})


def sentences(count: int):
    draw = random.Random(0)
    for _ in range(count):
        clauses = [[draw.choice(some.split()) for some in CHOICES[: draw.choice((4, 6, 9))]] for _ in range(3)]
        text = " and ".join(" ".join(clause) for clause in clauses[: draw.choice((1, 2, 3))])
        yield torch.tensor([2 + WORDS.index(word) for word in text.split()])


def data():
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in sentences(SAMPLES)]


def write(folder: str) -> None:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    bert = BertForMaskedLM(BertConfig(vocab_size=2 + len(WORDS), max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(bert.parameters(), lr=5e-4)
    texts = list(sentences(SAMPLES))
    for start in range(0, len(texts), 32):
        ids = torch.nn.utils.rnn.pad_sequence(texts[start : start + 32], batch_first=True, padding_value=PAD)
        hidden = (torch.rand(ids.shape) < 0.2) & (ids != PAD)
        fed, wanted = ids.masked_fill(hidden, MASK), ids.masked_fill(~hidden, -100)
        bert(input_ids=fed, attention_mask=(ids != PAD).long(), labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    bert.bert.save_pretrained(folder)


if __name__ == "__main__":
    write(sys.argv[1])
