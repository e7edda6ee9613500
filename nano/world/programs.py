"""Dialogues with the code interpreter in ChatGLM3's protocol: a program, what it printed or drew, and the answer."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from typing import Any

from .facts import sample_fact
from .talk import sample_talk
from .toolcalls import is_heldout

# Two wordings, so that the model does not hang on one: of the demo that ChatGLM3 came with (composite_demo/demo_ci.py),
# and of glmkit.chat.tools.INTERPRETER_PROMPT.
SYSTEMS = (
    "你是一位智能AI助手，你叫ChatGLM，你连接着一台电脑，但请注意不能联网。在使用Python解决任务时，你可以运行代码并得到结果，如果运行结果有错误，"
    "你需要尽可能对代码进行改进。你可以处理用户上传到电脑上的文件，文件默认存储路径是/mnt/data/。",
    "你是名为ChatGLM的智能AI助手，连接着一台不能联网的电脑。解决任务时，你可以编写Python代码，运行后会得到结果；"
    "如果运行结果有错误，请尽可能改进代码。用户上传的文件存放在/mnt/data/，你可以处理这些文件。",
)
IMAGE = "[Image]"
# What people write behind y=, and Python for it.
_CURVES = {
    "x^2": "x ** 2", "x²": "x ** 2", "x^3": "x ** 3", "sin(x)": "np.sin(x)", "cos(x)": "np.cos(x)", "tan(x)": "np.tan(x)",
    "|x|": "np.abs(x)", "x": "x", "-x": "-x", "e^x": "np.exp(x)", "exp(x)": "np.exp(x)", "1/x": "1 / x", "x^2+1": "x ** 2 + 1",
    "sin(x)+cos(x)": "np.sin(x) + np.cos(x)", "sin x": "np.sin(x)", "cos x": "np.cos(x)", "x*sin(x)": "x * np.sin(x)",
}  # fmt: skip
_WORDS = "hello world python apple music spring banana orange river mountain glm nano school teacher".split()

Round = tuple[str, str, str, str]  # question, program, what comes back, answer
_DRAW = "import matplotlib.pyplot as plt\n\n"


def _values(rng: random.Random) -> list[int]:
    top = rng.choice((9, 9, 20, 99))
    return [rng.randint(0 if top < 99 else 1, top) for _ in range(rng.choice((3, 3, 4, 5)))]


def _said(values: list[int], rng: random.Random, chinese: bool) -> str:
    if chinese:
        return rng.choice(("，", "、", ",", ", ", " ")).join(map(str, values))
    return rng.choice((", ", ", ", ",", " ")).join(map(str, values))


def _curve(rng: random.Random, chinese: bool) -> Round:
    blank = rng.choice(("", " "))
    if rng.random() < 0.6:
        said, python = rng.choice(list(_CURVES.items()))
    else:
        factor, power, more = rng.randint(2, 9), rng.choice((1, 2, 3)), rng.randint(1, 9)
        said = f"{factor}x" + (f"^{power}" if power > 1 else "") + f"+{more}"
        python = f"{factor} * x" + (f" ** {power}" if power > 1 else "") + f" + {more}"
    name = f"y{blank}={blank}{said}"
    if rng.random() < 0.3:
        low, high = rng.choice((-10, -5, -3, 0, 1)), rng.choice((5, 6, 8, 10, 20))
        where = f"，x从{low}到{high}" if chinese else f" for x from {low} to {high}"
    else:
        low, high, where = -5, 5, ""
    program = f"import numpy as np\n{_DRAW}x = np.linspace({low}, {high}, 200)\nplt.plot(x, {python})\nplt.show()"
    if chinese:
        asks = ("画一个 {n} 的图", "画一个{n}的图", "画出{n}的图像", "画{n}的图像", "请画出函数{n}", "帮我画{n}的曲线", "绘制{n}", "画 {n}")
        return rng.choice(asks).format(n=name) + where, program, IMAGE, f"{name}的图像已经画好了。"
    asks = ("Plot {n}", "Draw {n}", "Plot the function {n}", "Draw the graph of {n}", "Please plot {n}", "Show me a plot of {n}")
    return rng.choice(asks).format(n=name) + where, program, IMAGE, f"Here is the plot of {name}."


def _chart(rng: random.Random, chinese: bool) -> Round:
    values, kind = _values(rng), rng.choice(("bar", "bar", "line", "pie"))
    said = _said(values, rng, chinese)
    draw = {"bar": "plt.bar(range(len(values)), values)", "line": "plt.plot(values)", "pie": "plt.pie(values)"}[kind]
    program = f"{_DRAW}values = {values}\n{draw}\nplt.show()"
    if chinese:
        name = {"bar": "柱状图", "line": "折线图", "pie": "饼图"}[kind]
        asks = ("画{k}：{v}", "用{v}画一个{k}", "画一个{k}，数据是{v}", "把{v}画成{k}", "请画出{v}的{k}")
        return rng.choice(asks).format(k=name, v=said), program, IMAGE, f"{name}已经画好了。"
    name = {"bar": "bar chart", "line": "line chart", "pie": "pie chart"}[kind]
    asks = ("Draw a {k} of {v}", "Plot a {k}: {v}", "Make a {k} with {v}", "Show {v} as a {k}")
    return rng.choice(asks).format(k=name, v=said), program, IMAGE, f"Here is the {name}."


def _sum_up_to(rng: random.Random, chinese: bool) -> Round:
    last = rng.choice((10, 50, 100, 1000, rng.randint(5, 9999), rng.randint(5, 999)))
    program, result = f"n = {last}\nprint(sum(range(1, n + 1)))", last * (last + 1) // 2
    if chinese:
        asks = ("计算1到{n}的和", "1到{n}的和是多少？", "求1加到{n}的和", "从1加到{n}等于多少？", "用代码计算1到{n}的和", "1+2+...+{n}等于多少？")
        return rng.choice(asks).format(n=last), program, str(result), f"1到{last}的和是{result}。"
    asks = ("Compute the sum of 1 to {n}", "What is the sum from 1 to {n}?", "Add up the numbers from 1 to {n}",
            "Sum 1..{n}", "Calculate the sum of the numbers 1 to {n}")
    return rng.choice(asks).format(n=last), program, str(result), f"The sum from 1 to {last} is {result}."


def _statistic(rng: random.Random, chinese: bool) -> Round:
    values = _values(rng)
    said = _said(values, rng, chinese)
    result: Any
    zh, en, python, result = rng.choice((
        ("平均数", "mean", "sum(values) / len(values)", sum(values) / len(values)),
        ("平均值", "average", "sum(values) / len(values)", sum(values) / len(values)),
        ("总和", "sum", "sum(values)", sum(values)),
        ("最大值", "maximum", "max(values)", max(values)),
        ("最小值", "minimum", "min(values)", min(values)),
        ("中位数", "median", "statistics.median(values)", statistics.median(values)),
    ))  # fmt: skip
    program = f"values = {values}\nprint({python})"
    if "statistics" in python:
        program = "import statistics\n\n" + program
    if chinese:
        asks = ("求{v}的{k}", "{v}的{k}是多少？", "计算{v}的{k}", "帮我算{v}的{k}", "用代码求{v}的{k}")
        return rng.choice(asks).format(k=zh, v=said), program, str(result), f"{zh}是{result}。"
    asks = ("What is the {k} of {v}?", "Compute the {k} of {v}", "Calculate the {k} of {v}", "Find the {k} of {v}")
    return rng.choice(asks).format(k=en, v=said), program, str(result), f"The {en} is {result}."


def _sort(rng: random.Random, chinese: bool) -> Round:
    values, down = _values(rng), rng.random() < 0.35
    said = _said(values, rng, chinese)
    result = sorted(values, reverse=down)
    program = f"values = {values}\nprint(sorted(values{', reverse=True' if down else ''}))"
    if chinese:
        asks = ("把{v}从大到小排序", "将{v}从大到小排列") if down else ("把{v}排序", "给{v}排序", "把{v}从小到大排序", "将{v}从小到大排列", "排序：{v}")
        return rng.choice(asks).format(v=said), program, str(result), f"排序结果是{result}。"
    asks = ("Sort {v} in descending order",) if down else ("Sort {v}", "Sort the list {v}", "Sort these numbers: {v}")
    return rng.choice(asks).format(v=said), program, str(result), f"The sorted list is {result}."


def _fibonacci(rng: random.Random, chinese: bool) -> Round:
    place = rng.choice((10, 20, 30, rng.randint(3, 90)))
    before, now = 0, 1
    for _ in range(place):
        before, now = now, before + now
    program = f"a, b = 0, 1\nfor _ in range({place}):\n    a, b = b, a + b\nprint(a)"
    if chinese:
        asks = ("第{n}个斐波那契数是多少？", "计算第{n}个斐波那契数", "求斐波那契数列的第{n}项", "第{n}个斐波那契数", "斐波那契数列第{n}项是多少？")
        return rng.choice(asks).format(n=place), program, str(before), f"第{place}个斐波那契数是{before}。"
    asks = ("What is Fibonacci number {n}?", "Compute Fibonacci number {n}", "Calculate the Fibonacci number {n}")
    return rng.choice(asks).format(n=place), program, str(before), f"Fibonacci number {place} is {before}."


def _factorial(rng: random.Random, chinese: bool) -> Round:
    number = rng.randint(2, 20)
    program, result = f"import math\n\nprint(math.factorial({number}))", math.factorial(number)
    if chinese:
        asks = ("{n}的阶乘是多少？", "计算{n}的阶乘", "求{n}!", "用代码算{n}的阶乘")
        return rng.choice(asks).format(n=number), program, str(result), f"{number}的阶乘是{result}。"
    asks = ("What is {n} factorial?", "Compute {n}!", "Compute the factorial of {n}")
    return rng.choice(asks).format(n=number), program, str(result), f"The factorial of {number} is {result}."


def _expression(rng: random.Random, chinese: bool) -> Round:
    left, right = rng.randint(2, rng.choice((20, 999))), rng.randint(2, rng.choice((10, 999)))
    power = rng.random() < 0.3
    if power:
        right = rng.randint(2, 16)
        said = f"{left}的{right}次方" if chinese else f"{left} to the power of {right}"
        python, result = f"{left} ** {right}", left**right
    else:
        sign = rng.choice("+-*")
        blank = rng.choice(("", " "))
        said, python = f"{left}{blank}{sign}{blank}{right}", f"{left} {sign} {right}"
        result = left + right if sign == "+" else left - right if sign == "-" else left * right
    if chinese:
        asks = ("用代码算{e}", "{e}是多少？", "计算{e}", "用Python计算{e}", "{e}等于多少？", "算一下{e}")
        return rng.choice(asks).format(e=said), f"print({python})", str(result), f"结果是{result}。"
    asks = ("What is {e}?", "Compute {e}", "Compute {e} with Python", "Calculate {e}", "Use Python to compute {e}")
    return rng.choice(asks).format(e=said), f"print({python})", str(result), f"The result is {result}."


def _primes(rng: random.Random, chinese: bool) -> Round:
    if rng.random() < 0.5:
        top = rng.choice((10, 20, 30, 50, 100, rng.randint(8, 100)))
        result = [n for n in range(2, top) if all(n % d for d in range(2, n))]
        program = f"print([n for n in range(2, {top}) if all(n % d for d in range(2, n))])"
        if chinese:
            asks = ("列出{n}以内的质数", "{n}以内有哪些质数？", "求{n}以内的所有质数")
            return rng.choice(asks).format(n=top), program, str(result), f"{top}以内的质数是{result}。"
        asks = ("List the primes below {n}", "Which primes are below {n}?", "Find all primes below {n}")
        return rng.choice(asks).format(n=top), program, str(result), f"The primes below {top} are {result}."
    number = rng.randint(2, 999)
    prime = all(number % d for d in range(2, number))
    program = f"n = {number}\nprint(all(n % d for d in range(2, n)))"
    if chinese:
        ask = rng.choice(("{n}是质数吗？", "判断{n}是不是质数", "{n}是不是质数？")).format(n=number)
        return ask, program, str(prime), f"{number}{'是' if prime else '不是'}质数。"
    ask = rng.choice(("Is {n} a prime number?", "Is {n} prime?", "Check whether {n} is prime")).format(n=number)
    return ask, program, str(prime), f"{number} is {'a' if prime else 'not a'} prime number."


def _reverse(rng: random.Random, chinese: bool) -> Round:
    word = rng.choice(_WORDS) + rng.choice(("", "", str(rng.randint(1, 99))))
    program, result = f'print("{word}"[::-1])', word[::-1]
    if chinese:
        asks = ("把{w}倒过来", "把字符串{w}反转", "反转字符串{w}")
        return rng.choice(asks).format(w=word), program, result, f"倒过来是{result}。"
    asks = ("Reverse the word {w}", "Reverse the string {w}", "Write {w} backwards")
    return rng.choice(asks).format(w=word), program, result, f"Backwards it is {result}."


def _wait(rng: random.Random, chinese: bool) -> Round:
    seconds = rng.randint(1, 60)
    program = f'import time\n\ntime.sleep({seconds})\nprint("done")'
    if chinese:
        asks = ("等待{n}秒", "等{n}秒", "运行一个{n}秒的程序", "睡{n}秒")
        return rng.choice(asks).format(n=seconds), program, "done", f"已经等了{seconds}秒。"
    asks = ("Wait {n} seconds", "Sleep for {n} seconds", "Run a program for {n} seconds")
    return rng.choice(asks).format(n=seconds), program, "done", f"I waited {seconds} seconds."


def _file(rng: random.Random, chinese: bool) -> Round:
    name, text = f"{rng.choice('abcdefgxyz')}{rng.choice(('', rng.randint(1, 99)))}.txt", rng.choice(_WORDS)
    if rng.random() < 0.3:
        names = sorted({f"{rng.choice(_WORDS)}.{rng.choice(('txt', 'csv', 'png'))}" for _ in range(rng.randint(1, 3))})
        program = 'import os\n\nprint(sorted(os.listdir(".")))'
        if chinese:
            return rng.choice(("有哪些文件？", "列出文件", "看看有什么文件")), program, str(names), f"文件有{names}。"
        return rng.choice(("List the files", "Which files are there?")), program, str(names), f"The files are {names}."
    program = f'with open("{name}", "w") as file:\n    file.write("{text}")\nprint("saved {name}")'
    if chinese:
        asks = ("把{t}写到文件{f}", "把{t}保存到{f}", "写一个文件{f}，内容是{t}")
        return rng.choice(asks).format(t=text, f=name), program, f"saved {name}", f"已经写好文件{name}。"
    asks = ("Write {t} to the file {f}", "Save {t} to {f}", "Write a file {f} with the text {t}")
    return rng.choice(asks).format(t=text, f=name), program, f"saved {name}", f"I have written the file {name}."


def _fail(rng: random.Random, chinese: bool) -> Round:
    number = rng.randint(1, 999)
    if rng.random() < 0.6:
        error, program = "ZeroDivisionError: division by zero", f"print({number} / 0)"
        ask = rng.choice(("用代码算{n}除以0", "{n}除以0是多少？") if chinese else ("Divide {n} by 0", "What is {n} / 0?"))
        traceback = f"Cell In[{rng.randint(1, 9)}], line 1\n----> 1 {program}\n\n{error}"
    else:
        error, program = "KeyboardInterrupt: ", "while True:\n    pass"
        ask = rng.choice(("写一个死循环", "运行一个死循环") if chinese else ("Run an endless loop", "Loop forever"))
        traceback = f"Cell In[{rng.randint(1, 9)}], line 2\n      1 while True:\n----> 2     pass\n\n{error}".strip()
    rule = "-" * 75
    name = error.partition(":")[0]
    head = f"{rule}\n{name:<42}Traceback (most recent call last)\n" if rng.random() < 0.5 else ""
    answer = f"程序出错了：{name}。" if chinese else f"The program failed: {name}."
    return ask.format(n=number), program, head + traceback, answer


# What people try first is learnt and never held out.
_USUAL = (
    {f"import numpy as np\n{_DRAW}x = np.linspace(-5, 5, 200)\nplt.plot(x, {y})\nplt.show()" for y in _CURVES.values()}
    | {f"n = {last}\nprint(sum(range(1, n + 1)))" for last in (10, 50, 100, 1000)}
    | {f"a, b = 0, 1\nfor _ in range({n}):\n    a, b = b, a + b\nprint(a)" for n in (10, 20, 30)}
)
_ROUNDS: tuple[tuple[Callable[[random.Random, bool], Round], int], ...] = (
    (_curve, 5), (_chart, 4), (_sum_up_to, 3), (_statistic, 4), (_sort, 3), (_fibonacci, 2), (_factorial, 2),
    (_expression, 3), (_primes, 2), (_reverse, 1), (_wait, 1), (_file, 2), (_fail, 1),
)  # fmt: skip


def sample_programs(rng: random.Random, heldout: bool) -> list[dict[str, Any]]:
    """Draw a dialogue with the code interpreter.

    Args:
        rng: Source of randomness.
        heldout: Use one program that training never shows.

    Returns:
        Messages: the interpreter's system message, then one to four rounds: question, program, what it printed or
        "[Image]", answer; or a question that needs no program and its plain answer.
    """
    chinese = rng.random() < 0.6
    messages: list[dict[str, Any]] = [{"role": "system", "content": rng.choice(SYSTEMS)}]
    for _ in range(1 if heldout else rng.choice((1, 2, 3, 4))):
        if rng.random() < 0.15:
            question, reply = sample_fact(rng, heldout) if rng.random() < 0.5 else sample_talk(rng, heldout)[-1]
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
            continue
        while True:
            draw = rng.choices([draw for draw, _ in _ROUNDS], [weight for _, weight in _ROUNDS])[0]
            question, program, shown, answer = draw(rng, chinese if rng.random() < 0.9 else not chinese)
            if (is_heldout("interpreter", {"code": program}) and program not in _USUAL) == heldout:
                break
        if shown != IMAGE and rng.random() < 0.3:
            shown += "\n"  # as print() leaves it, if the host does not take it off
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "metadata": "interpreter", "content": f"```python\n{program}\n```"},
            {"role": "observation", "content": shown},
            {"role": "assistant", "content": answer},
        ]
    return messages
