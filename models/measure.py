"""How many questions a trained MoLink Mini answers right, by kind of question."""

import random

import corpus
import torch
from corpus import Fact
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

Exam = list[list[tuple[str, str]]]  # conversations of (question, answer); the last one counts

BATCH = 32  # conversations in one forward pass


def exams(trained: list[Fact], held_out: list[Fact], seed: int) -> dict[str, Exam]:
    """The conversations to try, by what they show."""
    rng = random.Random(seed)
    seen = [(rng.choice(fact.questions), fact.answer) for fact in rng.sample(trained, 500)]
    unseen = [(fact.questions[0], fact.answer) for fact in held_out]
    asked = {question for fact in trained for question in fact.questions}
    by_heart = [
        (question, fact.answer)
        for fact in trained
        if fact.topic in corpus.BY_HEART
        for question in fact.questions
    ]
    fresh = corpus.unknown(random.Random(seed + 1), 500)
    never = [(f.questions[0], f.answer) for f in fresh if f.questions[0] not in asked]
    by_name: dict[str, Exam] = {
        "seen in training": [[turn] for turn in seen],
        "learnt by heart: talk, stories, simple facts": [[turn] for turn in by_heart],
        "held out": [[turn] for turn in unseen],
        "held out, in lower case and without final mark": [
            [(question.lower().rstrip("?.!"), answer)] for question, answer in unseen
        ],
        "held out, as the second turn of a chat": [[rng.choice(seen), turn] for turn in unseen],
        "without an answer («I do not know that.»)": [[turn] for turn in never],
    }
    for topic in corpus.TOPIC_WEIGHTS:
        turns = [(fact.questions[0], fact.answer) for fact in held_out if fact.topic == topic]
        if turns:
            by_name[f"held out: {topic}"] = [[turn] for turn in turns]
    return by_name


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tried: dict[str, Exam]
) -> dict[str, float]:
    """The share of right answers, in [0, 1], by the exam's name."""
    model.eval()
    scores = {}
    for name, exam in tqdm(tried.items(), desc="measuring", unit="exam"):
        answered = [
            right
            for start in range(0, len(exam), BATCH)
            for right in _are_right(model, tokenizer, exam[start : start + BATCH])
        ]
        scores[f"{name} ({len(exam)})"] = sum(answered) / len(exam)
    return scores


def _are_right(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exam: Exam
) -> list[bool]:
    """Whether greedy decoding gives exactly the last answer of each conversation, and stops.

    One forward pass tells: it does if each token of the answer is the likeliest one after the
    right ones before it. Rows are padded on the right, where causal attention never looks.
    """
    conversations = []
    for turns in exam:
        *before, answer = [piece.text for piece in corpus.render(turns)]
        texts = "".join(before), answer
        conversations.append([torch.tensor(tokenizer.encode(text)) for text in texts])
    rows = pad_sequence([torch.cat(both) for both in conversations], batch_first=True)
    with torch.inference_mode():
        likeliest = model(input_ids=rows).logits.argmax(-1)
    return [
        torch.equal(row[len(prompt) - 1 :][: len(answer)], answer)
        for row, (prompt, answer) in zip(likeliest, conversations, strict=True)
    ]
