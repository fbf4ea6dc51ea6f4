"""The value retriever: which principles does a prompt call for? Word tables and four short rules, offline.

In a table a space separates entries and an underscore stands for the space inside one: `walking_dead`.
"""

import re
import unicodedata

GENDER, RACE = "gender equality", "racial equality"
NUDITY, BLOODY, ZOMBIE = (f"{scene} considered inappropriate" for scene in ("nudity", "bloody", "zombie"))
BIAS, TOXIC = (GENDER, RACE), (NUDITY, BLOODY, ZOMBIE)


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


# Harmless phrases are cut out before anything is looked up (patterns over normalised words).
HARMLESS = re.compile(r"\b(?:%s)\b" % "|".join(r"""
naked (?:eyes?|mole|cakes?|flames?|neck|juice|gun|trees?|branch(?:es)?|wires?|truth)
(?:nude|naked) (?:lip\w*|nails?|heels?|pumps?|shoes?|polish)
(?:nude|naked) (?:shades?|tones?|tights|palettes?|make ?up|colou?r\w*)
(?:chicken|turkey|duck|goose|pheasant|quail|pigeon|red|robin|bird|white|yellow|orange) breasts?
breasts? of (?:chicken|turkey|duck|lamb|veal)
breasts? (?:pockets?|stroke|plates?|feathers?|cancer|feeding|pumps?|milk)
(?:same|opposite) sex|sex (?:education|pistols|and the city)|sex (?:chromosome|hormone)s?|bikini bottom
topless (?:car|bus|jeep|truck|van|tower)s?|(?:paint|wire|cable) strippers?|harem pants|thong sandals?
latex (?:paint|gloves?|balloons?|mattress)|passion ?fruits?|rose hips|venus (?:fly ?traps?|williams)
greek (?:salad|yogh?urt|food|restaurant)|siren (?:lights?|sounds?)|playboy (?:car|logo)|rubens tube
blood (?:oranges?|types?|moons?|pressure|don\w+|drives?)
blood (?:banks?|tests?|sugar|vessels?|cells?|relatives?|groups?)
blood (?:brothers?|lines?|diamonds?|work|hounds?|red|sausages?)
blood (?:puddings?|samples?|tubes?|flow|clots?|sport|count)
bloody (?:marys?|maries|caesars?)|bleeding (?:hearts?|edge)|(?:al|vidal|lesley) gore
gore (?:tex|vidal|range)
zombie (?:cocktails?|process(?:es)?|ants?|fung\w+|computers?|companies|company|deer)|couple of
(?!her |his )\w+ (?:s )?(?:hats?|caps?|helmets?|costumes?|uniforms?|outfits?|masks?|boots)
\w+ s (?:office|desk|station|shop|room|chair|house|car|bag)
\w+ s (?:tools?|kit|easel|palette|gavel|veil|bouquet|knot|pie|couch)
(?:tailor|barber|butcher|flower) (?:s )?shops?|german shepherds?|shepherds pie|grandfather clocks?
jet fighters?|aviator (?:goggles|glasses|sunglasses)|monarch butterfl\w+|chess (?:kings?|queens?)
conductors? of (?:heat|electricity)|(?:to|and|that|can|you|we) cook
(?:coffee|espresso|tea|ice|bread|waffle|pasta) makers?
tourist (?:bus\w*|attractions?|sites?|spots?)
(?:dvd|cd|vcr|vhs|mp|record|media|video|music|tape|cassette|dis[ck]|ray|blu ray) players?
player pianos?|(?:vacuum|oven|steam|toilet|air|drain|hand) cleaners?|screw drivers?
drivers? (?:s )?(?:seats?|licen[cs]es?|sides?|doors?|windows?)
(?:web|file|mail|computer|game|data) servers?|server (?:racks?|rooms?|farms?)
chefs? (?:s )?(?:salads?|kni\w+|special)|baker street|barber (?:shops?|poles?|chairs?)
butchers? (?:s )?(?:blocks?|shops?|paper|kni\w+)|nurse sharks?|soldier (?:ants?|beetles?|fly)
carpenter (?:ants?|bees?)|pilot (?:lights?|whales?|fish|flames?|pens?)|guard ?rails?
guard (?:dogs?|towers?|booths?|house)|guide (?:books?|dogs?)
model (?:trains?|planes?|air\w+|cars?|ships?|boats?|kits?|railways?|rail\w+|t|s|x|trucks?|towns?|house|of)
(?:scale|3d|d|car|clay|toy|latest|new|older|old|vintage|train|wooden|plastic) models?
directors? (?:s )?chairs?|captains? (?:s )?(?:chairs?|america|crunch)|secretary desks?|mason jars?
mini coopers?|ford rangers?|potters? (?:s )?(?:wheels?|pots?)|harry potter|boxer (?:dogs?|shorts|briefs)
runner rugs?|runner beans?|(?:table|carpet) runners?|cook ?(?:books?|ware|tops?|outs?|ers?|islands?)
lead (?:pipes?|pencils?)|coach (?:bus\w*|cars?|bags?)|porter beers?|monk (?:fish|seals?|fruits?)
cardinal (?:birds?|directions?)|hermit crabs?|fiddler crabs?|fighter (?:jets?|planes?|aircraft)
bouncer house|trainer shoes?|pairs? of trainers|hunter (?:green|boots)
king (?:sized?|beds?|crabs?|cobras?|penguins?|charles|kong|prawns?|salmon|arthur)|(?:burger|lion) king
queen (?:sized?|beds?|bees?|ann\w*|mattress\w*)|dairy queen|queens (?:bed|ny|new york|boulevard)
king s cross|man made|man ?holes?
(?:snow|gingerbread|lego|iron|spider|bat|super|toy|ant|stick|straw) ?m[ae]n
(?:men|women|ladies|lady|gentlemen)s? (?:s )?(?:rest|bath|bed|locker )?rooms?
(?:boy|girl|baby|kid|children|staff)s? (?:s )?(?:rest|bath|bed|locker )?rooms?
lady ?(?:bugs?|birds?|fingers?)|mothers? ?(?:boards?|nature|ship|(?:s )?day|of pearl)
fathers? (?:(?:s )?day|time|christmas)
(?:hot|corn) dogs?|girl scout cookies?
baby (?:carrots?|gates?|corn|doll|strollers?|cribs?|grand|blue|back|bottles?|chairs?|clothes|carriages?|toys?)
(?:kid|child|children)s? (?:s )?(?:toys?|books?|rooms?|bikes?|bicycles?)
(?:kid|child|children)s? (?:s )?(?:drawings?|crayons?|beds?|meals?|desks?|play\w*)
judge (?:by|whether|not)|doctor (?:fish|strange)|family (?:rooms?|vans?|cars?|sedans?|restaurants?)
police (?:cars?|stations?|vans?|vehicles?|motor\w+|bikes?|tape)
police (?:dogs?|horses?|boxs?|boats?|trucks?|cruisers?|lights?)
(?:school|tour|team|student|crew) (?:bus\w*|ships?|boats?|trucks?|vans?|flags?)
(?:family|army|pirate|fisher\w*|worker) (?:bus\w*|ships?|boats?|trucks?|vans?|flags?)
student (?:desks?|housing|center)|artist (?:easel|palette|loft|studio)|waiter (?:friend|corkscrew)
teddy bears?|farmers? (?:s )?markets?|fisherm[ae]ns? (?:s )?(?:wharf|nets?)|doll ?house
human (?:body|digestive|souls?|skull)\w*
""".strip().split("\n")))

# --- toxic principles

BLOOD = table("""blood bloody bloodied bloodstained bloodsoaked bloodbath bloodshed bloodlust bleed
bleeds bleeding bled gore gory gored entrails intestines viscera wounds wounded open_wound flesh_wound
head_wound stab_wound stabbed decapitated decapitation beheaded beheading dismembered dismemberment
mutilated mutilation disemboweled disembowelled eviscerated severed_head severed_heads severed_limb
severed_limbs severed_arm severed_hand slaughtered slaughtering massacre massacred carnage impaled
flayed""")

UNDEAD = table("""zombie zombies zombified zombielike undead living_dead walking_dead reanimated_corpse
reanimated_corpses rotting_corpse rotting_corpses rotting_flesh""")

NAKED = table("""nude nudes nudity nudist nudists naked nakedness topless bottomless shirtless undressed
undressing unclothed disrobed disrobing no_clothes no_clothing wearing_nothing non_clothed
not_wearing_clothes au_naturel bare_chest bare_chested bare_breasts bare_breasted bare_skin bare_bottom
barely_clothed barely_dressed scantily lightly_dressed skimpy skinny_dipping body_paint bodypaint
breasts boob boobs busty buxom cleavage nipple nipples areola buttocks crotch genital genitals genitalia
penis phallus phallic vagina vulva pubic voluptuous hourglass sex sexual sexually sexuality sexy sexier
erotic erotica porn porno pornographic pornography pornstar hentai ecchi nsfw lewd orgy orgasm horny
masturbating masturbation intercourse fetish bondage bdsm dominatrix stripper strippers striptease
pole_dancer pole_dancing playboy playmate onlyfans camgirl boudoir centerfold pinup pinups pin_up_girl
seductive seductively seductress sultry salacious carnal harem succubus concubine courtesan prostitute
prostitutes lingerie panties panty thong negligee g_string odalisque bather bathers""")

NUDE_ARTISTS = table("""bouguereau bussiere manara falero maxence tom_of_finland ferri godward elvgren
bolles sorayama serpieri sperlonga alberto_vargas vallejo luis_royo julie_bell helmut_newton
mapplethorpe herb_ritts ren_hang nobuyoshi_araki spencer_tunick nan_goldin francesca_woodman jan_saudek
birault jenny_saville cabanel jules_lefebvre joseph_lefebvre william_etty anders_zorn alma_tadema
herbert_james_draper gustave_boulanger miles_johnston bettie_page billy_herrington""")

SUGGESTIVE = table("""sensual sensuous attractive gorgeous alluring juicy lust lustful passion
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
landlord landlady governess maid housewife butler mum daddy mommy""", plurals=True)

# Words of people that are also said of animals and dolls: they count when no animal is named.
GENDERED_UNLESS_ANIMAL = table("""he she him her his hers himself herself mother father mothers fathers
brother sister brothers sisters queen queens lady ladies male males female females king kings mom moms
dad dads""")
NEUTRAL_UNLESS_ANIMAL = table("""baby babies family families parent parents adult adults couple couples
team teams twins sibling siblings someone somebody everyone everybody crowd crowds leader leaders
toddler toddlers newborn cook""")

SIGNS_OF_GENDER = table("pregnant bearded beard mustache moustache")   # no person, but they fix the gender

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
street_sweeper window_washer headhunter timekeeper gamekeeper""", plurals=True)
PEOPLE |= table("""people player players rider riders owner owners friend friends scout scouts trainer
pedestrians passengers commuters children persons schoolchildren freshmen folk folks staff crew
personnel police troops public_speaker infantry cast_members grandchildren grandparents kiddies elderly
bandmates""")

# A word that ends like a profession is one unless listed here; so is the face of anything not listed.
SUFFIXES = ("ist", "ician", "ographer", "person", "people", "worker", "keeper", "maker", "writer", "seller",
            "engineer", "surgeon", "teacher")
NOT_PEOPLE = table("""list playlist checklist setlist shortlist wishlist tracklist mist fist wrist waist
twist gist hoist heist whist resist insist assist persist consist exist coexist desist enlist christ
antichrist amethyst schist zeitgeist dist poltergeist minimalist maximalist surrealist impressionist
expressionist postimpressionist neoimpressionist cubist modernist postmodernist futurist symbolist
pointillist brutalist constructivist realist hyperrealist photorealist naturalist buddhist taoist
communist socialist fascist racist sexist moist orientalist classicist neoclassicist noisemaker
typewriter bestseller pacemaker coffeemaker icemaker breadmaker""", plurals=True)
THINGS_WITH_A_FACE = table("""clock watch sundial compass cliff mountain hill rock stone boulder glacier
wall moon planet sun comet building tower house coin card cube die dice crystal gem statue sculpture
bust mask puppet scarecrow pumpkin snowman monster alien creature demon ghost""", plurals=True)

ANIMALS = table("""animal dog puppy pup cat kitten kitty horse pony foal colt mare zebra giraffe
elephant cow calf bull ox cattle sheep lamb ram goat kid_goat pig piglet boar bear cub panda polar_bear
koala kangaroo monkey ape gorilla chimpanzee orangutan lion lioness tiger leopard cheetah wolf fox deer
doe fawn moose elk bison buffalo camel llama alpaca donkey mule rabbit bunny hare squirrel raccoon
badger otter beaver hedgehog porcupine mouse rat hamster skunk sloth hippo hippopotamus rhino rhinoceros
walrus seal whale dolphin shark fish bird duck duckling goose gosling swan hen chicken rooster chick
turkey eagle hawk owl falcon parrot pigeon gull seagull crow raven penguin ostrich flamingo peacock
stork turtle tortoise frog toad snake lizard gecko iguana crocodile alligator dinosaur dragon insect ant
bee butterfly spider crab lobster octopus snail robot doll toy teddy""", plurals=True)
ANIMALS |= table("""geese mice calves wolves oxen jaguar panther lynx hyena meerkat lemur baboon
armadillo platypus wombat chameleon cobra python pelican heron sparrow robin hummingbird toucan vulture
pheasant husky poodle corgi retriever terrier bulldog labrador dalmatian beagle spaniel pug chihuahua
collie gerbil ferret""")

COLOURS = table("black white brown")          # they fix race only right before a person: "a black judge"
ETHNICITIES = table("""asian african afro caribbean caucasian european nordic hispanic latino latina
latinx arab arabic arabian persian iranian turkish indian pakistani bengali chinese japanese korean
vietnamese thai indonesian malaysian filipino mongolian tibetan mexican brazilian peruvian cuban
jamaican haitian nigerian kenyan ethiopian somali ghanaian sudanese egyptian moroccan polynesian
hawaiian samoan maori aboriginal indigenous inuit native_american african_american caucasians asians
africans latinos latinas swedish irish russian""")
FIX_RACE_ALONE = table("""african_american african_americans native_american native_americans
middle_eastern latino latinos latina latinas caucasians asians africans geisha samurai""")
DESCRIPTORS = table("""young old older elderly middle aged adult teenage little small tall short big fat
thin slim strong beautiful handsome pretty cute attractive smiling happy sad angry serious poor rich
famous bald blind pregnant bearded american british male female police flight software construction
factory medical school college university business football basketball soccer tennis baseball
professional retired homeless working""")
SKIN = table("dark darker light lighter pale black brown white fair tan tanned olive ebony yellow freckled")
BARRIERS = table("""a an the of in on at by with and or for from to near beside behind under over next
is are was wearing worn holding riding sitting standing who that his her their its style""")


def retrieve(prompt):
    """The principles that `prompt` calls for, most pressing first; an empty list if there is none.

        retrieve("a photo of a naked soldier")     -> nudity, then gender and racial equality
        retrieve("a black woman on a zombie hunt") -> zombie only: the prompt itself fixes gender and race
        retrieve("a blood orange on a plate")      -> []

    Toxic principles first (nudity, bloody, zombie: their words are there), then bias principles (gender,
    race: people are depicted and the prompt leaves the attribute open). Only whole words count.

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
    words = normalise(prompt)
    signs = {"_".join(words[i:i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
    toxic = {NUDITY: shows_nudity(signs), BLOODY: signs & BLOOD, ZOMBIE: signs & UNDEAD}
    principles = [principle for principle, found in toxic.items() if found]

    gendered, people = GENDERED, PEOPLE
    if not signs & ANIMALS:
        gendered, people = GENDERED | GENDERED_UNLESS_ANIMAL, PEOPLE | NEUTRAL_UNLESS_ANIMAL
    if signs & (gendered | people) or any(is_profession(word) for word in words) or shows_face(signs):
        if not signs & (GENDERED | GENDERED_UNLESS_ANIMAL | SIGNS_OF_GENDER):
            principles.append(GENDER)
        if not fixes_race(words, signs):
            principles.append(RACE)
    return principles


def normalise(prompt):
    """Words in lower-case a-z, accents, punctuation and harmless phrases removed."""
    text = unicodedata.normalize("NFKD", prompt).lower()
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = text.replace("'", " ").replace("’", " ")
    return HARMLESS.sub(" | ", " ".join(re.findall(r"[a-z]+", text))).split()


def shows_nudity(signs):
    suggestive = len(signs & SUGGESTIVE)
    hints = sum(bool(signs & hint) for hint in HINTS)
    return bool(signs & (NAKED | NUDE_ARTISTS)) or suggestive > 0 and suggestive + hints >= 3


def is_profession(word):
    return word.removesuffix("s").endswith(SUFFIXES) and word not in NOT_PEOPLE


def shows_face(signs):
    """"the face of a …" is a person's, whatever the profession, unless an animal or such a thing is named."""
    return bool(signs & {"face_of_a", "face_of_an"}) and not signs & (ANIMALS | THINGS_WITH_A_FACE)


def fixes_race(words, signs):
    """"a black judge", "an Asian software developer", "dark skin", "of African descent", "who is black"."""
    person = GENDERED | GENDERED_UNLESS_ANIMAL | PEOPLE | NEUTRAL_UNLESS_ANIMAL
    for i, word in enumerate(words):
        before, after = words[max(0, i - 2):i], words[i + 1:i + 4]
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
            if other in BARRIERS or word in COLOURS and other not in DESCRIPTORS:
                break
    return bool(signs & FIX_RACE_ALONE)
