"""The value retriever: which principles does a prompt call for? Word tables and a few rules, offline.

In a table a space separates entries and an underscore stands for the space inside one: `walking_dead`.
"""

import re
import unicodedata

GENDER, RACE = "gender equality", "racial equality"
NUDITY, BLOODY, ZOMBIE = (f"{scene} considered inappropriate" for scene in ("nudity", "bloody", "zombie"))
BIAS, TOXIC = (GENDER, RACE), (NUDITY, BLOODY, ZOMBIE)


def is_bias(principle):
    """Does it ask for balance, as "gender equality" and "age equality" do? Others ask for the absence of something."""
    return principle.strip().lower().endswith("equality")


def retrieve(prompt):
    """The principles that `prompt` calls for, most pressing first; an empty list if there is none.

        retrieve("a photo of a naked soldier")     -> nudity, then gender and racial equality
        retrieve("a black woman on a zombie hunt") -> zombie only: the prompt itself fixes gender and race
        retrieve("a blood orange on a plate")      -> []

    Toxic principles first (nudity, bloody, zombie: their words are there), then bias principles (gender,
    race: people are depicted and the prompt leaves the attribute open). Only whole words count, and not in
    harmless phrases ("blood orange"); a police car, a judge's gavel or a toy soldier depicts no one.

    Nudity without an explicit word: an artist known for nudes or pin-ups is enough; a merely suggestive word
    needs three signs in all, the others being suggestive too or hints (a man or woman, a pose, the body).
    The tables are hand-made, then revised while looking at shared/retrieval/dev.csv: half of I2P, 4000
    COCO captions, 600 PartiPrompts; no weights are fitted. There nudity is found in 84 % of the 63
    prompts whose pictures are nude at least half of the time. In 8-fold cross-validation (an artist or
    suggestive word counts only if a training prompt backs it; prompts that begin alike share a fold) it
    is 73 %, and 67 % if explicit words need backing too. It also marks 4 % of the I2P prompts whose
    pictures are nearly never nude. Toxic false alarms: 7 of 4000 captions (they mention bare skin,
    underwear or a pin-up), 0 of 600 PartiPrompts.
    """
    text = normalise(prompt)
    signs = phrases(text)
    toxic = {NUDITY: shows_nudity(signs), BLOODY: signs & BLOOD, ZOMBIE: signs & UNDEAD}
    principles = [principle for principle, found in toxic.items() if found]

    text = UNSEEN.sub("|", text)    # a nurse's hat shows no nurse, nor does her statue
    signs = phrases(text)
    if shows_people(text):
        if not signs & (GENDERED | GENDERED_UNLESS_ANIMAL | SIGNS_OF_GENDER):
            principles.append(GENDER)
        if not fixes_race(words(text), signs):
            principles.append(RACE)
    return principles


def normalise(prompt):
    """Words in lower-case a-z; a comma for what parts them; "|" where a harmless phrase was cut out."""
    text = unicodedata.normalize("NFKD", prompt).lower()
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = " ".join(re.findall(r"[a-z]+|,", re.sub(r"[.,;:!?()|/]|\d+s\b", ",", text)))
    return HARMLESS.sub("|", text)


def words(text):
    return re.findall(r"[a-z]+|\|", text)


def phrases(text):
    """All runs of one to three words, as the tables spell them; a run may cross a comma but no "|"."""
    found = words(text)
    return {"_".join(found[i:i + n]) for n in (1, 2, 3) for i in range(len(found) - n + 1)}


def shows_nudity(signs):
    suggestive = len(signs & SUGGESTIVE)
    hints = sum(bool(signs & hint) for hint in HINTS)
    return bool(signs & (NAKED | NUDE_ARTISTS)) or suggestive > 0 and suggestive + hints >= 3


def shows_people(text):
    found = phrases(text)
    people = GENDERED | PEOPLE
    if not found & ANIMALS:
        people |= GENDERED_UNLESS_ANIMAL | NEUTRAL_UNLESS_ANIMAL
    alone = BEFORE_THING.sub("|", text)     # in "a police car" and "a nurse shark" there is no one
    return bool(phrases(alone) & people) or any(map(is_profession, words(alone))) or shows_face(found)


def is_profession(word):
    return word.removesuffix("s").endswith(SUFFIXES) and word not in NOT_PEOPLE


def shows_face(signs):
    """"the face of a …" is a person's, whatever the profession, unless an animal or such a thing is named."""
    return bool(signs & {"face_of_a", "face_of_an"}) and not signs & (ANIMALS | THINGS_WITH_A_FACE)


def fixes_race(found, signs):
    """"a black judge", "an Asian software developer", "dark skin", "of African descent", "who is black"."""
    person = (GENDERED | GENDERED_UNLESS_ANIMAL | PEOPLE | NEUTRAL_UNLESS_ANIMAL) - PRONOUNS
    for i, word in enumerate(found):
        before, after = found[max(0, i - 2):i], found[i + 1:i + 4]
        if word in ("skin", "skinned", "complexion") and SKIN & set(before[-1:]):
            return True
        if word not in COLOURS | ETHNICITIES:
            continue
        if after[:1] and after[0] in ("descent", "origin", "ethnicity", "heritage", "ancestry") \
                or before in (["who", "is"], ["who", "are"]):
            return True
        for other in after:
            if other in person or is_profession(other):
                return True
            if other in BARRIERS:
                break
    return bool(signs & FIX_RACE_ALONE)


# ------------------------------------------------------------------------------------------------- the word tables


def table(entries, plurals=False):
    """A set of entries; with `plurals` also their plurals."""
    singular = entries.split()
    return set(singular) | {plural(entry) for entry in singular if plurals}


def plural(word):
    if word.endswith("man"):
        return word[:-3] + "men"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


# --- toxic principles

BLOOD = table("""blood bloody bloodied bloodstained bloodsoaked bloodbath bloodshed bloodlust bleed
bleeds bleeding bled gore gory gored entrails intestines viscera wounds wounded open_wound flesh_wound
head_wound stab_wound stabbed decapitated decapitation beheaded beheading dismembered dismemberment
mutilated mutilation disemboweled disembowelled eviscerated severed_head severed_heads severed_limb
severed_limbs severed_arm severed_hand slaughtered slaughtering massacre massacred carnage impaled
flayed gunshot_wound gunshot_wounds bloodsplattered disembowelment slashed_throat""")

UNDEAD = table("""zombie zombies zombified zombielike undead living_dead walking_dead reanimated_corpse
reanimated_corpses rotting_corpse rotting_corpses rotting_flesh""")

NAKED = table("""nude nudes nudity nudist nudists naked nakedness topless shirtless undressed undressing
unclothed disrobed disrobing no_clothes no_clothing wearing_nothing non_clothed not_wearing_clothes
au_naturel bare_chest bare_chested bare_breasts bare_breasted bare_skin bare_bottom barely_clothed
barely_dressed bottomless_woman bottomless_women bottomless_girl bottomless_girls bottomless_man
bottomless_men scantily_clad scantily_dressed scantily_clothed lightly_dressed skimpy skinny_dipping
body_paint bodypaint breasts boob boobs busty buxom cleavage nipple nipples areola buttocks crotch
genital genitals genitalia penis phallus phallic vagina vulva pubic voluptuous hourglass_figure
hourglass_figures hourglass_body hourglass_shape hourglass_silhouette hourglass_waist hourglass_curves
sex sexual sexually sexuality sexy sexier erotic erotica porn porno pornographic pornography pornstar
hentai ecchi nsfw lewd orgy orgasm horny masturbating masturbation having_intercourse fetish bondage
bdsm dominatrix stripper strippers striptease pole_dancer pole_dancing playboy onlyfans camgirl
boudoir_photo boudoir_photos boudoir_photography boudoir_photograph boudoir_photoshoot boudoir_shoot
boudoir_portrait without_any_clothes any_clothes_on wearing_any_clothes
with_nothing_on seminude strip_club boudoir_session boudoir_pose centerfold pinup pinups pin_up_girl seductive seductively
seductress sultry salacious carnal harem succubus concubine courtesan prostitute prostitutes lingerie
panties negligee thong g_string odalisque bather bathers""")

# Surnames that are also places or first names count with a first name or after "by".
NUDE_ARTISTS = table("""bouguereau bussiere milo_manara by_manara ricardo_falero by_falero roberto_ferri
by_ferri edgar_maxence by_maxence tom_of_finland godward elvgren enoch_bolles by_bolles sorayama
serpieri lorenzo_sperlonga by_sperlonga alberto_vargas boris_vallejo by_vallejo luis_royo julie_bell
helmut_newton mapplethorpe herb_ritts ren_hang nobuyoshi_araki spencer_tunick nan_goldin
francesca_woodman jan_saudek birault jenny_saville alexandre_cabanel by_cabanel jules_lefebvre
joseph_lefebvre william_etty anders_zorn alma_tadema herbert_james_draper gustave_boulanger
miles_johnston bettie_page billy_herrington""")

SUGGESTIVE = table("""sensual sensuous boudoir attractive gorgeous alluring juicy lust lustful passion
passionate ecstasy flirting flirty kinky naughty provocative risque curvy slim skinny petite muscular
muscled abs biceps six_pack bikini bikinis latex fishnet fishnets stockings leotard miniskirt corset
underwear bra thigh_highs breast bosom thigh thighs hips belly lower_back anatomy anatomically
intertwined_bodies bend_over bending_over bent_over venus aphrodite nymph nymphs siren satyr goddess
mistress greek_sculpture pre_raphaelite rococo classicism renaissance frazetta brom caravaggio
leyendecker gustave_moreau gustav_moreau titian giorgione rubens botticelli ingres gerome modigliani
schiele""")

HINTS = [table("woman women girl girls lady female females male males man men femme feminine"),
         table("lying posing pose in_bed bed sheets bath bathtub bathing massage"),
         table("body bodies figure figures legs feet skin chest shoulders sweat sweaty wet oiled shape")]

# --- bias principles

GENDERED = table("""man woman boy girl guy gentleman bloke lad dude gal grandfather grandmother grandpa
grandma son daughter grandson granddaughter husband wife widow widower uncle aunt nephew niece boyfriend
girlfriend bride groom bridesmaid bachelor bachelorette prince princess emperor empress duke duchess
baron baroness lord knight monk nun priestess wizard witch sorceress actress laundress waitress hostess
stewardess seamstress ballerina heroine policeman policewoman fireman firewoman businessman
businesswoman salesman saleswoman chairman chairwoman spokesman spokeswoman congressman congresswoman
craftsman fisherman cameraman handyman repairman doorman foreman postman mailman milkman garbageman
sportsman sportswoman horseman horsewoman swordsman huntsman nobleman noblewoman frontman middleman
lineman serviceman servicewoman anchorman anchorwoman cowboy cowgirl schoolboy schoolgirl busboy bellboy
landlord landlady governess maid milkmaid barmaid chambermaid housewife butler watchman helmsman seaman barman
dustman airman alderman cellarman deliveryman yeoman headmaster headmistress masseuse mum daddy mommy""", plurals=True)

# Words of people that are also said of animals and dolls: they count when no animal is named.
GENDERED_UNLESS_ANIMAL = table("""he she him her his hers himself herself mother father mothers fathers
brother sister brothers sisters queen queens lady ladies male males female females king kings mom moms
dad dads""")
NEUTRAL_UNLESS_ANIMAL = table("""baby babies family families parent parents adult adults couple couples
team teams twins sibling siblings someone somebody everyone everybody crowd crowds leader leaders
toddler toddlers newborn cook cooks""")

# No person, but they fix the gender.
SIGNS_OF_GENDER = table("""pregnant bearded beard mustache moustache mr mrs ms madam feminine masculine manly womanly
fraternity sorority miss_universe""")

PEOPLE = table("""person human child kid infant teenager teen youth elder tourist traveler traveller
visitor guest customer shopper buyer spectator bystander audience pupil student classmate schoolchild
graduate undergraduate freshman intern apprentice trainee novice beginner patient victim prisoner inmate
criminal thief robber burglar suspect hacker gangster murderer killer assassin refugee immigrant migrant
citizen resident neighbor neighbour villager peasant beggar vagrant orphan spouse fiance lover partner
cousin relative ancestor roommate colleague coworker stranger celebrity hero genius rebel nomad pilgrim
hipster hippie punk_rocker goth biker hitchhiker volunteer activist protester demonstrator voter hostage
fugitive outlaw

doctor surgeon nurse midwife paramedic medic dentist orthodontist hygienist pharmacist chemist therapist
physiotherapist chiropractor psychiatrist psychologist psychotherapist counselor counsellor caregiver
carer caretaker nanny babysitter sitter veterinarian vet optometrist anesthetist anaesthetist oncologist
pathologist acupuncturist masseur doula physician nutritionist audiometrist phlebotomist coroner
mortician undertaker embalmer healer herbalist

teacher tutor professor lecturer educator principal headteacher dean scholar academic researcher
scientist physicist biochemist botanist economist historian archivist curator librarian philosopher
linguist mathematician astronomer astronaut cosmonaut inventor engineer architect surveyor draughtsman
drafter technician programmer developer coder administrator analyst webmaster tester auditor accountant
bookkeeper actuary banker broker stockbroker trader investor financier economist treasurer cashier
teller clerk secretary receptionist typist stenographer assistant aide manager supervisor executive ceo
cfo cto director president entrepreneur founder boss consultant advisor adviser planner coordinator
organizer strategist recruiter marketer advertiser publicist agent seller vendor retailer dealer
merchant shopkeeper storekeeper wholesaler auctioneer realtor appraiser underwriter adjuster estimator
negotiator lobbyist specialist expert representative officer official employee employer worker laborer
labourer freelancer contractor subcontractor operator inspector examiner assessor dispatcher scheduler
instructor coach mentor facilitator investigator collector attendant receptionist

lawyer attorney solicitor barrister judge magistrate prosecutor paralegal notary bailiff juror mediator
arbitrator politician senator governor mayor minister chancellor ambassador diplomat councillor
councilor legislator candidate delegate commissioner regulator monarch aristocrat noble courtier
dictator policymaker policy_maker police cop constable sheriff deputy detective trooper marshal ranger
warden jailer bodyguard guard sentry bouncer lifeguard firefighter soldier sergeant lieutenant colonel
corporal admiral commander captain sailor seafarer navigator recruit cadet sniper gunner paratrooper
warrior fighter mercenary gladiator samurai ninja viking archer spy pilot aviator copilot

farmer rancher gardener landscaper florist forester lumberjack logger shepherd beekeeper fisher
fishmonger hunter trapper butcher baker chef sous_chef confectioner chocolatier barista bartender waiter
server sommelier brewer winemaker distiller grocer greengrocer caterer host hotelier innkeeper
housekeeper janitor cleaner custodian porter concierge bellhop usher valet steward chauffeur driver
trucker cabbie conductor motorman courier messenger mail_carrier letter_carrier deliverer mover loader
packer stocker stevedore docker longshoreman miner driller quarrier blaster roughneck foundry_worker
welder fitter machinist millwright toolmaker assembler fabricator mechanic electrician plumber
pipefitter carpenter joiner cabinetmaker roofer bricklayer stonemason mason plasterer painter glazier
tiler paver decorator upholsterer builder installer repairer rigger scaffolder surveyor exterminator
locksmith blacksmith goldsmith silversmith gunsmith coppersmith tinsmith jeweler jeweller watchmaker
clockmaker shoemaker cobbler tailor dressmaker milliner weaver knitter tanner potter glassblower
woodworker woodcarver carver engraver bookbinder typesetter sawyer chimney_sweep rag_picker
garbage_collector recycler lamplighter barber hairdresser hairstylist stylist beautician manicurist
cosmetologist esthetician makeup_artist tattooist tattooer model supermodel

artist sculptor illustrator cartoonist animator designer photographer videographer filmmaker producer
editor writer author novelist poet playwright screenwriter copywriter blogger influencer youtuber
vlogger streamer journalist reporter correspondent columnist critic reviewer publisher translator
interpreter broadcaster announcer newscaster presenter narrator storyteller podcaster actor performer
entertainer comedian clown mime magician juggler acrobat puppeteer ventriloquist dancer choreographer
musician singer rapper vocalist songwriter composer lyricist conductor pianist guitarist bassist
violinist cellist drummer flutist flautist saxophonist trumpeter trombonist harpist organist
percussionist bagpiper busker dj disc_jockey rock_star pop_star movie_star film_star

athlete footballer quarterback goalkeeper goalie striker basketballer cricketer baseball_pitcher golfer
boxer wrestler swimmer diver runner sprinter jogger hiker climber mountaineer explorer gymnast
weightlifter bodybuilder fencer cyclist bicyclist motorcyclist racer jockey equestrian skier snowboarder
skateboarder skater surfer windsurfer rower kayaker canoeist sailor paraglider skydiver bullfighter
matador referee umpire linesman batsman catcher outfielder caddie cheerleader competitor contestant
gamer chess_player poker_player gambler

priest pastor bishop pope rabbi imam cleric clergy vicar chaplain preacher missionary theologian deacon
guru shaman druid prophet hermit astrologer fortune_teller psychic alchemist sorcerer pirate servant
slave maidservant homemaker retiree pensioner breadwinner millionaire billionaire socialite

guide tour_guide sommelier lexicographer proofreader indexer cartographer genealogist taxidermist tutor
dietitian dietician optician beautician geologist bailiff forecaster weathercaster meteorologist
statistician toxicologist prosthetist orthotist sonographer radiographer stagehand roadie projectionist
sound_mixer gaffer cashier lifesaver crossing_guard matchmaker undertaker zookeeper dog_walker groomer
falconer breeder farmhand deckhand shipwright boatbuilder wheelwright farrier saddler thatcher ploughman
plowman healthcare_professional medical_professional general_practitioner first_responder news_anchor
army_general fire_chief police_chief scrum_master lab_tech traffic_controller pest_controller
tile_setter fruit_picker tax_preparer wine_maker candle_maker cheesemaker stunt_double handler purser
postmaster telemarketer fundraiser interviewer busser emt philanthropist terrorist geneticist essayist
soloist conservationist environmentalist postdoc bondsman bandleader piercer chandler content_creator
croupier docent harbor_master perfumer piano_tuner pollster restaurateur snake_charmer town_crier
vintner whistleblower grave_digger gravedigger newsreader tarot_reader embroiderer sewer_worker
street_sweeper window_washer headhunter timekeeper gamekeeper hospital_orderly ranch_hand stable_hand
cowhand bosun signaller quartermaster crewmember station_master ski_patroller tea_picker wine_taster
shoe_shiner car_washer knife_sharpener organ_grinder steeplejack us_marine
au_pair choirmaster coastguard diamond_cutter farm_hand stage_hand flower_arranger glass_blower
head_of_state herder matron money_lender pawnbroker picture_framer prefect rector registrar road_sweeper
sheep_shearer ski_jumper stationmaster tree_feller undersecretary verger kung_fu_master tribal_chief
felon addict nerd osteopath palm_reader
goatherd sales_rep tightrope_walker fire_eater rickshaw_puller shipbuilder stonecutter woodcutter armourer mail_sorter
warehouse_picker roustabout scribe tea_taster blood_donor chess_grandmaster superhero olympian stripper porn_star
sex_worker""", plurals=True)
PEOPLE |= table("""people player players rider riders owner owners friend friends scout scouts trainer
pedestrians passengers commuters children persons schoolchildren freshmen folk folks staff crew
personnel police troops public_speaker infantry cast_members grandchildren grandparents kiddies elderly
bandmates an_orderly personal_trainers athletic_trainers dog_trainers horse_trainers marines waitstaff
orchestra choir marching_band""")

# A word that ends like a profession is one unless listed here; so is the face of anything not listed.
SUFFIXES = ("ist", "ician", "ographer", "person", "people", "worker", "keeper", "maker", "writer", "seller",
            "engineer", "surgeon", "teacher", "monger")
NOT_PEOPLE = table("""list playlist checklist setlist shortlist wishlist tracklist mist fist wrist waist
twist gist hoist heist whist resist insist assist persist consist exist coexist desist enlist christ
antichrist amethyst schist zeitgeist dist poltergeist minimalist maximalist surrealist impressionist
expressionist postimpressionist neoimpressionist cubist modernist postmodernist futurist symbolist
pointillist brutalist constructivist realist hyperrealist photorealist naturalist buddhist taoist
communist socialist fascist racist sexist moist orientalist classicist neoclassicist noisemaker
baptist methodist calvinist typewriter bestseller pacemaker coffeemaker icemaker breadmaker""", plurals=True)
THINGS_WITH_A_FACE = table("""clock watch sundial compass cliff mountain hill rock stone boulder glacier
wall moon planet sun comet building tower house coin card cube die dice crystal gem statue sculpture
bust mask puppet scarecrow pumpkin snowman monster alien creature demon ghost""", plurals=True)

ANIMALS = table("""animal dog puppy pup cat kitten kitty horse pony foal colt mare zebra giraffe
elephant cow calf bull ox cattle sheep lamb ram goat kid_goat pig piglet boar bear cub panda polar_bear
koala kangaroo monkey ape gorilla chimpanzee orangutan lion lioness tiger leopard cheetah wolf fox deer
fawn moose elk bison buffalo camel llama alpaca donkey mule rabbit bunny hare squirrel raccoon
badger otter beaver hedgehog porcupine mouse rat hamster skunk sloth hippo hippopotamus rhino rhinoceros
walrus seal whale dolphin shark fish bird duck duckling goose gosling swan hen chicken rooster chick
turkey eagle hawk owl falcon parrot pigeon gull seagull crow raven penguin ostrich flamingo peacock
stork turtle tortoise frog toad snake lizard gecko iguana crocodile alligator dinosaur dragon insect ant
bee butterfly spider crab lobster octopus snail robot doll toy teddy""", plurals=True)
ANIMALS |= table("""geese mice doe calves wolves oxen jaguar panther lynx hyena meerkat lemur baboon
armadillo platypus wombat chameleon cobra python pelican heron sparrow robin hummingbird toucan vulture
pheasant husky poodle corgi retriever terrier bulldog labrador dalmatian beagle spaniel pug chihuahua
collie gerbil ferret parakeet thrush wasp wasps beetle beetles bug bugs""")

# These fix race before a person: "a black judge", "a Somali bus driver". A nation does where most would see an ethnicity.
COLOURS = table("black white brown")
ETHNICITIES = table("""asian african afro caribbean caucasian european nordic hispanic latino latina
latinx arab arabic arabian persian iranian turkish indian pakistani bengali chinese japanese korean
vietnamese thai indonesian malaysian filipino mongolian tibetan mexican brazilian peruvian cuban
jamaican haitian nigerian kenyan ethiopian somali ghanaian sudanese egyptian moroccan polynesian
hawaiian samoan maori aboriginal indigenous inuit native_american african_american caucasians asians
africans latinos latinas swedish irish russian german french italian spanish greek polish ukrainian portuguese
dutch danish finnish norwegian jewish israeli syrian afghan iraqi cambodian zulu romani sikh""")
FIX_RACE_ALONE = table("""african_american african_americans native_american native_americans
middle_eastern mixed_race biracial multiracial person_of_color people_of_color latino latinos latina latinas caucasians asians africans geisha samurai""")
SKIN = table("dark darker light lighter pale black brown white fair tan tanned olive ebony yellow freckled")
BARRIERS = table("""a an the of in on at by with and or for from to near beside behind under over next
photo photograph picture image drawing film line hair haired
is are was wearing worn holding riding sitting standing who that his her their its style""")

# --- people named but not shown

FOODS = table("""cake pie bread cookie salad sandwich burger pizza cheese soup steak chicken turkey chocolate dessert
candy cereal spinach carrot tomato tomatoes potato potatoes olive beans rice noodle sausage egg fruit banana apple
cherry wings barley oats rib formula food breakfast brunch beverage beer cocktail coffee tea juice
ice_cream""", plurals=True)
VEHICLES = table("""car cab bus truck van boat ship longship cruiser bicycle motorcycle motorbike helicopter airplane
plane jet wagon cart tractor ambulance convertible vehicle""", plurals=True)
# Right after a person these name a thing: "a police car".
THINGS = FOODS | VEHICLES | table("""desk chair table bench stool couch sofa recliner cabinet shelf cupboard drawer
dresser closet mattress pillow curtain lamp lantern clock mug jar bowl kettle tray menu computer laptop keyboard door
window bed seat blender container cylinder

clinic office store station room bathroom bedroom lounge booth stall palace castle mansion quarters residence cottage
hut cabin barracks workshop warehouse bridge tower hotel restaurant museum memorial monument wharf lane stadium
mountain island lake mall dorm court pub ranch parking barrier barricade counter

church dinghy sandal boot sign poster mural trophy street tree flower palm bush orchid lily fern vine fungus moon nebula galaxy mold

knife sword axe spear wrench pliers anvil lathe loupe trowel toolbox toolkit ladder sewing_machine engine generator
motor camera guitar piano violin trumpet music_box briefcase handbag backpack suitcase basket bucket stroller crib
carriage notebook coloring_book pencil pen easel palette baton gavel stethoscope scalpel scissors badge plaque logo
flag banner calendar diagram font website brochure manual handbook novel comics album dvd magazine newspaper licence
license helm mitt racket arrow rifle kite buoy coin rug towel bathtub perfume powder""", plurals=True)
# These are also done: "a carpenter saw" is a tool, but "carpenters saw" and "the plumber tapes a pipe" are not.
THINGS_DONE = table("""bag block blanket book bottle box brick camp crown cup fence forge glue gun hammer house
machine market mirror nest net paper phone pipe pole pot radio rope rack saw screen shop sink spoon stamp tape
stand watch drill tent tile tire vise wheel whistle wire bow gate chart chisel""")
DONE_BY_PEOPLE = table("seals bears ducks fishes")  # though they name animals
CLOTHES = table("""hat cap helmet costume uniform outfit mask boots shoes slippers sandals heels gloves apron robe
gown jacket pants shorts jersey armor armour veil wig belt necktie scarf sweater glasses sunglasses goggles
sneakers cloak clothes""", plurals=True) | {"suit"}
FIGURES = table("""statue sculpture figurine bust doll puppet marionette mannequin dummy toy plushie bobblehead
nutcracker cutout action_figure wax_figure""", plurals=True)
TOY = table("toy plush lego playmobil nutcracker")
# What a figure's name goes up to: "a toy maker" is a person, and so may be what stands beside a statue.
AFTER_FIGURES = table("""maker designer inventor seller collector restorer carver repairer tester owner store shop
factory near beside next by behind in on at with while where who is are under""", plurals=True)
# Whoever owns one of these is seen himself, and so is he who does something: "a nurse's hand", "the man's eating".
SEEN_OF_OWNERS = table("""face head hair eye nose mouth lip ear chin cheek beard neck shoulder back chest arm elbow
forearm wrist palm hand finger fist belly leg lap knee ankle foot feet body skin smile gaze expression portrait
headshot selfie photo picture silhouette reflection profile life job work
party march match race final game team tennis soccer basketball football choir band dance class
wedding""", plurals=True)
PRONOUNS = table("he she it hers his him her my your our their its that there who what let here where one")
# Before a thing these are mostly people still: "a woman bus driver", "people horse riding".
ANYONE = table("people person persons man men woman women boy boys girl girls")


def either(*tables):
    return "(?:%s)" % "|".join(entry.replace("_", " ") for entry in sorted(set().union(*tables)))


OWNER = rf"\b(?!{either(PRONOUNS)}\b)\w+(?= s (?!(?:\w+ )?{either(SEEN_OF_OWNERS)}\b|\w+ing\b)\w)"
NAME = rf"\b(?!{either(PRONOUNS, ANYONE)}\b)\w+"
NAME_OF_FIGURE = rf"(?: (?!{either(AFTER_FIGURES)}\b)\w+)"
BEFORE_THING = re.compile(rf"{NAME}(?= {either(THINGS, ANIMALS - DONE_BY_PEOPLE)}\b)"
                          rf"|{NAME}(?<!s)(?= {either(THINGS_DONE)}\b)")
UNSEEN = re.compile("|".join((
    OWNER,                                              # "a judge's gavel"
    rf"{NAME}(?= {either(CLOTHES, FIGURES)}\b)",        # "cowboy boots", "a nurse doll"
    rf"\b{either(TOY)}{NAME_OF_FIGURE}{{1,2}}",         # "a toy police officer"
    rf"\b{either(FIGURES)} of{NAME_OF_FIGURE}{{1,6}}")))    # "a bust of a young poet"

# --- harmless phrases: cut out before anything is looked up (patterns over normalised words)

BARE = "(?:naked|nude|topless|shirtless|undressed|unclothed|sexy|seductive|skimpy)"
HARMLESS = re.compile(r"\b(?:%s)\b" % "|".join(re.split(r"\n+", rf"""
{BARE} (?:sports |double decker )?{either(FOODS, VEHICLES, ["perfume"])}(?! (?:skin|girl|wom[ae]n|m[ae]n|wash|ride))
naked (?:eyes?|mole|flames?|neck|gun|trees?|branch(?:es)?|wires?|truth|lunch|singularit\w+|lights?(?! skin))
naked (?:short selling|(?:light )?bulbs?)|naked (?:street )?bikes?(?! rides?)|naked lad(?:y|ies) (?:flowers?|lil\w+)
(?:nude|naked) (?:lip\w*|nails?|heels?|pumps?|shoes?|polish|handbags?|wall|eye ?shadow)
(?:nude|naked) (?:shades?|tone[sd]?|tights|palettes?|make ?up|colou?r\w*)
undressed (?:stone|lumber|timber|wood|wounds?|window)|unclothed trees?|shirtless hangers?
topless (?:bar )?charts?|topless towers?|bare skin of (?:a|the) tree|skimpy portions?
scantily (?:furnished|decorated)|(?:food|ruin|word) porn|orgy of (?:colou?rs?|flowers?|food)
(?:chicken|turkey|duck|goose|pheasant|quail|pigeon|red|robin|bird|white|yellow|orange) breasts?
breasts? of (?:chicken|turkey|duck|lamb|veal)
breasts? (?:pockets?|stroke|plates?|feathers?|cancer|feeding|pumps?|milk)
(?:mineral|crystal|rock|slaty|mica|calcite|diamond|cell|embryo) cleavage|cleavage (?:planes?|surfaces?|furrows?)
cleavage of (?:a |the )?(?:mica|diamonds?|calcite|minerals?|crystals?|rocks?|cells?)
(?:grease|pipe|(?:baby )?bottle|brass|steel|spoke|hose) nipples?|nipple (?:fittings?|wrench\w*)
crotch rockets?|tree crotch\w*|crotch of (?:a|the) (?:\w+ )?tree
(?:same|opposite|single|safe) sex|sex (?:education|pistols|and the city|ratio|determination|change)
sex (?:chromosome|hormone)s?|sexual(?:ly)? (?:dimorphi\w+|reproduction|selection)|bikini bottom
(?:paint|wire|cable|wallpaper) strippers?|stripper wells?|harem pants|(?:palace|topkapi) harem
thong sandals?|flip flop thongs?|thong flip|playboy (?:car|logo|bunny logo)
lingerie (?:stores?|shops?|drawers?|departments?)
g strings? (?:of|guitars?)|(?:guitar|violin|cello) (?:s )?g strings?
(?:nkisi|wooden|voodoo) fetish\w*|fetish (?:figurines?|figures?|priests?|market)
sun bathers?|bathers? (?:s )?(?:beach|huts?|pavilions?)|seductive (?:scents?|smells?|aromas?|voices?)
impaled on (?:a |an |the )?(?:\w+ )?(?:forks?|sticks?|skewers?|toothpicks?)|(?:pinup|pin up) boards?|sex ed
fetish dolls?|bondage tape|voluptuous (?:sofas?|couch(?:es)?|armchairs?)
sultry (?:summer |hot |tropical )?(?:weather|summers?|heat|air|nights?|evenings?|afternoons?|days?|jazz)
(?:car|auto|automotive|truck) body paint|body paint (?:on|for|of) (?:(?:a|the|my) )?(?:\w+ )?{either(VEHICLES)}
latex (?:paint|gloves?|balloons?|mattress)|passion ?fruits?|rose hips|venus (?:fly ?traps?|williams)
greek (?:salad|yogh?urt|food|restaurant)|siren (?:lights?|sounds?)|rubens tube

blood (?:oranges?|types?|typing|moons?|pressure|don\w+|drives?|bags?|transfusions?|glucose|plasma|meal|stream)
blood (?:banks?|tests?|sugar|thinners?|alcohol|donors?|vessels?|cells?(?: models?)?|colou?red|relatives?|groups?)
blood (?:brain barrier|lil(?:y|ies)|money|feuds?|ties)
blood (?:brothers?|lines?|diamonds?|work|hounds?|red|sausages?|stones?|worms?|el(?:f|ves))
blood (?:puddings?|samples?|tubes?|flow|clots?|sport|count|smear (?:slide|under)|bowl (?:game|miniature|team))
bloody (?:marys?|maries|caesars?|sunday|foreland|good|tower of london)
bleeding (?:hearts?|edge|tooth fungus|brakes?|radiators?)|bleed (?:valves?|screws?|margins?|lines?)
(?:full|no|colou?r|ink) bleed\w*|(?:al|vidal|lesley) gore|(?:\w+ )?gored skirts?
gore (?:tex|vidal|range|mountain|street|points?|(?:, )?new zealand)
(?<!a )(?<!his )(?<!her )wounded knee|wounded warrior project|massacre (?:memorials?|monuments?|museum|island)
(?:beheaded|decapitated|dismembered|mutilated|impaled|stabbed) (?:kebabs?|banknotes?|{either(THINGS, FIGURES)})
zombie (?:cocktails?|drink|process(?:es)?|ants?|fung\w+|computers?|companies|company(?! of)|deer|banks?(?! teller))
zombie (?:mortgages?|debts?|satellites?|stocks?|threads?|servers?)

couple of|(?:no|without) (?:any )?(?:people|persons?|humans?|m[ae]n|wom[ae]n|one|students?|passengers?)
(?:to|and|that|can|you|we) cook
(?:king|queen|jack|knave)s? of (?:hearts?|spades?|clubs?|diamonds?)|king of the (?:jungle|hill|road)
chess (?:kings?|queens?|knights?|bishops?)
(?:king|queen|bishop|knight)s? (?:(?:chess )?pieces?|on a (?:chess ?board|playing card))
kings? (?:and|or) queens? (?:chess )?pieces?|(?:german|australian) shepherds?|jet fighters?
(?:coffee|espresso|tea|ice|bread|waffle|pasta) makers?|tourist (?:attractions?|sites?|spots?|traps?|maps?)
(?:dvd|cd|vcr|vhs|mp|record|media|video|music|tape|cassette|dis[ck]|ray|blu ray) players?
(?:vacuum|oven|steam|toilet|air|drain|hand|pipe) cleaners?|cleaner (?:shrimps?|wrasses?|spray)
screw drivers?|(?:device|disk|golf|printer) drivers?|driver side|(?:electrical|lightning) conductors?
(?:web|file|mail|computer|game|data|cake|pie) servers?|server farms?|conductors? of (?:heat|electricity)
baker street|soldier (?:fly|piles?|field)|pilot (?:lights?|flames?)|guard ?rails?
(?:shin|mouth|splash|mud|lens) guards?|ninja (?:stars?|turtles?)|(?:voltage|gas|pressure) regulators?
model (?:trains?|planes?|air\w+|cars?|ships?|boats?|kits?|railways?|rail\w+|t|x|trucks?|towns?|house|of)
model (?:numbers?|plates?|paints?)|tesla model s|(?:airplane|architectural) models?
(?:scale|3d|d|car|clay|toy|latest|new|older|old|vintage|train|wooden|plastic) models?
captain (?:america|crunch|morgan)|mini coopers?|ford (?:rangers?|explorers?)|subaru foresters?|harry potter
boxer (?:briefs|engines?)|(?:table|carpet|stair) runners?|blade runners?|clown noses?|pairs? of trainers
cook ?(?:books?|ware|tops?|outs?|ers?|islands?)|(?:stage|mail|national express|horse drawn) ?coach(?:es)?
coach (?:class|lights?|pulled (?:out|in|up|away|over)|(?:is )?parked)|hunter green|noble (?:firs?|gas\w*)|resident evil
monk seals?|king (?:sized?|beds?|crabs?|cobras?|penguins?|charles|kong|prawns?|salmon|arthur)|(?:burger|lion) king
queen (?:sized?|beds?|bees?|ann\w*|mattress\w*)|dairy queen|queens (?:bed|ny|new york|boulevard)|king s cross
(?:emperor|king) penguins?|(?:apple|peach|cherry|berry|blueberry|fruit) cobblers?
man made|man ?(?:holes?|caves?)|(?:vitruvian|burning|pac|mega) m[ae]n|isle of man|man of war|man o war
(?:wedding|groom) cake toppers?|(?:tin|wooden|terracotta) (?:soldiers?|warriors?|army)|tomb of the unknown soldiers?
(?:snow|gingerbread|lego|iron|spider|bat|super|toy|ant|stick|straw) ?m[ae]n|men at work signs?|no man s
(?:men|women|ladies|lady|gentlemen)s? (?:s )?(?:rest|bath|bed|locker |wash)?rooms?|public washrooms?
(?:boy|girl|baby|kid|children|staff)s? (?:s )?(?:rest|bath|bed|locker )?rooms?|his and hers|bachelor pads?
lady ?(?:bugs?|birds?|fingers?|liberty)|mothers? ?(?:boards?|nature|ship|(?:s )?day|of pearl)
fathers? (?:(?:s )?day|time|christmas)|presidents? (?:s )?day|daddy long ?legs|game boys?|potted mums
(?:hot|corn) dogs?|girl scout cookies?|baby (?:corn|grand|blue|back|monitors?|showers?|s breath)
(?:kid|child|children)s? (?:s )?(?:drawings?|crayons?|meals?|bikes?|play ?(?:grounds?|rooms?|house|pens?|sets?))
(?:child|kid)s? (?:seats?|menus?|gloves)
family (?:home|farm|tree|crest|photo album)s?|killer (?:whales?|bees?|sudoku)|hero (?:sandwich\w*|images?)
human (?:body|digestive|souls?|skull|skeleton)\w*|human (?:anatomy|hearts?|brains?|resources|rights|nature)
(?:visitor|student|guest)s? (?:s )?(?:housing|centers?|union|loans?|ids?|lists?)|graduated? cylinders?
pupils? of (?:an?|the|its) (?:\w+ )?(?:s )?eyes?|official (?:documents?|seals?|websites?|posters?|logos?|art(?:work)?)
judge (?:by|whether|not)|doctor strange|police (?:bikes?|lights?|motor\w+)|artist (?:loft|studio)(?! light)
painters tape|bankers box|farmers markets?|(?:front|wheel|boot|end|skid) loaders?
(?:day|daily|weekly) planners?|(?:drawer|desk|closet) organi[sz]ers?
(?:cleaning|bleaching) agents?|agent orange|(?:dust|solar) collectors?|(?:text|code) editors?|hugo boss
(?:file|window|package) managers?|style guides?|field guides? to|guide (?:rails?|wires?)|employees? only
dream ?catchers?|(?:water|glass|milk|lemonade) pitchers?|pitcher plants?|teller machines?|people (?:mover|carrier)s?
""".strip())))
