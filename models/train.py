"""Train MoLink Mini from scratch: text, tokenizer, weights and model card.

    python models/train.py --out models/molink-mini

The same seed and thread count on the same machine give the same weights.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

import corpus
import facts
import torch
from corpus import ASSISTANT, END, SYSTEM, USER, Fact
from measure import exams, measure
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

HERE = Path(__file__).parent
VOCABULARY = 1536
ROW_TOKENS = 256
ROWS = 8  # rows in a step
QUESTION_WEIGHT = 0.1  # in the loss; an answer's tokens weigh 1
# Words with their leading space; one token for a number below 100.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}{1,2}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True, slots=True)
class Batch:
    """One training step's input; both tensors are [ROWS, ROW_TOKENS]."""

    tokens: torch.Tensor  # int64
    weights: torch.Tensor  # float32, of each token as a target


def train_tokenizer(trained: list[Fact]) -> PreTrainedTokenizerFast:
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
    known = [text for f in trained if f.topic != "unknown" for text in (f.answer, *f.questions)]
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
    """Eight layers, so that it can be cut often; heads that split over one, two or four ranks."""
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


def batches(tokenizer: PreTrainedTokenizerFast, trained: list[Fact], seed: int) -> Iterator[Batch]:
    """An endless stream of batches; every row begins with a whole document."""
    documents = corpus.documents(trained, seed)
    while True:
        rows = [_packed_row(tokenizer, documents) for _ in range(ROWS)]
        yield Batch(
            tokens=torch.tensor([[token for token, _ in row] for row in rows]),
            weights=torch.tensor([[weight for _, weight in row] for row in rows]),
        )


def _packed_row(
    tokenizer: PreTrainedTokenizerFast, documents: Iterator[list[corpus.Piece]]
) -> list[tuple[int, float]]:
    """Documents one after the other, as ROW_TOKENS (token, weight) pairs; the last is cut."""
    row: list[tuple[int, float]] = []
    while len(row) < ROW_TOKENS:
        for text, is_answer in next(documents):
            weight = 1.0 if is_answer else QUESTION_WEIGHT
            row += [(token, weight) for token in tokenizer.encode(text)]
    return row[:ROW_TOKENS]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def train(model: LlamaForCausalLM, stream: Iterator[Batch], steps: int, peak: float) -> None:
    """AdamW on the weighted cross-entropy of the next token, in bfloat16 over float32 weights."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    model.train()
    progress = tqdm(range(steps), desc="training", unit="step")
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        batch = next(stream)
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


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face folder; unless asked otherwise, clients sample almost greedily."""
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, eos_token_id=0, pad_token_id=0
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_card(arguments: argparse.Namespace, scores: dict[str, float], minutes: float) -> None:
    """Fill `card.md` with what was run and measured."""
    weights = arguments.out / "model.safetensors"
    card = Template((HERE / "card.md").read_text()).substitute(
        command=f"python models/train.py --steps {arguments.steps} --lr {arguments.lr}"
        f" --seed {arguments.seed} --threads {arguments.threads}",
        countries=sum(len(table.split("|")) for table in facts.CAPITALS.values()),
        megabytes=f"{weights.stat().st_size / 1e6:.1f}",
        minutes=f"{minutes:.0f}",
        scores="\n".join(f"| {name} | {score:.1%} |" for name, score in scores.items()),
        steps=arguments.steps,
        tokens_per_step=f"{ROWS * ROW_TOKENS:,}",
        vocabulary=f"{VOCABULARY:,}",
    )
    (arguments.out / "README.md").write_text(card)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "molink-mini", help="model folder")
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of text and weights (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (%(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)

    trained, held_out = corpus.split(corpus.all_facts(arguments.seed), arguments.seed)
    tokenizer = train_tokenizer(trained)
    model = build_model()
    started = time.process_time()
    train(model, batches(tokenizer, trained, arguments.seed), arguments.steps, arguments.lr)
    minutes = (time.process_time() - started) / 60
    save(model, tokenizer, arguments.out)

    stored = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    scores = measure(stored, tokenizer, exams(trained, held_out, arguments.seed))
    write_card(arguments, scores, minutes)
    for name, score in scores.items():
        print(f"{score:7.1%}  {name}")


if __name__ == "__main__":
    main()
