"""The `debug` preset's own world: a tiny DeepSeek-V3 configuration, a tokenizer, and conversations
that can be learnt.

The conversations are with a phrase-book helper. The system turn says who is speaking, where they
live and which language they learn; a few questions follow, each of which has exactly one right
answer:

    system     You help Oscar from Lima to learn Finnish.
    user       What is a dog?
    assistant  A dog is koira in Finnish, Oscar.        language and name: system turn; koira:
                                                        learnt by heart
    user       I have a blue lamp.
    assistant  Noted: Oscar has a blue lamp.       colour and thing: this turn; name: system turn
    user       And in German?
    assistant  A dog is Hund in German, Oscar.          dog: the last word that was asked for, some
                                                        turns ago
    user       What colour is my lamp?
    assistant  The lamp of Oscar is blue.               blue: an earlier user turn
    user       Who am I?
    assistant  You are Oscar from Lima.                 both from the system turn

What is held out: pairs, not orders. One in `HELD_OUT_EVERY` of all (name, city), (name, noun) and
(colour, thing) pairs occurs in no training conversation, and every held-out conversation is made of
such pairs alone. So no assistant turn of the held-out file occurs in the training file, word for
word, and an answer cannot be looked up: it has to be
composed. What training shows: each name, city, colour and thing with other partners, and every
entry of the dictionary (a word in a language), as nobody can guess those.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

NAMES = (
    "Ada", "Anton", "Bela", "Boris", "Carla", "Clara", "David", "Dora", "Edgar", "Elena", "Emil",
    "Fatima", "Felix", "Greta", "Hugo", "Ida", "Igor", "Jonas", "Karin", "Leo", "Lena", "Marta",
    "Nadia", "Oscar", "Pavel", "Rosa", "Simon", "Tara", "Viktor", "Zoe",
)  # fmt: skip
CITIES = (
    "Accra", "Athens", "Berlin", "Bogota", "Cairo", "Dakar", "Delhi", "Dublin", "Geneva", "Hanoi",
    "Havana", "Jakarta", "Kyoto", "Lagos", "Lima", "Lisbon", "London", "Madrid", "Manila", "Milan",
    "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Riga", "Seoul", "Tokyo", "Tunis", "Vienna",
)  # fmt: skip
COLOURS = ("black", "blue", "brown", "green", "grey", "pink", "purple", "red", "white", "yellow")
THINGS = ("bag", "bike", "boat", "coat", "cup", "hat", "kite", "lamp", "ring", "sofa")
LANGUAGES = ("French", "German", "Spanish", "Finnish")
DICTIONARY = {  # noun: the word for it in each of LANGUAGES
    "bell": ("cloche", "Glocke", "campana", "kello"),
    "bird": ("oiseau", "Vogel", "pájaro", "lintu"),
    "book": ("livre", "Buch", "libro", "kirja"),
    "bridge": ("pont", "Brücke", "puente", "silta"),
    "candle": ("bougie", "Kerze", "vela", "kynttilä"),
    "cat": ("chat", "Katze", "gato", "kissa"),
    "chair": ("chaise", "Stuhl", "silla", "tuoli"),
    "dog": ("chien", "Hund", "perro", "koira"),
    "door": ("porte", "Tür", "puerta", "ovi"),
    "fish": ("poisson", "Fisch", "pez", "kala"),
    "flower": ("fleur", "Blume", "flor", "kukka"),
    "garden": ("jardin", "Garten", "jardín", "puutarha"),
    "horse": ("cheval", "Pferd", "caballo", "hevonen"),
    "house": ("maison", "Haus", "casa", "talo"),
    "key": ("clé", "Schlüssel", "llave", "avain"),
    "mirror": ("miroir", "Spiegel", "espejo", "peili"),
    "river": ("fleuve", "Fluss", "río", "joki"),
    "spoon": ("cuillère", "Löffel", "cuchara", "lusikka"),
    "tree": ("arbre", "Baum", "árbol", "puu"),
    "window": ("fenêtre", "Fenster", "ventana", "ikkuna"),
}
SYSTEM = "You help {name} from {city} to learn {language}."
TURNS = {  # kind of turn: question and answer
    "who": ("Who am I?", "You are {name} from {city}."),
    "where": ("Where do I live?", "You live in {city}, {name}."),
    "word": ("What is a {noun}?", "A {noun} is {word} in {language}, {name}."),
    "again": ("And in {other}?", "A {noun} is {other_word} in {other}, {name}."),
    "have": ("I have a {colour} {thing}.", "Noted: {name} has a {colour} {thing}."),
    "colour": ("What colour is my {thing}?", "The {thing} of {name} is {colour}."),
}
HELD_OUT_EVERY = 5

# The model of a DeepSeek-V3, config.json without what follows from the tokenizer.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 64,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    # V3's 0.02 is for a width of 7168; at 128 it learns this task 3 times slower
    "initializer_range": 0.06,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_interleave": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "torch_dtype": "float32",
}

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"  # EOS ends every turn
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' ~ message['role'] ~ ' is not system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def is_held_out(first: int, second: int) -> bool:
    """Whether the pair of the `first`-th and the `second`-th entry of two lists is kept out of
    training.
    """
    return (first + second) % HELD_OUT_EVERY == 0


def _partners(values: Sequence[str], first: int, held_out: bool) -> list[str]:
    """Return the values whose pair with the `first`-th entry of another list is on the wanted side
    of the split.
    """
    return [value for second, value in enumerate(values) if is_held_out(first, second) == held_out]


def _conversation(rng: random.Random, held_out: bool) -> list[dict[str, str]]:
    """Return one conversation: a system turn, then 4 to 6 questions with their answers."""
    name, colour = rng.randrange(len(NAMES)), rng.randrange(len(COLOURS))
    facts = {
        "name": NAMES[name],
        "city": rng.choice(_partners(CITIES, name, held_out)),
        "language": rng.choice(LANGUAGES),
        "colour": COLOURS[colour],
        "thing": rng.choice(_partners(THINGS, colour, held_out)),
    }
    nouns = rng.sample(_partners(tuple(DICTIONARY), name, held_out), 2)
    kinds = rng.sample(["who", "where", "word", "word", "have"], rng.randint(3, 4))
    for opener, follow_up in (("word", "again"), ("have", "colour")):
        if opener in kinds:  # anywhere after it
            kinds.insert(rng.randint(kinds.index(opener) + 1, len(kinds)), follow_up)

    messages = [{"role": "system", "content": SYSTEM.format(**facts)}]
    for kind in kinds:
        if kind == "word":
            facts["noun"] = nouns.pop()
            facts["word"] = DICTIONARY[facts["noun"]][LANGUAGES.index(facts["language"])]
        if kind == "again":
            facts["other"] = rng.choice(
                [language for language in LANGUAGES if language != facts["language"]]
            )
            facts["other_word"] = DICTIONARY[facts["noun"]][LANGUAGES.index(facts["other"])]
        question, answer = (text.format(**facts) for text in TURNS[kind])
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    return messages


def write_debug_data(
    directory: Path, seed: int = 0, train: int = 3000, held_out: int = 200
) -> tuple[Path, Path]:
    """Write `train.jsonl` and `eval.jsonl`, one `{"messages": [{"role", "content"}, ...]}` a line.

    Args:
        directory: made if it is not there; files in it are overwritten.
        seed: the same seed writes the same bytes.
        train: conversations in train.jsonl.
        held_out: conversations in eval.jsonl, made of held-out pairs alone (see the module's
            docstring).

    Returns:
        The paths of the two files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for file, count, is_eval in (("train.jsonl", train, False), ("eval.jsonl", held_out, True)):
        rng = random.Random(f"{seed} {file}")
        lines = [
            json.dumps({"messages": _conversation(rng, is_eval)}, ensure_ascii=False)
            for _ in range(count)
        ]
        paths.append(directory / file)
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths[0], paths[1]


def debug_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer (the kind DeepSeek uses), in which every word of the task
    is one token.

    Any text round-trips, as single bytes are in the vocabulary. BOS comes from the chat template
    alone, never from the tokenizer itself.
    """
    words = [word for translations in DICTIONARY.values() for word in translations]
    slots = {
        "name": NAMES,
        "city": CITIES,
        "language": LANGUAGES,
        "other": LANGUAGES,
        "noun": tuple(DICTIONARY),
    }
    slots |= {"word": words, "other_word": words, "colour": COLOURS, "thing": THINGS}
    frames = [SYSTEM, *(text for turn in TURNS.values() for text in turn)]
    corpus = [
        frame.format(**{slot: values[i % len(values)] for slot, values in slots.items()})
        for frame in frames
        for i in range(max(map(len, slots.values())))
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,  # never reached: merging stops when every word is one token
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=special[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def write_debug_model(directory: Path, model: Mapping[str, Any] | None = None) -> None:
    """Write what the weights of the debug model belong to: the tokenizer, `config.json` and
    `generation_config.json`.

    Weights are not written: they are initialised from the run's seed.

    Args:
        directory: made if it is not there; files in it are overwritten.
        model: its config.json, without what follows from the tokenizer; None: `DEEPSEEK_V3`.
    """
    tokenizer = debug_tokenizer()
    tokenizer.save_pretrained(directory)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = DEEPSEEK_V3 if model is None else model
    config = {name: model[name] for name in ("architectures", "model_type")}
    config |= {"vocab_size": len(tokenizer)} | model | ids
    for file, content in (
        ("config.json", config),
        ("generation_config.json", {**ids, "do_sample": False}),
    ):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
