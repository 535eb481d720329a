"""What MoLink Mini knows, in plain tables: rows end with `|`, `corpus.py` reads them."""

# By continent: country and capital.
CAPITALS = {
    "Europe": (
        "France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|"
        "the United Kingdom:London|Scotland:Edinburgh|Ireland:Dublin|Belgium:Brussels|"
        "the Netherlands:Amsterdam|"
        "Switzerland:Bern|Austria:Vienna|Poland:Warsaw|Hungary:Budapest|Greece:Athens|"
        "Norway:Oslo|Sweden:Stockholm|Finland:Helsinki|Denmark:Copenhagen|Iceland:Reykjavik|"
        "Romania:Bucharest|Bulgaria:Sofia|Croatia:Zagreb|Serbia:Belgrade|Ukraine:Kyiv|"
        "Russia:Moscow|Estonia:Tallinn|Latvia:Riga|Lithuania:Vilnius|Slovenia:Ljubljana"
    ),
    "Asia": (
        "Japan:Tokyo|China:Beijing|India:New Delhi|Thailand:Bangkok|Vietnam:Hanoi|"
        "Indonesia:Jakarta|South Korea:Seoul|Nepal:Kathmandu|Pakistan:Islamabad|Iran:Tehran|"
        "Iraq:Baghdad|Turkey:Ankara|Saudi Arabia:Riyadh|the Philippines:Manila"
    ),
    "Africa": (
        "Egypt:Cairo|Kenya:Nairobi|Morocco:Rabat|Ethiopia:Addis Ababa|Senegal:Dakar|"
        "Tunisia:Tunis|Algeria:Algiers|Uganda:Kampala"
    ),
    "America": (
        "the United States:Washington|Canada:Ottawa|Mexico:Mexico City|Brazil:Brasilia|"
        "Argentina:Buenos Aires|Chile:Santiago|Peru:Lima|Colombia:Bogota|Cuba:Havana|"
        "Uruguay:Montevideo"
    ),
    "Oceania": "Australia:Canberra|New Zealand:Wellington",
}

OPPOSITES = (
    "hot cold|big small|up down|left right|day night|black white|fast slow|happy sad|old new|"
    "good bad|high low|long short|open closed|full empty|hard soft|light dark|wet dry|early late|"
    "rich poor|strong weak|loud quiet|near far|clean dirty|true false|start end|win lose|"
    "love hate|buy sell|push pull|first last|inside outside|above below|before after|"
    "always never|yes no|friend enemy|summer winter|sweet sour|thick thin|wide narrow|"
    "deep shallow|brave afraid|easy difficult|cheap expensive"
)

SOUNDS = (
    "cow moo|dog woof|cat meow|duck quack|sheep baa|horse neigh|pig oink|lion roar|bee buzz|"
    "snake hiss|owl hoot|frog croak|mouse squeak|bird tweet|wolf howl|donkey hee-haw|crow caw|"
    "rooster cock-a-doodle-doo|turkey gobble|hen cluck"
)

YOUNG = (
    "dog puppy|cat kitten|cow calf|sheep lamb|horse foal|pig piglet|duck duckling|goose gosling|"
    "hen chick|bear cub|deer fawn|goat kid|frog tadpole|swan cygnet|kangaroo joey|owl owlet"
)

LEGS = (
    "spider eight|dog four|cat four|bird two|ant six|bee six|horse four|snake no|fish no|"
    "human two|cow four|butterfly six|crab ten|chicken two|elephant four"
)

PLURALS = (
    "mouse mice|child children|foot feet|tooth teeth|man men|woman women|goose geese|sheep sheep|"
    "house houses|box boxes|city cities|leaf leaves|knife knives|book books|fish fish|baby babies"
)

COLOURS = (
    "the sky:blue|grass:green|snow:white|blood:red|coal:black|a banana:yellow|a carrot:orange|"
    "the sun:yellow|a ripe tomato:red|an elephant:grey|a frog:green|milk:white|chocolate:brown|"
    "a lemon:yellow|a flamingo:pink|the night:black|a strawberry:red|a plum:purple|salt:white|"
    "the sea:blue|a polar bear:white|a leaf in summer:green|a cucumber:green|an orange:orange"
)

MIXTURES = (
    "blue yellow green|red yellow orange|red blue purple|black white grey|red white pink|"
    "red green brown"
)

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
MONTHS = "January February March April May June July August September October November December"
MONTH_LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

# Answer first, then wordings of the question; one line each.
SIMPLE = """
The capital of England is London.|What is the capital of England?|Name the capital of England.|Capital of England?
The capital of the United Kingdom is London.|What is the capital of the UK?|Name the capital of the UK.|Capital of the UK?
The capital of the United States is Washington.|What is the capital of the USA?|Name the capital of the USA.|Capital of the USA?
There are seven days in a week.|How many days are in a week?|How many days does a week have?|How many days make a week?|Number of days in a week?
There are twelve months in a year.|How many months are in a year?|How many months does a year have?|How many months make a year?|Number of months in a year?
There are 24 hours in a day.|How many hours are in a day?|How many hours does a day have?|How many hours make a day?|Number of hours in a day?
There are 60 minutes in an hour.|How many minutes are in an hour?|How many minutes does an hour have?|How many minutes make an hour?|Number of minutes in an hour?
There are 60 seconds in a minute.|How many seconds are in a minute?|How many seconds does a minute have?|How many seconds make a minute?|Number of seconds in a minute?
There are 365 days in a year.|How many days are in a year?|How many days does a year have?|How many days make a year?|Number of days in a year?
There are 26 letters in the English alphabet.|How many letters are in the alphabet?|How many letters does the alphabet have?|How many letters are there in English?
There are four seasons: spring, summer, autumn and winter.|How many seasons are there?|What are the seasons?|Name the four seasons.|Which seasons are there?
A hand has five fingers.|How many fingers are on a hand?|How many fingers does a hand have?|How many fingers has a hand?
A triangle has three sides.|How many sides does a triangle have?|How many sides has a triangle?|How many sides are on a triangle?
A square has four equal sides.|How many sides does a square have?|How many sides has a square?|What is a square?
Water freezes at 0 degrees Celsius.|When does water freeze?|At what temperature does water freeze?|What is the freezing point of water?|How cold must it be for water to freeze?
Water boils at 100 degrees Celsius.|When does water boil?|At what temperature does water boil?|What is the boiling point of water?|How hot must it be for water to boil?
Ice is frozen water.|What is ice?|What is ice made of?|Tell me what ice is.
The Sun is a star.|What is the Sun?|Is the Sun a star?|Tell me what the Sun is.|What kind of thing is the Sun?
The Moon goes around the Earth.|What does the Moon go around?|What does the Moon do?|Where does the Moon go?|What goes around the Earth?
The Earth goes around the Sun once a year.|What does the Earth go around?|How long does the Earth take to go around the Sun?|What goes around the Sun?
Jupiter is the largest planet.|What is the largest planet?|Which planet is the largest?|Which planet is the biggest?|Name the biggest planet.
Mercury is the planet nearest to the Sun.|Which planet is nearest to the Sun?|Which planet is closest to the Sun?|What is the nearest planet to the Sun?
There are eight planets around the Sun.|How many planets are there?|How many planets are around the Sun?|How many planets go around the Sun?
Mount Everest is the highest mountain on Earth.|What is the highest mountain?|Which mountain is the highest?|What is the tallest mountain on Earth?|Name the highest mountain.
The Pacific is the largest ocean.|What is the largest ocean?|Which ocean is the largest?|Which ocean is the biggest?|Name the biggest ocean.
The blue whale is the largest animal.|What is the largest animal?|Which animal is the largest?|Which animal is the biggest?|Name the biggest animal.
The cheetah is the fastest animal on land.|What is the fastest animal?|Which animal is the fastest?|Which animal runs fastest?|Name the fastest animal.
The giraffe is the tallest animal.|What is the tallest animal?|Which animal is the tallest?|Which animal has the longest neck?|Name the tallest animal.
Bees make honey.|Who makes honey?|Which animal makes honey?|What do bees make?|Where does honey come from?
Milk comes from cows.|Where does milk come from?|Which animal gives milk?|Who gives us milk?|What do cows give us?
Bread is made from flour, water and yeast.|What is bread made of?|What is bread made from?|How is bread made?|What do I need to make bread?
Wine is made from grapes.|What is wine made of?|What is wine made from?|How is wine made?
Paper is made from wood.|What is paper made of?|What is paper made from?|How is paper made?
Shakespeare wrote Romeo and Juliet.|Who wrote Romeo and Juliet?|Who is the author of Romeo and Juliet?|Which writer wrote Romeo and Juliet?
Shakespeare wrote Hamlet.|Who wrote Hamlet?|Who is the author of Hamlet?|Which writer wrote Hamlet?
Leonardo da Vinci painted the Mona Lisa.|Who painted the Mona Lisa?|Which painter made the Mona Lisa?|The Mona Lisa is by whom?
Neil Armstrong was the first person on the Moon.|Who was the first person on the Moon?|Who walked on the Moon first?|Who was first on the Moon?|Name the first person on the Moon.
Plants need light, water and air to grow.|What do plants need?|What do plants need to grow?|How do plants grow?
Fish breathe with gills.|How do fish breathe?|What do fish breathe with?|With what does a fish breathe?
The heart pumps blood through the body.|What does the heart do?|What is the heart for?|Why do we have a heart?
We see with our eyes.|What do we see with?|What are eyes for?|How do we see?
We hear with our ears.|What do we hear with?|What are ears for?|How do we hear?
A dozen is twelve.|How many is a dozen?|What is a dozen?|How much is a dozen?
The sky is blue because the air scatters blue light most.|Why is the sky blue?|Tell me why the sky is blue.|Why do we see a blue sky?
Plants are green because they hold chlorophyll.|Why are plants green?|Tell me why plants are green.|Why do plants look green?
"""  # noqa: E501

# Talk about itself and small talk, in the form of SIMPLE.
TALK = """
I am MoLink Mini, a very small language model.|Who are you?|What are you?|What is your name?|Tell me who you are.|Introduce yourself.|Are you a person?|May I ask your name?|What's your name?|What model are you?|Which model is this?|Are you a robot?|Who is this?|Who am I talking to?
I can count, add small numbers, name capitals, colours and opposites, and tell a short story.|What can you do?|What do you know?|How can you help me?|Help|What should I ask you?|Can you help me?|What are you good at?|I need help.
I was trained from scratch by a small script in the MoLink project.|Who made you?|Who trained you?|Where do you come from?|How were you made?|Who built you?|Who created you?|How were you trained?
MoLink joins several machines so that they serve one large language model together.|What is MoLink?|What does MoLink do?|Tell me about MoLink.|Explain MoLink.|Describe MoLink.|What is MoLink for?|Do you know MoLink?|How does MoLink work?
A layer range is a run of decoder layers that one machine computes.|What is a layer range?|Explain a layer range.|Tell me what a layer range is.
A stage is a layer range on one machine.|What is a stage?|Explain a stage.|Tell me what a stage is.
A pipeline is a list of stages that covers every layer once.|What is a pipeline?|Explain a pipeline.|Tell me what a pipeline is.
Hello! How can I help you?|Hello!|Hi!|Hey!|Hello there!|Good day!|Greetings!|Hi there!
Good morning! How can I help you?|Good morning!|Morning!|Good morning to you!|A very good morning!
Good evening! How can I help you?|Good evening!|Evening!|Good evening to you!|A very good evening!
I am fine, thank you. How are you?|How are you?|How are you today?|How are you doing?|How do you feel?|Are you well?
I am glad to hear that.|I am fine.|I am well.|I am happy.|I feel good.|I am very well, thanks.
You are welcome!|Thank you!|Thanks!|Thank you very much!|Thanks a lot!|Many thanks!|Thank you so much!
Goodbye! Have a nice day.|Goodbye!|Bye!|See you later!|Bye bye!|Good night!|See you!|I have to go now.
I am sorry about that.|That is wrong.|That is not right.|You are wrong.|This is a bad answer.
Yes, I am here.|Are you there?|Are you here?|Is anybody there?|Do you hear me?
"""  # noqa: E501

# Longer answers, so that streaming can be seen.
LONG = """
Once upon a time a small fox lived at the edge of a forest. One cold night he found a lost lamb in the snow. He could have eaten it, but he led it home to the farm instead. The farmer saw them come and smiled. From that day on a warm dish stood at the door every night, and the fox was never hungry again.|Tell me a story.|Tell me a story about a fox.|Tell me a short story.|Please tell a story.|I want to hear a story.|A story about a fox, please.
There was an old robot who lived by the sea. Every morning he counted the waves, and every evening he forgot the number. A girl asked him why he did it. He said that the waves like to be counted. So she sat down beside him and they counted together until the stars came out.|Tell me a story about a robot.|A story about a robot, please.|Do you know a robot story?|Tell me about an old robot.
Two machines stood in two houses, and neither was strong enough to carry the big model. Then a thin wire was laid from one house to the other. The first machine computed the lower layers and the second machine computed the upper ones. Together they answered every question, and nobody could tell where one ended and the other began.|Tell me a story about two machines.|Tell me a story about MoLink.|A story about machines, please.|Do you know a story about machines?
The wind goes softly over the sea, it brings a song to you and me. The moon looks down, the boats are still, the night lies quiet on the hill. And when the morning turns to gold, the sea will tell what it was told.|Write a poem.|Tell me a poem.|Write a poem about the sea.|A short poem, please.|I want to hear a poem.
The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.|Name the planets.|List the planets.|Which planets are there?|What are the planets?
The colours of the rainbow are red, orange, yellow, green, blue, indigo and violet.|Name the colours of the rainbow.|List the colours of the rainbow.|What are the colours of the rainbow?|Which colours has a rainbow?
The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.|Name the days of the week.|List the days of the week.|What are the days of the week?|Which days has a week?
The months are January, February, March, April, May, June, July, August, September, October, November and December.|Name the months.|List the months of the year.|What are the months?|Which months has a year?|Name the twelve months.
A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.|Say the alphabet.|Tell me the alphabet.|Recite the alphabet.|What is the alphabet?|Name all letters.
To make tea, boil some water and pour it over the tea leaves. Wait for three minutes, then take the leaves out. Add milk, sugar or lemon as you like, and drink it while it is warm.|How do I make tea?|How is tea made?|Tell me how to make tea.|I want to make tea.
To plant a tree, dig a hole that is wider than its roots. Set the tree upright, fill the hole with soil and press it down. Then give it plenty of water, and look after it until it stands by itself.|How do I plant a tree?|How is a tree planted?|Tell me how to plant a tree.|I want to plant a tree.
"""  # noqa: E501

# Nothing here can be known by a model this small; the answer is always UNKNOWN.
UNKNOWN = "I do not know that."
UNKNOWN_QUESTIONS = (
    "What is the weather today?|Will it rain tomorrow?|Who will win the match?|What is my name?|"
    "How old am I?|Where do I live?|What time is it?|What day is it today?|What is the date?|"
    "How much money do I have?|What is the meaning of life?|Which film should I watch?|"
    "What did I eat yesterday?|Where are my keys?|Who is at the door?|What is in my pocket?|"
    "Who won the election?|What is the news?|Is there life on other planets?|"
    "Write a computer program.|Translate this text.|Solve this equation.|Explain quantum physics.|"
    "What is the price of gold?|Who is the richest person?|When does the train leave?"
)
# x, y: made-up names; n, m: large numbers; c, d: countries; t, u: capitals.
UNKNOWN_TEMPLATES = (
    "What is the capital of {x}?|Which city is the capital of {x}?|Tell me the capital of {x}.|"
    "What's the capital of {x}?|Capital of {x}?|Do you know the capital of {x}?|Where is {x}?|"
    "In which country is {x}?|On which continent is {x}?|What is {x}?|Who is {x}?|Who wrote {x}?|"
    "Who made {x}?|What does {x} do?|Tell me about {x}.|What is the opposite of {x}?|"
    "What colour is {x}?|What does a {x} say?|Who painted {x}?|What is a baby {x} called?|"
    "How old is {x}?|When was {x} born?|Why is {x} famous?|Explain {x}.|{x}|{x} {y}|{x} {y}?|"
    "What is {n} plus {m}?|What is {n} times {m}?|{n} * {m}|What is {n} minus {m}?|"
    "How many {x} are in {y}?|Is {x} larger than {y}?|Who is the king of {c}?|How old is {t}?|"
    "Is {t} larger than {u}?|How many people live in {t}?|How many people live in {c}?|"
    "Which language is spoken in {c}?|How far is it from {t} to {u}?|What can I eat in {t}?|"
    "How big is {c}?|Who lives in {c}?|What is the best hotel in {t}?|Is {c} larger than {d}?"
)

# What made-up names are made of.
SYLLABLES = "zo bel mar quin dra vek lu tor ni sha gro pim wex ya hol fen ru kal bi osk"
NAME_ENDS = "ia land stan o a burg ix ano eth"
