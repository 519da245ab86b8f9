"""Word-level tokenizers over the words of the grammar: one for the text encoder, one for the language model."""

import re

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .grammar import BEGINNINGS, ENDINGS, OPENINGS, PREPOSITIONS
from .instructions import INSTRUCTIONS
from .world import COLOURS, OBJECTS, PLACES, SIZES

PAD, UNKNOWN, BEGIN, END = "<pad>", "<unk>", "<s>", "</s>"
TEXT_POSITIONS = 48
KEYS = ('{"objects":', '{"name":', '"size":', '"place":', '"background":')
BRACKETS = ("[", '"', '",', '"},', '"}],', '"}')


def vocabulary(instructions: bool = False) -> list[str]:
    """Special tokens, punctuation, and then every word that the grammar can write, in alphabetical order.

    Args:
        instructions: Whether the words of instructions, and the pieces of JSON, follow.
    """
    prepositions = [option for options in PREPOSITIONS.values() for option in options]
    phrases = [*OBJECTS, *SIZES, *PLACES, *COLOURS, *prepositions, *OPENINGS, *ENDINGS, *BEGINNINGS, "a and"]
    words = set(re.findall(r"[a-z]+", re.sub(r"\{[a-z]+\}", " ", " ".join(phrases))))
    tokens = [PAD, UNKNOWN, BEGIN, END, ",", ".", *sorted(words)]
    if instructions:
        new = {word for instruction in INSTRUCTIONS for word in instruction.text.lower().split()} - words
        tokens += [*sorted(new), *KEYS, *BRACKETS]
    return tokens


def build_tokenizer(for_text_encoder: bool, instructions: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that lowercases its input.

    Args:
        for_text_encoder: True adds begin and end tokens to every text and limits it to `TEXT_POSITIONS` tokens, as
            CLIP's tokenizer does. False adds nothing, as Qwen2's tokenizer does, and pads on the left.
        instructions: Whether it knows the words of instructions and JSON, too. Other tokens keep their ids.
    """
    words = vocabulary(instructions)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    pieces = r'\{?"[a-z]+":|"[,}\]]*|[\[,.]' if instructions else "[,.]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(pieces), behavior="isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(
        prefix="##", cleanup=True
    )  # words separated by spaces, no space before a comma
    if instructions:  # no space after an opening quote or bracket, none before a closing quote
        opening = [decoders.Replace('": " ', '": "'), decoders.Replace("[ {", "[{")]
        closing = decoders.Replace(Regex(' "(?=[,}])'), '"')
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Fuse(), *opening, closing])
    special = {"pad_token": PAD, "unk_token": UNKNOWN, "bos_token": BEGIN, "eos_token": END}
    if not for_text_encoder:
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, padding_side="left", model_max_length=512, **special
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, words.index(BEGIN)), (END, words.index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", model_max_length=TEXT_POSITIONS, **special
    )
