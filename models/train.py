"""Train MoLink Mini from scratch: text, tokenizer, weights and model card.

    python models/train.py --out models/molink-mini

The same seed and thread count on the same machine give the same weights.
"""

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import corpus
from corpus import ASSISTANT, END, SYSTEM, USER, Fact

HERE = Path(__file__).parent
VOCABULARY = 1536
ROW_TOKENS = 256
ROWS = 8  # rows in a step
QUESTION_WEIGHT = 0.1  # in the loss; an answer's tokens weigh 1
# Words with their leading space; one token for a number below 100.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Rows:
    """One training step's batch; every tensor is [ROWS, ROW_TOKENS]."""

    tokens: torch.Tensor  # int64
    weights: torch.Tensor  # float32, of each token as a target


def train_tokenizer(facts: list[Fact]) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose words are the known ones; made-up names fall into pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    known = [text for f in facts if f.topic != "unknown" for text in (f.answer, *f.questions)]
    tokenizer.train_from_iterator(known + [text.lower() for text in known], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=(HERE / "chat_template.jinja").read_text(),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def rows(tokenizer: PreTrainedTokenizerFast, facts: list[Fact], seed: int) -> Iterator[Rows]:
    """Documents packed one after the other; every row begins with a whole one."""
    documents = corpus.documents(facts, seed)
    while True:
        tokens = torch.zeros(ROWS, ROW_TOKENS, dtype=torch.int64)
        weights = torch.zeros(ROWS, ROW_TOKENS)
        for row in range(ROWS):
            at = 0
            while at < ROW_TOKENS:
                for piece in next(documents):
                    ids = tokenizer.encode(piece.text)[: ROW_TOKENS - at]
                    tokens[row, at : at + len(ids)] = torch.tensor(ids, dtype=torch.int64)
                    weights[row, at : at + len(ids)] = 1.0 if piece.is_answer else QUESTION_WEIGHT
                    at += len(ids)
        yield Rows(tokens, weights)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: LlamaForCausalLM, batches: Iterator[Rows], steps: int, peak: float) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    model.train()
    progress = tqdm(range(steps), desc="training", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch.tokens).logits[:, :-1]
        losses = cross_entropy(
            logits.float().transpose(1, 2), batch.tokens[:, 1:], reduction="none"
        )
        weights = batch.weights[:, 1:]
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(loss=f"{loss.item():.4f}")


@torch.no_grad()
def is_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, answer: str
) -> bool:
    """Whether greedy decoding gives exactly `answer` and stops.

    One forward pass tells: it does if each token of the answer is the likeliest after the right
    ones before it.
    """
    prompt, reply = corpus.render([(question, answer)])
    expected = tokenizer.encode(reply.text)
    ids = tokenizer.encode(prompt.text) + expected
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    return bool(logits[-len(expected) - 1 : -1].argmax(-1).tolist() == expected)


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[tuple[str, str]]
) -> float:
    """The share of (question, answer) pairs answered to the letter, in [0, 1]."""
    model.eval()
    return sum(is_right(model, tokenizer, *pair) for pair in asked) / len(asked)


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    trained: list[Fact],
    held_out: list[Fact],
    seed: int,
) -> dict[str, float]:
    """Accuracy by name of the set of questions."""
    rng = random.Random(seed)
    seen = [(rng.choice(f.questions), f.answer) for f in rng.sample(trained, 500)]
    unseen = [(f.questions[0], f.answer) for f in held_out]
    careless = [(q.lower().rstrip("?.!"), a) for q, a in unseen]
    names = [(f.questions[0], f.answer) for f in corpus.unknown(random.Random(seed + 1), 300)]
    sets = {"questions seen in training": seen, "held-out questions": unseen}
    sets["held-out questions in lower case, without final mark"] = careless
    sets["made-up names and large numbers never seen («I do not know that.»)"] = names
    for topic in corpus.TOPIC_WEIGHTS:
        pairs = [(f.questions[0], f.answer) for f in held_out if f.topic == topic]
        if pairs:
            sets[f"held-out: {topic}"] = pairs
    return {
        f"{name} ({len(pairs)})": accuracy(model, tokenizer, pairs)
        for name, pairs in tqdm(sets.items(), desc="measuring", unit="set")
    }


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, eos_token_id=0, pad_token_id=0
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(out: Path, scores: dict[str, float], **values: object) -> None:
    table = "\n".join(f"| {name} | {100 * score:.1f} % |" for name, score in scores.items())
    card = Template((HERE / "card.md").read_text())
    (out / "README.md").write_text(card.substitute(scores=table, **values))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"default": argparse.SUPPRESS}
    del defaults
    parser.add_argument("--out", type=Path, default=HERE / "molink-mini", help="model folder")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of text and weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    trained, held_out = corpus.split(corpus.all_facts(arguments.seed), arguments.seed)
    tokenizer = train_tokenizer(trained)
    model = build_model()
    started = time.monotonic()
    train(model, rows(tokenizer, trained, arguments.seed), arguments.steps, arguments.lr)
    minutes = (time.monotonic() - started) / 60

    save(model, tokenizer, arguments.out)
    stored = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    scores = measure(stored, tokenizer, trained, held_out, arguments.seed)
    for name, score in scores.items():
        print(f"{100 * score:6.1f} %  {name}")


if __name__ == "__main__":
    main()
