"""
The toy language. The sentences below were written by hand, as a speaker of German writes them: none was copied
from the generator's output.
"""
import os
import random
import re
import subprocess
import sys

import pytest

from flash_transformer.data.toy import (
    ADJECTIVES,
    NAMES,
    NOUNS,
    PLACES,
    PRONOUNS,
    VERBS,
    Clause,
    NounPhrase,
    copula,
    finish,
    german_present,
    inflect,
    link,
    prepositional,
    pronoun,
    question,
    refer,
    sentence,
    statement,
    subordinate,
    toy_corpus,
    verb_group,
)

ADJECTIVE = {a.english: a for a in ADJECTIVES}
NOUN = {form: (n, number) for n in NOUNS + [p.noun for p in PLACES] for form, number in
        ((n.singular, "s"), (n.plural, "p")) if form}
VERB = {v.english: v for v in VERBS}


def np(text, case="nom"): # "the old man", "him", "Anna"
    for key, (en, _) in PRONOUNS.items():
        if text == en.split()[case != "nom"]:
            return pronoun(key, case)
    if text in NAMES:
        return NounPhrase(link(f"{text}:{text}"), "s3", NAMES[text], light=True)
    *before, last = text.split()
    det = before.pop(0) if before and before[0] not in ADJECTIVE else ""
    noun, number = NOUN[last]
    return inflect(noun, case, number, {"these": "this", "an": "a"}.get(det, det), [ADJECTIVE[a] for a in before])


def prep(words, case, text): return prepositional(words, np(text, case))


def say(order, verb, mode, subject, *objects, front=None, opening="", **rest): # -> (English, German)
    subject = np(subject)
    ask = order is question
    group = copula(mode, subject.person) if verb == "be" else verb_group(VERB[verb], mode, subject.person, ask)
    rest = {k: link(v) if isinstance(v, str) else v for k, v in rest.items()}
    c = Clause(subject, group, tuple(np(o[4:], o[:3]) for o in objects), **rest)
    phrase = order(c, link(opening)) if opening or order is subordinate else \
        order(c, getattr(c, front)) if front else order(c)
    p = finish(phrase)
    return p.source, p.target


BY_HAND = [
    # statements; adjectives in all declensions
    (say(statement, "give", "present", "the old man", "dat:the child", "acc:a big red apple"),
     "The old man gives the child a big red apple.", "Der alte Mann gibt dem Kind einen großen roten Apfel."),
    (say(statement, "read", "present", "a young woman", "acc:an interesting book"),
     "A young woman reads an interesting book.", "Eine junge Frau liest ein interessantes Buch."),
    (say(statement, "drink", "present", "my neighbour", "acc:hot coffee"),
     "My neighbour drinks hot coffee.", "Mein Nachbar trinkt heißen Kaffee."),
    (say(statement, "drink", "past", "the small children", "acc:cold milk"),
     "The small children drank cold milk.", "Die kleinen Kinder haben kalte Milch getrunken."),
    (say(statement, "see", "present", "Anna", "acc:the small boy"),
     "Anna sees the small boy.", "Anna sieht den kleinen Jungen."),
    (say(statement, "help", "present", "these friendly doctors", "dat:our old neighbours"),
     "These friendly doctors help our old neighbours.", "Diese freundlichen Ärzte helfen unseren alten Nachbarn."),
    (say(statement, "have", "present", "I", "acc:no expensive car"),
     "I have no expensive car.", "Ich habe kein teures Auto."),
    (say(statement, "have", "past", "we", "acc:two black dogs"),
     "We had two black dogs.", "Wir hatten zwei schwarze Hunde."),
    (say(statement, "thank", "past", "he", "dat:three clever girls"),
     "He thanked three clever girls.", "Er hat drei klugen Mädchen gedankt."),
    (say(statement, "belong to", "present", "the beautiful picture", "dat:this woman"),
     "The beautiful picture belongs to this woman.", "Das schöne Bild gehört dieser Frau."),
    (say(statement, "follow", "past", "a big dog", "dat:the teachers"),
     "A big dog followed the teachers.", "Ein großer Hund ist den Lehrern gefolgt."),
    (say(statement, "eat", "present", "she", "acc:fresh bread"),
     "She eats fresh bread.", "Sie isst frisches Brot."),
    # the finite verb second, and the middle field: time before place
    (say(statement, "buy", "present", "the man", "acc:an umbrella", time="today:heute", front="time"),
     "Today the man buys an umbrella.", "Heute kauft der Mann einen Regenschirm."),
    (say(statement, "buy", "present", "the man", "acc:an umbrella", time="today:heute",
         place=prep("in:in", "dat", "the city")),
     "The man buys an umbrella in the city today.", "Der Mann kauft heute in der Stadt einen Regenschirm."),
    (say(statement, "find", "past", "Maria", "acc:the letter", time="yesterday:gestern",
         place=prep("in:in", "dat", "the garden")),
     "Maria found the letter in the garden yesterday.", "Maria hat gestern den Brief im Garten gefunden."),
    (say(statement, "wait", "present", "Paul", goal=prep("for:auf", "acc", "the doctor"),
         place=prep("at:an", "dat", "the station"), time="every:jeden day:Tag", front="place"),
     "At the station Paul waits for the doctor every day.", "Am Bahnhof wartet Paul jeden Tag auf den Arzt."),
    (say(statement, "travel", "past", "we", goal="to:nach Berlin:Berlin", manner="by:mit_dem train:Zug",
         time="last:letzte week:Woche"),
     "We travelled to Berlin by train last week.", "Wir sind letzte Woche mit dem Zug nach Berlin gereist."),
    (say(statement, "see", "present", "the mother", "acc:him", time="today:heute"),
     "The mother sees him today.", "Die Mutter sieht ihn heute."),
    (say(statement, "call", "past", "the mother", "acc:him", time="yesterday:gestern", front="time"),
     "Yesterday the mother called him.", "Gestern hat ihn die Mutter angerufen."),
    (say(statement, "call", "past", "the mother", "acc:her", time="yesterday:gestern", front="time"),
     "Yesterday the mother called her.", "Gestern hat die Mutter sie angerufen."),
    (say(statement, "show", "present", "he", "dat:me", "acc:his new lamp", time="today:heute", front="time"),
     "Today he shows me his new lamp.", "Heute zeigt er mir seine neue Lampe."),
    # place and direction, contractions
    (say(statement, "run", "present", "the cat", goal=prep("into:in", "acc", "the house")),
     "The cat runs into the house.", "Die Katze läuft ins Haus."),
    (say(statement, "sleep", "present", "the cat", place=prep("in:in", "dat", "the house")),
     "The cat sleeps in the house.", "Die Katze schläft im Haus."),
    (say(statement, "lay", "present", "Anna", "acc:the book", goal=prep("on:auf", "acc", "the table")),
     "Anna lays the book on the table.", "Anna legt das Buch auf den Tisch."),
    (say(statement, "lie", "present", "the book", goal=prep("on:auf", "dat", "the table")),
     "The book lies on the table.", "Das Buch liegt auf dem Tisch."),
    (say(statement, "go", "past", "the women", goal=prep("to:zu", "dat", "the school")),
     "The women went to the school.", "Die Frauen sind zur Schule gegangen."),
    (say(statement, "come", "present", "they", goal=prep("from:von", "dat", "the market")),
     "They come from the market.", "Sie kommen vom Markt."),
    (say(statement, "stay", "past", "the boy", goal=prep("with:bei", "dat", "the father")),
     "The boy stayed with the father.", "Der Junge ist beim Vater geblieben."),
    (say(statement, "go", "present", "I", goal=prep("into:in", "acc", "the forest"),
         manner=prep("without:ohne", "acc", "my dog")),
     "I go into the forest without my dog.", "Ich gehe ohne meinen Hund in den Wald."),
    # separable verbs and modals
    (say(statement, "invite", "present", "Peter", "acc:the young teacher"),
     "Peter invites the young teacher.", "Peter lädt den jungen Lehrer ein."),
    (say(statement, "open", "want to", "the child", "acc:a window"),
     "The child wants to open a window.", "Das Kind will ein Fenster aufmachen."),
    (say(statement, "get up", "must", "the girls", time="tomorrow:morgen", front="time"),
     "Tomorrow the girls must get up.", "Morgen müssen die Mädchen aufstehen."),
    (say(statement, "arrive", "past", "my friendly neighbour", goal="in:in Vienna:Wien"),
     "My friendly neighbour arrived in Vienna.", "Mein freundlicher Nachbar ist in Wien angekommen."),
    # the finite verb last
    (say(subordinate, "call", "present", "the woman", "acc:her doctor", opening="because:weil"),
     "Because the woman calls her doctor.", "Weil die Frau ihren Arzt anruft."),
    (say(subordinate, "close", "must", "she", "acc:these doors", opening="because:weil"),
     "Because she must close these doors.", "Weil sie diese Türen zumachen muss."),
    (say(subordinate, "work", "past", "I", place=prep("in:in", "dat", "our small garden"), opening="that:dass"),
     "That I worked in our small garden.", "Dass ich in unserem kleinen Garten gearbeitet habe."),
    (say(subordinate, "be", "past", "the horses", goal="ill:krank", opening="although:obwohl"),
     "Although the horses were ill.", "Obwohl die Pferde krank waren."),
    # the finite verb first
    (say(question, "read", "present", "the father", "acc:the newspaper", time="in_the:am evening:Abend"),
     "Does the father read the newspaper in the evening.", "Liest der Vater am Abend die Zeitung."),
    (say(question, "sell", "past", "the men", "acc:a horse"),
     "Did the men sell a horse.", "Haben die Männer ein Pferd verkauft."),
    (say(question, "come", "want to", "she", goal=prep("from:aus", "dat", "the kitchen"), opening="why:warum"),
     "Why does she want to come from the kitchen.", "Warum will sie aus der Küche kommen."),
    (say(question, "be", "present", "they", goal="hungry:hungrig"), "Are they hungry.", "Sind sie hungrig."),
]


@pytest.mark.parametrize("made, english, german", BY_HAND, ids=[e for _, e, _ in BY_HAND])
def test_sentences_by_hand(made, english, german):
    assert made == (english, german)


PARADIGMS = """
a good man      | ein guter Mann       | einen guten Mann     | einem guten Mann
the good man    | der gute Mann        | den guten Mann       | dem guten Mann
no good man     | kein guter Mann      | keinen guten Mann    | keinem guten Mann
the good men    | die guten Männer     | die guten Männer     | den guten Männern
good men        | gute Männer          | gute Männer          | guten Männern
no good men     | keine guten Männer   | keine guten Männer   | keinen guten Männern
a good woman    | eine gute Frau       | eine gute Frau       | einer guten Frau
this good woman | diese gute Frau      | diese gute Frau      | dieser guten Frau
our good women  | unsere guten Frauen  | unsere guten Frauen  | unseren guten Frauen
a good child    | ein gutes Kind       | ein gutes Kind       | einem guten Kind
the good child  | das gute Kind        | das gute Kind        | dem guten Kind
my good child   | mein gutes Kind      | mein gutes Kind      | meinem guten Kind
two good cars   | zwei gute Autos      | zwei gute Autos      | zwei guten Autos
this good boy   | dieser gute Junge    | diesen guten Jungen  | diesem guten Jungen
the good boys   | die guten Jungen     | die guten Jungen     | den guten Jungen
a neighbour     | ein Nachbar          | einen Nachbarn       | einem Nachbarn
her bags        | ihre Taschen         | ihre Taschen         | ihren Taschen
good coffee     | guter Kaffee         | guten Kaffee         | gutem Kaffee
good milk       | gute Milch           | gute Milch           | guter Milch
good water      | gutes Wasser         | gutes Wasser         | gutem Wasser
his eggs        | seine Eier           | seine Eier           | seinen Eiern
three cakes     | drei Kuchen          | drei Kuchen          | drei Kuchen
the windows     | die Fenster          | die Fenster          | den Fenstern
an expensive car | ein teures Auto     | ein teures Auto      | einem teuren Auto
"""


@pytest.mark.parametrize("row", PARADIGMS.strip().splitlines(), ids=lambda r: r.split("|")[0].strip())
def test_paradigms(row):
    english, *german = [cell.strip() for cell in row.split("|")]
    for case, form in zip(("nom", "acc", "dat"), german):
        assert " ".join(w.text for w in np(english, case).words.de) == form


def test_genders_and_plurals():
    by_hand = """
    der Mann Männer, die Frau Frauen, das Kind Kinder, der Junge Jungen, das Mädchen Mädchen, der Lehrer Lehrer,
    der Arzt Ärzte, der Nachbar Nachbarn, die Mutter, der Vater, der Hund Hunde, die Katze Katzen, das Pferd
    Pferde, das Buch Bücher, der Brief Briefe, die Zeitung Zeitungen, der Apfel Äpfel, die Birne Birnen, das Ei
    Eier, der Kuchen Kuchen, das Brot, der Kaffee, die Milch, das Wasser, der Hut Hüte, die Tasche Taschen, der
    Regenschirm Regenschirme, die Lampe Lampen, das Auto Autos, das Bild Bilder, die Blume Blumen, die Tür
    Türen, das Fenster Fenster, der Tisch Tische, der Stuhl Stühle, das Bett Betten, der Garten, die Küche, das
    Haus, der Park, der Wald, die Schule, die Stadt, der Markt, der Bahnhof"""
    nouns = NOUNS + [p.noun for p in PLACES]
    made = [" ".join([dict(m="der", f="die", n="das")[n.gender], n.german("nom", n.gender)]
                     + [n.german("nom", "p")] * bool(n.plural)) for n in nouns]
    assert made == " ".join(by_hand.split()).split(", ")


@pytest.mark.parametrize("forms", """
    kaufe kauft kaufen, arbeite arbeitet arbeiten, warte wartet warten, finde findet finden, lade lädt laden,
    sehe sieht sehen, lese liest lesen, esse isst essen, gebe gibt geben, helfe hilft helfen, schlafe schläft
    schlafen, laufe läuft laufen, reise reist reisen, gehe geht gehen, habe hat haben, bringe bringt bringen,
    stehe steht stehen, rufe ruft rufen""".split(","))
def test_german_present(forms):
    i, he, they = forms.split()
    changed = {v.german: v.changed for v in VERBS}.get(they, "")
    assert [german_present(they, p, changed) for p in ("s1", "s3", "p1", "p3")] == [i, he, they, they]


def test_perfects():
    by_hand = dict(
        buy="hat gekauft", go="ist gegangen", stay="ist geblieben", follow="ist gefolgt", call="hat angerufen",
        travel="ist gereist", arrive="ist angekommen", come="ist gekommen", run="ist gelaufen", see="hat gesehen",
        sit="hat gesessen", visit="hat besucht", sell="hat verkauft", invite="hat eingeladen", give="hat gegeben",
        open="hat aufgemacht", close="hat zugemacht", bring="hat gebracht", find="hat gefunden", lay="hat gelegt")
    assert {k: " ".join(VERB[k].perfect) for k in by_hand} == by_hand
    assert " ".join(VERB["get up"].perfect) == "ist aufgestanden"


def test_it_takes_the_gender_of_its_noun():
    for noun, german in (("the hat", "er"), ("a lamp", "sie"), ("my bed", "es"), ("the lamps", "sie"), ("Anna", "sie"),
                         ("the teacher", "er"), ("we", "wir")):
        assert refer(np(noun)).words.de[0].text == german
    assert refer(np("the hat")).words.en[0].text == "it"
    assert refer(np("the girl")) is None


def test_alignment_by_hand():
    c = Clause(np("Anna"), verb_group(VERB["call"], "present", "s3"), (np("her father", "acc"),),
               time=link("today:heute"), place=prep("in:in", "dat", "the garden"))
    p = finish(statement(c))
    assert p.source == "Anna calls her father in the garden today."
    assert p.target == "Anna ruft heute ihren Vater im Garten an."
    #      Anna    calls: ruft, an  her      father   in: im   the: im  garden   today
    assert set(p.alignment) == {(0, 0), (1, 1), (1, 7), (2, 3), (3, 4), (4, 5), (5, 5), (6, 6), (7, 2)}
    p = finish(question(Clause(np("he"), verb_group(VERB["buy"], "past", "s3", ask=True), (np("an egg", "acc"),))))
    assert (p.source, p.target) == ("Did he buy an egg.", "Hat er ein Ei gekauft.")
    assert set(p.alignment) == {(0, 0), (1, 1), (2, 4), (3, 2), (4, 3)}


def test_every_sentence_is_well_formed():
    rng, translations = random.Random(11), {}
    for _ in range(8000):
        p = sentence(rng)
        en, de = p.source.split(), p.target.split()
        assert 4 <= min(len(en), len(de)) <= max(len(en), len(de)) <= 16
        assert p.source[0].isupper() and p.target[0].isupper() and p.source[-1] == p.target[-1] in ".?"
        assert {i for i, _ in p.alignment} == set(range(len(en))) and {j for _, j in p.alignment} == set(range(len(de)))
        assert translations.setdefault(p.source, p) == p        # one English sentence, one German one
        assert not re.search(r"\b(an [^aeiou]|a [aeiou])", p.source.lower())
        assert not re.search(r"\b(in dem|in das|an dem|zu dem|zu der|von dem|bei dem)\b", p.target)
        words = re.findall(r"\w+", p.target)
        assert all(w[0].isupper() for w in words if w.lower() in NOUN_FORMS)


NOUN_FORMS = {n.german(case, g).lower() for n in NOUNS for case in ("nom", "acc", "dat")
              for g in (n.gender, *("p" if n.plural else ""))} - {"junge", "jungen"}  # adjectives, too


def test_corpus_is_disjoint_and_deterministic():
    corpus = toy_corpus(1500, 100, 100, seed=3)
    assert {k: len(v) for k, v in corpus.items()} == {"train": 1500, "validation": 100, "test": 100}
    assert corpus["train"].column_names == ["source", "target", "alignment"]
    assert len({s for split in corpus.values() for s in split["source"]}) == 1700
    assert corpus["train"][:] == toy_corpus(1500, 100, 100, seed=3)["train"][:]
    assert corpus["train"][:] != toy_corpus(1500, 100, 100, seed=4)["train"][:]
    assert len(toy_corpus(0, 0, 5)["train"]) == 0


def test_same_corpus_whatever_the_hash_seed(): # sets and frozensets must not leak their order
    code = ("from flash_transformer.data.toy import sentence; import random; rng = random.Random(5)\n"
            "print([sentence(rng) for _ in range(1500)])")
    told = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env=os.environ | {"PYTHONHASHSEED": seed}).stdout for seed in ("1", "2")]
    assert told[0] == told[1] and len(told[0]) > 1000


@pytest.mark.parametrize("sizes, word", [
    (dict(train=-1), "train"), (dict(test=2.5), "test"), (dict(validation="all"), "validation"),
    (dict(train=True), "train"), (dict(train=10**9), "at most"), (dict(seed=None), "seed"), (dict(seed="x"), "seed")])
def test_sizes_it_cannot_give(sizes, word):
    with pytest.raises(ValueError, match=word):
        toy_corpus(**sizes)
