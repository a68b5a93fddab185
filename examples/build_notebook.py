"""Write notebook.ipynb and notebook_zh.ipynb from one list of cells: the same code, the words in two languages.

    python examples/build_notebook.py          # words or code changed: outputs of cells whose code stayed are kept
    python examples/build_notebook.py --run    # also execute the code, some minutes; needs `pip install nbclient ipykernel`

Both files get the outputs of the same run.
"""

# ruff: noqa: E501 - a paragraph is one line, as Markdown in Chinese wants it

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
FILES = {"en": FOLDER / "notebook.ipynb", "zh": FOLDER / "notebook_zh.ipynb"}
ALIGN = "align"  # the tag of cells that need what TRL trains
CELLS: list[dict[str, Any]] = []


def text(en: str, zh: str) -> None:
    """A cell of words."""
    CELLS.append({"kind": "markdown", "en": en.strip(), "zh": zh.strip()})


def code(source: str, *tags: str) -> None:
    """A cell of code, the same in both."""
    CELLS.append({"kind": "code", "source": source.strip(), "tags": list(tags)})


text(
    """
# From text to a model that answers

This notebook goes the whole way once, on a CPU: text, tokenizer, model, pretraining, supervised fine-tuning (SFT), preference optimisation (DPO), evaluation and a conversation. It calls the functions behind the stages of the `doge` command. The corpus is the standard library of the Python that runs it, so nothing is downloaded.

It takes about five minutes on two cores. From a checkout, with Python 3.11 or newer:

    pip install -c constraints.txt -e ".[align,cpu]" jupyterlab ipywidgets
    jupyter lab examples/notebook.ipynb

The extra `align` brings TRL, which trains SFT and DPO and does not run on Python 3.10. Without it, skip sections 7 to 10. The outputs below come from one run on one core of a busy machine; two cores train further in the same time. Your numbers will differ, what they show will not.
""",
    """
# 从文本到会回答问题的模型

这个笔记本在 CPU 上完整走一遍全程：文本、分词器、模型、预训练、监督微调（SFT）、偏好优化（DPO）、评测，最后与模型对话。它调用的就是 `doge` 命令各个阶段背后的函数。语料是运行它的 Python 自带的标准库，不需要下载任何东西。

在两个 CPU 核心上大约需要五分钟。在代码仓库中，使用 Python 3.11 或更新版本：

    pip install -c constraints.txt -e ".[align,cpu]" jupyterlab ipywidgets
    jupyter lab examples/notebook_zh.ipynb

可选依赖 `align` 会安装 TRL，SFT 和 DPO 用它训练，而 TRL 不支持 Python 3.10。没有它时，请跳过第 7 到第 10 节。下面的输出来自一次运行，只用了一台繁忙机器的一个核心；两个核心在同样的时间里能训练得更多。你得到的数字会有所不同，但看到的现象是一样的。
""",
)

text(
    """
## Settings

`MINUTES` is the time for pretraining, and the one thing to change: with 10 the model is clearly better. Every stage has a *recipe*, a dataclass whose fields the files in `recipes/doge-tiny` fill in. `settings` reads such a file and puts the fields of this notebook over it. The environment variable `DOGE_NOTEBOOK_FIELDS` can put further ones on top, as JSON by stage: the project's tests shrink every stage with it, so that the notebook runs in seconds. You can leave it alone.
""",
    """
## 设置

`MINUTES` 是预训练的时间，也是唯一需要改动的地方：改成 10，模型会明显更好。每个阶段都有一份*配方*（recipe），即一个 dataclass，它的字段由 `recipes/doge-tiny` 中的文件填写。`settings` 读取这样一个文件，再用本笔记本给出的字段覆盖它。环境变量 `DOGE_NOTEBOOK_FIELDS` 可以用 JSON 按阶段再覆盖一层：项目的测试用它把每个阶段缩小，使整个笔记本几秒钟就能跑完。平时不用管它。
""",
)
code("""
import json
import os

from small_doge.demo import DemoRecipe
from small_doge.recipe import load

MINUTES = 2
RUN = f"runs/notebook-{MINUTES}-minutes"
RECIPES = DemoRecipe().recipes
FIELDS = json.loads(os.environ.get("DOGE_NOTEBOOK_FIELDS", "{}"))  # for tests: smaller stages


def settings(stage, recipe_class, **fields):
    return load(recipe_class, f"{RECIPES}/{stage}.yaml", {**fields, **FIELDS.get(stage, {})})


RUN
""")

text(
    """
## 1. Data

A corpus is a sequence of documents. This one holds the source files of the standard library, the docstrings of its modules written in C, and the chapters of the language reference. Look at how little it is: some ten megabytes, where large models read terabytes.
""",
    """
## 1. 数据

语料就是一串文档。这里的语料包括标准库的源文件、用 C 编写的模块的文档字符串，以及语言参考手册的各章。注意它有多小：10 MB 左右，而大模型要读若干 TB。
""",
)
code("""
from small_doge.data.corpora import open_corpus
from small_doge.data.tokenizer import TokenizerRecipe

tokenizer_recipe = settings("tokenizer", TokenizerRecipe, output_dir=f"{RUN}/tokenizer")
documents = list(open_corpus(tokenizer_recipe.corpus))

print(f"{len(documents):,} documents, {sum(len(d.text.encode()) for d in documents):,} bytes")
for document in documents[:: len(documents) // 5][:5]:
    print(f"{document.id:45} {len(document.text):>7,} characters")
print()
print(documents[-1].text[:300])
""")

text(
    """
## 2. Tokenizer

A model reads numbers. Byte-level BPE begins with the 256 bytes and joins, again and again, the two neighbours that stand side by side most often. It learns from the training side only; a share of the documents is held out by a hash of their text. Look at the line of bytes per token: so many bytes the model takes in one step.
""",
    """
## 2. 分词器

模型读的是数字。字节级 BPE 从 256 个字节开始，一次又一次地把最常相邻的两个单元合并成一个。它只从训练部分学习；有一部分文档按其文本的哈希值留出。看看输出中每个 token 对应的字节数（bytes per token）：模型每一步读进的就是这么多字节。
""",
)
code("""
from small_doge.data.tokenizer import encode_text, load_tokenizer, train_tokenizer

train_tokenizer(tokenizer_recipe)
tokenizer = load_tokenizer(f"{RUN}/tokenizer")
""")
text(
    """
Frequent words are one token, rare ones are cut into pieces. Blanks belong to the word behind them, and the indentation of a line is a token of its own.
""",
    """
常见的词是一个 token，少见的词会被切成几段。空格归属于它后面的词，一行的缩进自成一个 token。
""",
)
code("""
LINES = "def read_text(path):\\n    with open(path) as file:\\n        return file.read()\\n"

ids = encode_text(tokenizer, [LINES])[0]
print(len(LINES), "characters,", len(ids), "tokens")
print([tokenizer.decode([i]) for i in ids])
""")
text(
    """
`prepare` writes the corpus as rows of equal length, documents one behind the other. The positions begin anew at every document: that is how the model tells documents apart, and no document sees another.
""",
    """
`prepare` 把语料写成等长的行，文档一个接一个地排列。每个文档的位置都从头编号：模型正是这样区分文档的，任何文档都看不到别的文档。
""",
)
code("""
from small_doge.data.packed import PackedTokens
from small_doge.data.packing import PrepareRecipe, prepare

prepare(settings("prepare", PrepareRecipe, tokenizer=f"{RUN}/tokenizer", output_dir=f"{RUN}/data"))

rows = PackedTokens(f"{RUN}/data", "train")
print(f"{len(rows):,} rows of {rows.row_length} tokens")
begins = next(i for i in range(len(rows)) if (rows[i]["position_ids"][1:-30] == 0).any())
start = int((rows[begins]["position_ids"][1:] == 0).nonzero()[0]) + 1
print("a row where a document begins:", tokenizer.decode(rows[begins]["input_ids"][start - 8 : start + 20]))
print("and its positions:", rows[begins]["position_ids"][start - 8 : start + 20].tolist())
""")

text(
    """
## 3. Model

A Doge model is an embedding, a stack of equal blocks, and the embedding again to turn the result into a probability for each token. A block is attention, in which tokens read each other, and a feed-forward network (SwiGLU), which works on each token alone. What sets it apart is `dt_proj`: it gives every key a *score* that says how much this token is worth keeping. Section 5 shows the scores.
""",
    """
## 3. 模型

Doge 模型由一个嵌入层、一叠相同的块，以及再次使用的嵌入层组成，最后这一步把结果变成每个 token 的概率。一个块包括注意力（token 在其中互相读取）和前馈网络 SwiGLU（对每个 token 单独计算）。它的特别之处是 `dt_proj`：它给每个键一个*分数*，表示这个 token 有多值得保留。第 5 节会展示这些分数。
""",
)
code("""
from small_doge import DogeForCausalLM
from small_doge.models import config_for

model = DogeForCausalLM(config_for("tiny", vocab_size=len(tokenizer)))
print(model.model.layers[0])
""")
text(
    """
Where the parameters are. At this size the embedding is a third of the model, which is why the vocabulary is small. The scores of all layers together cost less than a thousand parameters.
""",
    """
参数分布在哪里。在这个规模上，嵌入层占了模型的三分之一，所以词表要小。所有层的分数加起来只用了不到一千个参数。
""",
)
code("""
from collections import Counter

PARTS = {"embed_tokens": "embedding", "dt_proj": "scores", "self_attn.A": "scores", "self_attn": "attention"}

count = Counter()
for name, parameter in model.named_parameters():
    part = next((PARTS[key] for key in PARTS if key in name), "feed-forward" if ".mlp." in name else "norms, residuals")
    count[part] += parameter.numel()
for part, number in count.most_common():
    print(f"{part:20} {number:>9,}  {number / count.total():.2%}")
print(f"{'in all':20} {count.total():>9,}")
""")

text(
    """
## 4. Pretraining

The model learns to predict the next token. A few steps are timed first, and the number of steps follows from `MINUTES`. The learning rate rises, stays, and falls for the last 60 % of the steps. Look at `bits/byte`: how many bits the model needs for each byte of text. Eight would be no knowledge at all.
""",
    """
## 4. 预训练

模型学习预测下一个 token。先给几步计时，再由 `MINUTES` 得出总步数。学习率先上升，再保持不变，最后 60 % 的步数里下降。看 `bits/byte`：模型表示每个字节的文本需要多少比特。八比特就等于一无所知。
""",
)
code("""
from small_doge.training.pretrain import PretrainArguments, pretrain

pretrain(
    settings(
        "pretrain",
        PretrainArguments,
        data=f"{RUN}/data",
        tokenizer=f"{RUN}/tokenizer",
        output_dir=f"{RUN}/pretrain",
        max_minutes=MINUTES,
        eval_steps=0.125,
        use_cpu=True,
    )
);
""")
text(
    """
The loss curve. It falls steeply at first, when the model learns which tokens are frequent, then slowly. Held-out text should follow training text: if it rose while the other fell, the model would be learning by heart.
""",
    """
损失曲线。开头下降很快，模型在学哪些 token 常见；随后变慢。留出文本的曲线应当跟随训练文本：如果它上升而训练文本的曲线下降，就说明模型在死记硬背。
""",
)
code("""
from IPython.display import Image

from small_doge.report import plots
from small_doge.report.run import read_run


def show(figure, words):
    return Image(plots.to_png(figure, dpi=90), alt=words)


run = read_run(RUN)
show(plots.loss_figure(run.history), "Loss of training and held-out text against the step")
""")
text(
    """
The same prompts, completed after 2 %, 25 % and all of the steps. First there is noise, then there are words, then something like Python.
""",
    """
同样的提示词，分别在 2 %、25 % 和全部步数之后由模型续写。先是噪声，然后出现单词，最后有点像 Python 了。
""",
)
code("""
for sample in run.samples:
    if sample["prompt"] in ("class Test", "The statement"):
        print(f"step {sample['step']:>4}: {(sample['prompt'] + sample['completion'][:130])!r}")
""")

text(
    """
## 5. Scores and windows

In attention every token (the *query*) reads the tokens before it (the *keys*). Dynamic Mask Attention gives each key a score s = exp(A · softplus(Wdt v)), made from the key's own value. The score is added to the match of query and key, and of all tokens so far a query sees only the w keys with the best scores.

Here is the head of the last layer whose scores differ most. A row is a token that reads, a column a token that is read. The strip on top holds the scores: a bright column is read more by everyone.
""",
    """
## 5. 分数与窗口

在注意力中，每个 token（*查询*）读取它前面的 token（*键*）。动态掩码注意力给每个键一个分数 s = exp(A · softplus(Wdt v))，由这个键自己的值算出。分数会加到查询与键的匹配程度上，而且在到目前为止的所有 token 中，查询只看得见分数最好的 w 个键。

下面是最后一层中分数差别最大的那个头。每一行是一个在读的 token，每一列是一个被读的 token。顶上的细条是分数：越亮的列，大家读得越多。
""",
)
code("""
from small_doge.report.page import attention_pictures

figures, _ = attention_pictures(f"{RUN}/pretrain", LINES)
show(list(figures.values())[-1], "Scores of a head and who reads whom, all keys kept")
""")
text(
    """
The window of this model is larger than the text, so every key stayed. Now the same head with a window of 8 keys: what is white below the diagonal was dropped. A column that turns white never comes back, because a key's score never changes and only better keys arrive. (The model was not trained with so small a window; this shows the rule, not a good setting.)
""",
    """
这个模型的窗口比文本大，所以所有键都留下了。现在把同一个头的窗口改成 8 个键：对角线以下的白色就是被丢掉的键。一列一旦变白就不会再恢复，因为键的分数永远不变，而新来的只会是更好的键。（模型并没有用这么小的窗口训练过；这里展示的是规则，不是推荐的设置。）
""",
)
code("""
from small_doge.models import load_model

WINDOW = 8

model = load_model(f"{RUN}/pretrain")
model.config.keep_window_size = WINDOW
ids = tokenizer(LINES, return_tensors="pt").input_ids
labels = [repr(tokenizer.decode([i]))[1:-1].replace(" ", "␣")[:12] for i in ids[0].tolist()]
attentions, scores = plots.attention_and_scores(model, ids)

layer = len(scores) - 1
group = int((scores[layer].max(1) - scores[layer].min(1)).argmax())
head = group * len(attentions[layer]) // len(scores[layer])
title = f"Layer {layer + 1}, head {head + 1}, a window of {WINDOW} keys"
figure = plots.attention_figure(attentions[layer][head], scores[layer][group], labels, title)
show(figure, "The same head with 8 keys kept: columns end where a key is dropped")
""")
text(
    """
So the whole mask is one number a key, its *eviction time*: the first query that does not see it. The bars are the columns of the picture, laid flat. A key of a high score has a long bar; one with a lower score than 8 keys before it has none.
""",
    """
因此整个掩码就是每个键一个数，即它的*移出时间*：第一个看不见它的查询。下面的横条就是上图的各列放平之后的样子。分数高的键横条长；前面已有 8 个键分数比它高的键，则没有横条。
""",
)
code("""
import torch

from small_doge.ops.dynamic_mask import eviction_times

times = eviction_times(torch.tensor(scores[layer])[None], WINDOW)[0, group].tolist()
for j, e in enumerate(times):
    print(f"{labels[j]:>12}  {scores[layer][group, j]:.3f}  {' ' * j}{'█' * (e - j)}")
""")
text(
    """
The same over the whole of training, layer by layer. A begins at 0, where all scores are 1 and attention is a sliding window; then the scores begin to differ. The share of keys that leave stays at 0, since rows of 256 tokens fit into the window.
""",
    """
下面是整个训练过程中逐层的变化。A 从 0 开始，这时所有分数都是 1，注意力就是一个滑动窗口；之后分数开始有了差别。离开窗口的键（share of keys that leave）一直是 0，因为 256 个 token 的行放得进窗口。
""",
)
code("""
show(plots.watching_figure(run.history), "Gradient norm, A, spread of the scores and what attention keeps, by layer")
""")

text(
    """
## 6. Evaluation on text

Bits per byte on the held-out documents: as many as a compressor would need if it predicted like this model. So real compressors stand beside it, `xz -9` on the held-out text alone and after reading all the training text, and an n-gram model that counted the training text. Two minutes bring the model about level with the plain `xz -9`; the four of the demo (`make demo`) take it past the n-gram model.
""",
    """
## 6. 在文本上评测

留出文档上的每字节比特数（bits per byte）：一个像本模型这样预测的压缩器，每个字节需要多少比特。所以旁边放上真正的压缩器：只看留出文本的 `xz -9`，以及先读完全部训练文本的 `xz -9`；还有一个对训练文本做过计数的 n-gram 模型。两分钟大约能让模型与单独的 `xz -9` 打平；演示（`make demo`）用四分钟，超过了 n-gram 模型。
""",
)
code("""
from small_doge.evaluation.evaluate import EvaluateRecipe, evaluate

fields = {"model": f"{RUN}/pretrain", "data": f"{RUN}/data", "output_dir": f"{RUN}/evaluation"}
evaluate(settings("evaluate", EvaluateRecipe, **fields))
run = read_run(RUN)
show(plots.comparison_figure(run.results["bits_per_byte"]), "Bits per byte of the model and of compressors")
""")

text(
    """
## 7. SFT: it learns to answer

From here on TRL is needed. The pretrained model continues text; it does not answer. Supervised fine-tuning shows it conversations: a question about a definition of the standard library, and the first paragraph of its docstring. A tenth of the definitions is held out.
""",
    """
## 7. SFT：学会回答

从这里开始需要 TRL。预训练模型只会续写文本，不会回答。监督微调给它看对话：一个关于标准库中某个定义的问题，和这个定义文档字符串的第一段。十分之一的定义被留出。
""",
)
code(
    """
from small_doge.data.stdlib_chat import QuestionsRecipe, write_questions

write_questions(settings("questions", QuestionsRecipe, output_dir=f"{RUN}/questions"))
with open(f"{RUN}/questions/conversations/train.jsonl", encoding="utf-8") as file:
    for message in json.loads(file.readline())["messages"]:
        print(f"{message['role']:>9}: {message['content']}")
""",
    ALIGN,
)
text(
    """
Only what the assistant says counts in the loss. Look at the held-out loss before and after: it falls by more than a nat, most of it because the model learns the form of an answer.
""",
    """
只有助手说的话计入损失。看看训练前后的留出损失：它下降了 1 纳特以上，主要是因为模型学会了答案的形式。
""",
)
code(
    """
from small_doge.training.sft import SFTArguments, sft

steps = max(1, min(200, run.stages["pretrain"]["steps"] // 2))
conversations = f"{RUN}/questions/conversations"
sft(
    settings(
        "sft",
        SFTArguments,
        model=f"{RUN}/pretrain",
        data=conversations,
        eval_data=conversations,
        output_dir=f"{RUN}/sft",
        max_steps=steps,
        use_cpu=True,
    )
);
""",
    ALIGN,
)

text(
    """
## 8. DPO: it learns to prefer

Direct preference optimisation shows two answers to a question, of which one is right; the other is the docstring of a sibling in the same module. The model learns to make the right one likelier than it was before, compared with the other. Look at the preference accuracy, which is 50 % by chance: it rises by some points, with a standard error of 2 on these 578 pairs, and by more the more pairs are read; `doge demo` takes 1,150 steps. A model of this size knows little of what functions do. What it finds is which docstring sounds like the name.
""",
    """
## 8. DPO：学会取舍

直接偏好优化（DPO）对一个问题给出两个答案，其中一个是对的，另一个是同一模块中另一个定义的文档字符串。模型学着让正确的答案相对于另一个比原来更可能。看看偏好准确率（preference accuracy），瞎猜是 50 %：它会上升几个百分点（这 578 对上的标准误是 2 个百分点），读到的对越多升得越多；`doge demo` 走 1,150 步。这么小的模型对函数的作用所知甚少，它学到的是哪条文档字符串读起来像这个名字。
""",
)
code(
    """
from small_doge.training.dpo import DPOArguments, dpo

preferences = f"{RUN}/questions/preferences"
dpo(
    settings(
        "dpo",
        DPOArguments,
        model=f"{RUN}/sft",
        data=preferences,
        eval_data=preferences,
        output_dir=f"{RUN}/dpo",
        max_steps=2 * steps,
        use_cpu=True,
    )
);
""",
    ALIGN,
)

text(
    """
## 9. The three models compared

All three are asked the same held-out questions. `loss` is in nats for each token of the true answer, `ended` the share of answers that come to an end by themselves, `preference_accuracy` how often the right docstring is likelier than the sibling's, and `matched` how often two questions and their two answers are put together rightly. The last two are 50 % by chance. SFT changes the first two a lot, DPO the others.
""",
    """
## 9. 比较三个模型

三个模型回答同样的留出问题。`loss` 是真实答案每个 token 的损失，单位为纳特；`ended` 是自己收尾的答案所占的比例；`preference_accuracy` 是正确的文档字符串比另一个更可能的频率；`matched` 是两个问题和两个答案被正确配对的频率。后两项瞎猜都是 50 %。SFT 让前两项变化很大，DPO 改变的是后两项。
""",
)
code(
    """
from small_doge.evaluation.answers import AnswersRecipe, answers

models = [f"{RUN}/{name}" for name in ("pretrain", "sft", "dpo")]
fields = {"questions": f"{RUN}/questions", "output_dir": f"{RUN}/answers", "asked": 32, "shown": 4}
answers(settings("answers", AnswersRecipe, models=models, **fields))

found = read_run(RUN).answers
print()
for name, figures in found["figures"].items():
    print(f"{name:10}", "  ".join(f"{key} {value:.3f}" for key, value in figures.items()))
""",
    ALIGN,
)
text(
    """
What they say. The pretrained model goes on with some text; after SFT the answer has the form of a docstring. Compare it with the true one: it sounds right and is seldom true. After two minutes it hardly depends on the question.
""",
    """
它们说了些什么。预训练模型只是接着写下去；SFT 之后，答案有了文档字符串的样子。与真实的对比一下：听上去像那么回事，但很少是对的。只训练两分钟的话，答案与问题几乎没有关系。
""",
)
code(
    """
for item in found["shown"]:
    print(f"{item['question']}\\n{'docstring':>10}: {item['docstring']}")
    for name, answer in item["answers"].items():
        print(f"{name:>10}: {answer[:160]!r}")
    print()
""",
    ALIGN,
)

text(
    """
## 10. A conversation

`doge chat` in a cell. With the extra `cpu` the replies come from the engine written for CPUs, without it from transformers. Ask something of your own; sampling (`do_sample=True`) gives another answer each time.
""",
    """
## 10. 对话

单元格里的 `doge chat`。安装了可选依赖 `cpu` 时，回复来自专为 CPU 编写的引擎，否则来自 transformers。换成你自己的问题试试；改用采样（`do_sample=True`），每次的答案都不一样。
""",
)
code(
    """
from small_doge.inference.chat import ChatRecipe, open_conversation

talk = open_conversation(ChatRecipe(model=f"{RUN}/dpo", do_sample=False, max_new_tokens=60))
for question in ("What does `os.path.exists` do?", "Explain `random.Random.shuffle`.", "What is `socket.close` for?"):
    print("you: ", question)
    print("doge:", talk.say(question))
    talk.reset()
""",
    ALIGN,
)

text(
    """
## 11. All of it on one page

`report` writes what the stages left behind as one HTML file that opens without a network, in the run's folder. Below are its numbers.
""",
    """
## 11. 汇总成一页

`report` 把各个阶段留下的内容写成一个 HTML 文件，放在这次运行的目录里，不联网也能打开。下面是其中的数字。
""",
)
code("""
from small_doge.report.page import ReportRecipe, report

report(settings("report", ReportRecipe, run_dir=RUN));
""")

text(
    """
## Where to go next

- **More minutes.** Set `MINUTES = 10` and run all cells again. Each number of minutes has a folder of its own, and a run that was interrupted goes on where it stopped.
- **Your own text.** Give `corpus` a folder of `.txt`, `.md`, `.jsonl` or `.parquet` files: [own data](../docs/howto/own_data.md).
- **Why a window of keys is enough**, with proofs and pictures: [Dynamic Mask Attention](../docs/concepts/dynamic_mask_attention.md).
- **The published sizes**, 20M to 320M parameters, on a GPU: [the training guide](../recipes/README.md).
- **Tasks others report**, such as MMLU or HellaSwag: [evaluate](../docs/howto/evaluate.md).
- **A chat page and an API** for the model you have just made: [chat and serve](../docs/howto/chat_and_serve.md).
""",
    """
## 接下来

- **更多时间。** 设 `MINUTES = 10`，重新运行所有单元格。每个分钟数都有自己的目录，被打断的运行会从停下的地方继续。
- **你自己的文本。** 把 `corpus` 设为一个放有 `.txt`、`.md`、`.jsonl` 或 `.parquet` 文件的目录：[使用自己的数据](../docs/howto/own_data.md)（英文）。
- **为什么一个窗口的键就够了**，附证明和图：[动态掩码注意力](../docs/concepts/dynamic_mask_attention.md)（英文）。
- **官方公布的规模**，20M 到 320M 参数，在 GPU 上训练：[训练指南](../recipes/README_zh.md)。
- **别人报告的任务**，如 MMLU 或 HellaSwag：[评测](../docs/howto/evaluate.md)（英文）。
- **聊天页面和 API**，用你刚刚做出的模型：[对话与部署](../docs/howto/chat_and_serve.md)（英文）。
""",
)


def notebook(language: str, outputs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The notebook in a language; ``outputs`` are those of a cell by its code."""
    cells: list[dict[str, Any]] = []
    executed = 0
    for number, cell in enumerate(CELLS, 1):
        common = {"cell_type": cell["kind"], "id": f"cell-{number:02}"}
        if cell["kind"] == "markdown":
            cells.append({**common, "metadata": {}, "source": _lines(cell[language])})
            continue
        executed += 1
        there = [{**o, "execution_count": executed} if "execution_count" in o else o for o in outputs[cell["source"]]]
        metadata = {"tags": cell["tags"]} if cell["tags"] else {}
        known = {"execution_count": executed, "metadata": metadata, "outputs": there}
        cells.append({**common, **known, "source": _lines(cell["source"])})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"file_extension": ".py", "name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def as_text(content: dict[str, Any]) -> str:
    """A notebook as the text of its file."""
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"


def kept_outputs(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The outputs in a notebook by the code they belong to; of code that is new, none."""
    there = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    known = {"".join(c["source"]): c["outputs"] for c in there if c["cell_type"] == "code"}
    return {c["source"]: known.get(c["source"], []) for c in CELLS if c["kind"] == "code"}


def executed_outputs() -> dict[str, list[dict[str, Any]]]:
    """The outputs of all cells, executed in a new folder."""
    import nbformat
    from nbclient import NotebookClient

    none = {c["source"]: [] for c in CELLS if c["kind"] == "code"}
    content = nbformat.reads(as_text(notebook("en", none)), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(content, timeout=None, resources=resources, record_timing=False).execute()
    return {c["source"]: _clean(c["outputs"]) for c in content["cells"] if c["cell_type"] == "code"}


def _clean(outputs: list[Any]) -> list[dict[str, Any]]:
    """Printed text in one piece; of results the picture or the text, whichever says more. Progress on stderr is gone."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            if output["name"] == "stderr":
                if not re.search(r"/s\]|^\s*$", output["text"]):  # neither a progress bar nor its end
                    print(f"left out: {output['text'].strip()}")
            elif found and found[-1]["output_type"] == "stream":
                found[-1]["text"] += output["text"]
            else:
                found.append({"name": "stdout", "output_type": "stream", "text": output["text"]})
            continue
        data = dict(output["data"])
        if "image/png" in data:
            data = {"image/png": data["image/png"].strip().replace("\n", "")}
        else:
            data = {"text/plain": _lines(data["text/plain"])}
        # The words for who cannot see a picture are there.
        metadata = {kind: dict(there) for kind, there in output["metadata"].items() if kind in data}
        found.append({"data": data, "execution_count": 0, "metadata": metadata, "output_type": "execute_result"})
    for output in found:
        if output["output_type"] == "stream":
            output["text"] = _lines(re.sub(r"[ \t]+$", "", output["text"], flags=re.MULTILINE))
    return found


def _lines(source: str) -> list[str]:
    return source.splitlines(keepends=True)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", action="store_true", help="execute the code")
    outputs = executed_outputs() if parser.parse_args().run else kept_outputs(FILES["en"])
    for language, path in FILES.items():
        path.write_text(as_text(notebook(language, outputs)), encoding="utf-8", newline="\n")
        print(f"wrote {path.name}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
