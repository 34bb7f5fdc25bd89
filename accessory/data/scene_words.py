"""What scenes are made of, in words: concepts, colours, relations and the wording of questions."""

from __future__ import annotations

NAMES: frozenset[str] = frozenset(
    """
    cactus|tulip|rose|sunflower|maple leaf|mushroom|palm tree|cow|tiger|rabbit|cat|crocodile|whale|snail|snake|horse
    |monkey|rooster|dog|pig|elephant|octopus|bug|ant|honeybee|lady beetle|fish|turtle|penguin|koala|dolphin|frog|bear
    |panda|spider|crab|lion|scorpion|unicorn|eagle|duck|bat|shark|owl|fox|butterfly|gorilla|giraffe|zebra|hedgehog
    |kangaroo|flamingo|parrot|lobster|hot dog|taco|burrito|tomato|eggplant|grapes|watermelon|lemon|banana|pineapple
    |red apple|green apple|pear|peach|cherries|strawberry|hamburger|pizza|french fries|sushi|doughnut|cookie|lollipop
    |popcorn|croissant|avocado|cucumber|carrot|egg|pretzel|broccoli|cupcake|garlic|cheese wedge|backpack|top hat
    |saxophone|guitar|trumpet|violin|crown|glasses|necktie|jeans|dress|lipstick|pill|ring|light bulb|bomb|laptop
    |briefcase|floppy disk|camera|television|radio|battery|key|bell|hammer|microscope|telescope|candle|scissors
    |pencil|envelope|umbrella|balloon|trophy|basketball|soccer ball|teddy bear|kite|rocket|helicopter|bus|ambulance
    |taxi|tractor|bicycle|sailboat|airplane|anchor|snowman|volcano|rainbow|house|castle|tent|toothbrush|drum|chair
    """.replace("\n", "")
    .replace("    ", "")
    .strip()
    .split("|")
)

PLURALS = {
    "cactus": "cacti",
    "octopus": "octopuses",
    "fish": "fish",
    "maple leaf": "maple leaves",
    "wolf": "wolves",
}
ALREADY_PLURAL = frozenset({"grapes", "cherries", "french fries", "glasses", "jeans", "scissors", "broccoli", "garlic",
                            "popcorn", "sushi", "lipstick"})  # fmt: skip


def plural(name: str) -> str:
    """The plural of a concept name; mass nouns and pairs become "pictures of X"."""
    if name in PLURALS:
        return PLURALS[name]
    if name in ALREADY_PLURAL:
        return f"pictures of {name}"
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    if name.endswith(("ato", "ado", "ango")) and name != "avocado":
        return name + "es"
    return name + "s"


PATCH_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 45),
    "green": (40, 165, 70),
    "blue": (45, 90, 225),
    "yellow": (250, 220, 50),
    "orange": (250, 140, 25),
    "purple": (140, 60, 180),
    "pink": (250, 150, 195),
    "brown": (130, 80, 40),
    "gray": (135, 135, 135),
    "black": (20, 20, 20),
}

# (axis, the asked one comes first along it) -> what it is to the other.
RELATIONS = {
    ("across", True): "to the left of",
    ("across", False): "to the right of",
    ("along", True): "above",
    ("along", False): "below",
}
OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

# The first wording is the one of the test.
PHRASES: dict[str, tuple[str, ...]] = {
    "count": ("How many {plural} are there?", "Count the {plural}.", "How many {plural} do you see?"),
    "colour": (
        "What color is behind the {name}?",
        "What is the background color of the {name}?",
        "The {name} is on which color?",
    ),
    "patch": ("What is on the {colour} patch?", "Name the thing on {colour}.", "Which thing is on the {colour} area?"),
    "relation": ("Is the {a} {relation} the {b}?", "Do you see the {a} {relation} the {b}?"),
    "what": ("What is {relation} the {b}?", "Which thing is {relation} the {b}?"),
    "where": (
        "Where is the {name}? Give the box.",
        "Give the box of the {name}.",
        "Please provide the bounding box of the {name}.",
    ),
    "region": ("What is in the box {box}?", "Name the thing at {box}.", "What do you see at {box}?"),
    "end": ("What is at the far {end}?", "What is at the {end} end?", "Name the thing at the far {end}."),
    "nth": ("What is {nth} from the {end}?", "Name the {nth} thing from the {end}."),
    "how many": ("How many things are there?", "Count the things.", "How many things do you see?"),
}
