"""Words and signs behind a number that say how large it is: 5k, 1.2M, 3万, 5 lakh, 5 milyon.

The words of other languages are the compact number forms of Unicode's CLDR, in the cases that it
lists. What means one power of ten in one language and another elsewhere stands in ``UNCLEAR``."""

from __future__ import annotations

#: Exponent of ten of a sign right behind the digits: 5M is a million and 5m are metres.
ATTACHED = {"k": 3, "K": 3, "M": 6, "B": 9}
#: Of a word, with or without a space before it; "_" is a space.
_WORDS = {
    3: """mille mila millier tausend tsd duizend tusen tusind þúsund ribu rb nghìn ngàn libo elfu
        ezer tuhat tuhatta tisíc tisíce tisíca tis tisoč tisuća tisuće hiljada hiljade tys tysiąc
        tysiące tysiąca tysięcy tūkst tūkstantis tūkstančiai tūkstančių tūkstotis tūkstoši tūkstošu
        millares milers mijë ming тысяча тысячи тысяч тысячы тыс тис тисяча тисячі тисяч хиляди
        хиљада хиљаде илјади мың миң мянга χιλ χιλιάδα χιλιάδες հազար אלף ألف آلاف هزار ہزار हज़ार
        हजार হাজার ਹਜ਼ਾਰ હજાર ஆயிரம் వేలు వేయి ಸಾವಿರ ആയിരം දහස් දහස ათასი""",
    5: "lakh lakhs lac lacs লাখ লক্ষ लाख ਲੱਖ લાખ لاکھ",
    6: """mn mln mio millón millones milhão milhões milione milioni millionen milyon juta jt
        triệu milion miliony milionów milionu milionů milioane miliona milijon milijona milijoni
        milijonov milijonai milijonų milijun milijuna miljoen miljon miljoner miljoonaa miljoona
        milj miljonit miljoni miljonu millioner millió milljón milljónir milions milió milión
        milióny miliónov milioi миллион миллиона миллионов млн мільйон мільйони мільйонів мільён
        мільёны милион милиона милиони сая εκατομμύριο εκατομμύρια εκατ մլն միլիոն מיליון
        مليون ملايين میلیون ملین मिलियन மில்லியன் మిలియన్ మిలియన్లు ಮಿಲಿಯನ್ ദശലക്ഷം මිලියන მილიონი
        მლნ""",
    7: "crore crores करोड़ करोड कोटी কোটি ਕਰੋੜ કરોડ کروڑ",
    9: """bn milliard milliards milliarde milliarden milliarder milliardo miliardo miliardi miliard
        miliarde miliardy miliardów miliarda miliárd milijarda milijarde milijard milijardai
        milijardų miljard miljarder miljardi miljardia miljardit miljards miljardu milliárd
        milljarður milljarðar milyar miliar milyard mrd mlrd mld bilhão bilhões tỷ mil_millones
        миллиард миллиарда миллиардов млрд мільярд мільярди мільярдів мільярды милиард милиарда
        милијарда милијарде δισ δισεκατομμύριο δισεκατομμύρια մլրդ միլիարդ מיליארד مليار مليارات
        میلیارد ارب अरब अब्ज ਅਰਬ અબજ மில்லியார்ட் బిలియన్ బిలియన్లు ಬಿಲಿಯನ್ ബില്യൺ බිලියන მილიარდი
        მლრდ""",
    12: """tn trn trln billón billones billionen billioner biljoen biljon biljoner biljoona
        biljoonaa bilion biliony bilionów bilionů bilión bilióny billió trilhão trilhões trilyon
        triliun trilion триллион триллиона триллионов трлн трильйон трильйони трильйонів τρισ
        τρισεκατομμύριο τρισεκατομμύρια տրլն տրիլիոն טריליון تريليون ترليون تریلیون""",
}
#: Of signs of scripts that are written without spaces: the next word may stand right behind them.
EAST_ASIAN = {
    **dict.fromkeys(("百", "백"), 2),
    **dict.fromkeys(("千", "仟", "천"), 3),
    **dict.fromkeys(("万", "萬", "만"), 4),
    **dict.fromkeys(("百万", "百萬", "백만"), 6),
    **dict.fromkeys(("千万", "千萬", "천만"), 7),
    **dict.fromkeys(("亿", "億", "억"), 8),
    **dict.fromkeys(("十亿", "十億", "십억"), 9),
    **dict.fromkeys(("兆", "조", "万亿"), 12),
    **dict.fromkeys(("ร้อย", "ຮ້ອຍ", "រយ", "ရာ"), 2),
    **dict.fromkeys(("พัน", "ພັນ", "ពាន់", "ထောင်"), 3),
    **dict.fromkeys(("หมื่น", "ໝື່ນ", "ម៉ឺន", "သောင်း"), 4),
    **dict.fromkeys(("แสน", "ແສນ", "សែន", "သိန်း"), 5),
    **dict.fromkeys(("ล้าน", "ລ້ານ", "លាន", "သန်း"), 6),
    **dict.fromkeys(("พันล้าน", "ຕື້"), 9),
    "หมื่นล้าน": 10,
    "แสนล้าน": 11,
    "ล้านล้าน": 12,
}
#: Thousand in one language and something else in another, or a unit: the digits alone would be a
#: guess.
UNCLEAR = (
    *("mil", "bin", "bil", "bio", "cr", "gross", "tril", "biliun", "십", "bln", "mlns", "grand"),
    *("tens", "dozens", "pairs", "couples", "score", "myriad", "myriads", "zillion", "hunderd"),
    *("quadrillion", "quintillion", "sextillion", "septillion", "octillion", "nonillion"),
    *("quadrillions", "quintillions", "gazillion", "googol", "permille", "ppm", "ppb", "bps"),
    *("per mille", "basis points", "‰"),
)
WORDS = {
    word.replace("_", " "): exponent for exponent, row in _WORDS.items() for word in row.split()
}
EXPONENTS = ATTACHED | WORDS | EAST_ASIAN
