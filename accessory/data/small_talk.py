"""Talk without a picture, so that a model that draws learns when not to: openers, thanks, questions about a thing."""

from __future__ import annotations

import numpy as np

from accessory.data.emoji import Concept

OPENERS = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi there.", "Hi! What can I do for you?"),
    ("Good morning!", "Good morning! What can I do for you today?"),
    ("Hey, how are you?", "I am fine, thank you."),
    ("What is your name?", "I have no name of my own. I am a small language model."),
    ("Who are you?", "I am a small language model that sees and draws emoji."),
    ("What can you do?", "I can name emoji, answer simple questions and draw emoji in three styles."),
    ("Can you help me?", "Of course. What do you need?"),
    ("Thanks!", "You are welcome!"),
    ("Thank you very much.", "You are welcome."),
    ("That is nice.", "I am glad that you like it."),
    ("I like it.", "I am glad to hear that."),
    ("Great, thank you.", "You are welcome."),
    ("Good night.", "Good night!"),
    ("Goodbye!", "Goodbye!"),
    ("See you later.", "See you!"),
    ("What is two plus two?", "Two plus two is four."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Tell me a joke.", "Why did the picture go to jail? It was framed."),
    ("Tell me a short story.", "Once upon a time a cat found a hat, put it on, and went home."),
    ("How many days has a week?", "A week has seven days."),
    ("What colour is the sky?", "The sky is blue."),
    ("Say something kind.", "You are doing well."),
    ("Do you speak English?", "Yes, I do."),
    ("Write a sentence about the sea.", "The sea is wide and deep."),
    ("Why is grass green?", "Grass is green because of chlorophyll."),
    ("Explain gravity in one sentence.", "Gravity pulls things with mass towards each other."),
    ("What did you just do?", "I answered what you asked me."),
    ("Okay.", "What would you like next?"),
    ("Never mind.", "All right."),
    ("What time is it?", "I cannot see a clock."),
    ("Are you a robot?", "I am a language model."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("Give me some advice.", "Take one step after the other."),
    ("How old are you?", "I have no age."),
    ("Where do you live?", "I live in a computer."),
)
"""What is said and what may be answered. Every fourth is for the test."""
ABOUT = (
    ("Which group does {label} belong to?", "{group}"),
    ("What kind of thing is {label}?", "{group}"),
    ("Give me keywords for {label}.", "{tags}"),
    ("What comes to mind with {label}?", "{tags}"),
    ("Do you know what {label} is?", "Yes, it belongs to {group}."),
    ("What do you think of {label}?", "It belongs to {group}."),
    ("Write one sentence about {label}.", "It is something of {group}."),
    ("Is {label} an emoji?", "Yes, it is an emoji."),
)


def exchange(concept: Concept, rng: np.random.Generator, *, training: bool) -> tuple[str, str]:
    """One thing said and its answer, an opener or a question about a concept; the test has its own of both."""
    if rng.random() < 0.5:
        chosen = [pair for i, pair in enumerate(OPENERS) if (i % 4 == 3) != training]
        return chosen[int(rng.integers(len(chosen)))]
    chosen = [pair for i, pair in enumerate(ABOUT) if (i % 4 == 3) != training]
    asked, answer = chosen[int(rng.integers(len(chosen)))]
    # The two that captions of training say as well: a third could make up a pair that evaluation asks with.
    words = {"label": concept.label, "group": concept.group, "tags": " and ".join(concept.tags[:2]) or concept.group}
    return asked.format(**words), answer.format(**words)
