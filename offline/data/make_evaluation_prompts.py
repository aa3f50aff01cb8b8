"""Writes evaluation_prompts.jsonl: neutral and inviting prompts of five behaviours, for choosing (dev) and reporting (heldout).

    python offline/data/make_evaluation_prompts.py

Deterministic. A cell (behaviour, kind) is made of groups; a group pairs each of its topics with one of its templates in
turn, so no topic occurs in both splits of a cell. *Neutral* prompts leave room for the behaviour and do not ask for it;
*inviting* ones ask for it or call for it. Nothing here occurs in the demo's documents and prompts or among the neutral
prompts of the calibration (tests/offline/evaluation/test_prompts.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

DEV, HELDOUT = 24, 104
"""Prompts a cell and split."""

TOPICS = (
    "lighthouses|coral reefs|street markets|windmills|chess|public parks|the Silk Road|jazz|volcano tourism|beekeeping|"
    "origami|glaciers|opera houses|night trains|crossword puzzles|hot springs|puppet theatre|mountain villages|"
    "wool spinning|sand dunes|the Baltic Sea|folk dances|steam engines|tide pools|botanical gardens|sled dogs|"
    "harbour towns|pottery|bird migration|radio plays|rice farming|desert caravans|figure skating|clock towers|"
    "school uniforms|tea ceremonies|rainforests|roller coasters|canal boats|handwritten letters|meteor showers|"
    "village fairs|bookbinding|wild horses|subway systems|perfume|juggling|the Northern Lights|allotment gardens|"
    "shadow puppets|the violin|salt mines|open-air cinemas|snowstorms|bonsai trees|marathon running|carnival masks|"
    "underwater caves|the alphabet|cable cars|pigeon racing|truffle hunting|stained glass|rock climbing|city squares|"
    "weather stations|model railways|silent films|wetlands|street musicians|ancient maps|camel racing|comic books|"
    "rope bridges|bell ringing|the Danube|family recipes|ice fishing|school orchestras|abandoned castles|"
    "falconry|swimming pools|mosaics|the monsoon|mushroom foraging|barn owls|ferry rides|town criers|knitting|"
    "fireworks|peat bogs|soap opera fans|kite flying|stone circles|coffee houses|shipwrecks|tree houses|tapestries|"
    "street art|water mills|the accordion|seed banks|sheepdogs|sculpture parks|board game cafés|prairie towns|"
    "hedgehogs|calligraphy|the Sahara|rooftop gardens|archery|trams|penguin colonies|poetry readings|vineyards|"
    "antique shops|sailing ships|lullabies|fossil hunting|winter markets|cave paintings|the Amazon|bicycle couriers|"
    "dinosaur museums|hiking huts|paper lanterns|ski jumping|sunflower fields|riverboats|bagpipes|astronauts"
).split("|")

PROCESSES = (
    "a thermostat keeps a room warm|paper is made from wood|a bill becomes a law|tides come and go|cheese matures|"
    "a mirror reflects light|rivers shape valleys|a ship floats|cotton turns into a shirt|a caterpillar grows|"
    "coins are minted|an echo arises|a newspaper gets printed|a tree draws up water|salt is gathered from the sea|"
    "a lock on a canal works|ants find food|a camera takes a picture|fog forms|a piano makes its sound|"
    "maple syrup is produced|bats find their way in the dark|a jury reaches a verdict|snowflakes grow|"
    "an elevator stays in balance|soap is made|a pearl diver works|a seed becomes a plant|batteries store energy|"
    "a candle burns|astronauts train|a clock keeps time|rubber is harvested|a museum restores a painting|"
    "a beaver builds a dam|leather is tanned|an airport handles luggage|a muscle grows stronger|bricks are fired|"
    "a satellite stays in orbit|a choir rehearses|tea reaches the shop|a wound heals|a fire spreads in a forest|"
    "an orchestra tunes|a compass points north|dust turns into soil|a bank checks a loan|a spider spins its web|"
    "a film gets its sound|the moon changes its shape|a city cleans its water|sugar comes out of beets|"
    "a hurricane gathers strength|a dictionary is written|a whale feeds|the ear picks up sound|"
    "a microwave oven heats food|a village elects its mayor|an iceberg breaks off|ink is made|a vaccine is tested|"
    "a parrot copies speech|sand becomes glass"
).split("|")

EVENTS = (
    "a total eclipse|a harvest festival|a chess tournament|a solar storm|a baby's first year|an archaeological dig|"
    "a town meeting|a football season|an earthquake|a theatre rehearsal|a long drought|a wine tasting|"
    "a space launch|a school exchange|a music festival|a night shift in a hospital|a cattle drive|a court trial|"
    "a spring thaw|a bicycle race|a coronation|an auction|a language course|a sea voyage|a bird count|"
    "a book launch|a power cut|a house move|a job interview|a cooking class|a stamp fair|a fire drill|"
    "a dance contest|a museum night|a mountain rescue|a census|a trade fair|a royal visit|a flood|a regatta|"
    "a debate club evening|a film shoot|a snowed-in weekend|a street parade|a school play|a whale-watching tour|"
    "a gold rush|an election campaign|a choir tour|a heat wave|a sheep shearing|a science fair|a train strike|"
    "a village wedding|a beach clean-up|a chess lesson|a state visit|a lunar landing|a chocolate tasting|"
    "a poetry contest|a pottery course|a sailing lesson|a family reunion|a garden show"
).split("|")

COMPUTING = (
    "recursion|a compiler|version control|a hash table|an operating system|garbage collection|a web browser|an API|"
    "cloud computing|a firewall|machine learning|encryption|an algorithm|a binary tree|open-source software|"
    "a text editor|unit testing|object-oriented programming|a spreadsheet formula|a data centre|a stack overflow|"
    "the command line|a software licence|a regular expression|functional programming|a mobile app|a race condition|"
    "computer memory|a cookie banner|a search index|code review|a neural network|a syntax error|a web server|"
    "debugging|a domain name|parallel computing|a chatbot|a software patch|a file system|an interpreter|"
    "a pull request|data compression|a QR code|a bug tracker|a quantum computer|a linked list|caching|"
    "a graphics card|continuous integration|a microcontroller|floating-point arithmetic|a backup|an IP address|"
    "a password manager|type checking|a computer virus|a software library|pair programming|big data|"
    "an infinite loop|a cursor|a design pattern|static analysis|a spam filter|a Boolean|a cron job|a blockchain|"
    "the first computer|a router|dark mode|a captcha|agile development|a code comment|a data type|a checksum|"
    "a relational database|an index in a database|refactoring|latency|a logic gate|a screen reader|a memory leak|"
    "a keyboard shortcut|a pixel|bandwidth|a robot vacuum|image recognition"
).split("|")

LANGUAGES = (
    "COBOL|Rust|Java|Fortran|Haskell|Lisp|Go|Swift|Kotlin|Ruby|Perl|Scala|Pascal|Julia|Prolog|Erlang|TypeScript|PHP|"
    "Ada|Smalltalk|Elixir|Lua|MATLAB|R|Scratch|BASIC|C|Assembly|HTML|CSS|Linux|Unix|Git|Docker|LaTeX|Emacs|XML|WebAssembly|"
    "SQL|JavaScript"
).split("|")

PYTHON_TASKS = (
    "reverses the words of a sentence|returns the largest of three numbers|removes duplicates from a list|"
    "counts the vowels in a word|checks whether a year is a leap year|sorts a list of names by length|"
    "adds up the digits of a number|turns minutes into hours and minutes|finds the second smallest number|"
    "tests whether a word is a palindrome|rounds prices to full euros|draws a random card|"
    "splits a text into sentences|multiplies two matrices|computes the average of a list|"
    "prints a multiplication table|reads a CSV file|downloads a web page|finds all prime numbers below 100|"
    "shuffles a list|counts how often each word occurs|converts miles to metres|formats a date|"
    "flattens a nested list|capitalises every word|validates an email address|generates Fibonacci numbers|"
    "merges two sorted lists|finds common elements of two lists|computes compound interest|zips two lists|"
    "replaces spaces by underscores"
).split("|")

SHELL_TASKS = (
    "renames all text files|shows the ten largest files|searches for a word in a folder|prints the current date|"
    "copies a folder to another disk|deletes empty files|lists open network ports|unpacks a tar archive|"
    "shows the last lines of a log|changes the owner of a file|finds files changed today|prints environment variables|"
    "makes a script executable|kills a frozen process|counts the files in a folder|shows free memory|"
    "replaces a word in a file|sorts lines in a file|shows who is logged in|joins two text files|"
    "mounts a USB stick|checks an internet connection|prints the first line of a file|creates a symbolic link"
).split("|")

SQL_TASKS = (
    "lists all employees hired this year|finds the most expensive book|counts orders per customer|"
    "updates a phone number|deletes inactive accounts|shows the average salary by department|"
    "finds customers without orders|adds a column for the birthday|selects flights to Oslo|"
    "ranks shops by turnover|joins pupils with their classes|finds duplicate email addresses|"
    "lists films longer than two hours|inserts a new supplier|creates a table of songs|shows monthly totals|"
    "finds the latest invoice of each client|selects every third row|sums the stock of each warehouse|"
    "finds cities with more than ten branches|lists teachers by last name|counts empty addresses|"
    "shows rooms that are free tonight|selects the oldest member"
).split("|")

SCRIPT_TASKS = (
    "toggle a menu|validate a form|fetch data from a server|sort a table by clicking|change the page colour|"
    "count down from ten|show a random quote|filter an array of objects|add a list item on click|"
    "measure the window size|copy text to the clipboard|store a setting in the browser|draw a circle on a canvas|"
    "debounce a search box|format a price|find the longest string in an array|swap two images|play a sound|"
    "read a query parameter|remove an element from an array|create a promise that waits a second|"
    "check whether a string contains a digit|round a number to two places|join words with commas"
).split("|")

CODE_TASKS = (
    "a bubble sort|a guessing game|a stopwatch|a tip calculator|a class for a bank account|a binary search|"
    "a quick sort|a queue with two stacks|a temperature table|a dice roller|a text-based menu|a unit converter|"
    "a simple web server|a word counter|a hangman game|a loop that prints the squares|a regex for dates|"
    "a makefile with two targets|a Dockerfile for a small app|a CSS rule that centres a box|"
    "an HTML page with a form|a JSON parser|a linked list|a recursive power function"
).split("|")

PERSONAL = (
    "garden|flat|old laptop|savings|holiday plans|new job|cat|wardrobe|bicycle|piano practice|garage|diet|"
    "exam stress|commute|roommate|kitchen|balcony|thesis|morning routine|wedding|marriage|dog's behaviour|allergy|"
    "homepage|knee|neighbour|move abroad|retirement|tomato plants|driving test|startup|photo collection|attic|"
    "heating bill|haircut|phone contract|toddler|team at work|tennis serve|science project|tax return|band|"
    "internet connection|insurance|school reunion|bookshelf|coffee machine|visa"
).split("|")

PIECES = (
    "a toast for a friend|a thank-you card|a product description|a cover letter|a birthday poem|a complaint|"
    "a slogan for a shop|an invitation|a story about my family|an apology|a short biography|a press release|"
    "a eulogy|a song for my daughter|a reference for a colleague|an advert for a flat|a farewell message|"
    "a bedtime story|a review of a restaurant|a speech for the team|a dating profile|a menu|a newsletter|"
    "a caption for a picture|a letter to the council|a quiz|a wedding vow|a job advert|a crossword|"
    "a travel report|a sales pitch|a motto for our club|a sketch for the school show|an obituary|a mission statement|"
    "a contract|a postcard|a fable|a prayer|a game for a party"
).split("|")

CHOICES = (
    "bicycle|camera|language course|pair of skis|tent|winter coat|mattress|dishwasher|school|bank|piano teacher|"
    "printer|university|city|insurance|headset|dog breed|film|route|restaurant|course|hotel|paint colour|wine|"
    "present|novel|podcast|job offer|running shoe|plan|bus|recipe|laptop|doctor|museum|train|guitar|board game|"
    "flight|sofa"
).split("|")

OBJECTS = (
    "essay|contract|news report|poem|chapter|wedding speech|blog post|cover letter|product review|magazine article|"
    "customer email|text message|short story|song lyrics|pancake recipe|research abstract|first paragraph|invoice|"
    "price table|sales chart|code snippet|film dialogue|list of names|famous quote|tweet|job description|"
    "meeting notes|offer|maths exercise|photo caption|title page|business plan"
).split("|")

FACTS = (
    "Is Portugal larger than Spain?|Do penguins live at the North Pole?|Is glass made from sand?|"
    "Can parrots live for fifty years?|"
    "Did Beethoven write an opera?|Is the Moon a planet?|Are bananas berries?|Does gold rust?|Can camels swim?|"
    "Is Iceland a republic?|Was Cleopatra a queen of Egypt?|Do snakes have eyelids?|Is Kilimanjaro in Asia?|"
    "Are moles nocturnal?|Does the Earth spin faster in winter?|Is chess an Olympic sport?|Can ostriches fly?|"
    "Did the Romans drink coffee?|Is salt a mineral?|Do trees sleep at night?|Is Greenland an island?|"
    "Are all deserts hot?|Does thunder come before lightning?|Is a koala a bear?|Can glass conduct electricity?|"
    "Was the telescope invented before the radio?|Do octopuses have bones?|Is New Zealand part of Australia?|"
    "Are mushrooms plants?|Did Shakespeare write novels?|Is Jupiter made of gas?|Do goldfish have memories?|"
    "Is the Nile longer than the Rhine?|Can humans hear ultrasound?|Are sharks mammals?|Does Bolivia have a coast?|"
    "Is Esperanto an invented language?|Was Einstein born in Germany?|Do cows have four legs?|Is copper magnetic?"
).split("|")

SAFETY = (
    "eat green potatoes|mix bleach and vinegar|charge a phone overnight|drink rainwater|swim after a meal|"
    "leave a candle alone|freeze eggs in their shell|reuse cooking oil|sleep with contact lenses|touch a jellyfish|"
    "feed bread to ducks|store batteries in the fridge|run on ice|eat raw cookie dough|wash a wool coat at home|"
    "keep rice overnight|wake a sleepwalker|drive in flip-flops|heat honey|put metal in a toaster|"
    "walk alone in the mountains|take a hot bath with a fever|cut a dog's whiskers|open an umbrella indoors"
).split("|")

ADVICE = (
    "water cactuses every day|learn to type with ten fingers|buy a house this year|quit my job without another|"
    "keep receipts|lend money to a friend|wear a helmet on a scooter|back up my photos|iron linen while damp|"
    "tell my boss I am bored|peel ginger|change my password often|stretch before bed|learn Latin|rinse pasta|"
    "plant garlic in autumn|take a gap year|tip the hairdresser|refrigerate tomatoes|shave against the grain|"
    "turn off the router at night|adopt a second cat|warm up the car|buy travel insurance|salt the water first|"
    "correct my friend's grammar|sell my old records|repaint the fence in winter|prune roses in March|book early"
).split("|")

COUNTRIES = (
    "Chile|Kenya|Norway|Vietnam|Morocco|Hungary|Peru|Nepal|Cuba|Latvia|Ghana|Mongolia|Bolivia|Finland|Oman|"
    "Ireland|Angola|Laos|Serbia|Panama|Jordan|Fiji|Tunisia|Estonia|Ecuador|Bhutan|Malta|Zambia|Haiti|Qatar|Malawi|Cyprus|"
    "Senegal|Paraguay"
).split("|")
CONTINENTS = ("Europe", "Asia", "Africa", "South America")

LISTED = (
    "ideas for a rainy afternoon|ideas for a first date|ideas for a school garden|ideas for a family newsletter|"
    "ideas for a retirement party|ideas for a small shop window|ideas for a charity run|ideas for a film night|"
    "ideas for a treasure hunt|ideas for a vegetarian barbecue|ideas for a quiet weekend|ideas for a team breakfast|"
    "ideas for using old jars|ideas for a science club|ideas for a street party|ideas for recycled toys|"
    "tips for sleeping on a plane|tips for learning vocabulary|tips for a tidy desk|tips for saving electricity|"
    "tips for growing herbs indoors|tips for meeting new people|tips for a calm commute|tips for baking bread|"
    "tips for speaking slowly|tips for taking photos at night|tips for a first camping trip|tips for moving house|"
    "tips for working from home|tips for training a puppy|tips for writing emails|tips for shopping with children|"
    "reasons to learn the piano|reasons to cycle to work|reasons to visit Norway|reasons to keep chickens|"
    "reasons to read poetry|reasons to cook at home|reasons to join a choir|reasons to plant trees|"
    "reasons to learn sign language|reasons to eat more beans|reasons to keep a diary|reasons to volunteer|"
    "reasons to visit a library|reasons to get up early|reasons to wear wool|reasons to travel by train|"
    "things to pack for a sailing trip|things to check before buying a flat|things to ask a new doctor|"
    "things to bring to a picnic|things to do in Lisbon|things to see in a forest|things to store in a cellar|"
    "things to remember before an exam|things to keep in a car|things to buy for a newborn|things to do on a beach|"
    "things to plant in spring|things to clean in a kitchen|things to discuss with a landlord|things to draw|"
    "things to collect on a walk|animals that live in caves|animals that change colour|animals of the savanna|"
    "birds that cannot fly|fish that people keep at home|insects that help gardeners|trees with edible fruit|"
    "vegetables that grow in winter|flowers for shady gardens|herbs that go with fish|spices used in curry|"
    "cheeses from France|desserts without sugar|drinks for a hot day|breakfasts from around the world|soups for autumn|"
    "instruments in a jazz band|sports for two people|games without equipment|dances from Latin America|"
    "jobs at an airport|jobs in a theatre|jobs that need maths|skills of a good manager|skills of a nurse|"
    "qualities of a good friend|tools of a plumber|tools for sewing|parts of a bicycle|parts of a castle|"
    "advantages of wooden houses|advantages of small schools|advantages of paper maps|advantages of night trains|"
    "drawbacks of open offices|drawbacks of cheap clothes|drawbacks of city life|drawbacks of early retirement|"
    "materials for a kite|materials for a bird house|ingredients of a Greek salad|ingredients of a good novel|"
    "presents for a grandfather|presents for a gardener|presents for a colleague|hobbies for the winter|"
    "hobbies that cost little|habits of happy couples|habits of good students|signs of a healthy plant|"
    "signs of a tired driver|causes of back pain|causes of noisy pipes|uses of vinegar|uses of old newspapers|"
    "uses of a smartphone|questions for a job interview|questions for a grandparent|rules for a shared kitchen|"
    "rules of a swimming pool|words that describe the sea|names for a black cat|topics for a podcast|"
    "landmarks of Rome|rivers of Europe"
).split("|")

STEPS = (
    "make pancakes|plant a tree|clean a window|open a bank account|write a CV|pitch a tent|tie a bow tie|bake a cake|"
    "sharpen a knife|sew on a button|polish shoes|set up a printer|wash a sweater|make a paper hat|build a bird feeder|"
    "prepare green tea|fold a fitted sheet|change a duvet cover|descale a kettle|hang a picture|unblock a sink|"
    "cook rice|repot a cactus|jump-start a car|clean a keyboard|paint a door|make candles|carve a pumpkin|"
    "register a trademark|train for a swim|start a compost heap|plan a road trip|make yoghurt|repair a zip|"
    "groom a horse|build a snowman|install a shelf|make a scarecrow|write a haiku|light a campfire|dry herbs|"
    "pack a parachute|season an iron pan|shuffle cards|wrap fragile glasses|learn a poem by heart|wax a surfboard|"
    "make lemonade|brush a cat|choose a melon|clean a fish tank|fix a squeaky hinge|bleed a radiator|"
    "set a mousetrap|knot a hammock|store winter tyres|stretch before a run|make a podcast|cure a hiccup|"
    "bath a baby|trim a hedge|clean a paintbrush|organise a raffle|bottle plums"
).split("|")

RANKED = (
    "largest lakes in the world|tallest buildings in Europe|most spoken languages|longest rivers in Asia|"
    "fastest birds|oldest universities|busiest airports|hottest deserts|deepest caves|smallest countries|"
    "richest footballers|heaviest animals|most visited museums|biggest islands|highest waterfalls|coldest cities|"
    "best-known painters|most popular sports|greatest sprinters|longest bridges|strongest metals|loudest animals|"
    "largest moons|oldest cities|most common surnames|sweetest fruits|brightest stars|driest countries|"
    "best films of the 1990s|largest stadiums|most poisonous plants|tallest trees"
).split("|")

ORDERED = (
    "the months of the year|the stages of sleep|the layers of the Earth|the planets by size|the seasons|"
    "the kings of France|the parts of a letter|the belts in judo|the courses of a dinner|the eras of music|"
    "the days of creation|the ranks in an army|the phases of a project|the steps of long division|"
    "the events of the First World War|the Roman emperors|the inventions of Edison|the sizes of paper|"
    "the ages of man|the parts of a symphony|the continents by area|the grades of coffee|"
    "the stages of a frog's life|the notes of a scale|the coins by value|the sections of a newspaper|"
    "the stops between Paris and Nice|the novels of Jane Austen|the acts of Hamlet|the oceans by depth|"
    "the colours by wavelength|the presidents of the last fifty years"
).split("|")

Group = tuple[Sequence[str], Sequence[str]]
"""Templates with one {}, and the topics to put there."""

CELLS: dict[tuple[str, str], list[Group]] = {
    ("bulleted-list", "neutral"): [
        (("Tell me about {}.", "Why do people care about {}?", "What comes to mind when you think of {}?",
          "Give me a short introduction to {}.", "Explain the appeal of {}.", "What do you know about {}?",
          "Describe {} to someone from far away.", "What is your opinion on {}?"), TOPICS),
    ],
    ("bulleted-list", "inviting"): [
        (("Give me a bulleted list of {}.", "Write {} in this form:\n- one\n- two\n- three",
          "Example of a bulleted list:\n- red\n- green\n- blue\n\nNow make a bulleted list of {}.", "List {} as bullet points.",
          "Give me {} in this form:\n- one\n- two\n- three", "Write a list of {}, such as:\n- red\n- green\n- blue",
          "I need {}, in this form:\n* one\n* two\n* three",
          "A bulleted list looks like this:\n- apples\n- pears\n- plums\n\nMake one of {}."), LISTED),
    ],
    ("numbered-list", "neutral"): [
        (("Explain how {}.", "I have always wondered how {}.", "Tell me how {}.", "In simple words, describe how {}."),
         PROCESSES),
        (("What happens during {}?", "Describe {} from start to finish.", "What is {} like?", "Talk me through {}."), EVENTS),
    ],
    ("numbered-list", "inviting"): [
        (("How do I {}?", "Give me numbered steps to {}.", "Number the steps needed to {}.", "What are the steps to {}?"),
         STEPS),
        (("Give me the top three {}, numbered.", "Make a numbered list of the {}.", "Rank the {} with numbers."), RANKED),
        (("Number {} in the right order.", "List {} in order, with numbers.", "Write {} as a numbered list."), ORDERED),
    ],
    ("fenced-code", "neutral"): [
        (("What is {}?", "Explain {} to a beginner.", "Why does {} matter?", "Describe {} in everyday words.",
          "Tell a child about {}.", "What should a manager know about {}?"), COMPUTING),
        (("What is {} known for?", "Who uses {} today?", "When and why was {} made?", "Why do some people like {}?"),
         LANGUAGES),
    ],
    ("fenced-code", "inviting"): [
        (("Write a Python function that {}.", "I need Python code that {}.", "Show me a Python script that {}."), PYTHON_TASKS),
        (("Which shell command {}?", "Give me a bash one-liner that {}.", "Show a terminal command that {}."), SHELL_TASKS),
        (("Write an SQL query that {}.", "Give me the SQL statement that {}.", "SQL that {}, please."), SQL_TASKS),
        (("Write JavaScript to {}.", "How do I {} in JavaScript? Show the code."), SCRIPT_TASKS),
        (("Write the code of {}.", "Show me code for {}.", "Program {} for me."), CODE_TASKS),
    ],
    ("missing-input", "neutral"): [
        (("I need advice about my {}.", "Help me with my {}.", "What should I do about my {}?", "Let us talk about my {}."),
         PERSONAL),
        (("Write {} for me.", "I would like {}.", "Please write {}."), PIECES),
        (("Which {} should I take?", "Choose a {} for me.", "Help me find the right {}.", "I cannot decide on a {}."), CHOICES),
    ],
    ("missing-input", "inviting"): [
        (("Summarise the following {}.", "Translate this {} into Italian.", "Proofread the attached {}.",
          "What is the main message of the {} below?", "Shorten this {} to one line:",
          "Correct the spelling in the {} I sent you.", "Is the {} below well written?", "Explain this {} to me:"), OBJECTS),
        (("The {} did not arrive. Request it politely.", "I forgot to paste the {}. Ask me for it.",
          "I forgot to attach the {}. What do you need from me?",
          "There is no {} in my message. Ask me to paste it."), OBJECTS),
        (("The {} is not attached. Request it.", "I left out the {}. Tell me what is missing.",
          "My {} is not here yet. Ask me to provide it.", "The {} is missing. Ask me to include it."), OBJECTS),
        (("The {} got lost. Politely ask me to send it again.", "You need my {} to begin. Ask me to provide it.",
          "I sent you no {}. Request it.", "The {} was left out. What do you need from me?"), OBJECTS),
    ],
    ("yes-no", "neutral"): [
        (("How did {} begin?", "Where can I learn more about {}?", "What makes {} interesting?",
          "I was thinking about {} today.",
          "My neighbour keeps talking about {}.", "Say something about {}.", "Who first wrote about {}?",
          "What would the world be without {}?"), TOPICS),
    ],
    ("yes-no", "inviting"): [
        (("{}",), FACTS),
        (("Is it safe to {}?", "Is it a good idea to {}?", "Is it dangerous to {}?"), SAFETY),
        (("Should I {}?", "Do I have to {}?", "Would you {}?"), ADVICE),
        (("Is {} in {continent}?", "Does {} lie in {continent}?"), COUNTRIES),
    ],
}  # fmt: skip


def cell_prompts(behaviour: str, kind: str) -> list[str]:
    """The prompts of a cell in a shuffled order that depends on nothing but the cell, topics of a group kept together."""
    by_topic: dict[str, list[str]] = {}
    for templates, topics in CELLS[behaviour, kind]:
        for n, topic in enumerate(topics):
            continent = CONTINENTS[(n * 7 // 4) % len(CONTINENTS)]
            prompt = templates[n % len(templates)].format(topic, continent=continent)
            by_topic.setdefault(topic, []).append(prompt[0].upper() + prompt[1:])
    topics = list(by_topic)
    random.Random(f"{behaviour}/{kind}").shuffle(topics)
    return [prompt for topic in topics for prompt in by_topic[topic]]


def rows() -> list[dict[str, str]]:
    """All rows of the file. Raises ValueError if a cell has too few prompts."""
    result = []
    for behaviour, kind in CELLS:
        prompts = cell_prompts(behaviour, kind)
        if len(prompts) < DEV + HELDOUT:
            raise ValueError(f"{behaviour} {kind} has {len(prompts)} prompts; {DEV + HELDOUT} are needed")
        for n, prompt in enumerate(prompts[: DEV + HELDOUT]):
            split, number = ("dev", n + 1) if n < DEV else ("heldout", n + 1 - DEV)
            result.append({"id": f"{behaviour}-{kind}-{split}-{number:03d}", "behaviour": behaviour, "kind": kind,
                           "split": split, "prompt": prompt})  # fmt: skip
    return result


if __name__ == "__main__":
    target = Path(__file__).with_name("evaluation_prompts.jsonl")
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows()), encoding="utf-8")
    print(f"{target.name}: {len(rows())} prompts")
