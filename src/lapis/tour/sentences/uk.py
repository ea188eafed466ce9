"""Ukrainian sentences.

Forms of a word: gen, dat, acc, ins, voc are its cases; `loc` and `at` follow a vowel, `in_` and `at_start` stand at the
start of a sentence or after a consonant. `{who:пішов|пішла}` agrees with who it is.
"""

SENTENCES: dict[str, tuple[str, ...]] = {
    # who they are
    "open": (
        "Це {who}.",
        "{who:Жив собі|Жила собі} {who.kind} на ім’я {who}.",
        "Це історія про {who.kind.acc} на ім’я {who}.",
        "{who} має багато друзів.",
        "Познайомтеся: це {who}.",
    ),
    "home": (
        "{who} живе {place.loc}.",
        "{who} живе {place.loc} з родиною.",
        "{who.at_start} є невеликий дім {place.in_}.",
        "{place} — це місто, де живе {who}.",
        "Дім {who.gen} стоїть {place.in_}.",
    ),
    "home.open": (
        "{place.in_} живе {who.kind} на ім’я {who}.",
        "Це історія про {who.kind.acc}, {who:який|яка} живе {place.loc}. {who:Його|Її} звати {who}.",
    ),
    "home2": (
        "{who.he} живе {place.loc}.",
        "{who.his} дім стоїть {place.in_}.",
        "Щоранку {who.he} прокидається {place.loc}.",
        "{who.he} знає кожну вулицю {place.loc}.",
    ),
    "food": (
        "{who} любить {food.acc}.",
        "{who} любить їсти {food.acc}.",
        "{who} щодня їсть {food.acc}.",
        "Коли {who} {who:голодний|голодна}, {who.he} їсть {food.acc}.",
        "{who} радіє, коли їсть {food.acc}.",
    ),
    "food2": (
        "{who.he} любить {food.acc}.",
        "Увечері {who.he} любить їсти {food.acc}.",
        "{who.he} часто просить {food.acc}.",
        "{who.he} щодня хоче їсти {food.acc}.",
    ),
    "pet": (
        "{who.at_start} є {pet}.",
        "{who} і {who.his} {pet} — добрі друзі.",
        "{who} дбає про {pet:свого|свою} {pet.acc}.",
        "{pet} {who.gen} дуже {pet:розумний|розумна}.",
        "Щодня {who} гуляє {pet:зі своїм|зі своєю} {pet.ins}.",
    ),
    "pet2": (
        "{who.he_at} є {pet}.",
        "{who.his} найкращий друг — {pet}.",
        "Щоранку {who.he} годує {pet:свого|свою} {pet.acc}.",
        "{who.his} {pet} дуже {pet:лагідний|лагідна}.",
    ),
    "thing": (
        "{who.at_start} є {thing}.",
        "{who} береже {thing:свій|свою|своє} {thing.acc}.",
        "{thing} {who.gen} {thing:старий, але гарний|стара, але гарна|старе, але гарне}.",
        "{who} пишається {thing:своїм|своєю|своїм} {thing.ins}.",
        "У домі {who.gen} є {thing}.",
    ),
    "thing2": (
        "{who.he_at} є {thing}.",
        "{who.he} показує всім {thing:свій|свою|своє} {thing.acc}.",
        "{who.his} {thing} дуже {thing:гарний|гарна|гарне}.",
        "{who.he} {who:отримав|отримала} {thing.acc} від батька.",
    ),
    "job": (
        "{who} працює {job.ins}.",
        "{who} — {job}.",
        "{who} — {job:чудовий|чудова} {job}.",
        "{who} любить працювати {job.ins}.",
        "Усі знають, що {who} — {job}.",
    ),
    "job2": (
        "{who.he} працює {job.ins}.",
        "{who.he} щодня працює {job.ins}.",
        "У дитинстві {who.he} {who:мріяв|мріяла} стати {job.ins}, і тепер {who.he} — {job}.",
    ),
    "sibling": (
        "{sib} {who.gen} — {other}.",
        "{who.at_start} є {sib} {other}.",
        "{who} дуже любить {sib:свого|свою} {sib.acc} {other.acc}.",
        "{who} часто грається {sib:зі своїм|зі своєю} {sib.ins} {other.ins}.",
        "Ім’я {sib.gen} {who.gen} — {other}.",
    ),
    "sibling2": (
        "{who.his} {sib} — {other}.",
        "{who.he_at} є {sib} на ім’я {other}.",
        "{who.he} розповідає все {sib:своєму|своїй} {sib.dat} {other.dat}.",
    ),
    "close": (
        "Усі люблять {who.acc}.",
        "{who} — {who:щасливий|щаслива} {who.kind}.",
        "Оце й усе про {who.acc}.",
        "Так минає день за днем.",
        "Життя прекрасне.",
    ),
    # two people
    "pair.open": (
        "{who} та {other} — друзі.",
        "{who} та {other} добре знають одне одного.",
        "Це історія про {who.acc} та {other.acc}.",
    ),
    "pair.home": (
        "{who} живе {place.loc}, а {other} живе {place2.loc}.",
        "Дім {who.gen} стоїть {place.in_}, але {other} живе {place2.loc}.",
    ),
    "pair.food": (
        "{who} любить {food.acc}, а {other} любить {food2.acc}.",
        "{who} любить їсти {food.acc}, але {other} любить їсти {food2.acc}.",
    ),
    "pair.close": (
        "Вони різні, але вони добрі друзі.",
        "Вони часто пишуть одне одному листи.",
        "Щоліта вони зустрічаються.",
    ),
    # stories
    "filler": (
        "День був сонячний.",
        "Небо було блакитне.",
        "Ранок був холодний.",
        "Віяв теплий вітер.",
        "Співали пташки.",
    ),
    "market.1": (
        "Одного ранку {who} {who:пішов|пішла} на ринок.",
        "{who} {who:зголоднів і пішов|зголодніла і пішла} на ринок.",
    ),
    "market.2": ("Там було багато людей.", "Там {who.he} {who:побачив|побачила} багато свіжих {count.many}."),
    "buy": (
        "{who} {who:купив|купила} {count}.",
        "{who.he} {who:купив|купила} {count}.",
        "{who:Він заплатив трохи грошей і взяв|Вона заплатила трохи грошей і взяла} {count}.",
    ),
    "end.market": ("Зрештою {who} {who:повернувся додому і приніс|повернулася додому і принесла} {count}.",),
    "lose": ("{who} {who:загубив|загубила} {item.acc}.", "Одного дня {who} {who:загубив|загубила} {item.acc}."),
    "lost.2": (
        "{who:Він довго шукав|Вона довго шукала} цю річ.",
        "{who:Він був дуже сумний|Вона була дуже сумна}.",
        "Удома цієї речі не було.",
    ),
    "lost.3": (
        "Потім {who} {who:пішов|пішла} шукати {spot.at}.",
        "{who:Він шукав|Вона шукала} також {spot.at}.",
    ),
    "find": (
        "{who} {who:знайшов|знайшла} {item.acc} {spot.at}.",
        "Нарешті {who} {who:знайшов|знайшла} {item.acc} {spot.at}.",
    ),
    "end.lost": ("Зрештою {who} {who:знайшов|знайшла} {item.acc} {spot.at}.",),
    "gift.1": (
        "Того дня {other.at} був день народження.",
        "{other} {other:святкував|святкувала} день народження.",
        "{who} {who:прийшов у гості|прийшла в гості} до {other.gen}.",
    ),
    "gift.2": (
        "{who} {who:купив|купила} {item.acc} для {other.gen}.",
        "{who} {who:хотів|хотіла} подарувати {other.dat} {item.acc}.",
    ),
    "give": (
        "{who} {who:подарував|подарувала} {other.dat} {item.acc}.",
        "{who} {who:усміхнувся і подарував|усміхнулася і подарувала} {other.dat} {item.acc}.",
    ),
    "gift.4": (
        "«Дякую, {who.voc}!» — {other:сказав|сказала} {other}.",
        "{other} дуже {other:зрадів|зраділа}.",
        "Вони пили чай і сміялися.",
    ),
    "end.gift": ("Зрештою {who} {who:подарував|подарувала} {other.dat} {item.acc}.",),
    "go": (
        "{who} {who:пішов|пішла} {spot.to}.",
        "Одного дня {who} {who:пішов|пішла} {spot.to}.",
        "Увечері {who} {who:пішов|пішла} {spot.to}.",
    ),
    "walk.2": (
        "{who:Він ішов повільно і співав|Вона йшла повільно і співала} пісню.",
        "Там було тихо.",
        "{who:Він хотів|Вона хотіла} трохи відпочити.",
    ),
    "meet": (
        "{who} {who:зустрів|зустріла} {other.acc}.",
        "Там {who} {who:зустрів|зустріла} {other.acc}.",
        "{who:Він зустрів|Вона зустріла} {other.acc} {spot.at}.",
    ),
    "walk.4": ("Вони довго розмовляли.", "Вони сіли й дивилися на хмари.", "Вони розповідали жарти."),
    "end.walk": ("Зрештою {who} та {other} разом пішли додому.",),
    "rain.1": ("Цілий день ішов дощ.", "Увечері почався дощ."),
    "rain.2": (
        "{who} {who:стояв під деревом і чекав|стояла під деревом і чекала}.",
        "{who.at_start} не було парасольки.",
    ),
    "rain.3": (
        "Потім {other:прийшов|прийшла} {other} з великою парасолькою.",
        "{other} {other:побачив|побачила} {who.acc} і {other:прийшов|прийшла} з парасолькою.",
    ),
    "rain.4": (
        "«Ходімо разом!» — {other:сказав|сказала} {other}.",
        "Вони пішли додому під однією парасолькою.",
        "{who} {who:подякував|подякувала} {other.dat}.",
    ),
    "run.1": (
        "Одного дня {pet} {who.gen} {pet:втік|втекла}.",
        "Уранці {who} не {who:міг|могла} знайти {pet:свого|свою} {pet.acc}.",
    ),
    "run.2": (
        "{who} {who:попросив|попросила} {other.acc} допомогти.",
        "{who} цілий день {who:шукав|шукала} {pet:свого|свою} {pet.acc}.",
    ),
    "run.3": ("{pet} {pet:спав|спала} {spot.at}.", "{other} {other:побачив|побачила} {pet.acc} {spot.at}."),
    "run.4": (
        "{who} {who:забрав|забрала} {pet:свого|свою} {pet.acc} додому.",
        "{who} і {who.his} {pet} знову були щасливі.",
    ),
    "clean.1": (
        "Одного дня {who} {who:вирішив|вирішила} почистити {thing:свій|свою|своє} {thing.acc}.",
        "{thing} {who.gen} {thing:був дуже брудний|була дуже брудна|було дуже брудне}.",
    ),
    "clean.2": (
        "{other} {other:прийшов|прийшла} допомогти.",
        "{who} {who:попросив|попросила} {other.acc} допомогти.",
    ),
    "clean.3": ("Вони працювали й співали пісень.", "Було спекотно, але вони не зупинялися."),
    "clean.4": (
        "Тепер {thing} знову {thing:чистий|чиста|чисте}.",
        "Увечері {thing} {who.gen} {thing:був як новий|була як нова|було як нове}.",
    ),
    "work.1": (
        "{who} рано {who:встав і пішов|встала і пішла} на роботу.",
        "{who} працює {job.ins} і має багато роботи.",
    ),
    "work.2": (
        "Дорогою {who} {who:зустрів|зустріла} {other.acc}.",
        "Дорогою {who.he} {who:побачив|побачила} {other.acc} {spot.at}.",
    ),
    "work.3": (
        "«Я працюю {job.ins} і люблю свою роботу», — {who:сказав|сказала} {who}.",
        "{other} теж {other:хотів би|хотіла б} мати таку роботу.",
    ),
    "work.4": (
        "Увечері {who} {who:повернувся додому втомлений, але щасливий|повернулася додому втомлена, але щаслива}.",
        "{who} {who:працював|працювала} до вечора.",
    ),
    # a city
    "city.open": (
        "{place} — гарне місто.",
        "{place.in_} живе багато людей.",
        "{place.in_} є старі вулиці й великі дерева.",
    ),
    "city.close": (
        "Люди люблять жити {place.loc}.",
        "Увечері {place.loc} тихо.",
        "{place} завжди чекає на гостей.",
    ),
    # talks
    "talk.open": (
        "{who} та {other} зустрілися {spot.at}.",
        "{other} {other:хотів|хотіла} більше дізнатися про {who.acc}.",
    ),
    "talk.home": (
        "«Де ти живеш?» — {other:запитав|запитала} {other}. «Я живу {place.loc}», — {who:відповів|відповіла} {who}.",
        "«Я живу {place.loc}», — {who:сказав|сказала} {who} {other.dat}.",
    ),
    "talk.food": (
        "«Що ти любиш їсти?» — {other:запитав|запитала} {other}. "
        "«Я люблю {food.acc}», — {who:відповів|відповіла} {who}.",
        "«Я люблю {food.acc}», — {who:сказав|сказала} {who} {other.dat}.",
    ),
    "talk.pet": (
        "«Яка тварина в тебе є?» — {other:запитав|запитала} {other}. "
        "«У мене є {pet}», — {who:відповів|відповіла} {who}.",
        "«У мене є {pet}», — {who:сказав|сказала} {who} {other.dat}.",
    ),
    "talk.thing": (
        "«Яка річ у тебе є?» — {other:запитав|запитала} {other}. «У мене є {thing}», — {who:відповів|відповіла} {who}.",
        "«У мене є {thing}», — {who:сказав|сказала} {who} {other.dat}.",
    ),
    "talk.job": (
        "«Ким ти працюєш?» — {other:запитав|запитала} {other}. «Я працюю {job.ins}», — {who:відповів|відповіла} {who}.",
        "«Я працюю {job.ins}», — {who:сказав|сказала} {who} {other.dat}.",
    ),
    "talk.sibling": (
        "«У тебе є брат чи сестра?» — {third:запитав|запитала} {third}. "
        "«{sib:Мій|Моя} {sib} — {other}», — {who:відповів|відповіла} {who}.",
        "«{sib:Мій|Моя} {sib} — {other}», — {who:сказав|сказала} {who} {third.dat}.",
    ),
    "talk.close": (
        "«До завтра!» — {other:сказав|сказала} {other}.",
        "Вони розмовляли до вечора.",
        "Потім вони пішли додому.",
    ),
    # a quiz
    "quiz.open": ("Учитель запитав дітей про {who.acc}.", "Діти загадували одне одному загадки про {who.acc}."),
    "quiz": (
        "{third} {third:запитав|запитала}: «{ask}» {other} {other:відповів|відповіла}: «{bare}».",
        "Учитель запитав: «{ask}» {other} {other:відповів|відповіла}: «{bare}».",
        "«{ask}» — {third:запитав|запитала} {third}. «{bare}», — {other:відповів|відповіла} {other}.",
    ),
    "quiz.close": ("«Дуже добре!» — сказав учитель.", "Усі заплескали в долоні."),
    "gloss": ("Англійською «{word}» — це «{english}».", "«{word}» англійською — «{english}»."),
    # questions, and answers of one word
    "ask.home": ("Де живе {who}?", "У якому місті живе {who}?", "Скажи, де живе {who}."),
    "ask.food": ("Що любить їсти {who}?", "Яку їжу любить {who}?", "Скажи, що любить їсти {who}."),
    "ask.pet": ("Яка тварина є {who.at}?", "Яку тварину має {who}?", "Скажи, яка тварина є {who.at}."),
    "ask.thing": ("Яка річ є {who.at}?", "Яку річ має {who}?", "Скажи, яка річ є {who.at}."),
    "ask.job": ("Ким працює {who}?", "Яка {who.at} професія?", "Скажи, ким працює {who}."),
    "ask.sibling": ("Хто {sib} {who.gen}?", "Як звати {sib.acc} {who.gen}?", "Скажи, хто {sib} {who.gen}."),
    "ask.go": ("Куди {who:пішов|пішла} {who}?", "Скажи, куди {who:пішов|пішла} {who}."),
    "ask.buy": ("Що {who:купив|купила} {who}?", "Скажи, що {who:купив|купила} {who}."),
    "ask.lose": ("Що {who:загубив|загубила} {who}?", "Скажи, що {who:загубив|загубила} {who}."),
    "ask.find": (
        "Де {who} {who:знайшов|знайшла} {item.noun.acc}?",
        "Скажи, де {who} {who:знайшов|знайшла} {item.noun.acc}.",
    ),
    "ask.give": (
        "Що {who} {who:подарував|подарувала} {other.dat}?",
        "Скажи, що {who} {who:подарував|подарувала} {other.dat}.",
    ),
    "ask.meet": ("Кого {who:зустрів|зустріла} {who}?", "Скажи, кого {who:зустрів|зустріла} {who}."),
    "follow.home": ("А де {who.he} живе?",),
    "follow.food": ("А що {who.he} любить їсти?",),
    "follow.pet": ("А яка тварина {who.at_he} є?",),
    "follow.thing": ("А яка річ є {who.at_he}?",),
    "follow.job": ("А ким {who.he} працює?",),
    "follow.sibling": ("А хто {who.his} {sib}?",),
    "word.home": ("У якому місті живе {who}?", "Назви місто, де живе {who}."),
    "word.food": ("Яка улюблена їжа {who.gen}?", "Назви улюблену їжу {who.gen}."),
    "word.pet": ("Яка тварина є {who.at}?",),
    "word.thing": ("Яка річ є {who.at}?", "Назви річ, яка є {who.at}."),
    "word.job": ("Яка {who.at} професія?",),
    "word.sibling": ("Як звати {sib.acc} {who.gen}?",),
    "word.buy": ("Скільки {count.many} {who:купив|купила} {who}?",),
    "word.lose": ("Якого кольору {item.noun}?", "Якого кольору {item.noun} {who.gen}?"),
    "word.give": ("Хто отримав {item.noun.acc}?",),
    "word.meet": ("Кого {who:зустрів|зустріла} {who}?",),
    "answer.home": ("{place}",),
    "answer.food": ("{food}",),
    "answer.pet": ("{pet}",),
    "answer.thing": ("{thing}",),
    "answer.job": ("{job}",),
    "answer.sibling": ("{other}",),
    "answer.buy": ("{count.number}",),
    "answer.lose": ("{item.color}",),
    "answer.give": ("{other}",),
    "answer.meet": ("{other.acc}",),
    # what a chat asks for
    "one_word": ("{ask} Відповідай одним словом.", "{ask} Лише одне слово.", "Одним словом: {ask}"),
    "read": ("{text} {ask}", "Прочитай текст. {text} {ask}", "{text}\n{ask}", "Текст: {text}\nПитання: {ask}"),
    "repeat": ("Повтори: {text}", "Скажи ще раз: {text}", "Повтори за мною: {text}"),
    "list.pet": ("Вибери тварин: {text}.", "Які з цих слів — тварини: {text}?"),
    "list.food": ("Вибери їжу: {text}.", "Які з цих слів — їжа: {text}?"),
    "list.place": ("Вибери міста: {text}.", "Які з цих слів — міста: {text}?"),
    "list.job": ("Вибери професії: {text}.", "Які з цих слів — професії: {text}?"),
    "tell": ("Розкажи про {who.acc}.", "Що ти знаєш про {who.acc}?", "Опиши {who.acc}."),
    "finish": ("Закінчи історію: {text}", "Чим закінчується ця історія? {text}"),
}
