"""Chinese words. Every noun carries its classifier; a food also says whether it is eaten or drunk."""

from lapis.tour.sentences.zh import SENTENCES
from lapis.tour.words.base import ANSWERS, Language, Word, rows
from lapis.tour.words.names import CHINESE

PLACES = """
penang 槟城
ipoh 怡保
kuching 古晋
melaka 马六甲
seoul 首尔
busan 釜山
incheon 仁川
kyiv 基辅
lviv 利沃夫
odesa 敖德萨
poltava 波尔塔瓦
kharkiv 哈尔科夫
beijing 北京
shanghai 上海
nanjing 南京
tokyo 东京
hanoi 河内
manila 马尼拉
delhi 德里
london 伦敦
paris 巴黎
rome 罗马
berlin 柏林
madrid 马德里
lisbon 里斯本
dublin 都柏林
prague 布拉格
cairo 开罗
boston 波士顿
sydney 悉尼
"""

FOODS = """
apple 个 苹果 吃
mango 个 芒果 吃
banana 根 香蕉 吃
orange 个 橙子 吃
pear 个 梨 吃
peach 个 桃子 吃
lemon 个 柠檬 吃
coconut 个 椰子 吃
tomato 个 西红柿 吃
potato 个 土豆 吃
durian 个 榴莲 吃
egg 个 鸡蛋 吃
pumpkin 个 南瓜 吃
cucumber 根 黄瓜 吃
rice 碗 米饭 吃
bread 个 面包 吃
soup 碗 汤 喝
noodles 碗 面条 吃
cheese 块 奶酪 吃
honey 瓶 蜂蜜 吃
fish 条 鱼 吃
chocolate 块 巧克力 吃
corn 根 玉米 吃
cake 块 蛋糕 吃
porridge 碗 粥 喝
yogurt 杯 酸奶 喝
"""

PETS = """
cat 只 猫
dog 只 狗
rabbit 只 兔子
goat 只 山羊
horse 匹 马
duck 只 鸭子
pigeon 只 鸽子
turtle 只 乌龟
cow 头 牛
sheep 只 绵羊
hamster 只 仓鼠
goose 只 鹅
donkey 头 驴
camel 头 骆驼
deer 头 鹿
squirrel 只 松鼠
"""

THINGS = """
bicycle 辆 自行车
boat 条 小船
guitar 把 吉他
drum 面 鼓
lamp 盏 台灯
umbrella 把 雨伞
clock 个 闹钟
hat 顶 帽子
bag 个 书包
ball 个 球
book 本 书
chair 把 椅子
mirror 面 镜子
violin 把 小提琴
piano 架 钢琴
camera 台 照相机
tent 顶 帐篷
ladder 架 梯子
basket 个 篮子
cup 个 杯子
radio 台 收音机
ring 枚 戒指
scarf 条 围巾
telescope 架 望远镜
"""

JOBS = """
teacher 名 老师
doctor 名 医生
farmer 名 农民
fisher 名 渔民
driver 名 司机
singer 名 歌手
painter 名 画家
nurse 名 护士
actor 名 演员
writer 名 作家
librarian 名 图书管理员
engineer 名 工程师
dancer 名 舞者
journalist 名 记者
lawyer 名 律师
photographer 名 摄影师
"""

COLORS = """
red 红色
blue 蓝色
green 绿色
yellow 黄色
white 白色
black 黑色
gray 灰色
purple 紫色
"""

SPOTS = """
market|市场|在市场
river|河边|在河边
park|公园|在公园
school|学校|在学校
forest|树林|在树林里
beach|海边|在海边
garden|花园|在花园里
station|车站|在车站
library|图书馆|在图书馆
lake|湖边|在湖边
"""

NUMBERS = {2: "两", 3: "三", 4: "四", 5: "五"}


def _with_classifiers(table: str) -> dict[str, Word]:
    return {key: Word(noun, a=f"一{unit}{noun}", unit=unit) for key, unit, noun in rows(table)}


TABLES = {
    "place": {key: Word(name) for key, name in rows(PLACES)},
    "food": {key: Word(noun, unit=unit, eat=eat) for key, unit, noun, eat in rows(FOODS)},
    "pet": _with_classifiers(PETS),
    "thing": _with_classifiers(THINGS),
    "job": _with_classifiers(JOBS),
    "spot": {key: Word(spot, at=at) for key, spot, at in rows(SPOTS, "|")},
    "color": {key: Word(color) for key, color in rows(COLORS)},
}


def person(name: str, female: bool, child: bool) -> Word:
    kind = (("先生", "女士"), ("男孩", "女孩"))[child][female]
    he = ("他", "她")[female]
    return Word(CHINESE[name], int(female), kind=kind, one=("一位", "一个")[child], he=he, his=f"{he}的")


def sibling(female: bool, other_female: bool, other_older: bool) -> Word:
    return Word((("弟弟", "妹妹"), ("哥哥", "姐姐"))[other_older][other_female])


def colored(color: str, thing: str) -> Word:
    noun, shade = TABLES["thing"][thing], TABLES["color"][color]
    return Word(f"{shade}的{noun}", a=f"一{noun.form('unit')}{shade}的{noun}", noun=noun, color=shade)


def counted(number: int, food: str) -> Word:
    noun = TABLES["food"][food]
    number_word = NUMBERS[number] + noun.form("unit")
    return Word(number_word + noun, noun=noun, number=number_word, unit=noun.form("unit"))


LANGUAGE = Language(
    code="zh", tables=TABLES,
    person=person, sibling=sibling, colored=colored, counted=counted, sentences={**ANSWERS, **SENTENCES},
    they=("他们", "她们"),
    joiner="",
    comma="、",
    stop="。",
)  # fmt: skip
