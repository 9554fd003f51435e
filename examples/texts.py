"""Text classes from a .jsonl file: is a remark about food, the room or the price, by a small BERT trained here.

python examples/texts.py made/texts
leanort deploy hf:made/texts --data jsonl:made/texts/remarks.jsonl --name texts
"""

import json
import os
import random
import sys
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig

SAMPLES = int(os.environ.get("SAMPLES", "2000"))
REMARKS = {
    "food": ["the {soup|bread|fish|cake} {was|tasted} {HOW}", "we liked {HOW} {coffee|salad|cheese} with it"],
    "room": ["the {bed|window|shower|heating} {was|seemed} {HOW}", "a {HOW} {view|carpet|lamp} in the corner"],
    "price": ["{HOW} {bill|offer|tariff} for one night", "it {cost|took} {far|much|a little} too {much|little}"],
}
HOW = "very good|quite bad|cold|fresh|rather old|not nice|better than before|as always|surprisingly fine"
NOISE = ["in the morning", "my friend said", "again", "to be honest", "on monday", "as far as i remember", ""]


def remark(draw: random.Random, topic: str) -> str:
    words = draw.choice(REMARKS[topic]).replace("{HOW}", "{" + HOW + "}").replace("{", "\0{").replace("}", "}\0")
    said = "".join(draw.choice(part[1:-1].split("|")) if part[:1] == "{" else part for part in words.split("\0"))
    return f"{draw.choice(NOISE)} {said} {draw.choice(NOISE)}".strip()


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    lines = [{"text": remark(draw, topic), "label": topic} for topic in draw.choices(list(REMARKS), k=SAMPLES)]
    (folder / "remarks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = sorted({word for line in lines for word in line["text"].split()})
    vocabulary = {word: number for number, word in enumerate(marks + words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    names = {"architectures": ["BertForSequenceClassification"], "num_labels": len(REMARKS)}
    BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes, **names).save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
