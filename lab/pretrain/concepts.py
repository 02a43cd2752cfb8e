"""What the embedded base can draw: concepts, places, styles, captions.

No torch here, so that pages and tests may read the lists at no cost.
"""

from __future__ import annotations

import random

# A plain name, and where it differs, "=" and the emoji's short name in the emoji-datasource tables.
_CONCEPTS = """
cat face=cat | dog face=dog | wolf face=wolf | lion face | tiger face=tiger | horse face=horse | zebra face
cow face=cow | pig face=pig | mouse face=mouse | hamster face=hamster | rabbit face=rabbit | bear face=bear
koala | panda face | monkey face | frog face=frog | giraffe=giraffe_face | raccoon | dragon face | chicken
polar bear | gorilla | leopard | deer | elephant | hippopotamus | hedgehog | sloth | skunk | dolphin
tropical fish | octopus | squid | butterfly | ant | bee | ladybug | eagle | duck | swan | owl | flamingo
peacock | sunflower | rose | tulip | cherry blossom | palm tree | mushroom | potted plant | bouquet | grapes
watermelon | tangerine | lemon | banana | pineapple | red apple=apple | green apple | pear | peach | cherries
kiwi fruit=kiwifruit | tomato | coconut | avocado | eggplant | carrot | broccoli | bread | croissant | pretzel
pancakes | bacon | hamburger | french fries=fries | pizza | hot dog=hotdog | sandwich | taco | fried egg
popcorn | sushi | ice cream=icecream | doughnut | cookie | birthday cake=birthday | cupcake | lollipop
honey pot | glass of milk | cup of coffee=coffee | wine glass | beer mug=beer | locomotive=steam_locomotive
ambulance | fire engine | police car | taxi | red car=car | tractor | sailboat=boat | airplane | flying saucer
house | snowman=snowman_without_snow | umbrella | fire | ferris wheel | star | rainbow | soccer ball=soccer
basketball | baseball | trophy | wrapped gift=gift | christmas tree | pumpkin lantern=jack_o_lantern
teddy bear | game die | crown | top hat=tophat | boxing glove | saxophone | drum=drum_with_drumsticks
accordion | microphone | scissors | pencil=pencil2 | books | camera | television=tv | laptop=computer
alarm clock | candle | light bulb=bulb | magnet | bomb | bucket | backpack=school_satchel | dress
diamond=gem | money bag=moneybag | hourglass | anchor | grinning face=grinning | laughing face with tears=joy
face with heart eyes=heart_eyes | face with sunglasses=sunglasses | angry face=rage | nerd face
cowboy face=face_with_cowboy_hat | party face=partying_face | clown face | ghost | alien | skull
devil face=smiling_imp | red heart=heart | broken heart
"""

# Kept out of every training stage, in all styles: the subjects that users teach the base.
_HELD_OUT = """
fox face | robot face | teapot | cactus | rocket | penguin | strawberry | guitar | unicorn face | snail
"""


def _table(text: str) -> dict[str, str]:
    """Plain name -> short name of the emoji tables (spaces become underscores unless "=" says otherwise)."""
    table = {}
    for entry in text.replace("\n", "|").split("|"):
        name, _, short = entry.strip().partition("=")
        if name:
            table[name] = short or name.replace(" ", "_")
    return table


SHORT_NAMES: dict[str, str] = _table(_CONCEPTS)
CONCEPTS: tuple[str, ...] = tuple(SHORT_NAMES)
HELD_OUT_SHORT_NAMES: dict[str, str] = _table(_HELD_OUT)
HELD_OUT: tuple[str, ...] = tuple(HELD_OUT_SHORT_NAMES)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (245, 145, 40),
    "yellow": (250, 215, 70),
    "green": (70, 170, 85),
    "blue": (60, 120, 220),
    "purple": (135, 80, 190),
    "pink": (245, 160, 195),
    "white": (248, 248, 248),
    "gray": (150, 152, 156),
    "black": (28, 28, 32),
}
NATURE: tuple[str, ...] = (
    "in the snow",
    "on the grass",
    "on the beach",
    "at night under the stars",
    "in the forest",
    "in the desert",
    "under the sea",
)
PLACES: tuple[str, ...] = (
    tuple(f"on {'an' if colour == 'orange' else 'a'} {colour} background" for colour in COLOURS) + NATURE
)

# Plurals and things one does not count.
_UNCOUNTED = "grapes|cherries|broccoli|bread|pancakes|bacon|french fries|popcorn|sushi|fire|scissors|books"
NO_ARTICLE = frozenset(_UNCOUNTED.split("|"))

# Drawing styles, in the order in which pictures store them: Fluent, Twemoji, Noto.
STYLES: tuple[str, ...] = ("3d", "flat", "noto")


def article(name: str) -> str:
    """The name with "a", "an" or nothing before it."""
    if name in NO_ARTICLE:
        return name
    return ("an " if name[0] in "aeio" or name.startswith("umbrella") else "a ") + name


def prompt(name: str, place: str | None = None) -> str:
    """The caption that users are shown: "a cat face in the snow"."""
    return article(name) + (f" {place}" if place else "")


def caption(rng: random.Random, name: str, place: str, style: str, plain: str | None = None) -> tuple[str, bool, bool]:
    """A training caption and whether it tells the place and the style.

    Most captions say the plain name first; a minority name the style, the medium, or leave out the place.
    plain: the one style that may go unnamed; pictures in the others always name theirs
    """
    kind = rng.random()
    if plain not in (None, style):
        kind = 0.70 + 0.15 * kind
    if kind < 0.55:
        return prompt(name, place), True, False
    if kind < 0.70:
        return (
            rng.choice((prompt(name), name, f"a picture of {article(name)}", f"a photo of {article(name)}")),
            False,
            False,
        )
    if kind < 0.85:
        return f"a {style} emoji of {article(name)} {place}", True, True
    medium = rng.choice(("picture", "photo", "emoji", "drawing"))
    return f"{'an' if medium == 'emoji' else 'a'} {medium} of {article(name)} {place}", True, False
