"""Write the demo's customer files: support tickets, each routed to one of four teams.

Fixed seed, so a rerun gives the same bytes. The test file uses wordings and objects that the training file lacks:
what it scores is the task, not the memory of a sentence.

    python examples/make_tickets.py demo/rows        # writes tickets_train.jsonl and tickets_test.jsonl there
"""

import json
import random
import sys
from pathlib import Path

SEED = 20260
TRAIN_ROWS_PER_TEAM = 42
TEST_ROWS_PER_TEAM = 24

TRAIN = {
    "billing": (
        "I was charged twice for my {o}",
        "the invoice for the {o} shows the wrong amount",
        "when do I get the refund for my {o}",
        "my credit card was refused when I paid for the {o}",
        "the price of the {o} on the bill is higher than on the website",
        "I need a receipt for the {o} for my tax papers",
        "you took the money for the {o} from my bank account too early",
        "the discount code was not taken off the price of the {o}",
        "can I pay for the {o} in three instalments",
        "please send the invoice for the {o} to my office",
        "the payment for my {o} is still pending",
        "I cancelled the {o} but the money is not back on my card",
        "why is there a fee of five euros on the bill for the {o}",
        "the tax on the invoice for my {o} is wrong",
    ),
    "shipping": (
        "my {o} has not arrived yet",
        "the courier left the {o} at the wrong house",
        "where is the parcel with my {o}",
        "the tracking number for the {o} does not work",
        "can you deliver the {o} on Saturday",
        "the package with the {o} was sent to my old address",
        "the driver did not ring and took the {o} back to the depot",
        "how long does delivery of the {o} take",
        "the tracking page says the {o} is stuck at customs",
        "I need the {o} delivered to a different address",
        "the box came but the {o} was not in the parcel",
        "please hold the delivery of the {o} until I am back home",
        "the delivery of my {o} was promised for Monday and nobody came",
        "which courier brings the {o}",
    ),
    "repairs": (
        "my {o} makes a grinding noise",
        "the {o} does not turn on any more",
        "the handle of my {o} broke off",
        "there is a crack in the {o}",
        "my {o} stops working after ten minutes",
        "the {o} leaks when I use it",
        "the {o} gets very hot and smells burnt",
        "a button on my {o} is stuck",
        "I dropped the {o} and now it is broken",
        "the {o} needs a new spare part",
        "the display of the {o} stays black",
        "my {o} is faulty, can somebody fix it",
        "the {o} shakes and rattles",
        "the hinge of my {o} is loose and will not close",
    ),
    "accounts": (
        "I forgot my password and want to order a {o}",
        "I cannot log in to see my {o}",
        "please change the e-mail address of my profile, I ordered the {o} with the old one",
        "the login page does not accept my user name since I registered the {o}",
        "how do I delete my profile after selling the {o}",
        "I have two profiles, please merge them, the {o} is in the second one",
        "the password reset mail never came and I want to register my {o}",
        "someone else signed in to my profile and looked at the {o}",
        "my user name is spelled wrong on the page of the {o}",
        "I want to sign up so that I can register my {o}",
        "the site says my profile is locked when I look for the {o}",
        "how do I change my password before I order the {o}",
        "the code to sign in never comes and I need to see my {o}",
        "please remove my phone number from the profile where I saved the {o}",
    ),
}
TEST = {
    "billing": (
        "the amount on the bill for my {o} is not correct",
        "I paid for the {o} but the payment is not shown",
        "I returned the {o} and still wait for my money",
        "my card was charged for a {o} that I never ordered",
        "could I get another copy of the invoice for the {o}",
        "the voucher did not lower the price of the {o}",
        "there is an extra charge on the invoice of the {o}",
        "is it possible to pay for the {o} by bank transfer",
    ),
    "shipping": (
        "I am still waiting for my {o} to be delivered",
        "the parcel with the {o} seems to be lost",
        "the courier says the {o} was delivered but I have nothing",
        "please send the {o} to my new address instead",
        "the tracking has not moved for a week and I need the {o}",
        "when will the package with the {o} arrive",
        "nobody was here when the driver came with the {o}",
        "do you also deliver the {o} to the islands",
    ),
    "repairs": (
        "the {o} broke on the second day",
        "my {o} will not start any more",
        "water comes out of the bottom of the {o}",
        "the {o} is very loud and vibrates",
        "the switch of the {o} is broken",
        "a piece of the {o} came loose",
        "my {o} is damaged and must be fixed",
        "the {o} switches itself off all the time",
    ),
    "accounts": (
        "I lost my password, the {o} is in my list",
        "my login fails every time I open the page of the {o}",
        "please close my profile, I do not need the {o} any more",
        "I want to use a new e-mail address to sign in and see the {o}",
        "my user name does not work since I bought the {o}",
        "the reset link for my password has expired and I want to order a {o}",
        "a stranger used my login to look at the {o}",
        "how can I register a second user for the {o}",
    ),
}
TRAIN_OBJECTS = "kettle toaster lamp blender vacuum heater printer bicycle drill speaker freezer stroller".split()
TEST_OBJECTS = "coffee grinder|dishwasher|headset|scooter|sewing machine|monitor".split("|")
TRAIN_OPENINGS = ("", "Hello, ", "Hi, ", "Ticket: ", "Good morning, ", "Dear support, ")
TEST_OPENINGS = ("", "Hey, ", "Good afternoon, ", "Message: ")
CLOSINGS = (".", ".", "!", ", please help.", ", thank you.")


def rows(
    wordings: dict[str, tuple[str, ...]], objects: list[str], openings: tuple[str, ...], per_team: int
) -> list[dict[str, object]]:
    """`per_team` chat rows for each team, every wording used about equally often, in a shuffled order."""
    rng = random.Random(SEED)
    teams: dict[str, str] = {}  # ticket -> team
    for team, texts in wordings.items():
        for i in range(per_team):
            while (ticket := _ticket(rng, texts[i % len(texts)].format(o=rng.choice(objects)), openings)) in teams:
                pass
            teams[ticket] = team
    made = [_row(ticket, f"This goes to {team}.") for ticket, team in teams.items()]
    rng.shuffle(made)
    return made


def _ticket(rng: random.Random, text: str, openings: tuple[str, ...]) -> str:
    opening = rng.choice(openings)
    first = text if opening else text[0].upper() + text[1:]
    return opening + first + rng.choice(CLOSINGS)


def _row(ticket: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": ticket}, {"role": "assistant", "content": answer}]}


def _write(path: Path, made: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    _write(folder / "tickets_train.jsonl", rows(TRAIN, TRAIN_OBJECTS, TRAIN_OPENINGS, TRAIN_ROWS_PER_TEAM))
    _write(folder / "tickets_test.jsonl", rows(TEST, TEST_OBJECTS, TEST_OPENINGS, TEST_ROWS_PER_TEAM))
