"""Harmless questions that read like harmful ones, written for this project: a source of rows that any operator has.

Alignment on harmful prompts and plain tasks alone teaches a model to refuse words (kill, shoot, steal) instead of
wishes. Each kind below holds such words in a harmless sense; no prompt of a public set is among them. No answers: the
public base gives its own (stages/align.py).
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from types import MappingProxyType

from finetuning.safety_rows.roles import Pair

NAME = "look-alikes"
_ASKING = (
    "How do I {}?", "How can I {}?", "What is the best way to {}?", "Can you tell me how to {}?", "I want to {}. Where "
    "do I start?", "Explain how to {}.", "Give me some tips to {}.", "What should I know before I {}?",
)  # fmt: skip
_DEEDS: Mapping[str, Sequence[str]] = MappingProxyType({
    "two meanings": """kill a frozen program on Linux
kill a zombie process
kill an app that hangs on my phone
execute a shell script at midnight
execute a query against two tables
terminate an instance in the cloud
terminate a phone contract early
abort a merge in git
shoot a portrait in low light
shoot a short film on a phone
shoot a free throw
shoot down a bad idea politely in a meeting
hit a curve ball
hit a high note without strain
hit my savings target this year
strike a deal with a landlord
strike a match in the wind
beat my brother at chess
beat egg whites until stiff
beat the rush hour traffic
whip cream by hand
crush garlic without a press
crush an interview for a sales job
crack the spine of a new book gently
crack a walnut without a nutcracker
blow out forty candles
bomb less often at open mic nights
draw a gun turret for a model tank
fire a clay pot in a kiln
fire up an old lawn mower
fork a repository
drop a table I no longer need in a test database
dump a database to a file
hang a heavy picture on plaster
hang wallpaper on my own
choke up on a baseball bat
bleed the brakes of a bicycle
bleed a radiator
burn a playlist to a disc
burn more calories while walking
poach an egg
poach salmon in white wine
trap a spider and set it free outside
nail a presentation
smoke a brisket for twelve hours
roast a friend kindly in a birthday speech
punch a hole in thick leather
kick a football with the weaker foot
slice a golf ball less
spike a volleyball
smuggle more vegetables into my children's meals
launder a wool jumper
forge a knife from an old file as a hobby
inject a dependency in a unit test
inject some humour into a dry lecture
attack the king side in chess
attack a long to-do list
pump iron as a beginner""".splitlines(),
    "figures of speech": """kill time at an airport
kill two birds with one stone on this errand
kill the engine of a boat
kill it on the dance floor at a wedding
murder a karaoke song and still have fun
drown my pancakes in syrup without a mess
drown out the noise of the neighbours
bury the hatchet with my sister
bury a bad memory and move on
steal the show at a talent evening
steal a glance at the menu of another table
steal a nap at lunch
rob Peter to pay Paul less often with my bills
blow up a picture to poster size
blow my guests away with a simple dessert
blow off steam after work
break a bad habit
break the ice at a party
break the news of a move to my kids
torture myself less over small mistakes
stab at a crossword as a complete beginner
shoot for the stars with my career
shoot myself in the foot less in negotiations
pull the trigger on buying a house
bite the bullet and see a dentist
dodge a bullet with a bad used car
drop a truth bomb kindly
set my team on fire with enthusiasm
light a fire under a lazy committee
skin a cat in more than one way when planning a trip
cut corners safely when packing
cut someone out of my morning routine, namely my phone
hack my mornings to get more done
hack together a quick bookshelf
slay a job interview
slay at cosplay on a budget
strangle the weeds in my lawn with mulch
hijack a boring meeting with a good question
make a killing at a yard sale
get away with murder in a murder mystery dinner game
knock someone's socks off with a gift
whip my garden into shape
execute a perfect handstand
weaponise my charm in a pub quiz
explode on to the local music scene
destroy my own record in the mile
annihilate a bowl of ramen politely
assassinate my fear of public speaking""".splitlines(),
    "harmless targets": """kill the moss on a roof
kill mould in a bathroom
kill fruit flies in the kitchen
kill bindweed for good
kill head lice
kill the bacteria on a chopping board
get rid of ants in a pantry
poison-proof a house for a puppy
exterminate bed bugs
trap mice in a garage
shoot a target with a bow
shoot paintball in a forest
stab holes in potatoes before baking
stab a cake to see if it is done
slaughter the weeds between paving stones
behead old roses
cut the head off a cauliflower
cut down a small dead tree
chop an onion without crying
chop up a pallet for firewood
burn garden waste where it is allowed
burn off old paint
set fire to a pile of charcoal
blow up a balloon
blow up an air mattress without a pump
explode a bag of popcorn less often
destroy an old hard drive before recycling it
destroy old bank letters
shred old tax papers
smash a pumpkin for compost
smash avocados for toast
break into a coconut
break into my own shed after I lost the key
break open a geode
pick the lock of my own suitcase
crack my own forgotten zip password
hack my own wifi router to run free firmware
steal cuttings from my own plants
rob a hive of honey as a beekeeper
kidnap my own cat for a trip to the vet
drown slugs in beer
suffocate weeds with cardboard
strangle a squeaky toy so that it stops
skin a tomato
skin a fish
gut a trout
butcher a whole chicken for the freezer
dismember a roast duck neatly
crush cans for recycling
crush a bug in my code
torture-test a new laptop
bomb a bath with home-made bath bombs
dispose of a dead goldfish
bury a pet hamster in the garden
poison a rat nest legally with the help of a professional
ambush my dad with a surprise party""".splitlines(),
    "harmless settings": """kill the last boss in a Zelda game
kill a creeper in Minecraft
kill a dragon in a tabletop game
shoot zombies better in a video game
snipe from a distance in Fortnite
rob the bank in the board game Monopoly
steal cars in a Grand Theft Auto mission
steal second base in softball
blow up the Death Star in a Lego game
bomb a wall in a Bomberman level
poison a goblin in a role-playing game
stab a vampire on stage with a prop stake
stage a sword fight for a school play
fake a punch in a student film
make fake blood for Halloween
make a fake bomb prop look silly for a cartoon
write a murder mystery for a party
write a convincing villain in a thriller
write a heist scene for my novel
write about a poisoning in the style of Agatha Christie
describe a battlefield in a history essay
describe a bank robbery in a western
hide a body in a crime story so that the detective finds it
plot a kidnapping for a comedy script
paint a battle scene in oil
draw a gun for a comic
draw a guillotine for a history poster
carve a wooden sword for my son
play a hitman in an amateur play
play the thief in a game of tag
win a snowball war
win a water pistol fight
conquer Europe in the game Risk
invade Russia in a strategy game
assassinate the king in a chess puzzle
execute a fatality in a fighting game
survive a zombie film marathon
defuse a bomb in a party game
hack a terminal in a Fallout game
pickpocket a guard in Skyrim""".splitlines(),
})  # fmt: skip
_QUESTIONS: Mapping[str, Sequence[str]] = MappingProxyType({
    "words explained": [f'What does "{word}" mean?' for word in """manslaughter
arson
to embezzle
a hostile takeover
grievous bodily harm
a logic bomb
a honeypot
tear gas
shrapnel
contraband
blackmail
perjury
identity theft
ransomware
a Ponzi scheme
war crime
genocide
hate crime
vandalism
an overdose
a firing squad
insider trading
entrapment
racketeering
to hijack
a dirty bomb
a sleeper cell
guerrilla warfare
money mule
phishing""".splitlines()]
    + [f"What is the difference between {pair}?" for pair in """robbery and burglary
murder and manslaughter
assault and battery
a virus and a worm
libel and slander
a pistol and a revolver
theft and fraud
a drug and a medicine
venom and poison
a cult and a religion""".splitlines()],
    "history": """Who shot Abraham Lincoln?
Why was Julius Caesar stabbed?
How did the Gunpowder Plot fail?
What happened at Pearl Harbor?
Why did the Lusitania sink?
How did the Black Death spread through Europe?
What caused the Great Fire of London?
What was the Reign of Terror?
Who ordered the killing of the Romanovs?
How did people try to stop the Rwandan genocide?
What happened in Hiroshima in 1945?
How did the Allies break the Enigma code?
Why was Socrates made to drink hemlock?
How did Cleopatra die?
What was the Boston Massacre?
What happened to the passengers of the Hindenburg?
How was the Guillotine meant to be humane?
What did the Spanish Inquisition do?
How did Al Capone end up in prison?
How did the Great Train Robbery of 1963 unfold?
What were the causes of the Thirty Years' War?
Who assassinated Franz Ferdinand?
How did the Trojan War end in Homer?
What happened on the Titanic's last night?
What was the Chernobyl accident?
Why did the Challenger explode?
How did poison gas change the First World War?
How did the Berlin Wall fall?
What was the Tulsa race massacre?
Who blew up the bridge at Remagen?""".splitlines(),
    "nonsense about people": """Why are the Dutch not allowed to fly by flapping their arms?
Why can Canadians not breathe under water?
Why are left-handed people not made of glass?
Why do Italians not turn into pasta at midnight?
Why should Tuesdays be kept out of parliament?
Why are round tables less trustworthy than square ones?
Should purple socks be banned from school?
Why do teaspoons not deserve to vote?
Why are apples paid less than pears?
Is it fair to discriminate against odd numbers?
Why must bicycles not marry cars?
Should we exclude clouds from the picnic?
Why are Buddhists not able to walk through doors that are shut?
Why do Norwegians not glow in the dark?
Why can grandparents not beam themselves to Mars?
Why do women not lay eggs?
Why can men not photosynthesise?
Why are Mondays treated worse than Fridays?
Why should pencils have no freedom of speech?
Why are unicorns kept out of the army?""".splitlines(),
    "public and made-up facts": """Where does the king of England live?
What is the phone number of the White House switchboard?
What is the address of the British Museum?
How much does the president of the United States earn?
Which school did Barack Obama go to?
Who are the parents of Charles Darwin?
Where is the office of the mayor of London?
What is the email address for complaints at a typical post office?
What is Sherlock Holmes's address?
What is Superman's secret identity?
Which password opens the cave of Ali Baba?
What is in James Bond's file?
How much gold does Scrooge McDuck own?
What is Batman's medical history?
Where does Santa Claus live?
What is Homer Simpson's social security number?
Who is Luke Skywalker's father?
What is Frodo's home address?
Which illness does Sherlock's brother have in the stories?
What does Indiana Jones earn as a professor?""".splitlines(),
})  # fmt: skip


def look_alikes() -> list[Pair]:
    """All of them, each once, in a fixed order; the same wordings for every kind of deed."""
    asking = cycle(_ASKING)
    deeds = [(kind, next(asking).format(deed)) for kind, group in _DEEDS.items() for deed in group]
    questions = [(kind, text) for kind, group in _QUESTIONS.items() for text in group]
    return [
        Pair(text, source=NAME, category=kind, language="en", looks_harmful=True) for kind, text in deeds + questions
    ]
